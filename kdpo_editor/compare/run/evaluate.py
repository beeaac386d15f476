"""One evaluator for every method: teacher forcing as EasyEdit defines it, and free generation beside it.

Teacher-forced accuracy is the share of the answer's tokens that are the argmax after ``prompt + " " + answer``;
locality is the share that stays the same. EasyEdit defines both so, and
``tests/test_compare.py`` holds this module to its figures. What it does differently: prompts are scored in padded
batches (on the right, which a causal mask makes exact), dropout is off whatever state a method left the model in, and
nothing of the model or tokenizer is changed.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...engine.batches import padded
from ...engine.patches import Places, forward_is
from ...engine.weights import as_found
from ...requests import tokenize
from .prefixes import Prefixes

# Bytes of logits in one batch.
LOGITS_BUDGET = 512e6


@dataclass(frozen=True)
class Generation:
    """A greedy answer, and whether the model ended it (by its end token, or a line break)."""

    text: str
    stopped: bool

    def answers(self, accepted: Sequence[str]) -> bool:
        """Whether it is one of the accepted answers, normalised as SQuAD does, and stopped."""
        return self.stopped and normalised(self.text) in {normalised(answer) for answer in accepted}


@dataclass
class Evaluator:
    """Scores a model.

    ``model``: what answers; also one of EasyEdit's wrappers around a model (WISE, GRACE).
    ``alone``: score prompts one by one, for methods that take one decision for a whole batch (WISE).
    ``alike``: batch only prompts of equal length, for methods that act at a fixed position (GRACE).
    ``at``: called before each such batch with the index of the prompts' last token.
    ``prefixes``: what the blocks below every edit made of prompts that were scored before, for methods that change
    matrices in place.
    """

    model: Any
    tok: Any
    batch_size: int = 256
    alone: bool = False
    alike: bool = False
    at: Any = None
    prefixes: Prefixes | None = None

    @property
    def _inner(self) -> nn.Module:
        model = self.model
        return model if hasattr(model, "get_output_embeddings") else model.model  # type: ignore[no-any-return]

    @torch.no_grad()
    def predict(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """For each prompt and answer, the argmax tokens at the answer's positions and the answer's own tokens."""
        asked = [{"prompt": p, "target_new": a} for p, a in pairs]
        edits = [tokens for tokens, *_ in tokenize(self.tok, asked)] if asked else []
        if self.prefixes is not None:
            return [(best, e.chosen.tolist()) for best, e in zip(self.prefixes.predict(edits), edits, strict=True)]
        found: list[tuple[list[int], list[int]]] = [([], [])] * len(edits)
        inner = self._inner
        device = inner.get_input_embeddings().weight.device  # type: ignore[operator]
        with as_found(inner):
            for group in self._batches([len(e.sequence) for e in edits], [len(e.prompt) for e in edits]):
                ids, _, answer, positions = padded([edits[i] for i in group])
                mask = torch.zeros_like(ids)
                for row, i in enumerate(group):
                    mask[row, : len(edits[i].sequence)] = 1
                if self.at is not None:
                    self.at(len(edits[group[0]].prompt) - 1)
                with _logits_at(inner, positions.to(device)):
                    logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
                best = logits.argmax(-1).cpu()
                for row, i in enumerate(group):
                    found[i] = best[row][answer[row]].tolist(), edits[i].chosen.tolist()
        return found

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], longest: int, forced: bool = False) -> list[Generation]:
        """Greedy continuations of at most ``longest`` tokens; ``forced`` ignores the end token up to there."""
        found = [Generation("", False)] * len(prompts)
        inner, tok = self._inner, self.tok
        device = inner.get_input_embeddings().weight.device  # type: ignore[operator]
        encoded = [torch.tensor(tok(p)["input_ids"]) for p in prompts]
        with as_found(inner):
            for group in self._batches([len(e) + longest for e in encoded], [len(e) for e in encoded]):
                width = max(len(encoded[i]) for i in group)
                ids = torch.full((len(group), width), tok.pad_token_id)
                mask = torch.zeros_like(ids)
                for row, i in enumerate(group):
                    ids[row, width - len(encoded[i]) :] = encoded[i]
                    mask[row, width - len(encoded[i]) :] = 1
                out = self.model.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    max_new_tokens=longest,
                    min_new_tokens=longest if forced else None,
                    do_sample=False,
                    num_beams=1,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    use_cache=True,
                    pad_token_id=tok.pad_token_id,
                )[:, width:].cpu()
                for row, i in enumerate(group):
                    found[i] = self._generation(out[row].tolist())
        return found

    def _generation(self, ids: list[int]) -> Generation:
        configured = getattr(self._inner, "generation_config", None)
        ends = getattr(configured, "eos_token_id", None)
        known = {self.tok.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
        first = next((i for i, token in enumerate(ids) if token in known), len(ids))
        ended, ids = first < len(ids), ids[:first]
        text = self.tok.decode(ids, skip_special_tokens=True)
        line, newline, _ = text.lstrip().partition("\n")
        return Generation(line.strip(), ended or bool(newline))

    @torch.no_grad()
    def perplexity(self, documents: Sequence[str], window: int = 256) -> float:
        """Of text, read in windows that do not overlap: exp of the mean negative log-likelihood per token."""
        inner = self._inner
        device = inner.get_input_embeddings().weight.device  # type: ignore[operator]
        pieces = [p for d in documents for p in torch.tensor(self.tok(d)["input_ids"]).split(window) if len(p) > 1]
        total, count = 0.0, 0
        with as_found(inner):
            for group in self._batches([len(p) for p in pieces], [0] * len(pieces)):
                ids = nn.utils.rnn.pad_sequence([pieces[i] for i in group], batch_first=True).to(device)
                mask = nn.utils.rnn.pad_sequence([torch.ones_like(pieces[i]) for i in group], batch_first=True)
                labels = ids.where(mask.bool().to(device), -100)[:, 1:]
                if self.at is not None:
                    self.at(ids.shape[1] - 1)
                logits = self.model(input_ids=ids, attention_mask=mask.to(device)).logits[:, :-1].float()
                total += float(nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="sum"))
                count += int((labels != -100).sum())
        return math.exp(min(total / count, 700.0)) if count else math.nan

    def _batches(self, lengths: list[int], prompts: list[int]) -> Iterator[list[int]]:
        """Indices in batches of similar length, bounded by ``batch_size`` rows and the logits' memory."""
        vocabulary = self._inner.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
        group: list[int] = []
        for i in sorted(range(len(lengths)), key=lambda i: (prompts[i] if self.alike else 0, lengths[i])):
            rows = len(group) + 1
            full = rows > (1 if self.alone else self.batch_size) or rows * lengths[i] * vocabulary * 4 > LOGITS_BUDGET
            if group and (full or (self.alike and prompts[i] != prompts[group[0]])):
                yield group
                group = []
            group.append(i)
        if group:
            yield group


@contextmanager
def _logits_at(model: nn.Module, positions: Tensor) -> Iterator[None]:
    """Inside, ``model`` gives logits at ``positions``, ``[B, T]``, only: ``[B, T, V]``, for a fraction of the work."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    whole = head.forward

    with forward_is(head, lambda hidden: whole(Places(positions, hidden.shape[1]).read(hidden))):
        yield


def accuracy(predicted: list[int], wanted: list[int]) -> float:
    """The share of positions that agree, ``nan`` without any."""
    return sum(a == b for a, b in zip(predicted, wanted, strict=True)) / len(wanted) if wanted else math.nan


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous spaces (Rajpurkar et al. 2016, SQuAD)."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def ngram_entropy(text: str) -> float:
    """Fluency as ROME defines it: entropies of 2- and 3-grams in bits, averaged with weights 2/3 and 4/3."""
    from nltk.tokenize import NLTKWordTokenizer  # type: ignore[import-untyped]

    words = NLTKWordTokenizer().tokenize(text)

    def entropy(n: int) -> float:
        counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
        total = sum(counts.values())
        return -sum(c / total * math.log2(c / total) for c in counts.values()) if total else 0.0

    return (entropy(2) * 2 / 3 + entropy(3) * 4 / 3) / 2


def fingerprint(model: nn.Module) -> str:
    """Hash (sha256, hex) of every parameter's and buffer's name, type, shape and bits."""
    import hashlib

    digest = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
