"""The arguments and options that several commands share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Recipe(str, Enum):
    """The ready-made settings."""

    KDPO = "KDPO"
    KDPO_L = "KDPO-L"


class Tracker(str, Enum):
    """Where figures are sent, as :data:`kdpo_editor.tracking.TRACKERS`."""

    trackio = "trackio"
    wandb = "wandb"
    tensorboard = "tensorboard"


class Dtype(str, Enum):
    """What a model is loaded in."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"
    float64 = "float64"


MODEL = "Hugging Face id, folder, .gguf file, or a name like smollm2-135m"
Ledger = Annotated[Path, typer.Argument(metavar="DIR", help="The ledger.")]
Out = Annotated[Path, typer.Option(metavar="DIR", help="The ledger, made if it is not there.")]
Model = Annotated[str, typer.Option(metavar="ID", help=f"{MODEL}.")]
LedgersModel = Annotated[str | None, typer.Option(metavar="ID", help=f"{MODEL} (default: the ledger's).")]
Device = Annotated[str | None, typer.Option(help='CUDA index, "cpu" or "cuda:1" (default: the GPU if there is one).')]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
DtypeOption = Annotated[Dtype | None, typer.Option(help="Of the model (default: the ledger's, else the settings').")]
SkipDamaged = Annotated[bool, typer.Option("--skip-damaged", help="Leave out damaged lines of the ledger.")]
Wait = Annotated[float, typer.Option(metavar="S", min=0.0, help="Seconds to wait for another writer.")]
LogTo = Annotated[Tracker | None, typer.Option(help="Send the figures of each edit there, too.")]
Json = Annotated[bool, typer.Option("--json", help="JSON lines, with everything known.")]
After = Annotated[int | None, typer.Option("--edit", metavar="K", min=0, help="After edit K (default: the head).")]
HParams = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Settings: a YAML file or the name of a ready-made one (default: the model's, or found from it).",
    ),
]
RecipeOption = Annotated[Recipe, typer.Option(help="Which ready-made settings.")]
Changes = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting; can be repeated.")]
