"""Edit real facts in the shipped model through EasyEdit, KDPO beside FT, and show what changed.

python -m kdpo_editor.cli.demo
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch
import yaml
from tqdm import tqdm

from .. import easyedit
from ..engine.generation import generate
from ..engine.weights import find_matrices, restore
from ..hparams import settings_folder
from ..testbed import SHIPPED_MODEL, load_records

UNRELATED = 20


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m kdpo_editor.cli.demo",
        description="Edit real KnowEdit records in a small model that knows them, with KDPO and with FT.",
    )
    parser.add_argument("--edits", type=_count, default=20, help="how many records to edit (default 20)")
    parser.add_argument("--show", type=_count, default=3, help="how many of them to show in words (default 3)")
    parser.add_argument("--device", default=None, help='CUDA index or "cpu"; default: the GPU where there is one')
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # the fastest for a model this small, and many times so on a busy machine
    try:
        easyedit.require()
        run(args.edits, args.show, args.device)
    except ModuleNotFoundError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted.\n")
        return 130
    return 0


def run(edits: int, show: int, device: str | int | None) -> None:
    """Edit the first ``edits`` records one at a time, each undone before the next, and print what happened."""
    records = load_records()[:edits]
    unrelated = load_records()[-UNRELATED:]
    form = "upstream checkout" if easyedit.is_upstream() else "PyPI release"
    say(f"EasyEdit's {form} edits {len(records)} KnowEdit ZsRE records in a model of 4M parameters that knows them.")
    rows = []
    for label, hparams in methods(device):
        with easyedit.quietly():
            editor = timed(editor_for(hparams))
        known = [generate(editor.model, editor.tok, r["prompt"]) for r in unrelated]
        results: list[dict[str, Any]] = []
        for record in tqdm(records, desc=f"{label:<5}", unit="edit", disable=None, leave=False):
            results.append(one_edit(editor, record, unrelated, known, in_words=label == "KDPO" and len(results) < show))
        for result in results:
            say(result.pop("words"))
        rows.append((label, {k: sum(r[k] for r in results) / len(results) for k in results[0]}))
    say(table(rows))


def methods(device: str | int | None) -> list[tuple[str, Any]]:
    """Settings of the methods compared, by the name in the table."""
    ft = "FT-M" if easyedit.is_upstream() else "FT-L"
    return [("KDPO", settings_for("KDPO", device)), (ft, settings_for(ft, device))]


def settings_for(method: str, device: str | int | None) -> Any:
    """The settings of ``method`` (a folder of ``hparams/``) for the shipped model, as the installed form reads them."""
    file = settings_folder() / method / f"{SHIPPED_MODEL}.yaml"
    hparams, _ = easyedit.settings({**yaml.safe_load(file.read_text("utf-8")), "device": device})
    return hparams


def editor_for(hparams: Any) -> Any:
    """EasyEdit's ``BaseEditor`` for these settings."""
    from easyeditor import BaseEditor

    return BaseEditor.from_hparams(hparams)


def timed(editor: Any) -> Any:
    """``editor``, noting in ``editor.seconds`` how long its method took for the last edit."""
    method = editor.apply_algo

    def apply(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = method(*args, **kwargs)
        editor.seconds = time.perf_counter() - start
        return result

    editor.apply_algo = apply
    return editor


def one_edit(
    editor: Any, record: dict[str, Any], unrelated: list[dict[str, Any]], known: list[str], in_words: bool
) -> dict[str, Any]:
    """Edit one record through the framework, look at the edited model, and put the weights back."""
    probes = {
        "": record["prompt"],
        "rephrased": record["rephrase_prompt"],
        "same subject": record["locality"][0]["prompt"],
    }
    before = {k: generate(editor.model, editor.tok, p) for k, p in probes.items()} if in_words else {}
    matrices = find_matrices(editor.model, editor.hparams)
    originals = {name: w.detach().clone() for name, w in matrices.items()}
    keep = {"sequential_edit": True} if easyedit.is_upstream() else {"keep_original_weight": False}
    with easyedit.quietly():
        (metrics,), _, _ = editor.edit(
            prompts=[record["prompt"]],
            target_new=[record["target_new"]],
            ground_truth=[record["ground_truth"]],
            rephrase_prompts=[record["rephrase_prompt"]],
            locality_inputs={"same": {k: [record["locality"][0][k]] for k in ("prompt", "ground_truth")}},
            verbose=False,
            **keep,
        )
    words = ""
    if in_words:
        words = f"\n{record['subject']}: {record['ground_truth']} -> {record['target_new']}"
        after = {k: generate(editor.model, editor.tok, p) for k, p in probes.items()}
        for kind, prompt in probes.items():
            words += f"\n  {kind:<13}{prompt}\n{'':15}before: {before[kind]}\n{'':15}after:  {after[kind]}"
    still = [generate(editor.model, editor.tok, r["prompt"]) for r in unrelated]
    restore(matrices, originals)
    post = metrics["post"]
    return {
        "success": float(post["rewrite_acc"][0]),
        "rephrase": float(post["rephrase_acc"][0]),
        "locality": float(post["locality"]["same_acc"][0]),
        "unrelated": sum(a == b for a, b in zip(known, still, strict=True)) / len(known),
        "seconds": editor.seconds,
        "words": words,
    }


def table(rows: list[tuple[str, dict[str, float]]]) -> str:
    """The comparison, as text."""
    columns = ("success", "rephrase", "locality", "unrelated", "seconds")
    lines = [f"\n{'method':<8}" + "".join(f"{c:>11}" for c in columns)]
    lines += [f"{label:<8}" + "".join(f"{values[c]:>11.3f}" for c in columns) for label, values in rows]
    lines.append(
        "\nsuccess, rephrase: EasyEdit's teacher-forced accuracy. locality: the same subject's other fact, before and"
        "\nafter. unrelated: other subjects' answers, generated freely, that stay the same. seconds: per edit."
    )
    return "\n".join(lines)


def say(text: str) -> None:
    """Write ``text``, if there is any, to standard output."""
    if text:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


if __name__ == "__main__":
    sys.exit(main())
