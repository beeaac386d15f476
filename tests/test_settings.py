"""The shipped YAML files: they load, explain every key and hold the paper's settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from kdpo_editor import SHIPPED_MODEL, KDPOHyperParams
from kdpo_editor.hparams import MOST_CONTEXTS, settings_folder
from kdpo_editor.lifelong.contexts import TEMPLATES

FOLDER = Path(__file__).parents[1] / "hparams"
FILES = sorted(file for kind in ("KDPO", "KDPO-DPO", "KDPO-L", "FT-BF") for file in (FOLDER / kind).glob("*.yaml"))

# Layer, steps, cycles, rate, stop_loss (paper, appendix; steps and cycles of the ablation in brackets below).
PAPER = {
    "llama-2-7b": (21, 8, 20, 1e-4, 1e-3),
    "llama-3-8b": (21, 8, 20, 1e-4, 1e-3),
    "qwen1.5-0.5b": (21, 8, 20, 1e-4, 1e-3),
    "gpt-j-6b": (21, 8, 20, 1e-4, 1e-3),
    "qwen1.5-7b": (21, 8, 20, 1e-4, 1e-5),
    "qwen1.5-1.8b": (18, 8, 20, 1e-4, 1e-3),
    "qwen1.5-4b": (31, 8, 20, 1e-4, 1e-3),
    "mistral-7b": (21, 8, 10, 2e-4, 2e-4),
}


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}-{f.stem}")
def test_every_key_is_explained(file: Path) -> None:
    KDPOHyperParams.from_hparams(file, "any" if file.stem == "auto" else None)
    lines = file.read_text("utf-8").splitlines()
    for block in "\n".join(lines).split("\n\n"):
        assert block.startswith("#"), block
    assert max(map(len, lines)) <= 135


@pytest.mark.parametrize("name", PAPER)
def test_settings_are_the_papers(name: str) -> None:
    h = KDPOHyperParams.from_hparams(FOLDER / "KDPO" / name)
    assert (h.layers[0], h.num_steps, h.cycles, h.lr, h.stop_loss) == PAPER[name]
    assert (h.objective, h.beta) == ("kdpo", 0.1)
    assert (h.append_eos, h.margin, h.schedule, h.replay, h.update_scale) == (False, 0.0, "depth_first", False, 1.0)


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3-8b", "qwen1.5-7b", "gpt-j-6b"])
def test_the_ablations_settings_are_the_papers(name: str) -> None:
    h = KDPOHyperParams.from_hparams(FOLDER / "KDPO-DPO" / name)
    assert (h.objective, h.layers, h.num_steps, h.cycles, h.lr) == ("dpo", [21], 6, 5, 1e-4)


def test_there_are_settings_for_every_model_promised() -> None:
    names = {f.stem for f in FILES}
    assert names >= {*PAPER, "gpt2-xl", "qwen2.5-7b", "llama-3.2-3b", SHIPPED_MODEL}


def test_files_leave_nothing_to_defaults_but_the_options() -> None:
    """Whoever reads a file sees every number that the paper sets."""
    written = {"alg_name", "model_name", "device", "layers", "rewrite_module_tmp", "num_steps", "cycles", "lr", "beta"}
    written |= {"stop_loss", "objective", "batch_size", "max_length"}
    for file in FILES:
        found = written - {"model_name", "layers", "rewrite_module_tmp"} if file.stem == "auto" else written
        assert set(yaml.safe_load(file.read_text("utf-8"))) >= found, file


def test_the_installed_package_finds_its_settings() -> None:
    assert (settings_folder() / "KDPO" / f"{SHIPPED_MODEL}.yaml").is_file()


def test_there_are_as_many_contexts_as_may_be_asked_for() -> None:
    assert len(TEMPLATES) == MOST_CONTEXTS
