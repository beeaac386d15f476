"""A model that one method edits, through the framework's own function for that method.

Around the function, which is never changed, stands what a fair comparison needs; each named here and in the docs:

*seeding*        Every edit starts from a seed of its own, so that a resumed run draws what an undisturbed one drew.
*contexts*       ROME, its successors and WISE draw random contexts from the model once per process and use them for
                 every model after it. They get contexts drawn for this model and seed.
*adapters*       LoRA and DPO return an adapter around the model; a DPO sequence starts a new one at zero for every
                 edit and loses the last. The adapter is folded into the weights after each edit.
*surroundings*   Training mode, dropout, ``requires_grad``, gradient checkpointing, ``use_cache``, hooks and the
                 tokenizer's padding are put back as they were after every edit.
*undoing*        Weights are put back from copies, and :func:`~.evaluate.fingerprint` tells whether all of it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed

from ... import easyedit
from ...editing import prepare
from ...errors import HyperParamsError
from .datasets import Record
from .evaluate import Evaluator

# How ROME and MEMIT begin the contexts that they put before a prompt, and WISE.
DOT_STARTS = ("The", "Therefore", "Because", "I", "You")
PLAIN_STARTS = ("I", "You", "Because", "Yes", "Q: ")
# These edit where a prompt names its subject, and put the rest of it through ``str.format``.
NEED_SUBJECT = ("ROME", "R-ROME", "SimIE", "MEMIT", "EMMET", "PMET", "CORE", "AlphaEdit", "SPHERE")
DRAW_CONTEXTS = (*NEED_SUBJECT, "WISE")
# These count tokens from the left, whatever padding side EasyEdit gives them.
COUNT_FROM_LEFT = ("PMET", "SimIE")
# What these remember is not in the weights: a resumed run makes the edits again.
REMEMBER = ("WISE", "GRACE", "SimIE", "ULTRAEDIT")


class Editing:
    """Edits ``model`` in place.

    Args:
        model, tok: a causal language model, in evaluation mode, and its tokenizer.
        config: the method's settings with ``alg_name``, as in its file under ``hparams/``; ``None`` edits nothing.
        seed: of everything random.
        folder: where the framework keeps statistics (``stats_dir``) and null spaces.
        unrelated: prompts that no edit is about, for methods that ask for one (WISE).
        sequence: whether edits will be made one after the other without undoing.
        outside: a function and the settings it reads, as :func:`~.outside.editor` finds them, instead of a method of
            the framework with ``config``.

    Raises:
        HyperParamsError: the settings do not fit, or the installed form lacks the method.
    """

    def __init__(
        self,
        model: nn.Module,
        tok: Any,
        config: dict[str, Any] | None,
        *,
        seed: int,
        folder: Path,
        unrelated: Sequence[str] = (),
        sequence: bool = True,
        outside: tuple[Callable[..., Any], Any] | None = None,
    ) -> None:
        self.base, self.tok, self.seed = model, tok, seed
        self.unrelated = list(unrelated) or [""]
        self.model: Any = model
        self.originals: dict[str, Tensor] = {}
        self.count = 0
        self.ignored: list[str] = []
        self._reset: Callable[[], Any] | None = None
        self.config = config or {}
        self.outside = outside is not None
        self.algorithm: str = "" if self.outside else self.config.get("alg_name", "")
        if config is None:
            return
        if outside is not None:
            self.apply, self.hparams = outside
            self.hparams.device = next(model.parameters()).device
            tok.padding_side = "right" if self.config.get("alg_name") in easyedit.RIGHT_PADDED else "left"
            set_seed(seed)
            easyedit.forget()
            return
        known = easyedit.methods()
        if self.algorithm not in known:
            raise HyperParamsError(
                f"EasyEdit's {easyedit.form()} form has no method {self.algorithm!r}; it has {', '.join(known)}"
            )
        self.apply = known[self.algorithm]
        device = next(model.parameters()).device
        placed = {"device": "cpu" if device.type == "cpu" else device.index or 0}
        if "stats_dir" in config:
            placed["stats_dir"] = str(folder)
        if "P_loc" in config:
            name = str(config["model_name"])
            which = f"{Path(name).name}-{config['layers']}-{config['nullspace_threshold']}"
            which += f"-{hashlib.sha256(name.encode()).hexdigest()[:8]}" if "/" in name else ""
            placed["P_loc"] = str(folder / f"null-space-{which}.pt")
        self.hparams, self.ignored = easyedit.settings({**config, **placed})
        if self.algorithm == "WISE":
            if not unrelated:
                raise HyperParamsError(
                    "n_edits: WISE needs a record that is never edited, and none is left; ask for fewer edits than "
                    "there are records"
                )
            self.hparams.sequential_edit = sequence
        right = self.algorithm in easyedit.RIGHT_PADDED or self.algorithm in COUNT_FROM_LEFT
        tok.padding_side = "right" if right else "left"
        set_seed(seed)
        easyedit.forget(_contexts(model, tok) if self.algorithm in DRAW_CONTEXTS else None)
        if "P_loc" in config and not Path(self.hparams.P_loc).exists():
            with easyedit.on_device(self.hparams), easyedit.quietly():
                easyedit.save_null_space(model, tok, self.hparams)

    @property
    def resumable(self) -> bool:
        """Whether :meth:`state` holds all that edits leave behind; if not, resuming makes the edits again."""
        return not (self.outside or self.algorithm in REMEMBER or self.config.get("replay", False))

    def prepare(self) -> None:
        """Compute what the first edit needs once, on the unedited model: KDPO's second moments."""
        if self.algorithm == "KDPO":
            prepare(self.base, self.tok, self.hparams)

    def evaluator(self) -> Evaluator:
        """For the model as it is now."""
        alone, alike = (self._reset is not None and self.algorithm == name for name in ("WISE", "GRACE"))
        at = self._ask_at if alike else None
        context = getattr(self.model, "context", None) if self.outside else None
        return Evaluator(self.model, self.tok, alone=alone, alike=alike, at=at, context=context)

    def edit(self, records: Sequence[Record]) -> None:
        """Make the edits that ``records`` ask for, in one call of the method."""
        self.count += 1
        if not self.config:
            return
        set_seed((self.seed * 1_000_003 + self.count) % 2**32)
        easyedit.prepare(self.algorithm, self.base, self.hparams)
        with self._surroundings(), easyedit.on_device(self.hparams), easyedit.quietly():
            edited, copies = self.apply(
                self.model if self.outside else self.base,
                self.tok,
                [self._request(record) for record in records],
                self.hparams,
                copy=False,
                return_orig_weights=True,
                keep_original_weight=True,
            )
        if hasattr(edited, "merge_and_unload"):
            self._fold(edited)
        elif callable(copies):
            self.model, self._reset = edited, copies if self._reset is None else self._reset
        else:
            self.model = edited
            for name, original in (copies or {}).items():
                self.originals.setdefault(name, original)

    def undo(self) -> None:
        """Put the model back as it was before the first edit."""
        if self._reset is not None:
            with torch.no_grad():
                self._reset()
            self._reset = None
        self.model = self.base
        for name, original in self.originals.items():
            with torch.no_grad():
                self.base.get_parameter(name).copy_(original)
        self.originals = {}
        self.count = 0
        easyedit.forget_history(self.algorithm, getattr(self, "hparams", None))

    def state(self) -> dict[str, Tensor]:
        """The edited weights by name, and what the method remembers beside them."""
        weights = {name: self.base.get_parameter(name).detach().cpu().clone() for name in self.originals}
        return {**weights, **easyedit.memory(self.algorithm)}

    def load_state(self, state: dict[str, Tensor], count: int) -> None:
        """Go on from a :meth:`state` after ``count`` calls of :meth:`edit`, on a model as it was at the start.

        Raises ``ValueError`` for weights that the model lacks or has in another size.
        """
        rest = dict(state)
        for name, parameter in self.base.named_parameters():
            if name in rest:
                saved = rest.pop(name)
                if saved.shape != parameter.shape or saved.dtype != parameter.dtype:
                    raise ValueError(f"{name} was saved as {saved.dtype} {tuple(saved.shape)}, the model's differs")
                self.originals[name] = parameter.detach().clone()
                with torch.no_grad():
                    parameter.copy_(saved)
        rest = easyedit.remember(self.algorithm, rest)
        if rest:
            raise ValueError(f"the model has no {', '.join(rest)}")
        self.count = count

    def _request(self, record: Record) -> dict[str, Any]:
        return {
            "case_id": record.index,
            "prompt": record.prompt,
            "target_new": easyedit.target_as_told(self.algorithm, self.tok, record.target_new),
            "ground_truth": record.ground_truth,
            "target_neg": record.ground_truth,
            "subject": record.subject,
            "loc_prompt": self.unrelated[self.count % len(self.unrelated)],
            "portability": {},
            "locality": {},
        }

    def _fold(self, edited: Any) -> None:
        """Merge an adapter into the weights and take it off."""
        for name, module in edited.named_modules():
            if hasattr(module, "base_layer") and hasattr(module, "merge"):
                full = f"{name.removeprefix('base_model.model.')}.weight"
                self.originals.setdefault(full, module.base_layer.weight.detach().clone())
        edited.eval()
        merged = edited.merge_and_unload()
        if hasattr(merged, "peft_config"):
            del merged.peft_config
        assert merged is self.base

    @contextlib.contextmanager
    def _surroundings(self) -> Iterator[None]:
        model, tok = self.base, self.tok
        config: Any = model.config
        kept = (config.use_cache, tok.padding_side, tok.pad_token_id)
        supports = model.__dict__.get("supports_gradient_checkpointing")
        training = [module for module in model.modules() if module.training]
        needing = [p for p in model.parameters() if p.requires_grad]
        checkpointing = _checkpointed(model)
        hooks = [(d, set(d)) for m in model.modules() for d in (m._forward_hooks, m._forward_pre_hooks)]
        try:
            yield
        finally:
            if _checkpointed(model) and not checkpointing:
                with warnings.catch_warnings():  # transformers 5 renames it
                    warnings.simplefilter("ignore", FutureWarning)
                    model.gradient_checkpointing_disable()  # type: ignore[operator]
            for registered, known in hooks:
                for handle in set(registered) - known:
                    del registered[handle]
            if supports is None:
                model.__dict__.pop("supports_gradient_checkpointing", None)
            config.use_cache, tok.padding_side, tok.pad_token_id = kept
            model.eval()
            for module in training:
                module.training = True
            model.requires_grad_(False)
            for parameter in needing:
                parameter.requires_grad_(True)
            for parameter in model.parameters():
                parameter.grad = None

    def _ask_at(self, position: int) -> None:
        """Tell GRACE which position to look a key up at."""
        if self._reset is not None:
            for module in self.base.modules():
                if hasattr(module, "key_id"):
                    setattr(module, "key_id", position)  # noqa: B010  (not a tensor, whatever modules are typed as)


def available(config: dict[str, Any]) -> bool:
    """Whether the installed form of EasyEdit has the method that ``config`` (with its ``alg_name``) is for."""
    if config["alg_name"] == "FT" and config.get("objective_optimization") == "target_new":
        return easyedit.is_upstream()  # the PyPI form knows FT-L only
    if config["alg_name"] == "LoRA" and config.get("lora_type") == "lora":
        return easyedit.is_upstream()  # the PyPI form knows AdaLoRA only
    return config["alg_name"] in easyedit.methods()


def _checkpointed(model: nn.Module) -> bool:
    """Whether any block recomputes its activations; transformers renames its own answer to this."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _contexts(model: Any, tok: Any) -> dict[str, list[str]]:
    """Contexts of a few random words by ``model``, ending in ``{}``; see :func:`~kdpo_editor.easyedit.forget`."""

    def sampled(starts: Sequence[str], length: int) -> list[str]:
        texts = []
        for start in starts:
            ids = tok(start, return_tensors="pt")["input_ids"].to(model.device)
            new = max(1, length - ids.shape[1])
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=5,
                top_p=None,
                temperature=1.0,
                max_new_tokens=new,
                min_new_tokens=new,
                pad_token_id=tok.pad_token_id,
            )
            texts.append(tok.decode(out[0], skip_special_tokens=True).replace("{", " ").replace("}", " "))
        return texts

    return {
        "dot": [f"{text}. {{}}" for text in sampled(DOT_STARTS, 10)],
        "plain": [f"{text} {{}}" for length in (5, 10) for text in sampled(PLAIN_STARTS, length)],
    }
