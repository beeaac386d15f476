"""Everything it takes to run beside EasyEdit, in both its forms. Nothing else in this package knows of it.

*PyPI* is ``easyeditor==0.0.1.dev0`` (2023); *upstream* is a checkout of ``zjunlp/EasyEdit``, on the path already or
named by the environment variable ``KDPO_EASYEDIT``. The framework's files are never changed. Pieces, what each is
for, and when it can go:

===================  ==================================================================================================
:func:`install`      Makes ``import easyeditor`` register KDPO, whichever package is imported first, without importing
                     it. Can go when EasyEdit lists KDPO itself.
placeholders         Both forms import packages that editing text never calls. While ``easyeditor`` is imported, and
                     for its own modules only, one that is not installed is stood in for; using it is an error that
                     names it. Can go when EasyEdit imports them late.
moved names          transformers 4.56 dropped three helpers from ``modeling_utils`` that the PyPI form imports (BLIP-2
                     only). They are put there while ``easyeditor`` is imported. Can go with the PyPI form.
model loading        Both forms choose a loader by the letters of a model's whole path. The PyPI form has none for
                     Mistral or Qwen and reads Llama tokenizers wrongly with transformers 5; upstream has none for Gemma
                     or Phi, and its one for Qwen 1.5 passes an argument that current transformers refuse. Such models,
                     and the shipped one, are loaded here and handed over ready. Can go when the framework asks the
                     model's config.
devices              The PyPI form writes ``cuda:`` before whatever device it is given. While one of its editors works
                     on a CPU, requests for CUDA are answered with the CPU; ``cuda:1`` is read as 1. Can go with the
                     PyPI form.
ledgers              With ``ledger`` in KDPO's settings, an editor takes its model to the ledger's head when it is made,
                     and after each of its runs the ledger is told if the weights were put back. Can go if the framework
                     ever tells a method so.
PyPI's contract      The PyPI form writes back every weight a method returns unless it was asked to keep the original,
                     so KDPO returns none then. Can go with the PyPI form.
PyPI's MEMIT         Expects blocks to return tuples, as they did before transformers 4.56; its traces are shown
                     such. Can go with the PyPI form.
AdaLoRA              The PyPI form's LoRA and upstream's default. Current peft refuses it without the number of steps;
                     it is told. The PyPI form's settings lack an attribute that its own code reads; they get it. Can go
                     when upstream passes the number.
:func:`settings`     A method's settings in whichever class the installed form reads, whose fields differ.
:func:`quietly`      Both forms print every step and write logs into the working directory. Can go when they stop.
:func:`forget`       Methods keep state in their modules (context templates, covariances, null spaces, histories) that
                     belongs to one model; the comparison clears it between models. Can go when the framework ties it
                     to the model.
===================  ==================================================================================================
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import functools
import importlib
import importlib.abc
import importlib.util
import inspect
import io
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .errors import HyperParamsError
from .hparams import KDPOHyperParams
from .kdpo import apply_kdpo_to_model

LOG = logging.getLogger(__name__)
VARIABLE = "KDPO_EASYEDIT"
HOW_TO_GET_IT = (
    "EasyEdit was not found. Either install its PyPI release with its needs,\n"
    "    pip install 'kdpo-editor[easyedit]' && pip install --no-deps easyeditor==0.0.1.dev0\n"
    f"or clone https://github.com/zjunlp/EasyEdit and set {VARIABLE} to the clone."
)
# What the text editors of either form need for real; nothing may stand in for these.
NEEDED = ("peft", "higher", "nltk", "scipy", "sklearn", "regex", "numpy")
# What both forms import and no text editor calls (but for data sets read from the hub, which say so themselves).
UNUSED = (
    "PIL", "av", "bitsandbytes", "cv2", "datasets", "decord", "einops", "fairscale", "gradio", "hydra", "iopath",
    "jsonlines", "matplotlib", "openai", "opencv", "pandas", "pytorch_lightning", "qwen_vl_utils", "rouge", "seaborn",
    "sentence_transformers", "sniffio", "timm", "torchvision", "umap", "webdataset", "zhipuai",
)  # fmt: skip
MOVED = ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer")
# The framework's own names for the methods that want padding on the right.
RIGHT_PADDED = ("ROME", "R-ROME", "MEMIT", "EMMET", "EAMET", "AlphaEdit", "CORE", "SPHERE")
# Where methods keep what they remember of a model's earlier edits.
MODULES = {"AlphaEdit": "alphaedit.AlphaEdit_main", "WISE": "wise.WISE"}
# Keys of settings files that one form's classes have and the other's lack.
OTHER_FORM = ("objective_optimization", "lora_type", "model_parallel", "fp16", "batch_size", "max_length")
# Letters in a model's name for which each form has a loader that works.
LOADS_ITSELF = {
    "pypi": ("t5", "gpt", "baichuan", "chatglm", "internlm"),
    "upstream": ("t5", "gpt", "llama", "baichuan", "chatglm", "internlm", "qwen2", "qwen3", "mistral"),
}


def install() -> None:
    """Register KDPO with ``easyeditor``: now, if it is imported already, else as soon as it is.

    Raises ``ModuleNotFoundError`` if the environment variable names a folder without ``easyeditor``.
    """
    checkout = os.environ.get(VARIABLE)
    if checkout and "easyeditor" not in sys.modules:
        if not (Path(checkout) / "easyeditor" / "__init__.py").is_file():
            raise ModuleNotFoundError(f"{VARIABLE}={checkout}: there is no folder easyeditor/ in it")
        if checkout not in sys.path:
            sys.path.insert(0, checkout)
    if "easyeditor" in sys.modules:
        _register()
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def require() -> ModuleType:
    """``easyeditor``, imported; or ``ModuleNotFoundError`` that says how to get it or what it lacks."""
    try:
        return importlib.import_module("easyeditor")
    except ModuleNotFoundError as error:
        if error.name == "easyeditor":
            raise ModuleNotFoundError(HOW_TO_GET_IT, name="easyeditor") from None
        raise


def is_upstream() -> bool:
    """Whether the imported framework is the upstream form; the PyPI form lacks ``sequential_edit``."""
    return "sequential_edit" in inspect.signature(_editor_class().edit).parameters


def form() -> str:
    """The imported framework's form, as users know it: "upstream" or "PyPI"."""
    return "upstream" if is_upstream() else "PyPI"


def _editor_class() -> Any:
    return importlib.import_module("easyeditor.editors.editor").BaseEditor


# Importing it -------------------------------------------------------------------------------------------------


class _Watcher(importlib.abc.MetaPathFinder):
    """Waits for ``import easyeditor``, lends it what it lacks meanwhile, and registers KDPO afterwards."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "easyeditor":
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            with _lent():
                execute(module)
            _register()
            sys.meta_path.remove(self)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


@contextlib.contextmanager
def _lent() -> Iterator[None]:
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(
                f"EasyEdit needs {name}, which is not installed: pip install 'kdpo-editor[easyedit]'", name=name
            )
    import transformers.modeling_utils
    import transformers.pytorch_utils

    importlib.import_module("peft")
    added = [n for n in MOVED if not hasattr(transformers.modeling_utils, n)]
    for name in added:
        value = getattr(transformers.pytorch_utils, name, _placeholder(f"transformers.modeling_utils.{name}"))
        setattr(transformers.modeling_utils, name, value)
    real_import = builtins.__import__

    def import_(
        name: str,
        globals_: dict[str, Any] | None = None,
        locals_: dict[str, Any] | None = None,
        fromlist: Sequence[str] = (),
        level: int = 0,
    ) -> Any:
        root = name.partition(".")[0]
        ours = level == 0 and root in UNUSED and str((globals_ or {}).get("__name__")).startswith("easyeditor")
        if ours and root not in sys.modules and importlib.util.find_spec(root) is None:
            return _placeholder(name if fromlist else root)
        return real_import(name, globals_, locals_, fromlist, level)

    builtins.__import__ = import_  # type: ignore[assignment]
    try:
        yield
    finally:
        builtins.__import__ = real_import
        for name in added:
            delattr(transformers.modeling_utils, name)


class _Missing(type):
    """The type of placeholders: classes, since the framework also derives from what it imports."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _placeholder(f"{cls.__qualname__}.{name}")

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if "__init__" in cls.__dict__:  # a class of the framework's own, derived from a placeholder
            return super().__call__(*args, **kwargs)
        package = cls.__qualname__.partition(".")[0]
        raise ModuleNotFoundError(f"EasyEdit called {cls.__qualname__}: {package} is not installed", name=package)


def _placeholder(name: str) -> Any:
    return _Missing(name, (), {"__qualname__": name, "__all__": []})


# Registering --------------------------------------------------------------------------------------------------


def _register() -> None:
    """Add KDPO to the framework's methods, and wrap its editor for shipped models and devices. Once only."""
    methods = importlib.import_module("easyeditor.util.alg_dict").ALG_DICT
    if "KDPO" in methods:
        return
    upstream = is_upstream()
    methods["KDPO"] = apply_kdpo_to_model if upstream else _apply_for_pypi
    batch = importlib.import_module("easyeditor.editors.batch_editor").BatchEditor
    was_batchable = batch.is_batchable_method
    batch.is_batchable_method = staticmethod(lambda name: name == "KDPO" or was_batchable(name))
    editor = _editor_class()
    editor.__init__ = _resumed(_with_model_loaded(editor.__init__, upstream))
    for name in ("edit", "batch_edit", "edit_requests", "edit_dataset", "generate_edit"):
        if hasattr(editor, name):
            setattr(editor, name, _followed(getattr(editor, name)))
    if not upstream:
        for name in ("__init__", "edit", "batch_edit", "edit_requests", "edit_dataset"):
            setattr(editor, name, _on_device(getattr(editor, name)))
        _mend_memit()
    _mend_adalora()


@functools.wraps(apply_kdpo_to_model)
def _apply_for_pypi(*args: Any, keep_original_weight: bool = False, **kwargs: Any) -> Any:
    model, originals = apply_kdpo_to_model(*args, **kwargs)
    return model, originals if keep_original_weight else {}


def _with_model_loaded(init: Callable[..., None], upstream: bool) -> Callable[..., None]:
    @functools.wraps(init)
    def wrapped(self: Any, hparams: Any) -> None:
        from .testbed import SECOND_MODEL, SHIPPED_MODEL

        name = getattr(hparams, "model_name", None)
        known = LOADS_ITSELF["upstream" if upstream else "pypi"]
        own = (SHIPPED_MODEL, SECOND_MODEL)
        if not isinstance(name, str) or (name not in own and any(letters in name.lower() for letters in known)):
            init(self, hparams)
            return
        hparams.model_name = _load(name, hparams)
        try:
            init(self, hparams)
        finally:
            hparams.model_name = name
        self.model_name = name

    return wrapped


def _load(name: str, hparams: Any) -> tuple[nn.Module, Any]:
    """Model and tokenizer, set up as the framework sets up those it loads itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .testbed import resolve

    model = AutoModelForCausalLM.from_pretrained(
        resolve(name),
        dtype=torch.float16 if getattr(hparams, "fp16", False) else torch.float32,
        device_map="auto" if getattr(hparams, "model_parallel", False) else None,
    )
    tok = AutoTokenizer.from_pretrained(resolve(name))
    tok.pad_token_id = tok.eos_token_id
    tok.padding_side = "right" if hparams.alg_name in RIGHT_PADDED else "left"
    return model, tok


# Ledgers ------------------------------------------------------------------------------------------------------


def _resumed(init: Callable[..., None]) -> Callable[..., None]:
    """``BaseEditor.__init__``, after which the model is where the ledger's head is."""

    @functools.wraps(init)
    def wrapped(self: Any, hparams: Any) -> None:
        init(self, hparams)
        folder = _ledger_of(hparams)
        if folder is not None:
            from .ledger import writing

            with writing(folder) as ledger:
                head = ledger.restore(self.model)
            if head:
                LOG.warning("resumed from %s: the model has its edits up to %d", folder, head)

    return wrapped


def _followed(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of ``BaseEditor`` after which the ledger's head is where the model is, edited or put back."""

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        folder = _ledger_of(self.hparams)
        if folder is not None:
            from .ledger import writing

            with writing(folder) as ledger:
                ledger.follow(self.model)
        return result

    return wrapped


def _ledger_of(hparams: Any) -> str | None:
    return hparams.ledger if isinstance(hparams, KDPOHyperParams) else None


# The PyPI form's methods --------------------------------------------------------------------------------------


def _mend_memit() -> None:
    compute_z: Any = importlib.import_module("easyeditor.models.memit.compute_z")
    nethook = compute_z.nethook

    class TraceDict(nethook.TraceDict):  # type: ignore[misc, name-defined]
        """Shows a block's output as a tuple, to the function that edits it and to whoever reads it afterwards."""

        def __init__(self, *args: Any, edit_output: Callable[..., Any], **kwargs: Any) -> None:
            def edit(output: Any, layer: str) -> Any:
                if not isinstance(output, torch.Tensor):
                    return edit_output(output, layer)
                return edit_output((output,), layer)[0]

            super().__init__(*args, edit_output=edit, **kwargs)

        def __getitem__(self, layer: str) -> Any:
            trace = super().__getitem__(layer)
            if isinstance(trace.output, torch.Tensor):
                return SimpleNamespace(output=(trace.output,))
            return trace

    compute_z.nethook = SimpleNamespace(**{**vars(nethook), "TraceDict": TraceDict})


def _mend_adalora() -> None:
    lora: Any = importlib.import_module("easyeditor.models.lora.lora_main")
    hparams_class = importlib.import_module("easyeditor.models.lora.lora_hparams").LoRAHyperParams
    if not hasattr(hparams_class, "model_parallel"):
        hparams_class.model_parallel = False
    config_class, run = lora.AdaLoraConfig, lora.execute_lora

    @functools.wraps(run)
    def execute(model: nn.Module, tok: Any, requests: Sequence[Any], hparams: Any, *args: Any, **kwargs: Any) -> Any:
        lora.AdaLoraConfig = functools.partial(config_class, total_step=hparams.num_steps)
        try:
            return run(model, tok, requests, hparams, *args, **kwargs)
        finally:
            lora.AdaLoraConfig = config_class

    lora.execute_lora = execute


# What a comparison of methods needs -----------------------------------------------------------------------------


def methods() -> dict[str, Callable[..., Any]]:
    """The framework's methods by name, KDPO among them."""
    require()
    found: dict[str, Callable[..., Any]] = importlib.import_module("easyeditor.util.alg_dict").ALG_DICT
    return found


def settings(config: dict[str, Any]) -> tuple[Any, list[str]]:
    """``config`` (with its ``alg_name``) as the installed form's class reads it, and the keys that it has no use for.

    Raises :class:`~kdpo_editor.HyperParamsError` naming a key that neither form has, or those that are missing.
    """
    name = config["alg_name"]
    if name == "KDPO":
        return KDPOHyperParams.from_config(config), []
    package = require()
    wanted = f"{name}HyperParams".lower()
    kind = next((getattr(package, n) for n in dir(package) if n.lower() == wanted), None)
    if kind is None:
        raise HyperParamsError(f"alg_name: EasyEdit's {form()} form has no settings for {name!r}")
    if "act_margin" in config:  # WISE: three fields in the class, one list in the files
        margins = dict(zip(("alpha", "beta", "gamma"), config["act_margin"], strict=True))
        config = {**{k: v for k, v in config.items() if k != "act_margin"}, **margins}
    known = {f.name: f for f in dataclasses.fields(kind)}
    unknown = [key for key in config if key not in known and key not in OTHER_FORM]
    if unknown:
        raise HyperParamsError(f"{name}: unknown key {unknown[0]!r}. Known keys: {', '.join(known)}")
    missing = [n for n, f in known.items() if f.default is dataclasses.MISSING and n not in config]
    if missing:
        raise HyperParamsError(f"{name}: missing key{'s' if len(missing) > 1 else ''} {', '.join(missing)}")
    return kind(**{k: v for k, v in config.items() if k in known}), sorted(set(config) - set(known))


def forget(templates: dict[str, list[str]] | None = None) -> None:
    """Clear what the framework's methods keep in their modules about the last model.

    ``templates``: contexts to use instead of those that ROME, MEMIT, AlphaEdit and WISE would draw from the model at
    their first edit, by ``"dot"`` (behind a sentence) and ``"plain"``; each holds ``{}`` once.
    """
    dot, plain = (["{}", *templates[k]] if templates else None for k in ("dot", "plain"))
    state: dict[str, dict[str, Any]] = {
        "rome.rome_main": {"CONTEXT_TEMPLATES_CACHE": dot},
        "memit.memit_main": {"CONTEXT_TEMPLATES_CACHE": dot and [["{}"], dot[1:]], "COV_CACHE": {}},
        "alphaedit.AlphaEdit_main": {
            "CONTEXT_TEMPLATES_CACHE": dot and [["{}"], dot[1:]],
            "COV_CACHE": {},
            "P_loaded": False,
        },
        "wise.utils": {"CONTEXT_TEMPLATES_CACHE": plain},
    }
    for name, values in state.items():
        module = sys.modules.get(f"easyeditor.models.{name}")
        for key, value in values.items():
            if module is not None and hasattr(module, key):
                setattr(module, key, value)
    for method in MODULES:
        forget_history(method)


def forget_history(method: str) -> None:
    """Clear what ``method`` remembers about its earlier edits of the model."""
    values: dict[str, dict[str, Any]] = {
        "AlphaEdit": {"cache_c_new": False},
        "WISE": {"edit_history": [], "merge_group_edit_history": []},
    }
    module = sys.modules.get(f"easyeditor.models.{MODULES.get(method)}")
    for key, value in values.get(method, {}).items():
        if module is not None:
            setattr(module, key, value)


def memory(method: str) -> dict[str, torch.Tensor]:
    """What ``method`` keeps in its module about earlier edits and needs for the next one, as tensors by name."""
    if method != "AlphaEdit" or not _module(method).cache_c_new:
        return {}
    return {"AlphaEdit.cache_c": _module(method).cache_c.clone()}


def remember(method: str, saved: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give ``method`` its :func:`memory` back; returns what of ``saved`` was not that."""
    rest = dict(saved)
    if method == "AlphaEdit" and "AlphaEdit.cache_c" in rest:
        _module(method).cache_c = rest.pop("AlphaEdit.cache_c")
        _module(method).cache_c_new = True
    return rest


def save_null_space(model: nn.Module, tok: Any, hparams: Any) -> None:
    """Compute AlphaEdit's projections (of ``hparams.layers``) with the framework and save them at ``hparams.P_loc``.

    The framework would save them in the working directory and look for them elsewhere.
    """
    module = _module("AlphaEdit")
    projections = torch.stack([module.get_project(model, tok, layer, hparams) for layer in hparams.layers])
    torch.save(projections, hparams.P_loc)


def _module(method: str) -> Any:
    return sys.modules[f"easyeditor.models.{MODULES[method]}"]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """The framework prints every step, logs every edit twice and writes into ``./logs``; none of it is wanted here."""
    disabled, folder = logging.root.manager.disable, Path.cwd()
    logging.disable(logging.INFO)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            os.chdir(scratch)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                yield
            os.chdir(folder)
    finally:
        os.chdir(folder)
        logging.disable(disabled)


# The PyPI form's devices --------------------------------------------------------------------------------------


@contextlib.contextmanager
def on_device(hparams: Any) -> Iterator[None]:
    """Let the PyPI form, which knows CUDA indices only, work where ``hparams.device`` says.

    Inside, ``hparams.device`` is an index; where that stands for a CPU, tensors that are sent to CUDA stay.
    """
    given = getattr(hparams, "device", None)
    index = _cuda_index(given)
    hparams.device = index or 0
    try:
        with _StayOnCPU() if index is None else contextlib.nullcontext():
            yield
    finally:
        hparams.device = given


def _cuda_index(device: Any) -> int | None:
    """The CUDA index that an EasyEdit ``device`` means, or ``None`` for the CPU."""
    if device is None:
        return 0 if torch.cuda.is_available() else None
    if isinstance(device, int) or str(device).isdigit():
        return int(device)
    device = torch.device(device)
    return None if device.type == "cpu" else device.index or 0


def _on_device(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        hparams = self.hparams if "hparams" in self.__dict__ else (args[0] if args else kwargs["hparams"])
        with on_device(hparams):
            return method(self, *args, **kwargs)

    return wrapped


class _StayOnCPU(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": "cpu"}
        elif func is torch.Tensor.to:
            args = tuple("cpu" if _is_cuda(a) else a for a in args)
        elif func is torch.Tensor.cuda:
            return args[0]
        return func(*args, **kwargs)


def _is_cuda(value: Any) -> bool:
    return isinstance(value, (str, torch.device)) and str(value).startswith("cuda")
