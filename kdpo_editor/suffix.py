"""Run a model once, then only the part of it that an edit can change.

Blocks below the first edited one never change, and under teacher forcing neither does what they are fed. So one
forward pass captures the arguments of every block from the first edited one up; later passes call only those
blocks, the final norm and the head, and the last two only where an answer is read.

Nothing here knows the name of an architecture. What follows the last block inside the module that holds the
blocks is seen by watching one pass; head, bias, logit scaling and soft-capping are the model's own, because its
own ``forward`` is called with that module's result put in. The first replay on a model is compared with
its full forward, and a model that differs is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from .errors import ModelError

# Models whose replay was compared with the full forward already, and from which blocks on.
_VERIFIED: WeakKeyDictionary[nn.Module, set[int]] = WeakKeyDictionary()


@dataclass
class Captured:
    """What one pass over ``[B, L]`` token ids left behind.

    ``hidden``: ``[B, L, D]``, input of the first edited block, model dtype, without gradient.
    ``arguments``: for each block from there on, its other positional and keyword arguments.
    ``positions``: ``[T]``, where logits are read.
    """

    hidden: Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]
    positions: Tensor


class Suffix:
    """The blocks from ``first`` up of a causal language model, to be captured once and replayed often.

    Args:
        model: a decoder-only ``transformers`` model with a language-model head.
        blocks_name: dotted name of its list of blocks, such as ``model.layers``.
        first: index of the first block that may change.
    """

    def __init__(self, model: nn.Module, blocks_name: str, first: int) -> None:
        self.model = model
        blocks = model.get_submodule(blocks_name)
        assert isinstance(blocks, nn.ModuleList)
        self.holder = model.get_submodule(blocks_name.rpartition(".")[0])
        self.blocks = list(blocks)[first:]
        self.first = first
        self._after: list[nn.Module] = []

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        embeddings = self.model.get_input_embeddings()  # type: ignore[operator]
        device: torch.device = embeddings.weight.device
        return device

    def capture(self, ids: Tensor, positions: Tensor) -> tuple[Captured, Tensor]:
        """Run the whole model over ``ids`` once.

        With gradients enabled and only edited matrices requiring them, the graph begins at the first edited
        matrix, so this pass serves as the first optimiser step's forward too.

        Args:
            ids: ``[B, L]`` int64.
            positions: ``[T]`` int64; logits are read there.

        Returns:
            What was captured, and the logits ``[B, T, V]`` in fp32.

        Raises:
            ModelError: a block is fed something that the edit would change, or replaying does not give what
                the full forward gave.
        """
        ids, positions = ids.to(self.device), positions.to(self.device)
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        after: list[nn.Module] = []
        with ExitStack() as hooks:

            def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                calls.append((args, dict(kwargs)))

            def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                if len(calls) == len(self.blocks):
                    after.append(module)

            for block in self.blocks:
                hooks.callback(block.register_forward_pre_hook(keep, with_kwargs=True).remove)
            for child in self.holder.children():
                if not isinstance(child, nn.ModuleList):
                    hooks.callback(child.register_forward_hook(note).remove)
            output = self.holder(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state
        if len(calls) != len(self.blocks):
            raise ModelError(f"{len(self.blocks)} blocks were to run once each, but {len(calls)} calls were seen")
        self._after = after
        hidden = None
        arguments = []
        for i, (args, kwargs) in enumerate(calls):
            if args:
                own, args = args[0], args[1:]
            else:
                own = kwargs.pop("hidden_states")
            if any(isinstance(v, Tensor) and v.requires_grad for v in (*args, *kwargs.values())):
                raise ModelError(
                    f"block {self.first + i} is fed more than hidden states by the edited layer; such models "
                    "cannot be edited"
                )
            if i == 0:
                hidden = own.detach()
            arguments.append((args, kwargs))
        assert hidden is not None
        captured = Captured(hidden, arguments, positions)
        logits = self._head(output[:, positions.to(output.device)])
        if self.first not in _VERIFIED.setdefault(self.model, set()):
            self._verify(ids, captured)
            _VERIFIED[self.model].add(self.first)
        return captured, logits

    def replay(self, captured: Captured) -> Tensor:
        """The logits ``[B, T, V]``, fp32, that the whole model would give with its weights as they are now."""
        hidden = captured.hidden
        for block, (args, kwargs) in zip(self.blocks, captured.arguments, strict=True):
            output = block(hidden, *args, **kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden[:, captured.positions.to(hidden.device)]
        for module in self._after:
            hidden = module(hidden)
        return self._head(hidden)

    def _head(self, hidden: Tensor) -> Tensor:
        """Logits of final hidden states, through whatever the model's own forward does after its blocks."""
        with _answering(self.holder, BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden)):
            logits: Tensor = self.model(inputs_embeds=hidden, use_cache=False, return_dict=True).logits
        return logits.float()

    @torch.no_grad()
    def _verify(self, ids: Tensor, captured: Captured) -> None:
        full = self.model(input_ids=ids, use_cache=False, return_dict=True).logits
        full = full[:, captured.positions.to(full.device)].float()
        replayed = self.replay(captured).to(full.device)
        # Rounding alone: the same operations on the same numbers, but for the shapes of the last ones.
        scale = full.nan_to_num(0.0, 0.0, 0.0).abs().max().clamp(min=1.0).item()
        tolerance = 32 * torch.finfo(next(self.model.parameters()).dtype).eps * scale
        if not torch.allclose(full, replayed, rtol=0.0, atol=tolerance, equal_nan=True):
            worst = (full - replayed).abs().max()
            raise ModelError(
                f"{type(self.model).__name__}: replaying blocks {self.first} and up gives logits that differ from "
                f"the full forward by {worst:.3g}; this architecture cannot be edited"
            )


@contextmanager
def _answering(module: nn.Module, output: Any) -> Iterator[None]:
    """While inside, ``module`` returns ``output`` whatever it is called with."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


@torch.no_grad()
def greedy(model: nn.Module, prompt: Tensor, length: int) -> Tensor:
    """The ``length`` most likely next tokens, one after another, without sampling or stopping.

    Args:
        prompt: ``[P]`` int64, on the model's device.

    Returns:
        ``[length]`` int64, on the same device.
    """
    step, cache, answer = prompt.unsqueeze(0), None, []
    for _ in range(length):
        output = model(input_ids=step, past_key_values=cache, use_cache=True, return_dict=True)
        step, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        answer.append(step[0])
    return torch.cat(answer)
