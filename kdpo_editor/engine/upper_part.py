"""The part of a model from its first edited matrix up, run as the model runs it and run alone from a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.utils import ModelOutput

from ..errors import ModelError
from .activation_cache import ActivationCache, Arguments
from .findings import Findings
from .patches import forward_is, narrowed, trained_only_at
from .prefix import Recorder, cache_name, recorder_of, without_prefix

# Multiplications that a module of the last block must be spared for it to pay.
WORTH = 2_000_000


@dataclass(frozen=True)
class Examined:
    """What was found out about a model and one edited module.

    ``inside``: the cache may begin at the matrix, not only at its block.
    ``head_alone``: logits are what the head gives, and nothing else follows.
    ``result``: the class of what the module that holds the blocks gives.
    ``after``: names of what follows the last block there.
    ``narrow``: names of the modules in the last block that are needed only where logits are read.
    """

    inside: bool
    head_alone: bool
    result: type[ModelOutput] = BaseModelOutputWithPastAndCrossAttentions
    after: tuple[str, ...] = ()
    narrow: tuple[str, ...] = ()

    def plain(self) -> dict[str, Any]:
        """The same in values of JSON."""
        return {**vars(self), "result": f"{self.result.__module__}:{self.result.__qualname__}"}

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Examined:
        """What :meth:`plain` gave."""
        module, _, name = plain["result"].partition(":")
        names = {key: tuple(plain[key]) for key in ("after", "narrow")}
        return cls(**{**plain, **names, "result": getattr(import_module(module), name)})


@dataclass
class HeadRows:
    """The head's rows for some tokens: ``weight`` ``[B, T, K, D]`` and ``bias`` ``[B, T, K]`` or ``None``."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits ``[B, T, K]`` of hidden states ``[B, T, D]``."""
        logits = (self.weight @ hidden.to(self.weight.device).unsqueeze(-1)).squeeze(-1)
        return logits if self.bias is None else logits + self.bias


class UpperPart:
    """The part of a causal language model from one matrix up, run within the model or alone from what was cached.

    Args:
        model: a decoder-only ``transformers`` model with a language-model head, in evaluation mode.
        blocks_name: dotted name of its list of blocks, such as ``model.layers``.
        first: index of the first block that may change.
        module_name: dotted name of the module whose weight is edited in that block.
        edited: dotted names of all edited modules.
        fact_token: through which tokens they are trained, "all", "subject" or "subject_last".
    """

    def __init__(
        self,
        model: nn.Module,
        blocks_name: str,
        first: int,
        module_name: str,
        edited: Sequence[str] = (),
        fact_token: str = "all",
    ) -> None:
        self.model, self.fact_token = model, fact_token
        blocks = model.get_submodule(blocks_name)
        assert isinstance(blocks, nn.ModuleList)
        self.holder = model.get_submodule(blocks_name.rpartition(".")[0])
        self.blocks = list(blocks)[first:]
        self.module_name = module_name
        self.module = model.get_submodule(module_name)
        self.edited = [model.get_submodule(name) for name in edited]
        self.after: list[nn.Module] = []
        self.narrow: list[tuple[nn.Module, int]] = []  # with their number of parameters
        self.worth = WORTH  # multiplications
        self.head_alone = False
        self.result: type[ModelOutput] = BaseModelOutputWithPastAndCrossAttentions
        self.findings = Findings.of(model)
        if (known := self.findings.known.get(f"examined {module_name}")) is not None:
            self.adopt(Examined.of(known))

    @property
    def place(self) -> torch.device:
        """Where the edited matrix is, and the forward from the cache begins."""
        return next(self.module.parameters()).device

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        embeddings = self.model.get_input_embeddings()  # type: ignore[operator]
        device: torch.device = embeddings.weight.device
        return device

    def run(
        self, ids: Tensor, positions: Tensor, inside: bool, recorder: Recorder | None = None
    ) -> tuple[ActivationCache, Tensor]:
        """Run the whole model over ``ids`` ``[B, L]`` and note what its blocks are called with.

        The cache begins at the edited matrix where ``inside`` is true, else at its block. Beside it, the final hidden
        states at ``positions`` ``[B, T]`` are returned, ``[B, T, D]``. ``recorder`` is given keys and values, and notes
        those of the blocks that the cache is for. Raises :class:`ModelError` where the blocks or the matrix are not
        called once each.
        """
        calls: list[Arguments] = []
        after: list[nn.Module] = []
        kept: dict[str, Tensor] = {}
        with ExitStack() as hooks:

            def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                calls.append((args, dict(kwargs)))
                if recorder is not None and len(calls) == 1 + inside:
                    recorder.kept = {}

            def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                if len(calls) == len(self.blocks):
                    after.append(module)

            def set_aside(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
                kept["inner"], kept["output"] = args[0].detach(), output
                return torch.zeros_like(output)

            def put_back(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
                if "output" not in kept:
                    return output  # the matrix was not called as a module
                rest = _hidden(output).detach()
                # Some blocks (OPT) flatten rows and positions for their matrices.
                kept["rest"], kept["inner"] = rest, kept["inner"].reshape(*rest.shape[:2], -1)
                whole = rest + kept["output"].view(rest.shape)
                return (whole, *output[1:]) if isinstance(output, tuple) else whole

            for block in self.blocks:
                hooks.callback(block.register_forward_pre_hook(keep, with_kwargs=True).remove)
            for child in self.holder.children():
                if not isinstance(child, nn.ModuleList):
                    hooks.callback(child.register_forward_hook(note).remove)
            if inside:
                hooks.callback(self.module.register_forward_hook(set_aside).remove)
                hooks.callback(self.blocks[0].register_forward_hook(put_back).remove)
            given = {} if recorder is None else {cache_name(self.holder) or "": recorder}
            result = self.holder(input_ids=ids, use_cache=False, return_dict=True, **given)
        if len(calls) != len(self.blocks) or (inside and "rest" not in kept):
            raise ModelError(f"{len(self.blocks)} blocks were to run once each, but {len(calls)} calls were seen")
        self.after, self.result = after, type(result)
        inputs, arguments = [], []
        for args, kwargs in calls:
            inputs.append(args[0] if args else kwargs.pop("hidden_states"))
            arguments.append((args[1:], kwargs))
        if inside:
            cache = ActivationCache(kept["rest"], kept["inner"], arguments[1:], positions)
        else:
            cache = ActivationCache(inputs[0].detach(), None, arguments, positions)
        return cache, cache.places.read(result.last_hidden_state)

    def from_cache(self, cache: ActivationCache) -> Tensor:
        """The final hidden states, ``[B, T, D]``, that the whole model would give with its weights as they are now."""
        blocks = self.blocks
        hidden = cache.hidden.to(self.place)
        with self.trained_at(cache.trained):
            if cache.inner is not None:
                hidden = hidden + self.module(cache.inner.to(self.place)).view(hidden.shape)
                blocks = blocks[1:]
            for block, (args, kwargs) in zip(blocks, cache.arguments, strict=True):
                with ExitStack() as patches:
                    if block is self.blocks[-1]:
                        spared = len(hidden) * (hidden.shape[1] - cache.positions.shape[1])
                        for module, parameters in self.narrow:
                            if spared * parameters >= self.worth:
                                patches.enter_context(narrowed(module, cache.places))
                    hidden = _hidden(block(hidden, *args, **kwargs))
        hidden = cache.places.read(hidden)
        for module in self.after:
            hidden = module(hidden)
        return hidden

    def freeze(self, cache: ActivationCache) -> tuple[ActivationCache, Tensor] | None:
        """What is before each row's first trained token, as it is with the weights as they are now.

        Returns a cache from which :meth:`from_cache` runs the tokens from there on alone, and the final hidden states,
        ``[B, T, D]``, without graph. ``None`` where the blocks of ``cache`` were not called with a recorder.
        """
        recorder = recorder_of(cache)
        if recorder is None or cache.trained is None:
            return None
        recorder.kept = {}
        with torch.no_grad():
            hidden = self.from_cache(cache)
            return self.frozen(cache, recorder), hidden

    def frozen(self, cache: ActivationCache, recorder: Recorder) -> ActivationCache:
        """As :meth:`freeze`, of what ``recorder`` noted in a pass over ``cache`` that was just made."""
        return without_prefix(cache, recorder.take(), self.blocks[len(self.blocks) - len(cache.arguments) :])

    def logits(self, hidden: Tensor, head_rows: HeadRows | None = None) -> Tensor:
        """Logits of final hidden states, in fp32, through whatever the model's own forward does after its blocks.

        ``[B, T, V]``, or ``[B, T, K]`` where :meth:`head_rows` chose ``K`` tokens of each position.
        """
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        with ExitStack() as patches:
            if head_rows is not None:
                patches.enter_context(forward_is(head, head_rows))
            if self.head_alone:
                logits: Tensor = head(hidden.to(head.weight.dtype))  # Mamba's residual stream is fp32
            else:
                output = self.result(last_hidden_state=hidden)  # type: ignore[call-arg]
                patches.enter_context(forward_is(self.holder, lambda *args, **kwargs: output))
                logits = self.model(inputs_embeds=hidden, use_cache=False, return_dict=True).logits
        return logits.float()

    def head_rows(self, tokens: Tensor) -> HeadRows | None:
        """The part of the head that scores ``tokens`` ``[B, T, K]``, or ``None`` if this head cannot be divided."""
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        # A forward of its own is unknown, unless it is accelerate's, which moves inputs to the head's device.
        if type(head) is not nn.Linear or ("forward" in head.__dict__ and not hasattr(head, "_hf_hook")):
            return None
        tokens = tokens.to(head.weight.device)
        return HeadRows(head.weight[tokens], None if head.bias is None else head.bias[tokens])

    def adopt(self, examined: Examined) -> None:
        """Run alone from now on as the examination found that it may be run."""
        narrow = [self.blocks[-1].get_submodule(name) for name in examined.narrow]
        self.narrow = [(module, sum(p.numel() for p in module.parameters())) for module in narrow]
        self.head_alone = examined.head_alone
        self.result = examined.result
        self.after = [self.holder.get_submodule(name) for name in examined.after]

    @contextmanager
    def trained_at(self, trained: Tensor | None) -> Iterator[None]:
        """Inside, the edited weights get gradients from the tokens in ``trained`` only.

        ``trained``: ``[B, L]`` bool; ``None`` is all.
        """
        with ExitStack() as patches:
            if trained is not None:
                for module in self.edited:
                    patches.enter_context(forward_is(module, trained_only_at(module.forward, trained)))
            yield


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
