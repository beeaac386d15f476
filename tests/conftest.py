from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdpo_editor import KDPOHyperParams

GOLDEN = Path(__file__).parent / "golden"
REQUEST = {"prompt": "What species is ZIC3 specific to?", "target_new": "male"}
PARAMETER = "model.layers.4.mlp.down_proj.weight"


def load(name: str) -> tuple[Any, Any]:
    folder = GOLDEN / f"{name}-mini"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folders that are not there yet. Asking pytest for each would list all earlier ones each time."""
    within = tmp_path_factory.mktemp("caches")
    return (within / str(number) for number in count())


@pytest.fixture(autouse=True)
def cache(caches: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own for each test."""
    folder = next(caches)
    monkeypatch.setenv("KDPO_CACHE", str(folder))
    return folder


@pytest.fixture
def llama() -> tuple[Any, Any]:
    """A 0.7M-parameter Llama that knows 60 ZsRE records, and its tokenizer."""
    return load("llama")


@pytest.fixture
def gpt2() -> tuple[Any, Any]:
    return load("gpt2")


@pytest.fixture
def settings() -> Callable[..., KDPOHyperParams]:
    """Settings that edit layer 4 of the small Llama, with any field overridden."""

    def make(**overrides: Any) -> KDPOHyperParams:
        base = {
            "model_name": "llama-mini",
            "layers": [4],
            "rewrite_module_tmp": "model.layers.{}.mlp.down_proj",
            "lr": 1e-3,
        }
        return KDPOHyperParams(**{**base, **overrides})

    return make


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A text file of what the small Llama was taught."""
    file = tmp_path / "text.txt"
    file.write_text("\n".join(f"What species is ZIC{n} specific to? human" for n in range(1, 40)), "utf-8")
    return str(file)


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every tensor of a model."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> None:
    """Every tensor of ``model`` is bit-identical to ``before``."""
    now = model.state_dict()
    assert now.keys() == before.keys()
    for name, tensor in now.items():
        assert tensor.dtype == before[name].dtype, name
        one, other = (t.contiguous().flatten().view(torch.uint8) for t in (tensor, before[name]))
        assert torch.equal(one, other), name


@contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """What a full disk does to a write, to whoever asks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
