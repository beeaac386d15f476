"""Where a model recalls its facts: causal tracing (Meng et al. 2022, "Locating and Editing Factual Associations").

A fact's subject is made unreadable by noise on its embeddings, and the answer becomes unlikely. Then what one matrix
wrote at one token is put back as it was without the noise. How far that brings the answer's probability back is the
indirect effect of that layer and token (section 2.1 there). Blocks whose effect at the subject's last token is largest
are those to edit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..derived import FOR_SUBJECT, complete
from ..engine.patches import forward_is
from ..engine.weights import as_found, find_blocks
from ..errors import ModelError, RequestError
from ..hparams import KDPOHyperParams
from ..requests.tokens import EditTokens, tokenize

TOKENS = (
    "first of the subject",
    "middle of the subject",
    "last of the subject",
    "first after it",
    "further ones",
    "last of the prompt",
)
"""The kinds of tokens, in the order of a prompt. Those of one kind are restored together."""
SUBJECT_LAST = TOKENS.index("last of the subject")
# As in the paper: noise of three standard deviations of the embeddings, and the outputs of ten layers restored of 48.
NOISE = 3.0
WINDOW = 10 / 48
# Draws of the noise for each fact. The paper takes ten; twenty facts have a draw each.
SAMPLES = 1


@dataclass(frozen=True)
class CausalTrace:
    """The mean over some facts.

    ``effects``: ``[6, blocks]`` fp32, the indirect effect, in probability, for each of :data:`TOKENS` and each block;
    NaN where no fact has such a token.
    ``clean``, ``corrupted``: the probability of the answer's first token without and with noise.
    ``facts``: how many there were.
    ``matrix``: the matrices that were restored, with ``{}`` for the block's index.
    """

    effects: Tensor
    clean: float
    corrupted: float
    facts: int
    matrix: str

    @property
    def layers(self) -> list[int]:
        """The blocks to edit through the subject's last token: spread as those that are edited by default.

        The last of them is the one of the largest effect, or the lowest that leaves room for the others.
        """
        depth = self.effects.shape[1]
        below = [round((FOR_SUBJECT[-1] - place) * depth) for place in FOR_SUBJECT]
        strongest = int(self.effects[SUBJECT_LAST].nan_to_num(-1).argmax())
        last = min(max(strongest, *below), depth - 2)
        return sorted({max(0, last - distance) for distance in below})


def trace(model: nn.Module, tok: Any, facts: Sequence[dict[str, str]], hparams: KDPOHyperParams) -> CausalTrace:
    """Trace ``facts``, which the model should know, through the matrices of ``hparams.rewrite_module_tmp``.

    Args:
        model: a decoder-only ``transformers`` model, left as it is.
        tok: its tokenizer.
        facts: ``[{"prompt": str, "subject": str, "target_new": str}, ...]``, the last being the known answer.
        hparams: names the matrices, or leaves that to the model's structure.

    Raises:
        RequestError: there are no facts, or one does not hold its subject.
        ModelError: as :func:`traced_modules`.
    """
    if not facts:
        raise RequestError("there are no facts to trace")
    hparams = complete(hparams, model)
    modules = traced_modules(model, hparams)
    blocks = list(find_blocks(model, hparams))
    tokens = [phrasings[0] for phrasings in tokenize(tok, facts, with_subject=True)]
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    noise = NOISE * embeddings.weight.float().std().item()
    generator = torch.Generator().manual_seed(0)
    found, clean, corrupted = [], [], []
    with torch.no_grad(), as_found(model):
        for fact in tqdm(tokens, desc="causal tracing", unit="fact", delay=1, disable=None, leave=False):
            effects, before, after = _trace_one(model, blocks, modules, embeddings, fact, noise, generator)
            found.append(effects)
            clean.append(before)
            corrupted.append(after)
    return CausalTrace(torch.stack(found).nanmean(0), fmean(clean), fmean(corrupted), len(tokens), hparams.place[1])


def traced_modules(model: nn.Module, hparams: KDPOHyperParams) -> list[nn.Module]:
    """Find the module of ``hparams.rewrite_module_tmp`` in each block of ``model``.

    Raises :class:`~kdpo_editor.ModelError` where a block has none, as in mixtures of experts and hybrid models.
    """
    hparams = complete(hparams, model)
    names = [hparams.place[1].format(i).removesuffix(".weight") for i in range(len(find_blocks(model, hparams)))]
    known = dict(model.named_modules())
    missing = next((name for name in names if name not in known), None)
    if missing is not None:
        raise ModelError(f"there is no module {missing}; only models that have one in each block can be traced")
    return [known[name] for name in names]


def _trace_one(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    modules: Sequence[nn.Module],
    embeddings: nn.Module,
    fact: EditTokens,
    noise: float,
    generator: torch.Generator,
) -> tuple[Tensor, float, float]:
    """The effects ``[6, blocks]`` of one fact, and the answer's probability without and with noise."""
    device = next(embeddings.parameters()).device
    prompt, answer = fact.prompt.to(device), int(fact.chosen[0])
    groups = _groups(fact)
    present = [group for group, where in enumerate(groups) if where]
    begin, end = fact.subject
    width = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    drawn = noise * torch.randn(SAMPLES, end - begin, width, generator=generator)

    # Most models can be told that the head is needed for the last token alone.
    last = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}

    def probabilities(rows: int) -> Tensor:
        logits = model(input_ids=prompt.expand(rows, -1), use_cache=False, **last).logits[:, -1]
        found: Tensor = logits.float().softmax(-1)[:, answer].cpu()
        return found

    with _outputs(modules) as written:
        clean = probabilities(1).item()
    # One row for each kind of token and each draw of the noise; the kinds share their draws.
    rows = torch.arange(len(present) * SAMPLES).view(len(present), SAMPLES)
    effects = torch.full((len(TOKENS), len(modules)), torch.nan)
    with _corrupted(embeddings, begin, drawn, len(present)):
        with _outputs(blocks) as given:
            before = probabilities(rows.numel()).mean().item()
        window = max(1, round(WINDOW * len(modules)))
        for layer in range(len(modules)):
            first = layer - window // 2
            restored = range(max(0, first), min(len(modules), first + window))
            with ExitStack() as hooks:
                for i in range(restored.start):  # as without anything restored
                    hooks.enter_context(forward_is(blocks[i], _always(given[i])))
                for i in restored:
                    hook = _restore(written[i], [(rows[n], groups[group]) for n, group in enumerate(present)])
                    hooks.callback(modules[i].register_forward_hook(hook).remove)
                found = probabilities(rows.numel()).view(len(present), SAMPLES).mean(1)
            effects[present, layer] = found - before
    return effects, clean, before


def _groups(fact: EditTokens) -> list[list[int]]:
    """The positions of each of :data:`TOKENS` in a prompt. A token is of one kind: the last one counts before all."""
    begin, end = fact.subject
    last = len(fact.prompt) - 1
    groups = [
        [begin],
        [*range(begin + 1, end - 1)],
        [end - 1],
        [end],
        [*range(end + 1, last)],
        [last],
    ]
    if end - begin == 1:
        groups[0] = []
    return [[i for i in where if i < last or group == len(TOKENS) - 1] for group, where in enumerate(groups)]


@contextmanager
def _outputs(modules: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """Inside, what ``modules`` give is noted, in the order in which they are run."""
    noted: list[Any] = []
    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_hook(lambda _, __, output: noted.append(output)).remove)
        yield noted


def _always(output: Any) -> Callable[..., Any]:
    """A forward that gives ``output``, whatever it is asked."""
    return lambda *_, **__: output


@contextmanager
def _corrupted(embeddings: nn.Module, begin: int, drawn: Tensor, repeats: int) -> Iterator[None]:
    """Inside, the embeddings from ``begin`` on have the noise ``drawn``, ``[S, N, D]``, added, ``repeats`` times."""

    def add(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, begin : begin + drawn.shape[1]] += drawn.repeat(repeats, 1, 1).to(output)
        return output

    handle = embeddings.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _restore(clean: Tensor, places: Sequence[tuple[Tensor, list[int]]]) -> Any:
    """A hook that puts what a module gave of one row, ``clean``, into some rows at some tokens."""
    clean = clean.view(-1, clean.shape[-1])

    def put(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        length = clean.shape[0]
        shaped = output.view(-1, length, output.shape[-1]).clone()
        for rows, where in places:
            for token in where:
                shaped[rows, token] = clean[token]
        return shaped.view(output.shape)

    return put
