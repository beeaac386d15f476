"""kdpo-figures: the figures of the paper from results and from edits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pandas")
pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")

from result_folders import TWO_EDITS, Row, write_cell

from kdpo_editor.compare.report.edit_figures import Answer, Question, example, optimisation
from kdpo_editor.compare.report.frontier import points
from kdpo_editor.compare.report.paper_figures import _spelled, main
from kdpo_editor.compare.report.reading import read_cells
from kdpo_editor.engine.traces import Cycle
from kdpo_editor.testbed import load_records

REPHRASED: list[Row] = [
    *TWO_EDITS,
    (0, 1, "checkpoint", "rephrase_acc", 0.4),
    (0, 2, "checkpoint", "rephrase_acc", 0.2),
]


def texts_of(figure: Any) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def written(capsys: pytest.CaptureFixture[str]) -> list[Path]:
    """The pictures that the command said it wrote, each with its SVG."""
    files = [Path(name) for name in re.findall(r"^wrote (.+)$", capsys.readouterr().out, re.MULTILINE)]
    for file in files:
        assert file.read_bytes().startswith(b"\x89PNG")
        assert "<svg" in file.with_suffix(".svg").read_text("utf-8")
    return files


# --- an edit, cycle by cycle


def test_the_cycle_is_drawn_with_its_tokens_and_a_line_where_a_rejected_answer_is_taken() -> None:
    cycles = [
        (["␣A", "b"], Cycle([1, 2], [0.7, 0.5], 2)),
        (["␣A", "b"], Cycle([1, 2], [0.4], 1)),
        (["␣C", "d"], Cycle([3, 4], [0.3, 0.0005], 1)),
    ]
    figure = optimisation("m: won", "Who?", ["␣C", "b"], cycles, 0.001)
    said = texts_of(figure)
    for text in ("Who?", "␣A", "d", "y_l of cycles 1 to 2", "y_l of cycle 3", "y_l 3"):
        assert text in said
    framed = [t.get_text() for t in figure.axes[0].texts if t.get_bbox_patch() is not None]
    assert framed == ["␣A", "d"]
    lines = figure.axes[1].lines
    assert [line.get_xdata()[0] for line in lines if line.get_linestyle() == ":"] == [0, 2, 3]
    curves = [line for line in lines if line.get_marker() != "None"]
    assert [list(curve.get_xdata()) for curve in curves] == [[0, 1], [2], [3, 4]]
    assert list(curves[-1].get_ydata()) == [0.3, 0.0005]


def test_tokens_are_spelled_with_their_spaces(llama: Any) -> None:
    _, tok = llama
    spelled = _spelled(tok, tok(" male or\nfemale")["input_ids"])
    assert spelled[0].startswith("␣")
    assert "".join(spelled).replace("␣", " ").replace("⏎", "\n") == " male or\nfemale"


def test_an_answer_that_is_known_has_no_cycle_to_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = load_records()[0]
    request = ["--prompt", record["prompt"], "--target", record["ground_truth"]]
    assert main(["cycle", *request, "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "already" in capsys.readouterr().err


def test_the_command_draws_a_record_s_cycle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cycle", "--record", "24", "--device", "cpu", "--out", str(tmp_path)]) == 0
    (file,) = written(capsys)
    assert file.name == "cycle-kdpo-llama-knowedit-shipped-24.png"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--record", "301"], "--record 301: shipped has records 0 to 300"),
        (["--record", "0", "--set", "lrr=1"], "lrr"),
        (["--record", "0", "--dataset", "none.json"], "none.json"),
        (["--prompt", "Who?", "--target", "Ada", "--model", "/no/model"], "cannot load the model /no/model"),
        (["--prompt", "Who?", "--target", "  "], "target_new"),
    ],
)
def test_a_cycle_that_cannot_be_drawn(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cycle", "--device", "cpu", *arguments]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--record", "1", "--target", "x"], ["--prompt", "x"], ["--record", "one"]])
def test_wrong_usage_of_cycle(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["cycle", *arguments])
    assert stop.value.code == 2


# --- examples from results


def asked(text: str, stopped: bool = True, **place: Any) -> dict[str, Any]:
    return {"text": text, "stopped": stopped, "wanted": ["Ada"], **place}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    before = asked("Bea", when="pre", checkpoint=0)
    kdpo = [before, asked("Ada"), asked("Adah", kind="rephrase", prompt="Which one?"), asked("Cid", when="right_after")]
    write_cell(folder, "a", REPHRASED, texts=kdpo)
    write_cell(folder, "b", REPHRASED, texts=[asked("Ada and", stopped=False)], method="ft", label="FT")
    return folder


def test_the_example_shows_each_method_before_and_after(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kdpo_editor.compare.report import edit_figures

    drawn: list[Question] = []
    monkeypatch.setattr(edit_figures, "example", lambda title, questions: drawn.extend(questions) or example(title, []))
    assert main(["example", str(results)]) == 0
    rewrite, rephrase = drawn
    assert (rewrite.kind, rewrite.prompt, rewrite.wanted) == ("rewrite", "Who?", ["Ada"])
    assert rewrite.answers == [
        Answer("before editing", "Bea", right=False, stopped=True),
        Answer("FT", "Ada and", right=True, stopped=False),
        Answer("KDPO", "Ada", right=True, stopped=True),
    ]
    assert [answer.text for answer in rephrase.answers] == ["(not recorded; a run of method=unedited would)", "Adah"]
    drawn.clear()
    assert main(["example", str(results), "--right-after"]) == 0
    assert [answer.text for answer in drawn[0].answers] == ["Bea", "Cid"]


def test_the_unedited_model_s_run_says_what_was_before(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kdpo_editor.compare.report import edit_figures

    drawn: list[Question] = []
    monkeypatch.setattr(edit_figures, "example", lambda title, questions: drawn.extend(questions) or example(title, []))
    other = [asked("Eve", kind="rephrase", prompt="Which one?")]
    write_cell(results, "c", REPHRASED, texts=other, method="unedited", label="Unedited")
    assert main(["example", str(results)]) == 0
    assert [answer.text for answer in drawn[1].answers] == ["Eve", "Adah"]


def test_right_answers_are_told_apart_without_colour_and_nothing_is_cut() -> None:
    answers = [Answer("before editing", "x " * 200, False, True), Answer("A rather long name " * 3, "Ada", True, True)]
    figure = example("title", [Question("rewrite", "Who? " * 60, ["Ada"], answers)])
    said = {text.get_text(): text for axes in figure.axes for text in axes.texts}
    assert {"✓", "✗"} <= said.keys()
    assert said["Ada"].get_fontweight() == "bold"
    width, height = figure.bbox.width, figure.bbox.height
    for text in said.values():
        box = text.get_window_extent()
        assert 0 <= box.x0 <= box.x1 <= width
        assert 0 <= box.y0 <= box.y1 <= height


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--edit", "7"], "--edit 7: there is no such edit; there are 0 to 0"),
        (["--seed", "3"], "--seed 3: {} has runs of seed 0"),
        (["--after", "1"], "--after 1: edit 0 was not looked at then, but after 2 edits"),
        (["--model", "x"], "--model x: {} has m"),
        (["--n-edits", "5"], "--n-edits 5: {} has 2"),
    ],
)
def test_an_example_that_is_not_there(
    results: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["example", str(results), *arguments]) == 1
    assert said.format(results) in capsys.readouterr().err


def test_of_several_models_one_must_be_chosen(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_cell(results, "c", model="other", texts=[asked("Ada")])
    assert main(["example", str(results)]) == 1
    assert f"{results} has results of m, other: choose with --model" in capsys.readouterr().err
    assert main(["example", str(results), "--model", "other"]) == 0
    (file,) = written(capsys)
    assert file.name == "example-other-zsre-sequence-2-s0-edit0-T2.png"


def test_results_without_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_cell(tmp_path, "a", texts=[])
    assert main(["example", str(tmp_path)]) == 1
    assert "nothing that was generated" in capsys.readouterr().err


# --- frontier


def test_a_frontier_has_a_point_per_method_and_rate(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rate, seed in ((1.0, 0), (1.0, 1), (0.5, 0)):
        rows = [(0, 2, "checkpoint", "rewrite_gen", rate), (-1, 2, "checkpoint", "known", 1.0 - seed / 10)]
        config = f"method:\n  rate_factor: {rate}\n"
        write_cell(results, f"r{rate}-{seed}", rows, config, method="ft_m", label="FT-M", seed=seed)
    (frame,) = [points(read_cells(results)[0], "rewrite_gen", "known", 2)]
    assert frame[["label", "rate"]].to_numpy().tolist() == [["FT-M", 0.5], ["FT-M", 1.0]]
    assert frame[["x", "y"]].to_numpy().tolist() == [[0.5, 1.0], [1.0, pytest.approx(0.95)]]
    assert main(["frontier", str(results)]) == 0
    (file,) = written(capsys)
    assert file.name == "frontier-m-zsre-sequence-2-T2-rewrite_gen-known.png"


def test_a_frontier_takes_no_other_setting_for_another_seed(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(0, 2, "checkpoint", "rewrite_gen", 1.0), (-1, 2, "checkpoint", "known", 1.0)]
    for steps in (10, 20):
        config = f"method:\n  rate_factor: 0.5\n  num_steps: {steps}\n"
        write_cell(results, f"n{steps}", rows, config, method="ft_m", label="FT-M")
    assert main(["frontier", str(results)]) == 1
    assert "FT-M: several cells have 0.5 times its rate and seed 0" in capsys.readouterr().err


def test_a_frontier_of_what_was_not_measured(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["frontier", str(results), "--y", "portability_acc"]) == 1
    assert (
        "rewrite_gen and portability_acc were not both measured after 2 edits; measured is " in capsys.readouterr().err
    )


@pytest.mark.parametrize("figure", ["example", "frontier"])
def test_a_folder_without_results(figure: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([figure, str(tmp_path)]) == 1
    assert "holds no results" in capsys.readouterr().err
    assert main([figure, str(tmp_path / "none")]) == 1
    assert "is not a folder" in capsys.readouterr().err


def test_methods_are_told_apart_without_colour() -> None:
    from itertools import cycle, islice

    from kdpo_editor.compare.report.figures import COLOURS, LINES, MARKERS

    looks = list(islice(zip(cycle(MARKERS), cycle(LINES), strict=False), 40))
    assert len(set(looks)) == 40
    for colour in COLOURS:
        red, green, blue = bytes.fromhex(colour[1:])
        assert 0.299 * red + 0.587 * green + 0.114 * blue < 170, f"{colour} is too pale in grey"
