"""Tune a method's settings for the shipped model on records that neither the demo nor the tests edit.

    python benchmarks/tune.py KDPO|FT|ROME [--records 30]

Every method gets the same budget: 18 settings, the same records, single edits through ``BaseEditor``. The best is
the one with the highest mean of success, rephrase and locality. Writes ``benchmarks/tuning/<method>.json``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from kdpo_editor import easyedit
from kdpo_editor.demo import quietly, settings_for
from kdpo_editor.testbed import load_records

RATES = (5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2)
GRIDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "KDPO": {"layers": ([2], [3], [4]), "lr": RATES},
    "FT": {"layers": ([2], [3], [4]), "lr": RATES},
    "ROME": {"layers": ([0], [1]), "v_num_grad_steps": (25, 60, 100), "v_lr": (0.1, 0.3, 0.5)},
}


def settings(method: str, **overrides: Any) -> Any:
    hparams = settings_for(method, "cpu")
    for key, value in overrides.items():
        setattr(hparams, key, value)
    return hparams


def measure(hparams: Any, records: list[dict[str, Any]]) -> dict[str, float]:
    from easyeditor import BaseEditor

    facts = [r["locality"][0] for r in records]
    with quietly():
        metrics, _, _ = BaseEditor.from_hparams(hparams).edit(
            prompts=[r["prompt"] for r in records],
            target_new=[r["target_new"] for r in records],
            ground_truth=[r["ground_truth"] for r in records],
            rephrase_prompts=[r["rephrase_prompt"] for r in records],
            subject=[r["subject"] for r in records],
            locality_inputs={"same": {k: [f[k] for f in facts] for k in ("prompt", "ground_truth")}},
            verbose=False,
            **({} if easyedit.is_upstream() else {"keep_original_weight": True}),
        )
    return {
        "success": float(np.mean([np.mean(m["post"]["rewrite_acc"]) for m in metrics])),
        "rephrase": float(np.mean([np.mean(m["post"]["rephrase_acc"]) for m in metrics])),
        "locality": float(np.mean([np.mean(m["post"]["locality"]["same_acc"]) for m in metrics])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("method", choices=GRIDS)
    parser.add_argument("--records", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(1)
    easyedit.require()
    records = load_records()[100 : 100 + args.records]
    grid = GRIDS[args.method]
    rows = []
    for values in tqdm(list(itertools.product(*grid.values()))):
        chosen = dict(zip(grid, values, strict=True))
        found = measure(settings(args.method, **chosen), records)
        rows.append({**chosen, **found, "mean": sum(found.values()) / len(found)})
    rows.sort(key=lambda row: -row["mean"])
    form = "upstream" if easyedit.is_upstream() else "pypi"
    out = Path(__file__).parent / "tuning" / f"{args.method}-{form}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"records": args.records, "rows": rows}, indent=1) + "\n", "utf-8")
    for row in rows[:6]:
        sys.stdout.write(f"{row}\n")


if __name__ == "__main__":
    main()
