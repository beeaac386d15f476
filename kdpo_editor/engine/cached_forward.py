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

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.utils import ModelOutput

from ..errors import ModelError
from ..hparams import KDPOHyperParams
from .patches import Places, forward_is, narrowed, trained_only_at
from .weights import blocks_name

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""What a block is called with besides its hidden states."""

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


_EXAMINED: WeakKeyDictionary[nn.Module, dict[str, Examined]] = WeakKeyDictionary()
_PER_ROW: WeakKeyDictionary[nn.Module, dict[Any, tuple[int, ...]]] = WeakKeyDictionary()


@dataclass
class ActivationCache:
    """What one pass over ``[B, L]`` token ids left behind.

    ``hidden``: ``[B, L, D]``, model dtype, without gradient: what the first edited block adds its matrix's output to,
    or, where ``inner`` is ``None``, that block's input.
    ``inner``: ``[B, L, F]``, the matrix's input.
    ``arguments``: the other positional and keyword arguments of each block that remains to be run.
    ``positions``: ``[B, T]`` int64, where logits are read.
    ``trained``: ``[B, L]`` bool, the tokens through which weights are trained; ``None`` is all.
    ``per_row``: of each leaf of ``arguments``, how many of its first dimension's entries belong to a row of the batch;
    0 where it is the same for all rows.
    """

    hidden: Tensor
    inner: Tensor | None
    arguments: list[Arguments]
    positions: Tensor
    trained: Tensor | None = None
    per_row: tuple[int, ...] = ()

    @cached_property
    def places(self) -> Places:
        """``positions`` in rows of this length."""
        return Places(self.positions, self.hidden.shape[1])

    def rows(self, kept: Tensor) -> ActivationCache:
        """Those rows of the batch whose indices, int64, are in ``kept``."""

        def some(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[kept.to(values.device)]

        leaves, tree = tree_flatten(self.arguments)
        sliced: dict[int, Tensor] = {}  # blocks share most of what they are called with
        for i, count in enumerate(self.per_row):
            if count:
                leaf = leaves[i]
                leaves[i] = sliced[id(leaf)] = sliced[id(leaf)] if id(leaf) in sliced else _rows(leaf, count, kept)
        hidden, positions = self.hidden[kept.to(self.hidden.device)], self.positions[kept.to(self.positions.device)]
        return ActivationCache(
            hidden, some(self.inner), tree_unflatten(leaves, tree), positions, some(self.trained), self.per_row
        )

    def of(self, hidden: Tensor, inner: Tensor | None, positions: Tensor, trained: Tensor | None) -> ActivationCache:
        """A capture of other tokens of the same number and length; shapes as above."""
        return ActivationCache(hidden, inner, self.arguments, positions, trained, self.per_row)


def _rows(values: Tensor, count: int, kept: Tensor) -> Tensor:
    """Of a batch with ``count`` entries for each row (ALiBi has one for each head), those of the rows ``kept``."""
    each: Tensor = values.unflatten(0, (-1, count))  # type: ignore[no-untyped-call]
    return each[kept.to(values.device)].flatten(0, 1)


@dataclass
class HeadRows:
    """The head's rows for some tokens: ``weight`` ``[B, T, K, D]`` and ``bias`` ``[B, T, K]`` or ``None``."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits ``[B, T, K]`` of hidden states ``[B, T, D]``."""
        logits = (self.weight @ hidden.to(self.weight.device).unsqueeze(-1)).squeeze(-1)
        return logits if self.bias is None else logits + self.bias


class CachedForward:
    """The part of a causal language model from one matrix up, to be run once and then from what was cached.

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
        self._after: list[nn.Module] = []
        self._narrow: list[tuple[nn.Module, int]] = []  # with their number of parameters
        self._head_alone = False
        self._result: type[ModelOutput] = BaseModelOutputWithPastAndCrossAttentions
        if module_name in _EXAMINED.get(model, {}):
            self._adopt(_EXAMINED[model][module_name])

    @classmethod
    def above(cls, model: nn.Module, weights: Iterable[str], hparams: KDPOHyperParams) -> CachedForward:
        """From the first of the edited matrices up; ``weights``: their names, in the order of ``hparams.layers``."""
        modules = {layer: name.rpartition(".")[0] for layer, name in zip(hparams.place[0], weights, strict=True)}
        first = min(modules)
        return cls(model, blocks_name(hparams), first, modules[first], list(modules.values()), hparams.fact_token)

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
        ids, positions = ids.to(self.device), positions.to(self.device)
        known = _EXAMINED.setdefault(self.model, {})
        if self.module_name not in known:
            found = self._examine(ids[:1])
            if found is None:
                cache, hidden = self._run(ids, positions, inside=False)
                return replace(cache, per_row=self._per_row(cache, ids, inside=False)), hidden
            known[self.module_name] = replace(found, narrow=tuple(self._find_narrow(ids[:1], found.inside)))
        examined = known[self.module_name]
        self._adopt(examined)
        trained = None if trained is None else trained.to(self.device)
        with self._trained_at(trained):
            cache, hidden = self._run(ids, positions, examined.inside)
        return replace(cache, trained=trained, per_row=self._per_row(cache, ids, examined.inside)), hidden

    def from_cache(self, cache: ActivationCache) -> Tensor:
        """The final hidden states, ``[B, T, D]``, that the whole model would give with its weights as they are now."""
        blocks = self.blocks
        hidden = cache.hidden.to(self.place)
        with self._trained_at(cache.trained):
            if cache.inner is not None:
                hidden = hidden + self.module(cache.inner.to(self.place)).view(hidden.shape)
                blocks = blocks[1:]
            for block, (args, kwargs) in zip(blocks, cache.arguments, strict=True):
                with ExitStack() as patches:
                    if block is self.blocks[-1]:
                        spared = len(hidden) * (hidden.shape[1] - cache.positions.shape[1])
                        for module, parameters in self._narrow:
                            if spared * parameters >= WORTH:
                                patches.enter_context(narrowed(module, cache.places))
                    hidden = _hidden(block(hidden, *args, **kwargs))
        hidden = cache.places.read(hidden)
        for module in self._after:
            hidden = module(hidden)
        return hidden

    def logits(self, hidden: Tensor, head_rows: HeadRows | None = None) -> Tensor:
        """Logits of final hidden states, in fp32, through whatever the model's own forward does after its blocks.

        ``[B, T, V]``, or ``[B, T, K]`` where :meth:`head_rows` chose ``K`` tokens of each position.
        """
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        with ExitStack() as patches:
            if head_rows is not None:
                patches.enter_context(forward_is(head, head_rows))
            if self._head_alone:
                logits: Tensor = head(hidden.to(head.weight.dtype))  # Mamba's residual stream is fp32
            else:
                output = self._result(last_hidden_state=hidden)  # type: ignore[call-arg]
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

    def _adopt(self, examined: Examined) -> None:
        narrow = [self.blocks[-1].get_submodule(name) for name in examined.narrow]
        self._narrow = [(module, sum(p.numel() for p in module.parameters())) for module in narrow]
        self._head_alone = examined.head_alone
        self._result = examined.result
        self._after = [self.holder.get_submodule(name) for name in examined.after]

    @contextmanager
    def _trained_at(self, trained: Tensor | None) -> Iterator[None]:
        """Inside, the edited weights get gradients from the tokens in ``trained`` only; ``None`` is all."""
        with ExitStack() as patches:
            if trained is not None:
                for module in self.edited:
                    patches.enter_context(forward_is(module, trained_only_at(module.forward, trained)))
            yield

    @torch.no_grad()
    def _per_row(self, cache: ActivationCache, ids: Tensor, inside: bool) -> tuple[int, ...]:
        """See :class:`ActivationCache`: what of the blocks' arguments grows with the number of rows, and how.

        It is found by running the same row two and three times. That is done once for each kind of arguments: a mask,
        for example, may be there for some lengths alone.
        """
        leaves, tree = tree_flatten(cache.arguments)
        kind = (self.module_name, str(tree), tuple(leaf.ndim if isinstance(leaf, Tensor) else -1 for leaf in leaves))
        known = _PER_ROW.setdefault(self.model, {})
        if kind not in known:
            two, three = (
                tree_flatten(self._run(row, torch.zeros_like(row[:, :1]), inside)[0].arguments)[0]
                for row in (ids[:1].repeat(2, 1), ids[:1].repeat(3, 1))
            )
            if not len(leaves) == len(two) == len(three):
                raise ModelError(f"{type(self.model).__name__} calls its blocks in another way for each batch size")
            known[kind] = tuple(
                c.shape[0] - b.shape[0] if isinstance(b, Tensor) and b.ndim and b.shape != c.shape else 0
                for b, c in zip(two, three, strict=True)
            )
        return known[kind]

    def _run(self, ids: Tensor, positions: Tensor, inside: bool) -> tuple[ActivationCache, Tensor]:
        calls: list[Arguments] = []
        after: list[nn.Module] = []
        kept: dict[str, Tensor] = {}
        with ExitStack() as hooks:

            def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                calls.append((args, dict(kwargs)))

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
            result = self.holder(input_ids=ids, use_cache=False, return_dict=True)
        if len(calls) != len(self.blocks) or (inside and "rest" not in kept):
            raise ModelError(f"{len(self.blocks)} blocks were to run once each, but {len(calls)} calls were seen")
        self._after, self._result = after, type(result)
        inputs, arguments = [], []
        for args, kwargs in calls:
            inputs.append(args[0] if args else kwargs.pop("hidden_states"))
            arguments.append((args[1:], kwargs))
        if inside:
            cache = ActivationCache(kept["rest"], kept["inner"], arguments[1:], positions)
        else:
            cache = ActivationCache(inputs[0].detach(), None, arguments, positions)
        return cache, cache.places.read(result.last_hidden_state)

    @torch.no_grad()
    def _examine(self, ids: Tensor) -> Examined | None:
        """Where the cache may begin and what follows it; :class:`ModelError` if it is exact from neither place.

        ``None`` where logits are NaN or infinite and nothing can be told; the loss will be, too.
        The matrix's output is disturbed after the capture, so that everything it feeds must answer for itself.
        """
        # Two rows of other tokens, run in the other order: rows are sliced out of batches.
        ids = torch.cat([ids, ids.flip(1)])
        swapped = torch.tensor([1, 0], device=ids.device)
        positions = torch.arange(ids.shape[1], device=ids.device).repeat(2, 1)
        disturbance: list[Tensor] = []

        def disturb(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if not disturbance:
                noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
                scale = output.detach().float().std().nan_to_num(1.0, 1.0, 1.0).item() + 1e-6
                disturbance.append((3 * scale * noise).to(output))
            return output + disturbance[0].view(output.shape)

        found = "cannot be tried"
        for inside in (True, False):
            try:
                cache, before = self._run(ids, positions, inside)
                cache = replace(cache, per_row=self._per_row(cache, ids, inside)).rows(swapped)
            except ModelError:
                if inside:
                    continue
                raise
            handle = self.module.register_forward_hook(disturb)
            try:
                full = self.model(input_ids=ids[swapped], use_cache=False, return_dict=True).logits.float()
                hidden = self.from_cache(cache)
                replayed = self.logits(hidden).to(full.device)
                head = self.model.get_output_embeddings()  # type: ignore[operator]
                alone = head(hidden.to(head.weight.dtype)).float()
                pair = torch.stack([positions % full.shape[-1], full.argmax(-1).to(positions.device)], -1)
                rows = self.head_rows(pair)
                part = None if rows is None else self.logits(hidden, rows).to(full.device)
            except torch.OutOfMemoryError:
                raise
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
                # Blocks or a head that want more than what they were seen to be given.
                found = f"fails ({type(error).__name__}: {error})"
                continue
            finally:
                handle.remove()
            if not torch.isfinite(full).all():
                return None
            half = next(self.model.parameters()).dtype in (torch.float16, torch.bfloat16)
            # What rounding may cost: a share of the change, and of the numbers themselves.
            change = (full - self.logits(before[swapped.to(before.device)]).to(full.device)).norm()
            allowed = (0.05 if half else 1e-3) * change + (2e-2 if half else 1e-5) * full.norm()
            difference = (full - replayed).norm()
            if part is not None:
                difference = torch.maximum(difference, (full.gather(-1, pair.to(full.device)) - part).norm())
            if difference <= allowed:
                after = [name for name, child in self.holder.named_children() if child in self._after]
                return Examined(inside, torch.equal(replayed, alone.to(full.device)), self._result, tuple(after))
            found = f"differs from the full forward (by {(difference / change).item():.2g} of the change)"
        raise ModelError(
            f"{type(self.model).__name__}: running what lies above {self.module_name} from its cache {found}; this "
            "architecture cannot be edited"
        )

    @torch.no_grad()
    def _find_narrow(self, ids: Tensor, inside: bool) -> list[str]:
        """Modules of the last block, the largest first, that may be run at the answer positions only.

        Each is tried: with NaN for whatever it gives elsewhere the final hidden state of the last position must stay.
        """
        ids = ids.repeat(1, -(-16 // ids.shape[1]))[:, :16]  # a few tokens tell more than one or two
        cache, _ = self._run(ids, torch.tensor([[ids.shape[1] - 1]], device=ids.device), inside)
        self._narrow = []
        expected = self.from_cache(cache)
        last = self.blocks[-1]
        names = [name for name, _ in last.named_children()]
        found: list[str] = []
        if inside and len(self.blocks) == 1:
            return found
        while names:
            name = names.pop(0)
            module = last.get_submodule(name)
            if not any(p.ndim > 1 for p in module.parameters()):
                continue
            try:
                with narrowed(module, cache.places, torch.nan):
                    same = torch.allclose(self.from_cache(cache), expected, rtol=0.05, atol=0.05)
            except (RuntimeError, TypeError, ValueError):  # it is called in another way
                same = False
            if same:
                found.append(name)
            else:
                names += [f"{name}.{child}" for child, _ in module.named_children()]
        return found


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
