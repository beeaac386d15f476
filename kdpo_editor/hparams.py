"""KDPO's settings, read from EasyEdit-style YAML."""

from __future__ import annotations

import math
import types
import typing
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .errors import SLIP, HyperParamsError, nearest

if TYPE_CHECKING:
    from omegaconf import DictConfig

OBJECTIVES = ("kdpo", "hinge", "ce", "dpo")
OPTIMIZERS = ("adam", "polyak")
SCHEDULES = ("depth_first", "breadth_first")
FACT_TOKENS = ("all", "subject", "subject_last")
# So many sentences are in lifelong/contexts.py.
MOST_CONTEXTS = 3
# What the paper does not have, switched off.
OFF = {
    "optimizer": "adam",
    "margin": 0.0,
    "fact_token": "all",
    "context_templates": 0,
    "schedule": "depth_first",
    "replay": False,
    "mom2_weight": 0.0,
    "bf16": False,
}


@dataclass
class KDPOHyperParams:
    """Settings of one KDPO run. Defaults are the paper's for a single edit of a 7B Llama.

    Raises :class:`~kdpo_editor.HyperParamsError`, which names the key and what is allowed, whenever a
    value has the wrong type or is out of range. Numbers that YAML reads as text (``5e-4`` without a dot)
    are understood.
    """

    model_name: str
    """Hugging Face id, folder, or what else :func:`kdpo_editor.load` knows. EasyEdit chooses its loader by what this
    text contains ("llama", "gpt", "qwen", ...)."""
    layers: list[int] | None = None
    """Indices, from 0, of the blocks whose matrix is edited. The paper edits one. ``None``: by the model's depth
    (:func:`kdpo_editor.derived.complete`)."""
    rewrite_module_tmp: str | None = None
    """Dotted name of the edited matrix with ``{}`` for the layer, with or without ``.weight``. ``None``: found from the
    model's own structure, the matrix of a block that writes into the residual stream last. Of routed experts it is the
    parameter that holds the matrices of them all."""
    device: int | str | None = None
    """CUDA index, "cpu" or "cuda:1"; ``None`` is the GPU where there is one. Read by EasyEdit, which puts the
    model there; an edit runs wherever it finds the model."""
    alg_name: str = "KDPO"

    num_steps: int = 8
    """Optimiser steps in a cycle (paper: 8)."""
    cycles: int = 20
    """Cycles at most; each begins with a new negative (paper: 20)."""
    lr: float = 1e-4
    """Adam's learning rate (paper: 1e-4 for single edits, a fifth of it in a sequence); with "polyak" a factor on the
    length of its steps, 1 or a little more."""
    beta: float = 0.1
    """Strength of the pull towards the reference (the paper's beta; DPO, eq. 7)."""
    stop_loss: float = 1e-3
    """A cycle ends before a step whose loss is below this (nats). With "hinge", steps aim so many logits beyond
    ``margin``, and what has the margin is left alone."""
    update_scale: float = 1.0
    """The final weight change is multiplied by this. 2.0 reproduces the authors' release in sequences."""

    optimizer: str = "adam"
    """"adam", the paper's, or "polyak": gradient steps as long as would bring the loss to zero if it were linear
    (:class:`kdpo_editor.engine.optimizers.Polyak`)."""
    objective: str = "kdpo"
    """What is minimised (:mod:`kdpo_editor.objectives`): "kdpo" as published; "hinge", without a reference; "ce",
    cross-entropy, as plain fine-tuning does; or "dpo" for the paper's ablation (free-running rejected answers)."""
    append_eos: bool = False
    """End the answer with the end token, so that free generation learns to stop."""
    margin: float = 0.0
    """Logits by which the new answer must win: the negative is the strongest token within this much of it, and an
    edit is finished only when every token wins by this much."""
    fact_token: str = "all"
    """Through which of the prompt's tokens matrices are trained: "all", those of the request's "subject", or
    "subject_last", its last one alone. But for "all", a request should name its ``subject``; else one is guessed."""
    context_templates: int = 0
    """Each request is also trained behind so many sentences, three at most (:mod:`kdpo_editor.lifelong.contexts`)."""
    schedule: str = "depth_first"
    """"depth_first" edits several requests of one call one after the other, "breadth_first" all at once."""
    memory_budget: float = 1.5e9
    """Bytes of captured inputs, keys and values, graphs and logits of a mini-batch of "breadth_first", and of the copy
    of the weights in bfloat16."""
    bf16: bool | None = False
    """Multiply in bfloat16 while steps are taken, where the model is in fp32; what is edited stays in fp32. ``None`` is
    where a CPU has instructions for it (:mod:`kdpo_editor.engine.half_products`)."""
    cuda_graphs: bool = False
    """Record a cycle's step as a CUDA graph and replay it. On a CPU it does nothing."""
    replay: bool = False
    """Remember the edits of a model, also from earlier calls, and train those again that a new edit pushes below half
    of ``margin``. They are forgotten once the edited matrices are restored or changed by anything else."""
    replay_checks: int = 32
    """Earlier edits that are looked at for each new one, by their prompts: half those that led by least, half a random
    sample. Other phrasings are looked at where the prompt is weak."""
    replay_budget: float = 1e9
    """Bytes of captured inputs that "replay" may hold; beyond it the edits that lead by most are dropped."""

    mom2_weight: float = 0.0
    """How much updates are kept away from inputs that the edited matrix usually sees, by their second moments
    (:mod:`kdpo_editor.lifelong.preconditioning`). Above 0 ``lr`` has another meaning and is to be chosen anew."""
    mom2_dataset: str | None = None
    """The text that second moments are computed from: a file in UTF-8, a paragraph or sentence a line. ``None`` is the
    general text of the package, from the Simple English Wikipedia."""
    mom2_n_samples: int = 20_000
    """Tokens of that text, from its beginning, at most."""

    ledger: str | None = None
    """Folder of an :class:`~kdpo_editor.EditLedger` in which every successful call is journaled; ``None`` is none."""

    max_length: int = 40
    """Truncation length of EasyEdit's evaluation, in tokens. Editing does not truncate."""
    batch_size: int = 1
    """Requests that EasyEdit's ``batch_edit`` hands over in one call; its ``edit`` insists on 1."""
    model_parallel: bool = False
    """Let EasyEdit load the model with ``device_map="auto"``."""
    fp16: bool = False
    """Let EasyEdit (upstream) load the model in half precision."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a setting; a name that is nearly one's is refused, any other is the framework's own affair."""
        known = self.__dataclass_fields__
        if name not in known and (near := nearest(name, known, SLIP)):
            raise HyperParamsError(f"unknown key {name!r}; did you mean {near}?")
        super().__setattr__(name, value)

    def __post_init__(self) -> None:
        types_ = typing.get_type_hints(type(self))
        for f in fields(self):
            setattr(self, f.name, _typed(f.name, getattr(self, f.name), types_[f.name]))
        self._check("alg_name", self.alg_name == "KDPO", '"KDPO"')
        self._check("model_name", bool(self.model_name), "a model's id or folder")
        layers = self.layers
        if layers is not None:
            self._check("layers", bool(layers) and min(layers) >= 0, "at least one index, none negative, or null")
            self._check("layers", len(set(layers)) == len(layers), "each layer once")
        template = self.rewrite_module_tmp
        named = template is None or template.count("{}") == 1
        self._check("rewrite_module_tmp", named, 'a name with one "{}" for the layer, or null')
        for key in ("num_steps", "cycles", "max_length", "batch_size", "replay_checks", "mom2_n_samples"):
            self._check(key, getattr(self, key) >= 1, "at least 1")
        for key in ("lr", "beta", "memory_budget", "replay_budget"):
            self._check(key, getattr(self, key) > 0, "more than 0")
        for key in ("stop_loss", "margin", "mom2_weight"):
            self._check(key, getattr(self, key) >= 0, "0 or more")
        self._check("context_templates", 0 <= self.context_templates <= MOST_CONTEXTS, f"0 to {MOST_CONTEXTS}")
        if isinstance(self.device, int):
            self._check("device", self.device >= 0, 'a CUDA index, "cpu", "cuda:1" or null')
        self._check("objective", self.objective in OBJECTIVES, f"one of {', '.join(OBJECTIVES)}")
        self._check("optimizer", self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}")
        self._check("margin", self.margin > 0 or self.objective != "hinge", "more than 0 where objective is hinge")
        self._check("fact_token", self.fact_token in FACT_TOKENS, f"one of {', '.join(FACT_TOKENS)}")
        self._check("schedule", self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
        self._check("update_scale", self.update_scale == 1.0 or not self.replay, "1 where replay is true")
        polyak = self.optimizer == "polyak"
        self._check("cuda_graphs", not (self.cuda_graphs and polyak), "false where optimizer is polyak")
        if self.objective == "dpo":  # the ablation is the paper's and has nothing beyond it
            for key, off in OFF.items():
                self._check(key, getattr(self, key) == off, f"{off!r} where objective is dpo")
        self._check("ledger", self.ledger != "", "a folder or null")

    @property
    def place(self) -> tuple[list[int], str]:
        """``layers`` and ``rewrite_module_tmp``, once they are known.

        Raises :class:`~kdpo_editor.HyperParamsError` where one is still ``None``.
        """
        if self.layers is None or self.rewrite_module_tmp is None:
            key = "layers" if self.layers is None else "rewrite_module_tmp"
            raise HyperParamsError(f"{key}: not known yet; kdpo_editor.derived.complete finds it from the model")
        return self.layers, self.rewrite_module_tmp

    @property
    def needs_subject(self) -> bool:
        """Whether a request's ``subject`` matters."""
        return self.fact_token != "all"

    @property
    def is_published(self) -> bool:
        """Whether an edit is the paper's: its objective, and nothing beyond it but an end token."""
        return self.objective == "kdpo" and all(getattr(self, key) == off for key, off in OFF.items())

    def _check(self, key: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise HyperParamsError(f"{key}: {getattr(self, key)!r} is not allowed; it must be {allowed}")

    @classmethod
    def from_hparams(cls, path: str | Path, model_name: str | None = None) -> KDPOHyperParams:
        """Read a YAML file; as in EasyEdit the suffix ``.yaml`` may be left out.

        ``hparams/RECIPE/NAME`` names a ready-made file wherever there is no such file: see :func:`settings_file`.
        ``model_name``: of the model, where the file names none.

        Raises ``FileNotFoundError`` for a missing file and :class:`~kdpo_editor.HyperParamsError` for an
        unknown, missing or bad key; both name the file.
        """
        file = settings_file(path)
        try:
            config = yaml.safe_load(file.read_text("utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(f"no hyperparameter file {file}{_neighbours(file)}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise HyperParamsError(f"{file} is not YAML: {error}") from error
        if not isinstance(config, dict):
            raise HyperParamsError(f"{file} must hold keys and values, not {type(config).__name__}")
        if model_name is not None:
            config.setdefault("model_name", model_name)
        try:
            return cls._from_dict(config)
        except HyperParamsError as error:
            raise HyperParamsError(f"{file}: {error}") from None

    @classmethod
    def from_config(cls, config: DictConfig | dict[str, Any]) -> KDPOHyperParams:
        """Make settings of an OmegaConf (Hydra) config or a plain dict; errors as in :meth:`from_hparams`."""
        if not isinstance(config, dict):
            from omegaconf import OmegaConf

            if not OmegaConf.is_dict(config):
                raise HyperParamsError(f"settings are a {type(config).__name__}; they must be a dict or a DictConfig")
            config = typing.cast("dict[str, Any]", OmegaConf.to_container(config, resolve=True))
        return cls._from_dict(config)

    @classmethod
    def _from_dict(cls, config: dict[str, Any]) -> KDPOHyperParams:
        known = {f.name: f for f in fields(cls)}
        for key in config:
            if key not in known:
                near = nearest(str(key), known)
                hint = f"; did you mean {near}?" if near else ""
                raise HyperParamsError(f"unknown key {key!r}{hint or '.'} Known keys: {', '.join(known)}")
        missing = [n for n, f in known.items() if f.default is MISSING and n not in config]
        if missing:
            raise HyperParamsError(f"missing key{'s' if len(missing) > 1 else ''} {', '.join(missing)}")
        return cls(**config)

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain Python values."""
        return asdict(self)


def _typed(key: str, value: Any, wanted: Any) -> Any:
    """``value`` as the type that ``key`` is declared with, or :class:`HyperParamsError`."""
    options = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    for option in options:
        if option is type(None) and value is None:
            return None
        if option == list[int] and isinstance(value, (list, tuple)):
            return [_typed(key, v, int) for v in value]
        if option is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                number = float(value)
            except ValueError:
                continue
            if math.isfinite(number):
                return number
        if option is int and isinstance(value, float) and value.is_integer():
            return int(value)
        if option in (int, str, bool) and type(value) is option:
            return value
    if type(None) in options and value is False:
        return None  # EasyEdit's YAML writes false for none
    words = {type(None): "null", float: "a finite number"}
    names = " or ".join(words.get(o, getattr(o, "__name__", str(o))) for o in options)
    raise HyperParamsError(f"{key}: {value!r} is not allowed; it must be {names.replace('list', 'a list of int')}")


def _neighbours(file: Path) -> str:
    near = sorted(f.stem for f in file.parent.glob("*.yaml")) if file.parent.is_dir() else []
    return f"; {file.parent} has {', '.join(near)}" if near else ""


def settings_folder() -> Path:
    """The folder of ready-made settings, ``hparams/`` of a clone or its copy in an installed package."""
    package = Path(__file__).parent
    clone = package.parent / "hparams"
    return clone if (clone / "KDPO").is_dir() else package / "settings"


def settings_file(path: str | Path) -> Path:
    """The YAML file that ``path`` names; the suffix ``.yaml`` may be left out.

    A path that begins with ``hparams/`` and is not there names a file of :func:`settings_folder`, so that what is
    written for a clone works in any folder.
    """
    file = Path(path)
    if file.suffix not in (".yaml", ".yml"):
        file = file.with_name(file.name + ".yaml")
    if file.exists() or file.parts[0] != "hparams":
        return file
    ready = settings_folder().joinpath(*file.parts[1:])
    return ready if ready.exists() else file


def ready_made(model_name: str, recipe: str = "KDPO") -> Path | None:
    """The file with ready-made settings for a model, by its id or by the last part of its name; ``None`` if none is.

    ``recipe``: the folder of ``hparams/`` that is looked in.
    """
    files = sorted((settings_folder() / recipe).glob("*.yaml"))
    names = {file: (yaml.safe_load(file.read_text("utf-8")) or {}).get("model_name") for file in files}
    last = model_name.rstrip("/").rpartition("/")[2].lower()
    fitting = [f for f, name in names.items() if name == model_name]
    fitting += [f for f, name in names.items() if name is not None and f.stem == last]
    return fitting[0] if fitting else None
