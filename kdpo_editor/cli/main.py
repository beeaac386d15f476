"""The command ``kdpo``: edit models, and keep, undo, inspect and export the edits."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Annotated, Any

import typer

from ..errors import DamagedFileError, KDPOError, explained
from ..version import __version__
from .check import check
from .edit import apply, edit
from .history import checkout, compact, log, redo, undo
from .locate import locate
from .options import MODEL
from .push import push
from .settings import settings
from .show import export, show
from .terminal import complain, say
from .ui import ui

DESCRIPTION = """\
Edit facts in language models with KDPO. The edits go into a ledger, a folder that remembers each of them
exactly: they can be listed, undone, shown, and exported. The model's own files are never changed."""
EXIT_CODES = """\
exit codes:
  0    done
  1    an error; an edit that did not reach its target or was skipped; a check that failed
  2    wrong usage; what cannot be checked
  130  interrupted; the ledger holds every edit that was reported"""
EXAMPLES = {
    "": """\
  kdpo edit --model kdpo-llama-knowedit --prompt "Which was the family of Stamnophora?" --target Tortricidae --out edits
  kdpo show edits
  kdpo undo edits
  kdpo export edits --as lora --to adapter""",
    "demo": "  kdpo demo\n  kdpo demo --edits 3 --show 1",
    "edit": """\
  kdpo edit --model kdpo-llama-knowedit --prompt "Which was the family of Stamnophora?" --target Tortricidae --out edits
  kdpo edit --model meta-llama/Llama-2-7b-hf --file facts.jsonl --out edits --set append_eos=true --set margin=1
  kdpo edit --model meta-llama/Llama-2-7b-hf --file facts.jsonl --out edits --resume
  kdpo edit --model Qwen/Qwen1.5-7B --chat --prompt "Who wrote it?" --target Ann --out edits

each line of facts.jsonl:
  {"prompt": "Which was the family of Stamnophora?", "target_new": "Tortricidae"}""",
    "settings": """\
  kdpo settings --model Qwen/Qwen3-0.6B > qwen3.yaml
  kdpo settings --model meta-llama/Llama-2-7b-hf --set lr=2e-5""",
    "locate": "  kdpo locate --model smollm2-135m --picture map.png --to smollm2.yaml",
    "apply": "  kdpo apply saved-delta --model kdpo-llama-knowedit --out edits",
    "undo": "  kdpo undo edits\n  kdpo undo edits -n 3",
    "redo": "  kdpo redo edits",
    "checkout": "  kdpo checkout edits 5\n  kdpo checkout edits 0    # the unedited model",
    "log": "  kdpo log edits\n  kdpo log edits --json",
    "show": '  kdpo show edits\n  kdpo show edits --prompt "Which family are Stamnophora?"',
    "export": """\
  kdpo export edits --as model --to edited-model    # with save_pretrained
  kdpo export edits --as lora  --to adapter         # PeftModel.from_pretrained loads it
  kdpo export edits --as delta --to saved-delta     # for kdpo apply, EditDelta.load
  kdpo export edits --as delta --to one-edit --edit 3 --since 2""",
    "check": "  kdpo check edits\n  kdpo check edits --json --min-rephrase 0.5 > checked.json",
    "push": "  kdpo push edits me/my-edits\n  kdpo push edits me/my-edits --checked checked.json --no-adapter",
    "ui": "  kdpo ui --model smollm2-135m\n  kdpo ui --model smollm2-135m --recipe KDPO-L --out edits",
    "compact": "  kdpo compact edits\n  kdpo compact edits --keep 10",
}


def demo(
    model: Annotated[str, typer.Option(metavar="ID", help=f"{MODEL}.")] = "smollm2-135m",
    edits: Annotated[int, typer.Option(metavar="N", min=1, help="Records to edit.")] = 10,
    show: Annotated[int, typer.Option(metavar="N", min=0, help="Records to show in words.")] = 3,
    device: Annotated[str, typer.Option(help='CUDA index, "cpu" or "cuda:1".')] = "cpu",
) -> int:
    """Edit ten real facts, one after another, with KDPO, KDPO-L and EasyEdit's FT side by side."""
    from .demo import run

    run(model, edits, show, device)
    return 0


COMMANDS = (demo, edit, settings, locate, apply, undo, redo, checkout, log, show, check, export, push, compact, ui)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        app(args=None if argv is None else list(argv), prog_name="kdpo")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def _epilog(name: str) -> str:
    """Examples and exit codes, whose lines are kept as they are."""
    text = f"examples:\n{EXAMPLES[name]}\n\n{EXIT_CODES}"
    return "\n\n".join(f"\b\n{part}" for part in text.split("\n\n"))


def _exits(command: Callable[..., int]) -> Callable[..., None]:
    """``command``, ending the program with its exit code, or with a message and 1 or 130."""

    @wraps(command)
    def run(**options: Any) -> None:
        try:
            code = command(**options)
        except KeyboardInterrupt:
            complain("interrupted")
            code = 130
        except BrokenPipeError:  # the reader of our output had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 0
        except (KDPOError, OSError, ModuleNotFoundError) as error:
            complain(explained(error))
            if isinstance(error, DamagedFileError) and "journal.jsonl, line" in str(error):
                complain("--skip-damaged leaves such lines out")
            code = 1
        raise typer.Exit(code)

    return run


app = typer.Typer(
    help=DESCRIPTION,
    epilog=_epilog(""),
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _say_version(asked: bool) -> None:
    if asked:
        say(f"kdpo_editor {__version__}")
        raise typer.Exit


@app.callback(help=DESCRIPTION, epilog=_epilog(""))
def _of_no_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None: ...


for _command in COMMANDS:
    app.command(_command.__name__, epilog=_epilog(_command.__name__))(_exits(_command))


if __name__ == "__main__":
    sys.exit(main())
