"""Seconds and memory of an edit, side by side in one run.

    python benchmarks/bench.py [--quick] [--models NAME ...] [--methods LABEL ...] [--memit N] [--anew]

On SmolLM2-135M-Instruct with its real weights and on random weights of real shapes, with records of CounterFact. Parts:

edits     one fact a call from the unedited model, methods alternating: KDPO and KDPO-L, each also written plainly
          (``tests/plain.py``: full forward passes), and EasyEdit's FT-M, ROME and, where it has them, others.
calls     many facts in one call. KDPO-L's has a hundred. MEMIT makes the value of each fact by itself, which takes half
          an hour for a hundred: calls of 2 and of ``--memit`` are timed, and a hundred is on the line through both.
sizes     KDPO-L in calls of other sizes.
in a row  KDPO-L one by one, nothing undone: forty in SmolLM2, a thousand in the tests' model of 4M parameters, 301
          facts to new answers and back again.
floor     the operations of an edit's passes, and the share of the speed of one matrix product as tall as its tokens.

Second moments are on disk before anything is timed. *First* is the first edit of a model just loaded. Memory is what
the process or GPU holds above what it held before the call, at its highest. Random weights take work that is the same
for all of a kind: KDPO sixteen steps, KDPO-L eight.

Each part is written to ``benchmarks/results/bench[-gpu][-quick].{md,json,png}`` when it is done, and a run goes on
after the last one that is there. ``--anew`` forgets them.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from kdpo_editor import SHIPPED_MODEL, KDPOHyperParams, easyedit, edit
from kdpo_editor.cache import cache_folder
from kdpo_editor.compare.run import statistics
from kdpo_editor.compare.run.datasets import Record, load
from kdpo_editor.compare.run.derived_settings import derive
from kdpo_editor.compare.run.editing import Editing
from kdpo_editor.compare.run.memory import high_water, wait_for
from kdpo_editor.derived import complete
from kdpo_editor.editing import check, prepare
from kdpo_editor.hparams import settings_folder
from kdpo_editor.lifelong.second_moments import fingerprint
from kdpo_editor.models import loading

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from plain import plain_kdpo, plain_kdpo_l

RESULTS = Path(__file__).parent / "results"
CUDA = torch.cuda.is_available()
SMOLLM2 = "smollm2-135m"
# Random weights: the class of the configuration and what is not its default. All speak SmolLM2's tokens, of which
# Llama-2's own vocabulary of 32,000 has too few.
SHAPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "Qwen1.5-0.5B": (
        Qwen2Config,
        {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "vocab_size": 151936}
        | {"num_attention_heads": 16, "num_key_value_heads": 16, "tie_word_embeddings": True},
    ),
    "Llama-2-7B": (
        LlamaConfig,
        {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 49152}
        | {"num_attention_heads": 32, "num_key_value_heads": 32},
    ),
    "Qwen2.5-7B": (
        Qwen2Config,
        {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064}
        | {"num_attention_heads": 28, "num_key_value_heads": 4},
    ),
    "Llama-3.1-8B": (
        LlamaConfig,
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
        | {"num_attention_heads": 32, "num_key_value_heads": 8},
    ),
}
RIVALS = {"FT-M": "FT-M", "ROME": "ROME", "MEMIT": "MEMIT", "LoRA": "LoRA", "UltraEdit": "UltraEdit"}
MINE = ("KDPO", "KDPO-L")
TWINS = {"KDPO": "KDPO, plain", "KDPO-L": "KDPO-L, plain"}


@dataclass
class Model:
    """A model, and its weights as they were."""

    name: str
    model: Any
    tok: Any
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    editings: dict[str, Editing] = field(default_factory=dict)

    @classmethod
    def named(cls, name: str) -> Model:
        random = name in SHAPES
        model, tok = loading.load(
            SMOLLM2 if random else name, dtype="bfloat16" if CUDA and name != SHIPPED_MODEL else "float32"
        )
        if random:
            torch.manual_seed(0)
            kind, shape = SHAPES[name]
            with torch.device("cuda" if CUDA else "cpu"):
                made = AutoModelForCausalLM.from_config(kind(**shape), dtype=next(model.parameters()).dtype)
            model = made.eval().requires_grad_(False)
        return cls(name, model, tok, {k: p.detach().clone() for k, p in model.named_parameters()})

    @torch.no_grad()
    def undo(self) -> dict[str, torch.Tensor]:
        """Make it what it was; returns by how much each changed weight had changed."""
        for editing in self.editings.values():
            editing.undo()
        changed = {k: p for k, p in self.model.named_parameters() if not torch.equal(p, self.kept[k])}
        changes = {k: p - self.kept[k] for k, p in changed.items()}
        for name, parameter in changed.items():
            parameter.copy_(self.kept[name])
        return changes

    def settings(self, recipe: str) -> KDPOHyperParams:
        file = settings_folder() / recipe / (SHIPPED_MODEL if self.name == SHIPPED_MODEL else "auto")
        found = KDPOHyperParams.from_hparams(file, self.name)
        if self.name not in SHAPES:
            return complete(found, self.model)
        always = {"cycles": 8} if recipe == "KDPO-L" else {"cycles": 2, "stop_loss": 0.0}
        return complete(replace(found, **always), self.model)

    def method(self, label: str) -> Callable[[Sequence[Record]], Any]:
        """What edits some records in one call of the method."""
        recipe = label.partition(",")[0]
        if label in RIVALS:
            return self._rival(label)
        hparams = self.settings(recipe)
        if label == "KDPO, CUDA graphs":
            hparams = replace(hparams, cuda_graphs=True)
        if label == "KDPO, plain":
            place = f"{hparams.rewrite_module_tmp}.weight".format(*(hparams.layers or []))
            keys = ("lr", "beta", "num_steps", "cycles", "stop_loss")
            options = {key: getattr(hparams, key) for key in keys}
            return lambda some: plain_kdpo(self.model, self.tok, requests(some)[0], place, **options)
        how: Any = plain_kdpo_l if label == "KDPO-L, plain" else edit
        return lambda some: how(self.model, self.tok, requests(some), hparams)

    def _rival(self, label: str) -> Callable[[Sequence[Record]], Any]:
        if label not in self.editings:
            config = derive(RIVALS[label], self.model, self.name)
            folder = cache_folder() / "stats" / f"bench-{fingerprint(self.model)[:16]}"
            folder.mkdir(parents=True, exist_ok=True)
            statistics.ensure(self.model, self.tok, config, "general", None, folder, 4)
            self.editings[label] = Editing(self.model, self.tok, config, seed=0, folder=folder)
        return self.editings[label].edit


def requests(records: Sequence[Record]) -> list[dict[str, str]]:
    return [{"prompt": r.prompt, "target_new": r.target_new, "subject": r.subject} for r in records]


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of a call, and by how many MB its memory rose."""
    gpus = [torch.device("cuda", torch.cuda.current_device())] if CUDA else []
    with high_water(gpus) as peak:
        wait_for(gpus)
        start = time.perf_counter()
        call()
        wait_for(gpus)
        seconds = time.perf_counter() - start
    return seconds, (peak.bytes or 0) / 1e6


def edits(m: Model, labels: Sequence[str], records: Sequence[Record]) -> dict[str, Any]:
    """Of each method, the first edit and the others; and how far what it does is from its plain form's."""
    methods = {label: m.method(label) for label in labels}
    seconds: dict[str, list[float]] = {label: [] for label in labels}
    peaks: dict[str, list[float]] = {label: [] for label in labels}
    apart: dict[str, list[float]] = {label: [] for label in MINE}
    for record in tqdm(records, desc=m.name, disable=None):
        changes = {}
        for label, method in methods.items():
            taken, peak = timed(lambda method=method, record=record: method([record]))  # type: ignore[misc]
            seconds[label].append(taken)
            peaks[label].append(peak)
            changes[label] = m.undo()
        for label in {*MINE} & {*labels}:
            if TWINS[label] in labels:
                apart[label].append(distance(changes[label], changes[TWINS[label]]))
    rows = {
        label: {
            "first": some[0],
            "seconds": median(some[1:]),
            "quartiles": quantiles(some[1:], n=4)[::2] if len(some) > 2 else [some[-1]] * 2,
            "peak_mb": max(peaks[label]),
        }
        for label, some in seconds.items()
    }
    return {"rows": rows, "apart": {label: max(some) for label, some in apart.items() if some}}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The norm of the difference of two changes of weights, as a share of the second's."""
    apart = sum((one[k] - change).float().norm().item() ** 2 if k in one else 1.0 for k, change in other.items())
    return float((apart / max(sum(c.float().norm().item() ** 2 for c in other.values()), 1e-30)) ** 0.5)


def calls(m: Model, sizes: dict[str, list[int]], records: Sequence[Record]) -> dict[str, Any]:
    """Seconds for each fact of one call of many, and its memory; a hundred are on the line through two calls."""
    rows = {}
    for label, counts in sizes.items():
        method, taken = m.method(label), []
        for size in counts:
            seconds, peak = timed(lambda method=method, size=size: method(records[:size]))  # type: ignore[misc]
            taken.append(seconds)
            m.undo()
        each = (taken[-1] - taken[0]) / (size - counts[0]) if len(counts) > 1 else 0.0
        rows[label] = {"size": size, "seconds": seconds / size, "peak_mb": peak}
        if each or size == 100:
            rows[label]["in a hundred"] = (seconds + each * (100 - size)) / 100
    return rows


def in_a_row(m: Model, records: Sequence[Record]) -> dict[str, float]:
    """Medians of the ten edits about the tenth, and of ten at a time up to the last."""
    method = m.method("KDPO-L")
    taken = [timed(lambda r=r: method([r]))[0] for r in tqdm(records, desc="in a row", disable=None)]  # type: ignore
    m.undo()
    ends = sorted({min(15, len(taken)), *(n for n in (50, 100, 200, 500, 1000) if n <= len(taken)), len(taken)})
    return {"10" if end == 15 else str(end): median(taken[max(end - 10, 1) : end]) for end in ends}


def floor(m: Model, label: str, record: Record) -> dict[str, float]:
    """Operations of an edit's passes, the speed of one product of that size, and the share of it that is reached."""
    method, hparams = m.method(label), m.settings(label)
    taken = []
    for _ in range(4):
        taken.append(timed(lambda: method([record]))[0])
        m.undo()
    with FlopCounterMode(display=False) as counter:
        method([record])
    m.undo()
    phrasings, weights = check(m.model, m.tok, requests([record]), hparams)
    weight = next(iter(weights.values())).detach()
    begin = {"all": lambda e: 0, "subject_last": lambda e: e.subject[1] - 1}[hparams.fact_token]
    rows = torch.randn(sum(e.length - begin(e) for e in phrasings[0]), weight.shape[1]).to(weight)
    product = median(timed(lambda: rows @ weight.T)[0] for _ in range(50))
    speed = 2 * rows.numel() * weight.shape[0] / product
    operations = counter.get_total_flops()
    return {"gflop": operations / 1e9, "gflops": speed / 1e9, "tokens": len(rows), "seconds": median(taken[1:])} | {
        "share": operations / speed / median(taken[1:])
    }


def plan(m: Model, labels: Sequence[str], memit: int, quick: bool) -> dict[str, Callable[[], Any]]:
    """The parts of a model's measurement, each by its name."""
    if m.name == SHIPPED_MODEL:
        there = load("shipped")
        back = [replace(record, target_new=record.ground_truth) for record in there]
        return {"in a row": lambda: in_a_row(m, (2 * [*there, *back])[: 60 if quick else 1000])}
    records = load("counterfact", n_edits=1000)
    real = m.name == SMOLLM2
    rounds, many, row = (3, 8, 16) if quick else (5 if real else 4, 100 if real or CUDA else 10, 40)
    single = [label for label in labels if label not in ("MEMIT", "ROME") or (real and label != "MEMIT")]
    big = {label: [many] for label in labels if label in ("KDPO-L", "UltraEdit")}
    big |= {"MEMIT": [2, memit] if memit < many else [many]} if "MEMIT" in labels and (real or CUDA) else {}
    parts: dict[str, Callable[[], Any]] = {
        "edits": lambda: edits(m, single, records[:rounds]),
        "calls": lambda: calls(m, big, records),
        "floor": lambda: {label: floor(m, label, records[1]) for label in MINE if label in labels},
    }
    if real and "KDPO-L" in labels:
        sizes = (3,) if quick else (10, 30)
        parts["sizes"] = lambda: {str(n): calls(m, {"KDPO-L": [n]}, records)["KDPO-L"] for n in sizes}
        parts["in a row"] = lambda: in_a_row(m, records[:row])
    return parts


def report(results: dict[str, Any]) -> str:
    lines = [f"Measured on {results['machine']}; {', '.join(f'{k} {v}' for k, v in results['versions'].items())}."]
    for name, r in results["models"].items():
        lines += ["", f"### {name}, {r['weights']}"]
        if "edits" in r:
            lines += ["", "| | s/edit | quartiles | first | peak memory |", "|---|---|---|---|---|"]
            for label, row in r["edits"]["rows"].items():
                low, high = row["quartiles"]
                lines.append(
                    f"| {label} | {row['seconds']:.3f} | {low:.3f} to {high:.3f} | {row['first']:.3f} |"
                    f" {row['peak_mb']:.0f} MB |"
                )
            lines += [""] if r["edits"]["apart"] else []
            for label, apart in r["edits"]["apart"].items():
                lines.append(f"{label}'s change of the weights is off by {apart:.2g} of its plain form's at most.")
        if "calls" in r:
            lines += [
                "",
                "| | facts in one call | s/fact | s/fact of a hundred | peak memory |",
                "|---|---|---|---|---|",
            ]
            rows = [("KDPO-L", row) for row in r.get("sizes", {}).values()] + [*r["calls"].items()]
            for label, row in rows:
                hundred = f"{row['in a hundred']:.3f}" if "in a hundred" in row else ""
                lines.append(
                    f"| {label} | {row['size']} | {row['seconds']:.3f} | {hundred} | {row['peak_mb']:.0f} MB |"
                )
        for label, f in r.get("floor", {}).items():
            lines += ["", f"{label} on one fact: {f['gflop']:.0f} GFLOP in {f['seconds']:.3f} s, {f['share']:.0%} of"]
            lines[-1] += f" {f['gflops']:.0f} GFLOP/s, the speed of one product of {f['tokens']} rows."
        if "in a row" in r:
            cells = ", ".join(f"{n}th {seconds:.3f}" for n, seconds in r["in a row"].items())
            lines += ["", "KDPO-L one by one, nothing undone, seconds an edit, medians of ten about the 10th, or up to"]
            lines[-1] += f": {cells}."
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured = results["models"]
    figure, axes = plt.subplots(len(measured), 3, figsize=(13, 3 * len(measured)), squeeze=False)
    for (bars, sizes, row), (name, r) in zip(axes, measured.items(), strict=True):
        rows = r.get("edits", {"rows": {}})["rows"]
        bars.barh([*rows], [some["seconds"] for some in rows.values()], color="0.5")
        bars.set(title=name, xlabel="seconds an edit, one a call", visible=bool(rows))
        bars.invert_yaxis()
        points = [*r.get("sizes", {}).values(), *([r["calls"]["KDPO-L"]] if "KDPO-L" in r.get("calls", {}) else [])]
        by_size = {p["size"]: p["seconds"] for p in points}
        by_count = {int(n): seconds for n, seconds in r.get("in a row", {}).items()}
        for panel, seconds, x, y in (
            (sizes, by_size, "facts in one call of KDPO-L", "seconds a fact"),
            (row, by_count, "earlier edits", "seconds an edit"),
        ):
            panel.plot([*seconds], [*seconds.values()], "o-", color="0.2")
            panel.set(title=name, xlabel=x, ylabel=y, visible=bool(seconds))
            panel.set_ylim(0, 1.1 * max(seconds.values(), default=1))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def processor() -> str:
    """The name of this machine's processor."""
    file = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.+)$", file.read_text("utf-8"), re.MULTILINE) if file.exists() else None
    return named[1] if named else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer records and edits, into bench-quick.*")
    parser.add_argument("--models", nargs="+", choices=[SMOLLM2, SHIPPED_MODEL, *SHAPES], help="which, in this order")
    parser.add_argument("--methods", nargs="+", help="which; all of them, but LoRA, by default")
    parser.add_argument("--memit", type=int, default=6, help="facts in MEMIT's larger call (default: 6)")
    parser.add_argument("--anew", action="store_true", help="do not go on with what is there")
    args = parser.parse_args()
    easyedit.require()
    logging.getLogger("kdpo_editor").setLevel(logging.ERROR)  # upstream's import lets everything through
    known = easyedit.is_upstream() and (settings_folder() / "UltraEdit" / "auto.yaml").exists()
    labels = ["KDPO", "KDPO, plain", *(["KDPO, CUDA graphs"] if CUDA else []), "KDPO-L", "KDPO-L, plain", "FT-M"]
    labels = [some for some in args.methods or [*labels, "ROME", "MEMIT", "UltraEdit"] if some != "UltraEdit" or known]
    chosen = args.models or [SMOLLM2, SHIPPED_MODEL, *([*SHAPES][1:] if CUDA else [*SHAPES][:1])]
    file = RESULTS / f"bench{'-gpu' * CUDA}{'-quick' * args.quick}.json"
    here = {
        "machine": f"{torch.cuda.get_device_name() if CUDA else processor()}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"EasyEdit": easyedit.version()},
    }
    results: dict[str, Any] = {"models": {}, **here}
    if file.exists() and not args.anew:
        before = json.loads(file.read_text("utf-8"))
        if {key: before[key] for key in here} == here:  # figures of another machine are not gone on with
            results = before
    for name in chosen:
        m = Model.named(name)
        dtype = str(next(m.model.parameters()).dtype).removeprefix("torch.")
        mine = results["models"].setdefault(
            name, {"weights": f"{'random' if name in SHAPES else 'trained'} weights, {dtype}"}
        )
        parts = plan(m, labels, args.memit, args.quick)
        if not parts.keys() <= mine.keys():
            prepare(m.model, m.tok, m.settings("KDPO-L"))  # the moments are on disk from here on
            del m, parts
            m = Model.named(name)
            parts = plan(m, labels, args.memit, args.quick)
        for part, measure in parts.items():
            if part not in mine:
                start = time.perf_counter()
                mine[part] = measure()
                mine.setdefault("took", {})[part] = time.perf_counter() - start
                file.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
                file.with_suffix(".md").write_text(report(results), "utf-8")
                plot(results, file.with_suffix(".png"))
    sys.stdout.write(report(results))


if __name__ == "__main__":
    main()
