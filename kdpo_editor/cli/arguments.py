"""How the command ``kdpo`` is called: its commands and options, their help, and what is said of wrong usage."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

DESCRIPTION = """\
Edit facts in language models with KDPO. The edits go into a ledger, a folder that remembers each of them
exactly: they can be listed, undone, shown, and exported. The model's own files are never changed."""
EXIT_CODES = """\
exit codes:
  0    done
  1    an error, or an edit that did not reach its target or was skipped
  2    wrong usage
  130  interrupted; the ledger holds every edit that was reported"""
EXAMPLES = {
    "": """\
  kdpo edit --model kdpo-llama-knowedit --prompt "Which was the family of Stamnophora?" --target Tortricidae --out edits
  kdpo show edits
  kdpo undo edits
  kdpo export edits --as lora --to adapter""",
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
    "compact": "  kdpo compact edits\n  kdpo compact edits --keep 10",
}
RECIPES = ("KDPO", "KDPO-L")
DTYPES = ("float32", "float16", "bfloat16", "float64")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\nSee {self.prog} --help.\n")


def make_parser(
    commands: Sequence[Callable[[argparse.Namespace], int]],
) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and that of each command; the functions ``commands`` give names and help, and are what is run."""
    runs: dict[str, Any] = {run.__name__: run for run in commands}
    parser = _Parser(
        prog="kdpo",
        description=DESCRIPTION,
        epilog=f"examples:\n{EXAMPLES['']}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    parsers: dict[str, argparse.ArgumentParser] = {}

    def command(name: str) -> argparse.ArgumentParser:
        run = runs[name]
        parsers[name] = sub = subparsers.add_parser(
            name,
            help=run.__doc__.strip(),
            description=run.__doc__.strip(),
            epilog=f"examples:\n{EXAMPLES[name]}\n\n{EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(run=run)
        if name != "settings":  # the one command without a ledger
            sub.add_argument("--skip-damaged", action="store_true", help="leave out damaged lines of the ledger")
        return sub

    def writes(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--wait", type=_seconds, default=0.0, metavar="S", help="seconds to wait for another writer")

    def loads(sub: argparse.ArgumentParser, required: bool) -> None:
        text = "Hugging Face id, folder, .gguf file, or a name like smollm2-135m"
        text += "" if required else " (default: the ledger's)"
        sub.add_argument("--model", required=required, metavar="ID", help=text)
        sub.add_argument("--device", help='CUDA index, "cpu" or "cuda:1" (default: the GPU where there is one)')
        sub.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")

    def sets(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--hparams",
            metavar="FILE",
            help="settings: a YAML file or the name of a ready-made one (default: the model's, or found from it)",
        )
        sub.add_argument("--recipe", choices=RECIPES, default=RECIPES[0], help="which ready-made ones (default KDPO)")
        sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting; can be repeated")

    sub = command("edit")
    loads(sub, required=True)
    sub.add_argument("--prompt", help="what the model is asked")
    sub.add_argument("--target", help="what it shall answer")
    sub.add_argument("--subject", help="what the prompt asks about, word for word (for fact_token)")
    sub.add_argument("--chat", action="store_true", help="put the prompts into the model's own chat template")
    sub.add_argument("--file", metavar="JSONL", help='edits, one a line; "-" reads standard input')
    sub.add_argument("--out", required=True, metavar="DIR", help="the ledger, made if it is not there")
    sets(sub)
    sub.add_argument("--dtype", choices=DTYPES, help="of the model (default: the ledger's, else the settings')")
    sub.add_argument("--keep-going", action="store_true", help="skip bad lines and edits that diverge")
    sub.add_argument("--resume", action="store_true", help="leave out edits that are in the ledger already")
    writes(sub)

    sub = command("settings")
    loads(sub, required=True)
    sets(sub)

    sub = command("apply")
    sub.add_argument("delta", nargs="+", metavar="DELTA", help="folder that kdpo export --as delta or EditDelta made")
    loads(sub, required=True)
    sub.add_argument("--out", required=True, metavar="DIR", help="the ledger, made if it is not there")
    sub.add_argument("--dtype", choices=DTYPES, help="of the model (default: the ledger's or the delta's)")
    sub.add_argument("--force", action="store_true", help="add the difference even if the model is another")
    writes(sub)

    for name, text in (("undo", "take back"), ("redo", "put back")):
        sub = command(name)
        sub.add_argument("ledger", metavar="DIR")
        sub.add_argument("-n", type=_positive, default=1, metavar="N", help=f"how many edits to {text} (default 1)")
        writes(sub)
    sub = command("checkout")
    sub.add_argument("ledger", metavar="DIR")
    sub.add_argument("number", type=_count, help="the edit; 0 is the unedited model")
    writes(sub)

    sub = command("log")
    sub.add_argument("ledger", metavar="DIR")
    sub.add_argument("--json", action="store_true", help="JSON lines, with everything known of each edit")

    sub = command("show")
    sub.add_argument("ledger", metavar="DIR")
    loads(sub, required=False)
    sub.add_argument("--edit", type=_count, metavar="K", help="after edit K (default: the head)")
    sub.add_argument("--prompt", action="append", metavar="TEXT", help="instead of the edits' own; can be repeated")
    sub.add_argument("--chat", action="store_true", help="put what --prompt says into the model's chat template")
    sub.add_argument("--longest", type=_positive, default=24, metavar="T", help="tokens to generate (default 24)")
    sub.add_argument("--json", action="store_true", help="JSON lines")

    sub = command("export")
    sub.add_argument("ledger", metavar="DIR")
    loads(sub, required=False)
    sub.add_argument("--as", required=True, choices=("model", "lora", "delta"), help="what to write")
    sub.add_argument("--to", required=True, metavar="DIR", help="folder to write; must not exist, or be empty")
    sub.add_argument("--edit", type=_count, metavar="K", help="after edit K (default: the head)")
    sub.add_argument("--since", type=_count, default=0, metavar="K", help="a delta without the edits up to K")
    sub.add_argument("--rank", type=_positive, help="of the adapter (default: the smallest that holds the edits)")

    sub = command("compact")
    sub.add_argument("ledger", metavar="DIR")
    sub.add_argument("--keep", type=_count, default=0, metavar="N", help="edits that can still be undone (default 0)")
    writes(sub)
    return parser, parsers


def check_options(
    parser: argparse.ArgumentParser, commands: dict[str, argparse.ArgumentParser], arguments: list[str]
) -> None:
    """End with a helpful message if a command or an option is misspelt, or options do not go together."""
    name = next((a for a in arguments if not a.startswith("-")), None)
    if name is None:
        return
    if name not in commands:
        near = difflib.get_close_matches(name, commands, n=1)
        parser.error(f"there is no command {name!r}; {f'did you mean {near[0]}? ' if near else ''}"
                     f"There are {', '.join(commands)}")  # fmt: skip
    sub = commands[name]
    known = [option for action in sub._actions for option in action.option_strings]
    given = []
    for argument in arguments[arguments.index(name) + 1 :]:
        if argument == "--":
            break
        if argument.startswith("-") and not argument[1:2].isdigit() and argument != "-":
            option = argument.partition("=")[0] if argument.startswith("--") else argument[:2]
            given.append(option)
            if option not in known:
                near = difflib.get_close_matches(option, known, n=1)
                sub.error(f"there is no option {option}; {f'did you mean {near[0]}?' if near else 'see the help'}")
    if name == "edit" and not {"--help", "-h"} & set(given):
        if "--file" in given and {"--prompt", "--target", "--subject"} & set(given):
            sub.error("give either --file, or --prompt, --target and, where it is needed, --subject")
        if "--file" not in given and not {"--prompt", "--target"} <= set(given):
            sub.error("give --prompt and --target, or --file")


def _number(text: str, kind: type, least: float, what: str) -> Any:
    try:
        number = kind(text)
    except ValueError:
        number = None
    if number is None or not least <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return number


def _count(text: str) -> int:
    return int(_number(text, int, 0, "a number from 0"))


def _positive(text: str) -> int:
    return int(_number(text, int, 1, "a number from 1"))


def _seconds(text: str) -> float:
    return float(_number(text, float, 0, "a number of seconds"))
