"""Everything it takes to run beside EasyEdit, in both its forms. Of the rest of the package only the comparison, the
demo and the package itself, which installs the import hook, know of it.

*PyPI* is ``easyeditor==0.0.1.dev0`` (2023); *upstream* is a checkout of ``zjunlp/EasyEdit``, on the path already or
named by the environment variable ``KDPO_EASYEDIT``. The framework's files are never changed. Pieces, what each is
for, and when it can go:

===================  ==================================================================================================
registering          KDPO is added to the framework's methods when ``easyeditor`` is imported, or at once if it was
                     before. Can go when EasyEdit lists KDPO itself.
placeholders         Both forms import packages that editing text never calls. While ``easyeditor`` is imported, and
                     for its own modules only, one that is not installed is stood in for; using it is an error that
                     names it. Can go when EasyEdit imports them late.
moved names          transformers 4.56 dropped three helpers from ``modeling_utils`` that the PyPI form imports (BLIP-2
                     only). They are put there while ``easyeditor`` is imported. Can go with the PyPI form. transformers
                     5.24 dropped a module that upstream's UnKE imports; a placeholder lets the rest be imported. Can go
                     when UnKE makes its masks otherwise.
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
``prepare``          AlphaEdit, SPHERE and SimIE go by letters in a model's name and WISE by two keys of its config;
                     they get what they look for, for any model. Can go when the framework looks at the matrix, and at
                     the third key.
UltraEdit            Begins its running statistics anew at each call, returns nothing to undo by, and more (in
                     ``ultraedit``). Can go when the framework does as the paper says.
PMET                 Puts the space before an answer only if "gpt" is in the model's name. Can go when the framework
                     asks the tokenizer.
WISE                 Computes the edited matrix's output without its bias, unless "gpt2" is in the model's name. Can go
                     when the framework adds the bias.
``settings``         A method's settings in whichever class the installed form reads, whose fields differ.
``quietly``          Both forms print every step and write logs into the working directory. Can go when they stop.
``forget``           Methods keep state in their modules (context templates, covariances, null spaces, histories) that
                     belongs to one model; the comparison clears it between models. Can go when the framework ties it
                     to the model.
===================  ==================================================================================================

Modules: ``registering`` puts KDPO into the framework; ``placeholders`` has what is lent at import; ``import_hook``
waits for it; ``loading``, ``ledgers``, ``adalora``, ``wise`` and ``ultraedit`` what they are called after; ``pypi``
the PyPI form's devices and MEMIT; ``comparing`` ``prepare``, PMET's space and the last three, which comparing methods
needs.
``finding``, below them, imports the framework and tells its form.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .comparing import (
        forget,
        forget_history,
        memory,
        methods,
        prepare,
        quietly,
        remember,
        save_null_space,
        settings,
        target_as_told,
    )
    from .finding import form, is_upstream, require, version
    from .loading import RIGHT_PADDED
    from .placeholders import MOVED
    from .pypi import on_device

# Where each name is. They are loaded when they are used: the import hook, in this folder too, must cost nothing.
_MODULES = {
    "comparing": "forget forget_history memory methods prepare quietly remember save_null_space settings "
    "target_as_told",
    "finding": "form is_upstream require version",
    "loading": "RIGHT_PADDED",
    "placeholders": "MOVED",
    "pypi": "on_device",
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = [
    "MOVED",
    "RIGHT_PADDED",
    "forget",
    "forget_history",
    "form",
    "is_upstream",
    "memory",
    "methods",
    "on_device",
    "prepare",
    "quietly",
    "remember",
    "require",
    "save_null_space",
    "settings",
    "target_as_told",
    "version",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_PLACES[name]}", __name__), name)
    globals()[name] = value
    return value
