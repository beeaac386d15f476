"""kdpo-report on result folders as a comparison leaves them."""

from __future__ import annotations

import base64
import csv
import hashlib
import html.parser
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pd = pytest.importorskip("pandas")
pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")

from result_folders import TWO_EDITS, Row, write_cell  # noqa: E402

import kdpo_editor.compare.report  # noqa: E402
from kdpo_editor.compare.report.figures import _curves, _radar_scores, styles_of  # noqa: E402
from kdpo_editor.compare.report.means import tidy, wide  # noqa: E402
from kdpo_editor.compare.report.reading import read_cells  # noqa: E402
from kdpo_editor.compare.report.report import main, report, slug  # noqa: E402
from kdpo_editor.compare.report.tables import as_latex, as_markdown, tables  # noqa: E402
from kdpo_editor.errors import ResultsError  # noqa: E402

WriteCell = Callable[..., Path]
REPORT = Path(kdpo_editor.compare.report.__file__).parent
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def cell(tmp_path: Path) -> WriteCell:
    """Write one result folder below ``tmp_path / "results"`` and return it."""
    return partial(write_cell, tmp_path / "results")


def figure(folder: Path, metric: str, T: int = 2, when: str = "checkpoint", label: str = "KDPO") -> Any:
    frame = tidy(read_cells(folder)[0])
    frame = frame[(frame["metric"] == metric) & (frame["T"] == T) & (frame["when"] == when) & (frame["label"] == label)]
    (row,) = frame.itertuples()
    return row


def scaled(rows: list[Row], factor: float) -> list[Row]:
    return [(*row[:4], row[4] * factor) for row in rows]


# --- aggregation


@pytest.mark.parametrize(
    ("metric", "T", "when", "mean", "edits"),
    [
        ("rewrite_acc", 1, "checkpoint", 1.0, 1),
        ("rewrite_acc", 2, "checkpoint", 0.75, 2),
        ("rewrite_acc", 2, "right_after", 0.9, 2),
        ("rewrite_acc", 1, "right_after", 1.0, 1),
        ("rewrite_acc", 2, "pre", 0.25, 2),
        ("rewrite_acc", 1, "pre", 0.0, 1),
        ("locality_acc", 2, "checkpoint", 0.65, 2),
        ("locality.same_acc", 2, "checkpoint", 0.775, 2),
        ("locality.other_acc", 2, "checkpoint", 0.25, 1),
        ("seconds", 1, "checkpoint", 1.0, 1),
        ("seconds", 2, "checkpoint", 2.0, 2),
        ("perplexity", 2, "checkpoint", 12.0, 0),
        ("perplexity", 2, "pre", 10.0, 0),
        ("peak_memory", 2, "checkpoint", 2.0 * 2**20, 0),
        ("setup_seconds", 1, "checkpoint", 5.0, 0),
        ("setup_seconds", 2, "checkpoint", 5.0, 0),
        ("known", 2, "checkpoint", 0.9, 0),
        ("known", 2, "pre", 1.0, 0),
    ],
)
def test_mean_over_edits(cell: WriteCell, metric: str, T: int, when: str, mean: float, edits: int) -> None:
    row = figure(cell("a").parent, metric, T, when)
    assert row.mean == pytest.approx(mean)
    assert row.edits == edits


def test_mean_and_std_are_over_seeds_not_over_edits(cell: WriteCell) -> None:
    for seed, factor in enumerate((1.0, 0.5, 0.6)):
        folder = cell(f"s{seed}", scaled(TWO_EDITS, factor), seed=seed).parent
    row = figure(folder, "rewrite_acc")
    values = [0.75, 0.375, 0.45]
    mean = sum(values) / 3
    assert row.mean == pytest.approx(mean)
    assert row.std == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values) / 2))
    assert (row.seeds, row.edits) == (3, 6)


def test_one_seed_has_no_std(cell: WriteCell) -> None:
    folder = cell("a").parent
    assert math.isnan(figure(folder, "rewrite_acc").std)
    assert "±" not in as_markdown(tables(tidy(read_cells(folder)[0]))).split("Mean, and")[0].replace(r"\_", "_")


def test_values_that_are_not_a_number_are_left_out_of_mean_and_count(cell: WriteCell) -> None:
    folder = cell(
        "a", [*TWO_EDITS, (0, 2, "checkpoint", "rephrase_acc", math.nan), (1, 2, "checkpoint", "rephrase_acc", 0.4)]
    )
    row = figure(folder.parent, "rephrase_acc")
    assert (row.mean, row.edits) == (pytest.approx(0.4), 1)


def test_a_collapsed_model_s_infinite_perplexity_is_shown_and_is_not_the_best(cell: WriteCell) -> None:
    for seed in (0, 1):
        cell(f"a{seed}", [*TWO_EDITS[:-2], (-1, 2, "checkpoint", "perplexity", math.inf)], seed=seed)
        folder = cell(f"b{seed}", method="ft", label="FT", seed=seed).parent
    (table,) = [t for t in tables(tidy(read_cells(folder)[0])) if t.made == 2 and not t.detail]
    column = table.columns.index("perplexity")
    shown = {label: row[column][:2] for label, row in zip(table.labels, table.rows, strict=True)}
    assert shown["KDPO"] == ("inf", False)
    assert shown["FT"] == ("12.0 ± 0.0", False)  # nobody to compete with


def test_single_edits_are_averaged_over_all_of_them(cell: WriteCell) -> None:
    rows: list[Row] = [(e, 1, "checkpoint", "rewrite_acc", float(e)) for e in range(4)]
    rows += [(e, 1, "pre", "rewrite_acc", 0.0) for e in range(4)] + [
        (e, 1, "right_after", "seconds", 2.0) for e in range(4)
    ]
    folder = cell("a", rows, protocol="single", n_edits=4).parent
    assert figure(folder, "rewrite_acc", T=1).mean == pytest.approx(1.5)
    assert figure(folder, "seconds", T=1).edits == 4


def test_before_editing_is_taken_from_the_methods_where_the_unedited_model_has_no_run(cell: WriteCell) -> None:
    folder = cell("a").parent
    assert figure(folder, "rewrite_acc", label="before editing").mean == pytest.approx(0.25)
    cell("b", method="unedited", label="Unedited model")
    assert list(tidy(read_cells(folder)[0])["label"].unique()) == ["Unedited model", "KDPO"]


def test_where_the_unedited_model_was_not_scored_the_methods_say_what_was_before(cell: WriteCell) -> None:
    cell("a")
    last = [row for row in TWO_EDITS if row[1] != 1]
    frame = tidy(read_cells(cell("b", last, method="unedited", label="Unedited model").parent)[0])
    labels = {made: list(of["label"].unique()) for made, of in frame.groupby("T")}
    assert labels == {1: ["before editing", "KDPO"], 2: ["Unedited model", "KDPO"]}


def test_a_sweep_gets_a_row_per_setting_and_its_seeds_stay_together(cell: WriteCell) -> None:
    for lr in ("0.1", "0.5"):
        for seed in (0, 1):
            config = f"method:\n  hparams:\n    lr: {lr}\noutput_dir: runs/{lr}-{seed}\n"
            folder = cell(f"lr={lr},seed={seed}", config=config, seed=seed).parent
    frame = tidy(read_cells(folder)[0])
    assert list(frame["label"].unique()) == ["before editing", "KDPO (lr=0.1)", "KDPO (lr=0.5)"]
    assert set(frame["seeds"]) == {2}


def test_where_a_run_logged_to_is_no_other_setting(cell: WriteCell) -> None:
    for seed, logged in enumerate(("null", "tensorboard")):
        folder = cell(f"s{seed}", config=f"method:\n  lr: 0.1\nlogging: {logged}\n", seed=seed).parent
    assert set(tidy(read_cells(folder)[0])["seeds"]) == {2}


def test_records_of_different_files_are_not_compared(cell: WriteCell) -> None:
    for file, method in (("a", "KDPO"), ("b", "FT"), ("b", "KDPO")):
        told = {"method": method.lower(), "label": method, "dataset": "file"}
        folder = cell(f"{method}-{file}", config=f"dataset:\n  name: file\n  source: {file}.json\n", **told).parent
    made = [t for t in tables(tidy(read_cells(folder)[0])) if t.made == 2 and not t.detail]
    assert {t.caption.partition(", ")[2]: t.labels[1:] for t in made} == {
        "file (source=a.json), after 2 of 2 edits": ["KDPO"],
        "file (source=b.json), after 2 of 2 edits": ["FT", "KDPO"],
    }


def test_different_numbers_of_edits_are_not_compared(cell: WriteCell) -> None:
    cell("a")
    folder = cell("b", n_edits=3, method="ft", label="FT").parent
    assert [(t.made, t.n_edits, t.labels[-1]) for t in tables(tidy(read_cells(folder)[0])) if not t.detail] == [
        (1, 2, "KDPO"), (2, 2, "KDPO"), (1, 3, "FT"), (2, 3, "FT"),
    ]  # fmt: skip


def test_a_run_with_the_settings_and_seed_of_another_is_not_counted_twice(cell: WriteCell) -> None:
    cell("old", finished="2026-01-01")
    folder = cell("new", finished="2026-01-02").parent
    cells, left_out = read_cells(folder)
    assert [c.name for c in cells] == ["new"]
    assert left_out == [("old", "repeats new: same settings and seed")]


def test_wide_table_holds_the_same_numbers(cell: WriteCell) -> None:
    frame = wide(tidy(read_cells(cell("a").parent)[0])).set_index(["T", "label"])
    assert frame.loc[(2, "KDPO"), "rewrite_acc.mean"] == pytest.approx(0.75)
    assert frame.loc[(2, "KDPO"), "rewrite_acc.right_after.mean"] == pytest.approx(0.9)
    assert frame.loc[(2, "KDPO"), "rewrite_acc.edits"] == 2
    assert list(frame.loc[2].index) == ["before editing", "KDPO"]


# --- tables


def test_best_values_are_marked_and_the_unedited_model_does_not_compete(cell: WriteCell) -> None:
    cell("a")
    cell("b", scaled(TWO_EDITS, 0.5), method="ft", label="FT")
    folder = cell("c", scaled(TWO_EDITS, 0.01), method="unedited", label="Unedited").parent
    (table,) = [t for t in tables(tidy(read_cells(folder)[0])) if t.made == 2 and not t.detail]
    best = {
        column: [label for label, row in zip(table.labels, table.rows, strict=True) if row[i].best]
        for i, column in enumerate(table.columns)
    }
    assert best["rewrite_acc"] == best["locality_acc"] == best["rewrite_acc (right after)"] == ["KDPO"]
    assert best["known"] == ["KDPO"]
    assert best["perplexity"] == best["seconds"] == best["setup_seconds"] == best["peak_memory (MiB)"] == ["FT"]
    assert best["edits"] == best["seeds"] == []


@pytest.mark.parametrize(
    ("metric", "best"),
    [("tasks.wikitext.word_perplexity", "FT"), ("tasks.wikitext.bits_per_byte", "FT"), ("tasks.arc.acc", "KDPO")],
)
def test_of_a_tasks_figures_the_better_one_is_marked(cell: WriteCell, metric: str, best: str) -> None:
    for name, label, value in (("a", "KDPO", 0.9), ("b", "FT", 0.5)):
        folder = cell(name, [*TWO_EDITS, (-1, 2, "checkpoint", metric, value)], method=name, label=label).parent
    (table,) = [t for t in tables(tidy(read_cells(folder)[0])) if t.made == 2 and metric in t.columns]
    column = table.columns.index(metric)
    assert [label for label, row in zip(table.labels, table.rows, strict=True) if row[column].best] == [best]


def test_equal_values_are_best_together(cell: WriteCell) -> None:
    cell("a")
    folder = cell("b", method="ft", label="FT").parent
    (table,) = [t for t in tables(tidy(read_cells(folder)[0])) if t.made == 2 and not t.detail]
    assert [row[0].best for row in table.rows] == [False, True, True]


NASTY = "<script>alert('&')</script> 50%_{a}$b$ \\x #1 ~^ |c| *d*"


def test_latex_escapes_names(cell: WriteCell) -> None:
    text = as_latex(tables(tidy(read_cells(cell("a", label=NASTY).parent)[0])))
    escaped = r"50\%\_\{a\}\$b\$ \textbackslash{}x \#1 \textasciitilde{}\textasciicircum{} \textbar{}c\textbar{}"
    assert escaped in text
    assert "50%" not in text
    for tabular in text.split("\\begin{tabular}{l")[1:]:
        columns = tabular.index("}")  # as many letters "r"
        rows = [line for line in tabular.splitlines() if line.endswith(r"\\")]
        assert len(rows) == 3
        assert all(row.replace(r"\&", "").count("&") == columns for row in rows)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("pdflatex"), reason="needs pdflatex")
def test_latex_compiles(cell: WriteCell, tmp_path: Path) -> None:
    cell("a", label=NASTY)
    text = as_latex(tables(tidy(read_cells(cell("b", label=NASTY, seed=1).parent)[0])))
    frame = r"\documentclass{article}\usepackage{booktabs,graphicx}\begin{document}" + text + r"\end{document}"
    (tmp_path / "t.tex").write_text(frame)
    subprocess.run(["pdflatex", "-halt-on-error", "t.tex"], cwd=tmp_path, check=True, capture_output=True)


def test_markdown_names_do_not_break_the_table(cell: WriteCell) -> None:
    text = as_markdown(tables(tidy(read_cells(cell("a", label=NASTY).parent)[0])))
    assert r"\<script\>" in text
    assert r"\|c\| \*d\*" in text


# --- damaged and unfinished folders


def cut(folder: Path) -> None:
    content = (folder / "rows.parquet").read_bytes()
    (folder / "rows.parquet").write_bytes(content[: len(content) // 2])


def rewrite(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))


def drop_column(folder: Path) -> None:
    pd.read_parquet(folder / "rows.parquet").drop(columns="value").to_parquet(folder / "rows.parquet")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut, "rows.parquet cannot be read"),
        (lambda f: (f / "rows.parquet").write_bytes(b""), "rows.parquet cannot be read"),
        (lambda f: (f / "rows.parquet").unlink(), "rows.parquet is missing"),
        (drop_column, "rows.parquet lacks value"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda f: (f / "manifest.json").write_text('{"schema": 1, "ha'), "manifest.json cannot be read"),
        (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json cannot be read"),
        (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json is not of schema 1"),
        (lambda f: rewrite(f, schema=2), "manifest.json is not of schema 1"),
        (lambda f: rewrite(f, seed="0"), "manifest.json: seed is '0', not a whole number"),
        (lambda f: rewrite(f, method=None), "manifest.json: method is None, not a text"),
        (lambda f: rewrite(f, trials="six"), "manifest.json: trials is 'six', not a whole number"),
        (lambda f: rewrite(f, seed=7), "rows.parquet is of seed [0], manifest.json of 7"),
        (lambda f: rewrite(f, status="failed", error="out of\nmemory"), "its status is 'failed' (out of memory)"),
        (lambda f: rewrite(f, status="running"), "its status is 'running'; --partial shows its checkpoints 1, 2"),
        (lambda f: (f / "config.yaml").unlink(), "config.yaml is missing"),
        (lambda f: (f / "config.yaml").write_text("a: [1"), "config.yaml cannot be read"),
    ],
)
def test_a_damaged_folder_is_named_and_left_out(cell: WriteCell, damage: Callable[[Path], Any], reason: str) -> None:
    folder = cell("good").parent
    damage(cell("bad/one", method="ft", label="FT"))
    cells, left_out = read_cells(folder)
    assert [c.name for c in cells] == ["good"]
    assert len(left_out) == 1
    assert left_out[0][0] == "bad/one"
    assert left_out[0][1].startswith(reason)


def test_partial_shows_only_checkpoints_whose_edits_are_all_measured(cell: WriteCell) -> None:
    rows = [row for row in TWO_EDITS if row[:2] != (1, 2) or row[2] != "checkpoint"]
    folder = cell("killed", rows, status="running").parent
    cells, _ = read_cells(folder, partial=True)
    assert cells[0].label == "KDPO (partial)"
    assert list(cells[0].means["T"].unique()) == [1]


def test_a_killed_run_without_a_whole_checkpoint_is_left_out_even_with_partial(cell: WriteCell) -> None:
    folder = cell("killed", TWO_EDITS[:5], status="running").parent
    with pytest.raises(ResultsError, match="killed: its status is 'running'"):
        read_cells(folder, partial=True)


# --- the command


class Page(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_command_writes_everything(cell: WriteCell, capsys: pytest.CaptureFixture[str]) -> None:
    cell("a")
    cut(cell("torn", method="ft", label="FT"))
    results = cell("b", scaled(TWO_EDITS, 0.5), method="lora", label="LoRA").parent
    assert main([str(results)]) == 0
    out = results / "report"
    written = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    curves = {f"figures/curves-m-zsre-2.{kind}" for kind in ("png", "svg")}
    assert written == {"report.html", "report.md", "tables.tex", "tidy.csv", "wide.csv"} | curves
    said = capsys.readouterr()
    assert "m, zsre, after 2 of 2 edits" in said.out
    assert "0.750*" in said.out
    assert "Left out torn: rows.parquet cannot be read" in said.err
    assert "torn: rows.parquet" in (out / "report.html").read_text()
    with (out / "tidy.csv").open() as file:
        assert {row["edits"] for row in csv.DictReader(file) if row["metric"] == "rewrite_acc" and row["T"] == "2"} == {
            "2"
        }


def test_a_curve_is_of_the_means_over_seeds(cell: WriteCell) -> None:
    for seed, factor in enumerate((1.0, 0.5)):
        folder = cell(f"s{seed}", scaled(TWO_EDITS, factor), seed=seed).parent
    frame = tidy(read_cells(folder)[0]).query("when != 'pre'")
    drawn = _curves(frame, styles_of(frame))
    (axes,) = (axes for axes in drawn.axes if axes.get_title() == "rewrite_acc")
    before, kdpo = (list(bars.lines[0].get_ydata()) for bars in axes.containers)
    assert before == pytest.approx([0, 0.1875])
    assert kdpo == pytest.approx([0.75, 0.5625])


def test_a_radars_fluency_is_a_share_of_the_unedited_models(cell: WriteCell) -> None:
    said = [(0, 0, "pre", "fluency.ngram_entropy", 6.0), (0, 2, "checkpoint", "fluency.ngram_entropy", 3.0)]
    frame = tidy(read_cells(cell("a", [*TWO_EDITS, *said]).parent)[0]).query("T == 2")
    scores = _radar_scores(frame)
    assert list(scores.index) == ["KDPO"]
    assert scores.loc["KDPO", ["rewrite_acc", "fluency.ngram_entropy"]].tolist() == pytest.approx([0.75, 0.5])


def test_radars_for_each_data_set_and_their_mean(cell: WriteCell, tmp_path: Path) -> None:
    rows = [*TWO_EDITS, (0, 1, "checkpoint", "rephrase_acc", 0.4), (0, 2, "checkpoint", "rephrase_acc", 0.2)]
    for dataset in ("zsre", "recent"):
        results = cell(dataset, rows, dataset=dataset).parent
    written = report(results, tmp_path / "out", {"figures"})
    radars = {path.name for path in written if path.name.startswith("radar") and path.suffix == ".png"}
    of = ("recent", "zsre", "mean")
    assert radars == {f"radar-m-{dataset}-sequence-2-T{T}.png" for dataset in of for T in (1, 2)}


def test_the_page_escapes_data_and_loads_nothing(cell: WriteCell, tmp_path: Path) -> None:
    results = cell("a", label=NASTY, model="<b>m</b>", notes=["<i>note</i>"], config="method: '<u>x</u>'\n").parent
    report(results, tmp_path, {"html"})
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert not {"i", "u", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [{}]
    # The only script that a browser runs is the page's own.
    own = (REPORT / "page.js").read_bytes()
    assert f"<script>{own.decode()}</script>" in text
    assert f"script-src 'sha256-{base64.b64encode(hashlib.sha256(own).digest()).decode()}'\"" in text
    sources = [
        value or "" for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")
    ]
    assert all(source.startswith(("data:image/svg+xml;base64,", "#")) for source in sources)
    for said in (NASTY, "<b>m</b>", "<i>note</i>", "<u>x</u>", f"{NASTY} says Ada", "(did not stop)", "torch"):
        assert said in page.text


def test_the_page_s_tables_are_narrow(cell: WriteCell, tmp_path: Path) -> None:
    """Headers can be broken, what is the same for all methods stands below, and ± on a line of its own."""
    for seed in (0, 1):
        results = cell(f"a{seed}", scaled(TWO_EDITS, 1 + seed), seed=seed).parent
    report(results, tmp_path, {"html"})
    text = (tmp_path / "report.html").read_text()
    assert ">rewrite_<wbr>acc<" in text
    assert "N = 2 edits for each of 2 seeds (0, 1)" in text
    assert ">seeds<" not in text
    assert re.search(r'>1\.125\s*<span class="std">± 0\.530</span></td>', text)
    cell("b", method="ft", label="FT")  # one seed
    report(results, tmp_path, {"html"})
    assert ">seeds<" in (tmp_path / "report.html").read_text()


def test_the_page_opens_with_one_table_and_one_picture_of_the_most_edits(cell: WriteCell, tmp_path: Path) -> None:
    rows = [*TWO_EDITS, (0, 1, "checkpoint", "rephrase_acc", 0.4), (0, 2, "checkpoint", "rephrase_acc", 0.2)]
    cell("a", rows)
    results = cell("b", rows, method="ft", label="FT", dataset="another").parent
    cell("c", rows, method="ft", label="FT")
    report(results, tmp_path, {"html"})
    text = (tmp_path / "report.html").read_text()
    opening = text[: text.index("Further down")]
    assert opening.count("<table") == opening.count("<img") == 1
    assert "<h3>After 2 of 2 edits</h3>" in opening
    assert 'alt="Radar: m, zsre, after 2 of 2 edits"' in opening


@pytest.mark.parametrize(
    ("trials", "said"),
    [
        ((None, None), "settings tried: not said."),
        ((6, 6), "settings tried: 6 for each method."),
        ((6, None), "settings tried: 6 for each method, but LoRA not said."),
    ],
)
def test_tables_and_pictures_say_n_split_seeds_and_settings_tried(
    cell: WriteCell, tmp_path: Path, trials: tuple[int | None, int | None], said: str
) -> None:
    rows = [*TWO_EDITS, (0, 1, "checkpoint", "rephrase_acc", 0.4), (0, 2, "checkpoint", "rephrase_acc", 0.2)]
    config = "dataset:\n  split: validation\n"
    for name, label, count in (("a", "KDPO", trials[0]), ("b", "FT", trials[0]), ("c", "LoRA", trials[1])):
        results = cell(name, rows, config, label=label, method=label.lower(), seed=3, trials=count).parent
    cell("d", rows, config, label="unedited", method="unedited", seed=3, trials=9)
    report(results, tmp_path, {"html"})
    page = Page((tmp_path / "report.html").read_text())
    for made in ("1 edit", "2 edits"):
        line = f"N = {made}, seed 3; split: validation; {said}"
        assert page.text.count(line) >= 2  # below a table and below a picture


def test_settings_tried_are_a_column_where_they_are_said(cell: WriteCell) -> None:
    cell("a", trials=6)
    cell("b", trials=6, seed=1)
    folder = cell("c", method="ft", label="FT").parent
    cell("d", method="unedited", label="unedited", trials=6)
    (table,) = [t for t in tables(tidy(read_cells(folder)[0])) if t.made == 2 and not t.detail]
    column = table.columns.index("settings tried")
    found = {label: row[column].text for label, row in zip(table.labels, table.rows, strict=True)}
    assert found == {"unedited": "-", "FT": "-", "KDPO": "6"}


def test_every_answer_stands_beside_the_others_to_its_prompt(cell: WriteCell, tmp_path: Path) -> None:
    asked = [{"edit": edit, "prompt": f"Question {edit}?", "stopped": True} for edit in range(40)]
    cell("a", texts=[{**text, "text": "Ada Lovelace"} for text in asked])
    results = cell("b", method="ft", label="FT", texts=[{**text, "text": "Grace"} for text in asked]).parent
    report(results, tmp_path, {"html"})
    text = (tmp_path / "report.html").read_text()
    assert text.count('<div class="asked">') == 40
    assert text.count('<div class="right"><b>KDPO ✓</b>Ada Lovelace</div>') == 40
    assert text.count("<div><b>FT</b>Grace</div>") == 40


def test_answers_of_too_many_edits_are_of_some_taken_evenly(
    cell: WriteCell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdpo_editor.compare.report.page.MOST_ANSWERS", 20)
    texts = [{"edit": edit, "prompt": f"Question {edit}?", "text": "Ada", "stopped": True} for edit in range(40)]
    report(cell("a", texts=texts).parent, tmp_path, {"html"})
    page = Page((tmp_path / "report.html").read_text())
    assert "Of 40 edits, 20 are here" in page.text
    assert "Question 38?" in page.text
    assert "Question 39?" not in page.text


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
@pytest.mark.parametrize("width", [400, 1280])
def test_in_a_browser_columns_are_chosen_and_answers_searched(cell: WriteCell, tmp_path: Path, width: int) -> None:
    browsers = pytest.importorskip("playwright.sync_api")
    texts = [{"edit": edit, "prompt": f"Question {edit}?", "text": "Ada", "stopped": True} for edit in range(12)]
    report(cell("a", texts=texts).parent, tmp_path, {"html"})
    errors: list[str] = []
    with browsers.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda message: errors.append(message.text))
        page.goto((tmp_path / "report.html").as_uri())
        head = page.locator("th", has_text="perplexity").first
        assert head.is_visible()
        assert not page.locator("th", has_text="right after").first.is_visible()
        page.click("text=Choose columns")
        page.get_by_label("perplexity").uncheck()
        page.get_by_label("rewrite_acc (right after)").check()
        assert not head.is_visible()
        assert page.locator("th", has_text="right after").first.is_visible()
        page.click("text=side by side")
        page.fill("input[type=search]", "question 11? ADA")
        assert page.locator(".asked:visible").count() == 1
        assert page.inner_text("output") == "1 of 12 prompts"
        page.fill("input[type=search]", "")
        assert page.locator(".asked:visible").count() == 12
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        browser.close()
    assert errors == []


@pytest.mark.filterwarnings("ignore:Glyph")  # the figures' font has no Chinese
def test_names_from_data_cannot_leave_the_output_folder(cell: WriteCell, tmp_path: Path) -> None:
    results = cell("a", model="../../../évil/模型", dataset="..", label="_x\x1b[31m").parent
    out = tmp_path / "out"
    assert all(path.resolve().is_relative_to(out) for path in report(results, out, {"figures", "html", "terminal"}))
    assert {path.name for path in tmp_path.iterdir()} == {"out", "results"}


def test_slugs_of_different_names_differ() -> None:
    names = ["a b", "a/b", "模型", "型模", "..", "a-b", "a_b", ""]
    assert len({slug(name) for name in names}) == len(names)
    assert all(slug(name).isascii() and not set(slug(name)) & set("/\\ ") for name in names)
    assert slug("..") not in (".", "..")


def test_the_terminal_hears_no_control_characters(cell: WriteCell, capsys: pytest.CaptureFixture[str]) -> None:
    report(cell("a", label="x\x1b[31m\ny").parent, Path(), {"terminal"})
    assert "\x1b" not in capsys.readouterr().out


def test_nothing_to_report_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    assert "holds no results" in capsys.readouterr().err
    assert main([str(tmp_path / "missing")]) == 1
    assert "is not a folder" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_only_damaged_folders_is_an_error_that_names_them(cell: WriteCell, capsys: pytest.CaptureFixture[str]) -> None:
    bad = cell("bad")
    cut(bad)
    assert main([str(bad.parent)]) == 1
    assert "bad: rows.parquet cannot be read" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_an_error(cell: WriteCell, capsys: pytest.CaptureFixture[str]) -> None:
    results = cell("a").parent
    (results / "report").write_text("in the way")
    assert main([str(results), "--format", "csv"]) == 1
    assert "report" in capsys.readouterr().err


def test_an_unknown_format_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["somewhere", "--format", "word"])
    assert stop.value.code == 2
    assert "markdown" in capsys.readouterr().err


@pytest.mark.slow
def test_importing_the_package_does_not_load_the_reports_libraries() -> None:
    heavy = "{'matplotlib', 'pandas', 'pyarrow'}"
    code = f"import sys, kdpo_editor, kdpo_editor.compare.report.report; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
