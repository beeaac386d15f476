"""Evaluate again and again for the price of the blocks that edits can change."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from ...engine.batches import make_batches
from ...engine.cached_forward import Suffix
from ...engine.weights import as_found, find_matrices
from ...errors import KDPOError
from ...hparams import KDPOHyperParams
from ...lifelong.replay import Entry, ReplayBuffer, entries_of
from ...requests import EditTokens

# Methods that change the matrices their settings name, in place, and nothing else.
IN_PLACE = ("KDPO", "FT", "ROME", "MEMIT", "AlphaEdit")
# Rows of a batch, and bytes held at most.
ROWS = 32
BUDGET = 4e9


class Prefixes:
    """What a model's blocks below the first edited matrix made of prompts with their answers.

    No edit changes that, so it is computed once for each prompt and answer and serves the evaluation before the first
    edit and all that follow. It is held in main memory, in the model's dtype; what does not fit is computed each time.

    Args:
        suffix: of the model that is edited, from its first edited matrix up.
        hparams: which matrices those are.
    """

    def __init__(self, suffix: Suffix, hparams: KDPOHyperParams) -> None:
        self.suffix, self.hparams = suffix, hparams
        self.held = 0.0
        self._rows = ReplayBuffer()
        self._kept: dict[tuple[int, ...], Entry] = {}

    @classmethod
    def of(cls, model: nn.Module, settings: dict[str, Any] | None) -> Prefixes | None:
        """For a method's ``settings`` as EasyEdit's files have them; ``None`` where nothing would be saved."""
        if not settings or settings.get("alg_name") not in IN_PLACE or min(settings.get("layers") or [0]) == 0:
            return None
        keys = ("model_name", "layers", "rewrite_module_tmp")
        try:
            hparams = KDPOHyperParams(**{key: settings[key] for key in keys})
            suffix = Suffix.above(model, find_matrices(model, hparams), hparams)
            with as_found(model), torch.no_grad():
                suffix.capture(torch.arange(4).unsqueeze(0), torch.tensor([[3]]))
        except KDPOError:  # what this package cannot replay is scored as a whole
            return None
        return cls(suffix, hparams)

    @torch.no_grad()
    def predict(self, edits: Sequence[EditTokens]) -> list[list[int]]:
        """The argmax tokens at the positions of each answer, by the weights as they are now."""
        found: list[list[int]] = [[]] * len(edits)
        order = sorted(range(len(edits)), key=lambda i: len(edits[i].sequence))
        with as_found(self.suffix.model):
            for members in (order[start : start + ROWS] for start in range(0, len(order), ROWS)):
                captured = self._captured([edits[i] for i in members])
                for batch in chain(*self._rows.batches(self.suffix, dict(enumerate(captured)), self.hparams)):
                    for member, best, real in zip(batch.members, batch.rejected, batch.mask, strict=True):
                        found[members[member]] = best[real].tolist()
        return found

    def _captured(self, edits: Sequence[EditTokens]) -> list[Entry]:
        """Each with its inputs, computed now if they are not held; at most one batch of them."""
        keys = [(len(edit.prompt), *edit.prompt.tolist(), *edit.chosen.tolist()) for edit in edits]
        here = {key: self._kept[key] for key in keys if key in self._kept}
        new = {key: edit for key, edit in zip(keys, edits, strict=True) if key not in here}
        captured = self._capture(list(new.values())) if new else []
        for key, one in zip(new, captured, strict=True):
            here[key] = one
            if self.held + one.bytes <= BUDGET:
                self._kept[key] = one
                self.held += one.bytes
        return [here[key] for key in keys]

    def _capture(self, edits: Sequence[EditTokens]) -> list[Entry]:
        entries = entries_of(edits, make_batches(self.suffix, edits, self.hparams))
        return [Entry(e.tokens, e.hidden.cpu(), None if e.inner is None else e.inner.cpu()) for e in entries]
