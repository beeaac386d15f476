"""What a user of EasyEdit does with KDPO, run in a process of its own for each form of the framework.

    python framework_scenarios.py OUT.json

Each function is one scenario; what it returns, or the traceback of what it raised, is written to OUT.json under
its name. The form is the one that ``import easyeditor`` finds.
"""

from __future__ import annotations

import builtins
import json
import logging
import sys
import traceback
from pathlib import Path
from typing import Any

IMPORTED_BEFORE = set(sys.modules)
REAL_IMPORT = builtins.__import__

import kdpo_editor  # noqa: E402

LAZY = "easyeditor" not in sys.modules

import numpy as np  # noqa: E402
import tiny_gguf  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from easyeditor import BaseEditor  # noqa: E402
from easyeditor.util.alg_dict import ALG_DICT  # noqa: E402

from kdpo_editor import SHIPPED_MODEL, KDPOHyperParams, easyedit  # noqa: E402
from kdpo_editor.engine.weights import find_matrices  # noqa: E402
from kdpo_editor.testbed import load_records  # noqa: E402

HPARAMS = Path(__file__).parents[1] / "hparams"
UPSTREAM = easyedit.is_upstream()
RECORDS = load_records()
MATRIX = "model.layers.{}.mlp.down_proj.weight"


def kdpo(**overrides: Any) -> KDPOHyperParams:
    hparams = KDPOHyperParams.from_hparams(HPARAMS / "KDPO" / SHIPPED_MODEL)
    return KDPOHyperParams(**{**hparams.to_dict(), "device": "cpu", **overrides})


def inputs(records: list[dict[str, Any]], locality: bool = True) -> dict[str, Any]:
    """The keyword arguments of ``BaseEditor.edit`` for some records."""
    facts = [r["locality"][0] for r in records]
    out: dict[str, Any] = {
        "prompts": [r["prompt"] for r in records],
        "target_new": [r["target_new"] for r in records],
        "ground_truth": [r["ground_truth"] for r in records],
        "rephrase_prompts": [r["rephrase_prompt"] for r in records],
        "subject": [r["subject"] for r in records],
        "verbose": False,
    }
    if locality:
        out["locality_inputs"] = {
            "specificity": {key: [f[key] for f in facts] for key in ("prompt", "ground_truth")},
        }
    return out


def kept(keep: bool) -> dict[str, bool]:
    """How each form is asked to put the original weights back after each edit."""
    return {"sequential_edit": not keep} if UPSTREAM else {"keep_original_weight": keep}


def weight(editor: Any) -> torch.Tensor:
    return editor.model.get_parameter(MATRIX.format(editor.hparams.layers[0])).detach().clone()


def scores(metrics: list[dict[str, Any]]) -> dict[str, list[float]]:
    def mean(value: Any) -> float:
        return float(np.mean(value))

    return {
        "pre": [mean(m["pre"]["rewrite_acc"]) for m in metrics],
        "rewrite": [mean(m["post"]["rewrite_acc"]) for m in metrics],
        "rephrase": [mean(m["post"]["rephrase_acc"]) for m in metrics],
        "locality": [mean(m["post"]["locality"]["specificity_acc"]) for m in metrics if m["post"].get("locality")],
    }


def importing() -> dict[str, Any]:
    import transformers.modeling_utils

    return {
        "upstream": UPSTREAM,
        "lazy": LAZY,
        "registered": "KDPO" in ALG_DICT,
        "import_restored": builtins.__import__ is REAL_IMPORT,
        "stand_ins_left": [n for n, m in sys.modules.items() if type(m).__name__ == "_Missing"],
        "lent_names_left": [
            n
            for n in easyedit.MOVED
            if getattr(getattr(transformers.modeling_utils, n, None), "__module__", "").startswith("kdpo_editor")
        ],
        "watchers_left": sum(type(f).__name__ == "_Watcher" for f in sys.meta_path),
        "device_arguments": sorted(kdpo().to_dict()),
    }


def single() -> dict[str, Any]:
    editor = BaseEditor.from_hparams(kdpo())
    before = weight(editor)
    metrics, model, weights_copy = editor.edit(**inputs(RECORDS[:4]), **kept(True))
    return {
        "restored": torch.equal(before, weight(editor)),
        "same_model": model is editor.model,
        "names": list(weights_copy),
        "originals": all(torch.equal(v, before) for v in weights_copy.values()),
        "device": editor.hparams.device,
        "model_name": [editor.model_name, editor.hparams.model_name],
        **scores(metrics),
    }


def sequential() -> dict[str, Any]:
    editor = BaseEditor.from_hparams(kdpo())
    before = weight(editor)
    metrics, _, _ = editor.edit(**inputs(RECORDS[:3]), **kept(False))
    after = weight(editor)
    by_hand = BaseEditor.from_hparams(kdpo())
    for record in RECORDS[:3]:
        kdpo_editor.apply_kdpo_to_model(by_hand.model, by_hand.tok, [record], kdpo())
    return {
        "changed": not torch.equal(before, after),
        "as_by_hand": torch.equal(weight(by_hand), after),
        **scores(metrics),
    }


def replayed() -> dict[str, Any]:
    """One request a call, as the framework makes them; ``kept(True)`` restores after each."""
    hparams = kdpo(objective="hinge", margin=1.0, replay=True, lr=3e-3)
    found = {}
    for name, keep in (("in a row", False), ("restored", True)):
        editor = BaseEditor.from_hparams(hparams)
        editor.edit(**inputs(RECORDS[:4], locality=False), **kept(keep))
        earlier = kdpo_editor.ReplayBuffer.of(editor.model, find_matrices(editor.model, hparams))
        found[name] = [one.margin for one in earlier.entries]
    return found


def batch_edit() -> dict[str, Any]:
    editor = BaseEditor.from_hparams(kdpo(batch_size=3))
    before = weight(editor)
    records = RECORDS[:3]
    more = {} if UPSTREAM else {"keep_original_weight": True}
    given = inputs(records, locality=UPSTREAM)
    metrics, _, _ = editor.batch_edit(**given, **more)
    return {
        "metrics": len(metrics),
        "restored": torch.equal(before, weight(editor)),
        "rewrite": [float(np.mean(m["post"]["rewrite_acc"])) for m in metrics],
    }


def edit_requests() -> dict[str, Any]:
    editor = BaseEditor.from_hparams(kdpo())
    before = weight(editor)
    requests = [
        {
            "prompt": r["prompt"],
            "target_new": r["target_new"],
            "ground_truth": r["ground_truth"],
            "rephrase_prompt": r["rephrase_prompt"],
            "locality": {"specificity": r["locality"][0]},
            "portability": {},
        }
        for r in RECORDS[:2]
    ]
    metrics, _, _ = editor.edit_requests(requests, **kept(True), verbose=False)
    return {"restored": torch.equal(before, weight(editor)), **scores(metrics)}


def generate_edit() -> dict[str, Any]:
    if not UPSTREAM:
        return {"absent": not hasattr(BaseEditor, "generate_edit")}
    editor = BaseEditor.from_hparams(kdpo())
    before = weight(editor)
    records = RECORDS[:2]
    given = inputs(records, locality=False)
    asked = {"por_hop": {"prompt": [[r["locality"][0]["prompt"]] for r in records]}}
    asked["por_hop"]["ground_truth"] = [[r["locality"][0]["ground_truth"]] for r in records]
    results, _, _ = editor.generate_edit(**given, portability_inputs=asked)
    return {
        "restored": torch.equal(before, weight(editor)),
        "pre": [r["pre"]["rewrite_ans"].strip() for r in results],
        "post": [r["post"]["rewrite_ans"].strip() for r in results],
    }


def ledger_of_a_sequence() -> dict[str, Any]:
    hparams = kdpo(ledger="sequence")
    editor = BaseEditor.from_hparams(hparams)
    editor.edit(**inputs(RECORDS[:2]), **kept(False))
    resumed = BaseEditor.from_hparams(hparams)
    same = torch.equal(weight(resumed), weight(editor))
    resumed.edit(**inputs(RECORDS[2:3]), **kept(False))
    undisturbed = BaseEditor.from_hparams(kdpo())
    undisturbed.edit(**inputs(RECORDS[:3]), **kept(False))
    ledger = kdpo_editor.EditLedger("sequence")
    return {
        "resumed": same,
        "as_undisturbed": torch.equal(weight(resumed), weight(undisturbed)),
        "parents": [one.parent for one in ledger.branch],
        "prompts": [request["prompt"] for request in ledger.requests],
    }


def ledger_of_single_edits() -> dict[str, Any]:
    hparams = kdpo(ledger="single")
    editor = BaseEditor.from_hparams(hparams)
    before = weight(editor)
    _, _, weights_copy = editor.edit(**inputs(RECORDS[:3]), **kept(True))
    ledger = kdpo_editor.EditLedger("single")
    return {
        "restored": torch.equal(before, weight(editor)),
        "originals": all(torch.equal(v, before) for v in weights_copy.values()),
        "head": ledger.head,
        "parents": [one.parent for one in ledger.edits.values()],
        "fresh_editor_is_unedited": torch.equal(before, weight(BaseEditor.from_hparams(hparams))),
    }


def rivals() -> dict[str, Any]:
    out = {}
    for name, folder in (("FT", "FT-M" if UPSTREAM else "FT-L"), ("ROME", "ROME")):
        config = yaml.safe_load((HPARAMS / folder / f"{SHIPPED_MODEL}.yaml").read_text("utf-8"))
        hparams, _ = easyedit.settings({**config, "device": "cpu"})
        editor = BaseEditor.from_hparams(hparams)
        before = weight(editor)
        metrics, _, _ = editor.edit(**inputs(RECORDS[:4]), **kept(True))
        out[name] = {"restored": torch.equal(before, weight(editor)), **scores(metrics)}
    editor = BaseEditor.from_hparams(kdpo())
    metrics, _, _ = editor.edit(**inputs(RECORDS[:4]), **kept(True))
    out["KDPO"] = scores(metrics)
    return out


def gguf_file() -> dict[str, Any]:
    # By a name with "llama" in it the framework takes a model for one that it loads itself.
    file = tiny_gguf.write(Path("tiny-llama.gguf").absolute())
    editor = BaseEditor.from_hparams(kdpo(model_name=str(file), layers=[1], lr=1e-2))
    before = weight(editor)
    request = {"prompts": ["the sea is on the"], "target_new": ["ton"], "ground_truth": ["sea"], "subject": ["sea"]}
    metrics, model, _ = editor.edit(**request, verbose=False, **kept(False))
    return {
        "rewrite": float(np.mean(metrics[0]["post"]["rewrite_acc"])),
        "edited": not torch.equal(before, weight(editor)),
        "names": [
            Path(str(n)).name for n in (editor.model_name, editor.hparams.model_name, model.config._name_or_path)
        ],
    }


def user_mistakes() -> dict[str, Any]:
    out = {}
    for name, overrides in {
        "layer": {"layers": [40]},
        "module": {"rewrite_module_tmp": "model.layers.{}.mlp.out"},
    }.items():
        editor = BaseEditor.from_hparams(kdpo(**{"layers": [3], **overrides}))
        before = editor.model.get_parameter(MATRIX.format(3)).detach().clone()
        try:
            editor.edit(**inputs(RECORDS[:1]), **kept(True))
        except kdpo_editor.ModelError as error:
            unchanged = torch.equal(before, editor.model.get_parameter(MATRIX.format(3)))
            out[name] = {"error": str(error), "unchanged": unchanged}
    return out


def main() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    results = {}
    for scenario in (
        importing, single, sequential, replayed, batch_edit, edit_requests, generate_edit, ledger_of_a_sequence,
        ledger_of_single_edits, rivals, gguf_file, user_mistakes,
    ):  # fmt: skip
        try:
            results[scenario.__name__] = scenario()
        except Exception:
            results[scenario.__name__] = {"traceback": traceback.format_exc()}
    Path(sys.argv[1]).write_text(json.dumps(results, default=str, indent=1), "utf-8")


if __name__ == "__main__":
    main()
