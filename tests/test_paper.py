"""The paper's algorithm reads the paper's settings, and nothing else that could change what an edit is."""

from __future__ import annotations

from typing import Any

from conftest import PARAMETER, REQUEST

from kdpo_editor import KDPOHyperParams
from kdpo_editor.engine.cached_forward import CachedForward
from kdpo_editor.engine.weights import find_matrices, only_training
from kdpo_editor.hparams import OFF
from kdpo_editor.kdpo import kdpo
from kdpo_editor.requests.tokens import tokenize

PUBLISHED = {"num_steps", "cycles", "lr", "beta", "stop_loss"}
# How it is computed, not what: the size of a mini-batch, of which one edit is one, and CUDA graphs.
COMPUTED = {"memory_budget", "cuda_graphs"}


class Noted(KDPOHyperParams):
    """Settings that note which of them were read."""

    read: set[str]

    def __getattribute__(self, name: str) -> Any:
        fields = type(self).__dataclass_fields__
        if name in fields:
            self.__dict__.setdefault("read", set()).add(name)
        return super().__getattribute__(name)


def test_it_has_the_papers_five_settings_and_no_option_beside_them(llama: Any) -> None:
    """Of those that it reads besides, each is off, or it would not be called."""
    model, tok = llama
    hparams = Noted(model_name="llama", layers=[4], rewrite_module_tmp="model.layers.{}.mlp.down_proj")
    assert hparams.is_published
    weights = find_matrices(model, hparams)
    assert list(weights) == [PARAMETER]
    forward = CachedForward.above(model, weights, hparams)
    ((tokens,),) = tokenize(tok, [REQUEST])
    hparams.read.clear()
    with only_training(model, weights, {}):
        assert kdpo(forward, weights, tokens, hparams).cycles
    assert hparams.read - {"objective", *OFF} == PUBLISHED | COMPUTED
