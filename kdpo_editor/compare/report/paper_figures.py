"""The command ``kdpo-figures``: figures of the KDPO paper that ``kdpo-report`` does not draw, and the frontier."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import DataError, RequestError, ResultsError
from .report import exit_status, say, slug, write

if TYPE_CHECKING:
    from .edit_figures import Question
    from .figures import Picture
    from .result_folder import ResultFolder

EPILOG = """\
examples:
  kdpo-figures example results --edit 3          what each method wrote, before and after
  kdpo-figures cycle --record 24                 one edit of the shipped model, step by step
  kdpo-figures cycle --model gpt2-xl --prompt "The capital of Australia is" --target Melbourne
  kdpo-figures frontier results                  success against what else changed, over learning rates

Every figure is written as PNG and SVG. Radar plots are drawn by kdpo-report.
Exit status: 0 when it was, 1 when there is nothing to draw, 2 for wrong usage.
"""
CHOICES = ("model", "dataset", "protocol", "n_edits")


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``kdpo-figures``; returns the exit status."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.draw is _cycle and (args.prompt is None) != (args.target is None):
        parser.error("cycle: give --prompt and --target, or --record alone")

    def act() -> None:
        for picture in args.draw(args):
            name = "-".join(map(slug, picture.name))
            out = args.out or (args.folder / "report" / "figures" if args.draw is not _cycle else Path("figures"))
            write(out / f"{name}.svg", picture.svg)
            say(f"wrote {write(out / f'{name}.png', picture.png)}")

    return exit_status("kdpo-figures", act)


def make_parser() -> argparse.ArgumentParser:
    """Of the command line; ``draw`` is what makes the pictures."""
    parser = argparse.ArgumentParser(
        prog="kdpo-figures",
        description="Figures of the KDPO paper, from the results of a comparison or from an edit.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    figures = parser.add_subparsers(metavar="FIGURE", required=True)

    def figure(name: str, draw: Any, text: str) -> argparse.ArgumentParser:
        sub = figures.add_parser(name, help=text, description=text)
        sub.set_defaults(draw=draw)
        return sub

    def of_results(name: str, draw: Any, text: str) -> argparse.ArgumentParser:
        sub = figure(name, draw, text)
        sub.add_argument("folder", type=Path, metavar="RESULTS", help="where the results are")
        for key in CHOICES:
            kind, metavar = (int, "N") if key == "n_edits" else (str, "NAME")
            sub.add_argument(f"--{key.replace('_', '-')}", type=kind, metavar=metavar, help="only runs with this one")
        sub.add_argument("--out", type=Path, metavar="DIR", help="where to write (default RESULTS/report/figures)")
        when = sub.add_mutually_exclusive_group()
        when.add_argument("--after", type=int, metavar="T", help="after T edits (default: the last checkpoint)")
        if name == "example":
            when.add_argument("--right-after", action="store_true", help="right after the edit, before those after it")
        return sub

    sub = of_results("example", _example, "What the model wrote before an edit, and after it by method.")
    sub.add_argument("--edit", type=int, default=0, metavar="K", help="which edit, from 0 (default 0)")
    sub.add_argument("--seed", type=int, metavar="S", help="of the runs (default: the lowest; it orders the edits)")

    sub = of_results("frontier", _frontier, "Two metrics against each other, a curve for each method over its rates.")
    sub.add_argument("--x", default="rewrite_gen", metavar="METRIC", help="across (default rewrite_gen)")
    sub.add_argument("--y", default="known", metavar="METRIC", help="upwards (default known)")

    sub = figure("cycle", _cycle, "One KDPO edit: its rejected answers cycle by cycle, its loss step by step.")
    which = sub.add_mutually_exclusive_group(required=True)
    which.add_argument("--prompt", help="what the model is asked; with --target")
    which.add_argument(
        "--record", type=int, metavar="N", help="a record of the data set instead, from 0 as in its file"
    )
    sub.add_argument("--target", help="what it shall answer")
    sub.add_argument("--dataset", default="shipped", metavar="SOURCE", help="a name, a file (default shipped)")
    sub.add_argument(
        "--model", default="kdpo-llama-knowedit", metavar="ID", help="Hugging Face id or folder (default: the shipped)"
    )
    sub.add_argument("--device", help='"cpu" or "cuda:1" (default: the GPU where there is one)')
    sub.add_argument("--hparams", metavar="FILE", help="settings: a YAML file or the name of a ready-made one")
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting; can be repeated")
    sub.add_argument("--out", type=Path, metavar="DIR", help="where to write (default figures)")
    return parser


# Of results -----------------------------------------------------------------------------------------------------


def _chosen(args: argparse.Namespace) -> list[ResultFolder]:
    """The cells that the options leave, of one model, data set, protocol and number of edits.

    Raises ResultsError naming the option that leaves none, or that is to choose.
    """
    from .reading import read_cells

    cells, left_out = read_cells(args.folder)
    for name, reason in left_out:
        sys.stderr.write(f"Left out {name}: {reason}\n")
    for key in CHOICES:
        wanted = getattr(args, key)
        if wanted is not None:
            found = [cell for cell in cells if cell.manifest[key] == wanted]
            if not found:
                there = _listed(cell.manifest[key] for cell in cells)
                raise ResultsError(f"--{key.replace('_', '-')} {wanted}: {args.folder} has {there}")
            cells = found
    for key in CHOICES:
        several = {cell.manifest[key] for cell in cells}
        if len(several) > 1:
            raise ResultsError(
                f"{args.folder} has results of {_listed(several)}: choose with --{key.replace('_', '-')}"
            )
    return cells


def _frontier(args: argparse.Namespace) -> Iterator[Picture]:
    from . import frontier

    cells = _chosen(args)
    made = max(int(cell.means["T"].max()) for cell in cells) if args.after is None else args.after
    yield from frontier.pictures(cells, args.x, args.y, made)


def _example(args: argparse.Namespace) -> Iterator[Picture]:
    import matplotlib as mpl

    from . import edit_figures
    from .figures import SETTINGS, picture
    from .tables import after

    cells = _chosen(args)
    seeds = {cell.manifest["seed"] for cell in cells}
    seed = min(seeds) if args.seed is None else args.seed
    if seed not in seeds:
        raise ResultsError(f"--seed {seed}: {args.folder} has runs of seed {_listed(seeds)}")
    cells = [cell for cell in cells if cell.manifest["seed"] == seed]
    model, dataset, protocol, n_edits = cells[0].group
    made = max(int(cell.means["T"].max()) for cell in cells) if args.after is None else args.after
    questions = _questions(cells, args.edit, "right_after" if args.right_after else "checkpoint", made)
    when = f"right after edit {args.edit}" if args.right_after else after(protocol, n_edits, made)
    moment = "right-after" if args.right_after else f"T{made}"
    name = ("example", model, dataset, protocol, str(n_edits), f"s{seed}", f"edit{args.edit}", moment)
    with mpl.rc_context(SETTINGS):
        title = f"{model}, {dataset}, edit {args.edit}\n{when}"
        yield from picture(name, title, None, edit_figures.example(title, questions))


def _questions(cells: Sequence[ResultFolder], edit: int, when: str, made: int) -> list[Question]:
    """What was asked about ``edit``, with the answer of the unedited model and of each method."""
    from ..run.evaluate import Generation
    from .edit_figures import Answer, Question
    from .means import UNEDITED
    from .reading import read_texts

    texts = [(cell, text) for cell in cells for text in read_texts(cell)]
    edits = {text["edit"] for _, text in texts}
    if not edits:
        raise ResultsError(f"{cells[0].folder.parent}: nothing that was generated is recorded there")
    if edit not in edits:
        raise ResultsError(f"--edit {edit}: there is no such edit; there are {min(edits)} to {max(edits)}")
    questions: dict[tuple[str, str], Question] = {}
    before: dict[tuple[str, str], Answer] = {}
    for cell, text in sorted(texts, key=lambda pair: pair[0].label.casefold()):
        if text["edit"] != edit:
            continue
        place = (text["kind"], text["prompt"])
        said = Generation(text["text"], bool(text["stopped"]))
        label, unedited = cell.label, cell.manifest["method"] == UNEDITED
        answer = Answer(label, said.text, said.answers(text["wanted"]), said.stopped)
        if text["when"] == "pre" or unedited:
            before.setdefault(place, dataclasses.replace(answer, label="before editing"))
        elif text["when"] == when and (when == "right_after" or text["checkpoint"] == made):
            question = questions.setdefault(place, Question(*place, text["wanted"], []))
            questions[place] = dataclasses.replace(question, answers=[*question.answers, answer])
    if not questions:
        option = "--right-after" if when == "right_after" else f"--after {made}"
        seen = _listed(t["checkpoint"] for _, t in texts if (t["when"], t["edit"]) == (when, edit))
        raise ResultsError(f"{option}: edit {edit} was not looked at then" + f", but after {seen} edits" * bool(seen))
    unknown = Answer("before editing", "(not recorded; a run of method=unedited would)", False, True)
    return [
        dataclasses.replace(question, answers=[before.get(place, unknown), *question.answers])
        for place, question in sorted(questions.items(), key=lambda item: item[0][0] != "rewrite")
    ]


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, sorted(set(values))))


# Of an edit -----------------------------------------------------------------------------------------------------


def _cycle(args: argparse.Namespace) -> Iterator[Picture]:
    import matplotlib as mpl

    from ...cli.settings import chosen_settings
    from ...derived import complete
    from ...editing import edit
    from ...models.loading import load
    from ...requests.tokens import tokenize
    from ..run.datasets import load as load_records
    from . import edit_figures
    from .figures import SETTINGS, picture

    request, of = {"prompt": args.prompt, "target_new": args.target}, args.prompt
    if args.record is not None:
        records = load_records(args.dataset, shuffle=False, unique_subjects=False)
        if not 0 <= args.record < len(records):
            raise DataError(f"--record {args.record}: {args.dataset} has records 0 to {len(records) - 1}")
        record = records[args.record]
        request, of = {"prompt": record.prompt, "target_new": record.target_new}, f"{args.dataset}-{args.record}"
        request |= {"subject": record.subject} if record.subject_in_prompt else {}
    hparams, _ = chosen_settings(args.model, args.hparams, changes=args.set)
    model, tok = load(args.model, device=args.device)
    ((tokens, *_),) = tokenize(tok, [request], append_eos=hparams.append_eos)
    _, _, (trace,) = edit(model, tok, [request], complete(hparams, model))
    if not trace.cycles:
        raise RequestError(f"{request['prompt']!r} is answered with {request['target_new']!r} already: nothing to show")
    cycles = [(_spelled(tok, cycle.rejected), cycle) for cycle in trace.cycles]
    end = f"{len(cycles)} cycles, {trace.steps} steps, {'won' if trace.converged else 'not won'}"
    with mpl.rc_context(SETTINGS):
        title, chosen = f"{args.model}: {end}", _spelled(tok, tokens.chosen.tolist())
        drawn = edit_figures.optimisation(title, request["prompt"], chosen, cycles, hparams.stop_loss)
        yield from picture(("cycle", args.model, of), title, None, drawn)


def _spelled(tok: Any, ids: Sequence[int]) -> list[str]:
    """Each token as text, a space at its beginning shown as ``␣``."""
    shown = []
    for identity, token in zip(ids, tok.convert_ids_to_tokens(ids), strict=True):
        text = tok.decode([identity])
        if "\N{REPLACEMENT CHARACTER}" in text or not text:
            text = str(token)  # a part of a character, or nothing to see
        space = text.startswith(" ") or str(token).startswith("▁")  # which some tokenizers do not decode alone
        shown.append(("␣" if space else "") + text.replace("\n", "⏎").strip())
    return shown


if __name__ == "__main__":
    sys.exit(main())
