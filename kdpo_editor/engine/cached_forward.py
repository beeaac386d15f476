"""Run a model once, then only the part of it that an edit can change.

What comes before the first edited matrix never changes, and under teacher forcing neither does what it is fed. So one
forward pass captures the input of that matrix, what its block adds its output to, and the arguments of every block
above; later passes compute one matrix product, those blocks, the final norm, and of the head only what is asked
for: all logits of the answer positions, or just two of each. In the last block other positions matter only by their
keys and values, so all else is computed at the answer positions alone. Where a block does more with the matrix's output
than add it (Gemma-2 normalises it first), the cache begins at that block instead.

Nothing here knows the name of an architecture. What follows the last block inside the module that holds the
blocks is seen by watching one pass; logit scaling and soft-capping are the model's own, because where logits are more
than what the head gives, its own ``forward`` is called with that module's result put in. All this is tried once per
model, by disturbing the edited matrix's output and comparing with the full forward; a model for which it does not hold
is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..hparams import KDPOHyperParams
from .activation_cache import ActivationCache
from .examination import examined, freezes, per_row
from .prefix import Recorder, recorder_of
from .upper_part import UpperPart
from .weights import blocks_name


class CachedForward(UpperPart):
    """The part of a model above its first edited matrix, which examines the model before it first runs."""

    @classmethod
    def above(cls, model: nn.Module, weights: Iterable[str], hparams: KDPOHyperParams) -> CachedForward:
        """From the first of the edited matrices up; ``weights``: their names, in the order of ``hparams.layers``."""
        modules = {layer: name.rpartition(".")[0] for layer, name in zip(hparams.place[0], weights, strict=True)}
        first = min(modules)
        return cls(model, blocks_name(hparams), first, modules[first], list(modules.values()), hparams.fact_token)

    def capture(self, ids: Tensor, positions: Tensor, trained: Tensor | None = None) -> tuple[ActivationCache, Tensor]:
        """Run the whole model over ``ids`` once.

        With gradients enabled and only edited matrices requiring them, the graph begins at the first edited
        matrix, so this pass serves as the first optimiser step's forward too. Rows may be padded on the right with
        any token: under a causal mask nothing before it sees it.

        Args:
            ids: ``[B, L]`` int64.
            positions: ``[B, T]`` int64; logits are read there.
            trained: ``[B, L]`` bool, or ``None``; see :class:`ActivationCache`.

        Returns:
            What was captured, and the final hidden states there, ``[B, T, D]``, for :meth:`logits`.

        Raises:
            ModelError: the forward from the cache does not give what the full forward gives.
        """
        cache, hidden = self._capture(ids, positions, trained)
        recorder = recorder_of(cache)
        if recorder is not None:
            recorder.take()  # nobody asked for it
        return cache, hidden

    def _capture(self, ids: Tensor, positions: Tensor, trained: Tensor | None) -> tuple[ActivationCache, Tensor]:
        ids, positions = ids.to(self.device), positions.to(self.device)
        found = examined(self, ids)
        if found is None:
            cache, hidden = self.run(ids, positions, inside=False)
            return replace(cache, per_row=per_row(self, cache, ids, inside=False)), hidden
        self.adopt(found)
        trained = None if trained is None else trained.to(self.device)
        recorder = Recorder() if self.fact_token != "all" and freezes(self, ids, found.inside) else None
        with self.trained_at(trained):
            cache, hidden = self.run(ids, positions, found.inside, recorder)
        return replace(cache, trained=trained, per_row=per_row(self, cache, ids, found.inside)), hidden

    def capture_frozen(
        self, ids: Tensor, positions: Tensor, trained: Tensor | None
    ) -> tuple[ActivationCache, ActivationCache | None, Tensor]:
        """As :meth:`capture`, with a cache of the tokens from each row's first trained one on in between.

        Arguments are as there: ``[B, L]``, ``[B, T]`` and ``[B, L]``. The cache in between is ``None`` where all tokens
        are trained, or where keys and values cannot stand in for those before. Where it is not, the hidden states have
        no graph.
        """
        with torch.no_grad():
            cache, hidden = self._capture(ids, positions, trained)
            recorder = recorder_of(cache)
            if recorder is not None and cache.trained is not None:
                return cache, self.frozen(cache, recorder), hidden
        return cache, None, hidden
