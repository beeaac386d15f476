"""Seconds per edit on the shipped model: this editor, KDPO written plainly, and the framework's FT, alternating.

    python benchmarks/edit_speed.py [--records 20] [--threads 1]

Prints a Markdown table. All three edit the same matrix of the same model; each edit is undone before the next.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kdpo_editor import SHIPPED_MODEL, KDPOHyperParams, easyedit, edit
from kdpo_editor.demo import methods, quietly
from kdpo_editor.hparams import settings_folder
from kdpo_editor.testbed import load_model, load_records

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from plain import plain_kdpo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--records", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    easyedit.require()
    with quietly():
        model, tok = load_model()
    hparams = KDPOHyperParams.from_hparams(settings_folder() / "KDPO" / SHIPPED_MODEL)
    name = hparams.rewrite_module_tmp.format(hparams.layers[0]) + ".weight"
    weight = model.get_parameter(name)
    original = weight.detach().clone()
    steps: dict[str, list[int]] = {}
    ft_name, ft = methods("cpu")[1]

    def ours(record: dict[str, Any]) -> int:
        return edit(model, tok, [record], hparams)[2][0].steps

    def plain(record: dict[str, Any]) -> int:
        settings = {k: getattr(hparams, k) for k in ("lr", "beta", "num_steps", "cycles", "stop_loss")}
        return len(plain_kdpo(model, tok, record, name, **settings).losses)

    def framework(record: dict[str, Any]) -> int:
        from easyeditor.models.ft import apply_ft_to_model

        tok.pad_token = tok.eos_token
        losses: list[int] = []
        backward = torch.autograd.backward
        torch.autograd.backward = lambda *a, **k: (losses.append(1), backward(*a, **k))[1]
        try:
            with quietly():
                if easyedit.is_upstream():
                    apply_ft_to_model(model, tok, [record], ft)
                else:
                    with easyedit.on_device(ft):
                        apply_ft_to_model(model, tok, [record], ft)
        finally:
            torch.autograd.backward = backward
        return len(losses)

    form = "upstream" if easyedit.is_upstream() else "PyPI"
    rivals: dict[str, Callable[[dict[str, Any]], int]] = {
        "KDPO, this package": ours,
        "KDPO, written plainly (two models, full forward passes)": plain,
        f"{ft_name}, EasyEdit ({form})": framework,
    }
    seconds: dict[str, list[float]] = {label: [] for label in rivals}
    steps = {label: [] for label in rivals}
    for record in [load_records()[-1], *load_records()[: args.records]]:
        for label, method in rivals.items():
            start = time.perf_counter()
            taken = method(record)
            seconds[label].append(time.perf_counter() - start)
            steps[label].append(taken)
            with torch.no_grad():
                weight.copy_(original)
            model.requires_grad_(True)
    sys.stdout.write("| | s/edit | quartiles | steps/edit | ms/step |\n|---|---|---|---|---|\n")
    for label in rivals:
        t, n = seconds[label][1:], steps[label][1:]  # the first edit warms up
        low, middle, high = statistics.quantiles(t, n=4)
        sys.stdout.write(
            f"| {label} | {middle:.3f} | {low:.3f} to {high:.3f} | {statistics.median(n):g} |"
            f" {1000 * sum(t) / max(sum(n), 1):.1f} |\n"
        )


if __name__ == "__main__":
    main()
