"""Speed and memory, side by side in one run.

    python benchmarks/bench.py [--quick] [--models Llama-2-7B ...]

On the shipped model and on random-weight models of real shapes (Qwen1.5-0.5B; Llama-2-7B and Qwen2.5-7B where there is
a GPU) it measures, alternating, this editor, KDPO written plainly (``tests/plain.py``: two models, full forward
passes), and the installed framework's FT, ROME, LoRA and (upstream) DPO; then how the cost of an edit grows with
answer length, layer, earlier edits and batch size; and what share of the machine's matrix speed a step reaches.
Writes ``benchmarks/results/bench[-gpu][-upstream].{md,json,png}``, anew after each model.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from kdpo_editor import SHIPPED_MODEL, KDPOHyperParams, easyedit, edit
from kdpo_editor.compare.run.datasets import Record
from kdpo_editor.compare.run.editing import Editing
from kdpo_editor.easyedit import quietly
from kdpo_editor.hparams import settings_folder
from kdpo_editor.testbed import load_model, load_records

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from live_bytes import peak_bytes
from plain import plain_kdpo

RESULTS = Path(__file__).parent / "results"
MATRIX = "model.layers.{}.mlp.down_proj"
SHAPES = {
    "Qwen1.5-0.5B": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "vocab_size": 151936}
    | {"num_attention_heads": 16, "num_key_value_heads": 16, "tie_word_embeddings": True},
    "Llama-2-7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000}
    | {"num_attention_heads": 32, "num_key_value_heads": 32},
    "Qwen2.5-7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064}
    | {"num_attention_heads": 28, "num_key_value_heads": 4},
}
LAYERS = {"Qwen1.5-0.5B": 21, "Llama-2-7B": 21, "Qwen2.5-7B": 18}


@dataclass
class Model:
    """A model to edit at one layer; ``parameter`` is its edited matrix."""

    name: str
    model: Any
    tok: Any
    hparams: KDPOHyperParams
    parameter: str = field(init=False)
    original: torch.Tensor = field(init=False)
    editings: dict[str, Editing] = field(default_factory=dict)
    """The framework's methods that have edited it."""

    def __post_init__(self) -> None:
        self.parameter = self.hparams.rewrite_module_tmp.format(self.hparams.layers[0]) + ".weight"
        self.original = self.weight.detach().clone()

    @property
    def weight(self) -> torch.nn.Parameter:
        return self.model.get_parameter(self.parameter)

    def undo(self) -> None:
        for editing in self.editings.values():
            editing.undo()
        self.model.requires_grad_(True)
        with torch.no_grad():
            self.weight.copy_(self.original)

    def settings(self, **overrides: Any) -> KDPOHyperParams:
        return KDPOHyperParams(**{**self.hparams.to_dict(), **overrides})


def shipped() -> Model:
    with quietly():
        model, tok = load_model("cuda" if torch.cuda.is_available() else "cpu")
    return Model("shipped", model, tok, KDPOHyperParams.from_hparams(settings_folder() / "KDPO" / SHIPPED_MODEL))


def random_model(shape: str, layer: int, dtype: torch.dtype) -> Model:
    """Random weights of a real shape. Two cycles of eight steps, never cut short: the work is the same for all."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    torch.manual_seed(0)
    config = (LlamaConfig if shape.startswith("Llama") else Qwen2Config)(**SHAPES[shape])
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    hparams = KDPOHyperParams(
        model_name=shape, layers=[layer], rewrite_module_tmp=MATRIX, lr=1e-4, cycles=2, stop_loss=0.0
    )
    with quietly():
        return Model(shape, model, load_model()[1], hparams)


def plain(m: Model, record: dict[str, Any]) -> tuple[int, Any]:
    settings = {k: getattr(m.hparams, k) for k in ("lr", "beta", "num_steps", "cycles", "stop_loss")}
    trace = plain_kdpo(m.model, m.tok, record, m.parameter, **settings)
    return len(trace.losses), (trace.negatives, trace.losses)


def ours(m: Model, record: dict[str, Any]) -> tuple[int, Any]:
    trace = edit(m.model, m.tok, [record], m.hparams)[2][0]
    return trace.steps, ([c.rejected for c in trace.cycles], [loss for c in trace.cycles for loss in c.losses])


def graphed(m: Model, record: dict[str, Any]) -> tuple[int, Any]:
    trace = edit(m.model, m.tok, [record], m.settings(cuda_graphs=True))[2][0]
    return trace.steps, None


def framework(method: str) -> Callable[[Model, dict[str, Any]], tuple[int, Any]]:
    """The installed EasyEdit's own function for ``method``, FT at the same layer as KDPO, the others at their own."""
    folder = method if method != "FT" else "FT-M" if easyedit.is_upstream() else "FT-L"
    config = yaml.safe_load((settings_folder() / folder / f"{SHIPPED_MODEL}.yaml").read_text("utf-8"))

    def run(m: Model, record: dict[str, Any]) -> tuple[int, Any]:
        if method not in m.editings:
            layers = {"layers": m.hparams.layers} if method == "FT" else {}
            m.editings[method] = Editing(m.model, m.tok, {**config, **layers}, seed=0, folder=RESULTS)
        steps = 0
        backward = torch.autograd.backward

        def counted(*args: Any, **kwargs: Any) -> None:
            nonlocal steps
            steps += 1
            backward(*args, **kwargs)

        torch.autograd.backward = counted
        try:
            m.editings[method].edit([from_shipped(record)])
        finally:
            torch.autograd.backward = backward
        return steps, None

    return run


def from_shipped(record: dict[str, Any]) -> Record:
    return Record(record["subject"], record["prompt"], record["target_new"], record["ground_truth"], (), {}, {}, 0)


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    synchronise()
    start = time.perf_counter()
    result = call()
    synchronise()
    return time.perf_counter() - start, result


def side_by_side(m: Model, rivals: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds per edit and step of each rival over the same records, alternating; the first record warms up."""
    seconds: dict[str, list[float]] = {label: [] for label in rivals}
    steps: dict[str, list[int]] = {label: [] for label in rivals}
    same = True
    for i, record in enumerate(tqdm(records, desc=m.name, disable=None)):
        traces = {}
        for label, rival in rivals.items():
            taken, (count, traces[label]) = timed(lambda rival=rival, record=record: rival(m, record))
            m.undo()
            if i:
                seconds[label].append(taken)
                steps[label].append(count)
        (ours_negatives, ours_losses), (negatives, losses) = traces["KDPO"], traces["KDPO, plain"]
        close = all(abs(a - b) < 1e-3 for a, b in zip(ours_losses, losses, strict=False))
        same = same and ours_negatives == negatives and len(ours_losses) == len(losses) and close
    # Each edit's own two times, which lie next to each other.
    times = [slow / fast for slow, fast in zip(seconds["KDPO, plain"], seconds["KDPO"], strict=True)]
    return {
        "plain_over_ours": {
            "median": statistics.median(times),
            "quartiles": statistics.quantiles(times, n=4)[::2],
            "of_all": sum(seconds["KDPO, plain"]) / sum(seconds["KDPO"]),
        },
        "rows": {
            label: {
                "seconds": statistics.median(seconds[label]),
                "quartiles": statistics.quantiles(seconds[label], n=4)[::2],
                "steps": statistics.median(steps[label]),
                "ms_per_step": 1000 * sum(seconds[label]) / max(sum(steps[label]), 1),
            }
            for label in rivals
        },
        "same_negatives_and_losses": same,
    }


def growth(m: Model, quick: bool) -> dict[str, dict[str, float]]:
    """Seconds per edit (medians) over answer length, layer, earlier edits and batch size."""
    record = load_records()[0]
    layers = m.model.config.num_hidden_layers
    out: dict[str, dict[str, float]] = {}

    def once(hparams: KDPOHyperParams, request: dict[str, Any]) -> float:
        weight = m.model.get_parameter(hparams.rewrite_module_tmp.format(hparams.layers[0]) + ".weight")
        kept = weight.detach().clone()
        taken = []
        for _ in range(4):
            taken.append(timed(lambda: edit(m.model, m.tok, [request], hparams))[0])
            weight.data.copy_(kept)
        return statistics.median(taken[1:])

    fixed = m.settings(cycles=2, stop_loss=0.0, lr=1e-6)  # sixteen steps, whatever the answer
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    out["answer tokens"] = {}
    for count in (1, 2, 4, 8, 12):
        target = " ".join(words[:count])
        length = len(m.tok(f"a {target}")["input_ids"]) - 1
        out["answer tokens"][str(length)] = once(fixed, {**record, "target_new": target})
    out["layer"] = {}
    for layer in sorted({0, layers // 4, layers // 2, 3 * layers // 4, layers - 1}):
        out["layer"][str(layer)] = once(m.settings(**{**fixed.to_dict(), "layers": [layer]}), record)
    out["batch size"] = batches(m, quick)
    if m.name == "shipped":
        # Real edits in a row, none undone; every record is edited to its target and later back again.
        records = load_records()
        back = [{**r, "target_new": r["ground_truth"]} for r in records]
        per_step = []
        for record in tqdm((records + back)[: 50 if quick else 500], desc="in a row", disable=None):
            taken, (_, _, (trace,)) = timed(lambda record=record: edit(m.model, m.tok, [record], m.hparams))
            per_step.append(taken / max(trace.steps, 1))
        windows = range(0, len(per_step), max(len(per_step) // 5, 1))
        out["earlier edits (per step)"] = {
            str(at): statistics.median(per_step[at : at + len(per_step) // 5]) for at in windows
        }
        m.undo()
    return out


def batches(m: Model, quick: bool) -> dict[str, float]:
    """Seconds per fact, of the same facts from the unedited model, at every batch size, with its best rate of three.

    Edits of the shipped model end when they are won, after steps that depend on the rate: it is the best for one fact,
    or for sixty-four. A rate with which an edit is not won does not count.
    """
    facts = load_records()[: 16 if quick else 64]
    real = m.name == "shipped"
    sizes = [size for size in (1, 4, 16, 64) if size <= len(facts)]
    rates = (1, 2, 4) if real else (1,)

    def once(size: int, rate: float, some: list[dict[str, Any]]) -> float:
        """Seconds per fact; infinite if an edit that can be won is not."""
        taken, won = 0.0, True
        settings = m.settings(schedule="breadth_first", lr=rate * m.hparams.lr)
        for start in range(0, len(some), size):
            batch = some[start : start + size]
            seconds, (_, _, traces) = timed(lambda batch=batch: edit(m.model, m.tok, batch, settings))
            taken, won = taken + seconds, won and all(trace.converged for trace in traces)
            m.undo()
        return taken / len(some) if won or not real else math.inf

    rounds: dict[tuple[int, int], list[float]] = {(size, rate): [] for size in sizes for rate in rates}
    for size in sizes:  # kernels are made when a shape first occurs
        once(size, 1, facts[: max(size, 16)])
    for _ in range(3 if real else 2):
        for (size, rate), seconds in rounds.items():
            seconds.append(once(size, rate, facts))
    return {str(size): min(statistics.median(rounds[size, rate]) for rate in rates) for size in sizes}


def floor(m: Model) -> dict[str, float]:
    """What one replayed step must compute, against what the machine does on a plain matrix product of that size."""
    config, layer = m.model.config, m.hparams.layers[0]
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = head * (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.hidden_size
    matrix = config.hidden_size * config.intermediate_size
    above = config.num_hidden_layers - layer - 1
    weights = matrix + above * (attention + 3 * matrix)
    tokens = len(m.tok(f"{load_records()[0]['prompt']} {load_records()[0]['target_new']}")["input_ids"]) - 1
    # Forward, and backward to the input, of every weight; the edited one's own gradient in place of its input's.
    operations = 2 * 2 * weights * tokens
    a = torch.randn(tokens, config.hidden_size).to(m.weight)
    b = torch.randn(config.hidden_size, config.intermediate_size).to(m.weight)
    for _ in range(3):
        a @ b
    speed = statistics.median(2 * a.numel() * b.shape[1] / timed(lambda: a @ b)[0] for _ in range(50))
    hparams = m.settings(num_steps=32, cycles=1, stop_loss=0.0, lr=1e-6)
    short = m.settings(num_steps=1, cycles=1, stop_loss=0.0, lr=1e-6)
    requests = [load_records()[0]]
    times = []
    for _ in range(4):
        long = timed(lambda: edit(m.model, m.tok, requests, hparams))[0]
        times.append((long - timed(lambda: edit(m.model, m.tok, requests, short))[0]) / 31)
        m.undo()
    return {
        "operations_per_step": operations,
        "weight_bytes_read_per_step": 2 * weights * m.weight.element_size(),
        "matrix_product_per_second": speed,
        "floor_ms": 1000 * operations / speed,
        "measured_ms": 1000 * statistics.median(times[1:]),
    }


def memory(m: Model) -> dict[str, float]:
    """Peak bytes of one edit above the loaded model, and how many edited matrices that is."""
    request = load_records()[0]
    peaks = {}
    for label, rival in {"KDPO": ours, "KDPO, plain": plain}.items():
        rival(m, request)
        m.undo()
        peaks[label] = peak_bytes(lambda rival=rival: rival(m, request)) / m.weight.nbytes
        m.undo()
    tokens = len(m.tok(f"{request['prompt']} {request['target_new']}")["input_ids"]) - 1
    captured = tokens * sum(m.weight.shape) * m.weight.element_size()
    return {"matrix_bytes": m.weight.nbytes, "captured_inputs": captured / m.weight.nbytes, **peaks}


def report(results: dict[str, Any]) -> str:
    lines = [f"Measured on {results['machine']}; {', '.join(f'{k} {v}' for k, v in results['versions'].items())}."]
    for name, r in results["models"].items():
        lines += ["", f"### {name}, layer {r['layer']} of {r['layers']}", ""]
        lines += ["| | s/edit | quartiles | steps | ms/step |", "|---|---|---|---|---|"]
        for label, row in r["edits"]["rows"].items():
            low, high = row["quartiles"]
            lines.append(
                f"| {label} | {row['seconds']:.3f} | {low:.3f} to {high:.3f} | {row['steps']:g} |"
                f" {row['ms_per_step']:.1f} |"
            )
        ratio = r["edits"]["plain_over_ours"]
        low, high = ratio["quartiles"]
        lines += ["", f"Same rejected answers and losses as the plain form: {r['edits']['same_negatives_and_losses']}."]
        lines.append(
            f"Each edit beside itself in the plain form: {ratio['median']:.1f} times cheaper (median; quartiles "
            f"{low:.1f} and {high:.1f}), all of them together {ratio['of_all']:.1f} times."
        )
        size = r["memory"]
        lines.append(
            f"Peak memory above the model, in edited matrices of {size['matrix_bytes'] / 1e6:.1f} MB: "
            f"KDPO {size['KDPO']:.1f} (of that captured inputs {size['captured_inputs']:.1f}), "
            f"plain {size['KDPO, plain']:.1f}."
        )
        f = r["floor"]
        lines.append(
            f"A step takes {f['measured_ms']:.1f} ms; its {f['operations_per_step'] / 1e9:.2f} GFLOP would take "
            f"{f['floor_ms']:.1f} ms at the speed of one plain matrix product of that size."
        )
        for kind, values in r["growth"].items():
            cells = ", ".join(f"{x}: {y:.4f}" for x, y in values.items())
            lines.append(f"Seconds per edit by {kind}: {cells}.")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = results["models"]
    figure, axes = plt.subplots(len(models), 5, figsize=(20, 4 * len(models)), squeeze=False)
    for row, (name, r) in zip(axes, models.items(), strict=True):
        labels = list(r["edits"]["rows"])
        row[0].barh(labels, [r["edits"]["rows"][label]["seconds"] for label in labels], color="0.5")
        row[0].set(title=name, xlabel="seconds per edit")
        row[0].invert_yaxis()
        for axis in row[1 + len(r["growth"]) :]:
            axis.set_axis_off()
        for axis, (kind, values) in zip(row[1:], r["growth"].items(), strict=False):
            axis.plot([int(x) for x in values], list(values.values()), "o-", color="0.2")
            axis.set(xlabel=kind, ylabel="seconds per edit", ylim=(0, None))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer records and edits")
    parser.add_argument("--models", nargs="+", choices=["shipped", *SHAPES], help="which, in this order")
    args = parser.parse_args()
    easyedit.require()
    logging.getLogger("kdpo_editor").setLevel(logging.WARNING)  # upstream's import lets everything through
    upstream = easyedit.is_upstream()
    ft = "FT-M, EasyEdit" if upstream else "FT-L, EasyEdit"
    cuda = torch.cuda.is_available()
    others = ("FT", "ROME", "LoRA", *(("DPO",) if upstream else ()))
    dtype = torch.bfloat16 if cuda else torch.float32
    # What makes each, the framework's methods beside it, and how many edits are timed.
    plans: dict[str, tuple[Callable[[], Model], tuple[str, ...], int]] = {"shipped": (shipped, others, 10)}
    plans |= {s: (lambda s=s, n=n: random_model(s, n, dtype), ("FT",), 5) for s, n in LAYERS.items()}
    chosen = args.models or (plans if cuda else ["shipped", "Qwen1.5-0.5B"])
    results: dict[str, Any] = {
        "machine": f"{torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("torch", "transformers")}
        | {"easyeditor": "upstream" if upstream else version("easyeditor")},
        "models": {},
    }
    RESULTS.mkdir(exist_ok=True)
    name = "bench" + "-gpu" * cuda + "-upstream" * upstream
    for make, methods, count in (plans[model] for model in chosen):
        m = make()
        rivals: dict[str, Any] = {"KDPO": ours, "KDPO, plain": plain}
        rivals |= {"KDPO, CUDA graphs": graphed} if cuda else {}
        rivals |= {ft if method == "FT" else f"{method}, EasyEdit": framework(method) for method in methods}
        records = load_records()[: 1 + (count // 2 if args.quick else count)]
        results["models"][m.name] = {
            "layer": m.hparams.layers[0],
            "layers": m.model.config.num_hidden_layers,
            "edits": side_by_side(m, rivals, records),
            "memory": memory(m),
            "floor": floor(m),
            "growth": growth(m, args.quick),
        }
        if not cuda and m.name != "shipped":  # the type that such models come in
            m = random_model(m.name, m.hparams.layers[0], torch.bfloat16)
            results["models"][m.name]["growth"]["batch size, in bfloat16"] = batches(m, args.quick)
        del m
        (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        (RESULTS / f"{name}.md").write_text(report(results), "utf-8")
        plot(results, RESULTS / f"{name}.png")
    sys.stdout.write(report(results))


if __name__ == "__main__":
    main()
