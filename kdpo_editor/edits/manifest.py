"""What is written down about an edit beside its tensors: the model it was made on, what was asked, what came of it."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from dataclasses import field as default
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.traces import EditTrace
from ..engine.weights import uncompiled
from ..errors import DamagedFileError, FingerprintError
from ..hparams import KDPOHyperParams
from ..requests.forms import plain_request
from ..version import __version__
from .storage import NAMES, Spec, dump_json, field, hash_from, spec_from, spec_of

# What a config says that does not make another model of it.
VOLATILE = ("architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "return_dict", "id2label",
            "label2id", "problem_type", "chunk_size_feed_forward")  # fmt: skip
# What it says that another copy of the same model may say otherwise; `dequantised_sha256` beside it tells models apart.
UNCHECKED = ("dequantised_from",)


@dataclass(frozen=True)
class Value:
    """What identifies the value of a matrix: the SHA-256 of its dtype, shape and bytes; and its spec."""

    sha256: str
    spec: Spec

    def to_json(self) -> dict[str, Any]:
        """Hash, shape and dtype as plain values."""
        return {"sha256": self.sha256, "shape": list(self.spec.shape), "dtype": self.spec.dtype}

    @classmethod
    def from_json(cls, record: Any, what: str) -> Value:
        """Of its JSON form; raises :class:`~kdpo_editor.DamagedFileError`, beginning with ``what``."""
        return cls(hash_from(record, "sha256", what), spec_from(record, what))


def value_of(tensor: Tensor) -> Value:
    """The :class:`Value` of a tensor of any shape. Equal values mean bit-identical tensors."""
    spec = spec_of(tensor)
    digest = hashlib.sha256(f"{spec}:".encode())
    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return Value(digest.hexdigest(), spec)


def values_from(record: Any, what: str) -> dict[str, Value]:
    """``{parameter name: Value}`` of its JSON form."""
    if not isinstance(record, dict):
        raise DamagedFileError(f"{what} is a {type(record).__name__}; it must be an object")
    return {name: Value.from_json(value, f"{what}: {name[:200]}") for name, value in record.items()}


@dataclass(frozen=True)
class Change:
    """A matrix before and after the edit. For a low-rank delta ``after`` is what it makes of ``before``."""

    before: Value
    after: Value


def full_form(changes: Mapping[str, Change]) -> dict[str, Value]:
    """What a delta in full form stores, by key: ``before:NAME`` and ``after:NAME``."""
    stored = {f"before:{name}": change.before for name, change in changes.items()}
    return stored | {f"after:{name}": change.after for name, change in changes.items()}


@dataclass
class EditInfo:
    """What was asked in an edit, with which settings, and what came of it.

    ``requests``: of each, the fields that are texts or lists of texts.
    ``outcomes``: ``{"converged": bool, "steps": int}`` of each, measured after the edit (``converged``: teacher-forced,
    the new answer is the model's choice at every position); empty if not known. ``hparams``: all settings, or ``None``.
    ``date``: UTC, ISO 8601. ``versions``: of what made the edit.
    """

    requests: list[dict[str, Any]] = default(default_factory=list)
    outcomes: list[dict[str, Any]] = default(default_factory=list)
    hparams: dict[str, Any] | None = None
    date: str = ""
    versions: dict[str, str] = default(default_factory=dict)

    @classmethod
    def now(
        cls,
        requests: Sequence[Mapping[str, Any]],
        hparams: KDPOHyperParams | None = None,
        traces: Sequence[EditTrace] = (),
    ) -> EditInfo:
        """Of an edit just made."""
        import safetensors
        import transformers

        return cls(
            requests=[texts_of(plain_request(request, f"request {i}")) for i, request in enumerate(requests)],
            outcomes=[{"converged": t.converged, "steps": t.steps} for t in traces],
            hparams=None if hparams is None else hparams.to_dict(),
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            versions={
                "kdpo_editor": __version__,
                "python": platform.python_version(),
                "torch": str(torch.__version__),
                "transformers": transformers.__version__,
                "safetensors": safetensors.__version__,
            },
        )

    def with_edits_of(self, infos: Iterable[EditInfo]) -> EditInfo:
        """This, as what is known of the edits of all ``infos`` together, in order; outcomes where all are known."""
        infos = list(infos)
        known = all(len(info.outcomes) == len(info.requests) for info in infos)
        outcomes = [outcome for info in infos for outcome in info.outcomes] if known else []
        return replace(self, requests=[r for info in infos for r in info.requests], outcomes=outcomes)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Any, what: str) -> EditInfo:
        """Of its JSON form; raises :class:`~kdpo_editor.DamagedFileError`, beginning with ``what``."""
        info = cls(
            requests=field(record, "requests", list, what),
            outcomes=field(record, "outcomes", list, what),
            hparams=field(record, "hparams", (dict, type(None)), what),
            date=field(record, "date", str, what),
            versions=field(record, "versions", dict, what),
        )
        for texts in (*info.requests, info.versions):
            if not isinstance(texts, dict) or texts_of(texts) != texts:
                raise DamagedFileError(f"{what}: requests and versions must hold texts only")
        for request in info.requests:
            field(request, "prompt", str, f"{what}: a request")
            field(request, "target_new", str, f"{what}: a request")
        for outcome in info.outcomes:
            field(outcome, "converged", bool, f"{what}: an outcome")
            field(outcome, "steps", int, f"{what}: an outcome")
        return info


def texts_of(request: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a request that are texts or lists of texts; what else it has does not change an edit."""
    return {
        str(key): value
        for key, value in request.items()
        if isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))
    }


def config_of(model: nn.Module) -> dict[str, Any]:
    """The part of a model's config that tells it from other models, as plain JSON."""
    config = getattr(model, "config", None)
    plain = config.to_dict() if config is not None else {}
    kept = {
        k: v
        for k, v in plain.items()
        if not k.startswith("_") and k not in VOLATILE and not k.endswith(("_token_id", "_token_ids"))
    }
    return dict(json.loads(json.dumps(kept, default=str)))


def config_hash(config: dict[str, Any]) -> str:
    """SHA-256 of :func:`config_of`'s result."""
    return hashlib.sha256(dump_json(config)).hexdigest()


def dtype_of(changes: Mapping[str, Change]) -> str | None:
    """The dtype of the first of the matrices, as torch names it; ``None`` where there are none."""
    return next((change.before.spec.torch_name for change in changes.values()), None)


def state_hash(changes: Mapping[str, Change]) -> str:
    """SHA-256 of the values that ``changes`` leave behind, by which edits are known again."""
    return config_hash({name: change.after.sha256 for name, change in changes.items()})


def check_config(config: dict[str, Any], model: nn.Module, what: str) -> None:
    """Raise :class:`~kdpo_editor.FingerprintError`, beginning with ``what``, unless ``model`` has that config.

    Keys that only one side has are let pass: releases of transformers add and drop some.
    """
    here = config_of(model)
    if config_hash(here) == config_hash(config):
        return
    other = [
        f"{k} is {here[k]!r:.40} here, {config[k]!r:.40} there"
        for k in here
        if k in config and here[k] != config[k] and k not in UNCHECKED
    ]
    if other:
        raise FingerprintError(f"{what} was made on another model: {'; '.join(other[:5])}")


def matrices_of(
    model: nn.Module, specs: Mapping[str, Spec], what: str, any_dtype: bool = False
) -> dict[str, nn.Parameter]:
    """The parameters of ``model`` named in ``specs``.

    Raises :class:`~kdpo_editor.FingerprintError`, beginning with ``what``, if one is missing or of another shape or
    (unless ``any_dtype``) dtype.
    """
    parameters = dict(uncompiled(model).named_parameters())
    found = {}
    for name, spec in specs.items():
        parameter = parameters.get(name)
        if parameter is None:
            raise FingerprintError(f"{what} changes {name}, which this {type(model).__name__} does not have")
        same = parameter.dtype in NAMES and (parameter.shape == spec.shape if any_dtype else spec_of(parameter) == spec)
        if not same:
            here = f"{' x '.join(map(str, parameter.shape))} {NAMES.get(parameter.dtype, parameter.dtype)}"
            raise FingerprintError(f"{what}: {name} is {here} here, {spec} there")
        if parameter.device.type == "meta":
            raise FingerprintError(f"{what}: {name} is on the meta device; load the model first")
        found[name] = parameter
    return found
