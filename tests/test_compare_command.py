"""The command ``kdpo-compare``: mistakes are named, and neither a failure nor a kill stops the rest."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
from comparing import CHECKOUT, HAS_PYPI, SMALL, cells, command, compare, composed, environment, figures, manifest

from kdpo_editor.compare.report.reading import read_cells
from kdpo_editor.errors import ResultsError

# Of edited weights they would be others for all layers but the lowest. The perplexity tells of any change of a weight.
SECOND_MOMENTS = ["method.hparams.layers=[1,2,4]", "protocol.perplexity=true"]
SECOND_MOMENTS += ["+method.hparams.mom2_weight=10", "+method.hparams.mom2_n_samples=2000"]

pytestmark = pytest.mark.skipif(not HAS_PYPI and not CHECKOUT, reason="no form of EasyEdit is installed")


MISTAKES = {
    "a method": (["method=kdop"], ["method/kdop", "ft_m", "kdpo", "rome"]),
    "a model": (["model=nothing"], ["nothing", "kdpo-llama-knowedit"]),
    "a data set": (["dataset=nothing"], ["nothing", "counterfact", "zsre"]),
    "a setting": (["method.hparams.lrr=1"], ["lrr"]),
    "a setting that is added": (["method=ft_m", "+method.hparams.lrr=1"], ["unknown key 'lrr'"]),
    "a key": (["n_edit=1"], ["n_edit"]),
    "a file": (["dataset=file", "dataset.source=nowhere.json"], ["nowhere.json"]),
}
# Several command lines, one after the other: the status of each, and what it says on standard error.
SEVERAL = """
import contextlib, io, json, sys
from kdpo_editor.compare.run import app

found = []
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    with contextlib.redirect_stderr(io.StringIO()) as said:
        status = app.main()
    found.append([status, said.getvalue()])
sys.stdout.write(json.dumps(found))
"""


LACKING = "a method that the form lacks"


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Of each mistake, and of what only skips, the exit status and what is said, all by one process."""
    out = tmp_path_factory.mktemp("said")
    lines = {name: arguments for name, (arguments, _) in MISTAKES.items()} | {LACKING: ["-m", "method=grace"]}
    told = [[*arguments, f"out={out}", f"cache={out}/cache", *SMALL] for arguments in lines.values()]
    run = subprocess.run(
        [sys.executable, "-c", SEVERAL, json.dumps(told)], capture_output=True, text=True, env=environment(),
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return dict(zip(lines, json.loads(run.stdout.splitlines()[-1]), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_on_the_command_line_is_named_without_a_traceback(
    said: dict[str, tuple[int, str]], mistake: str
) -> None:
    status, text = said[mistake]
    assert status != 0
    assert "Traceback" not in text
    for word in MISTAKES[mistake][1]:
        assert word in text


@pytest.mark.parametrize("name", ["a,b.json", "a=b.json", "my edits.json", "it's (1) [2] {3}.json", 'a "b".json'])
def test_a_file_may_have_any_name(tmp_path: Path, name: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from kdpo_editor.compare.run.app import _quoted

    file = tmp_path / name
    file.write_text("[]", "utf-8")
    (override,) = OverridesParser.create().parse_overrides([_quoted(f"dataset.source={file}")])
    assert override.value() == str(file)
    assert not override.is_sweep_override()


def test_what_names_no_file_is_left_to_hydra(tmp_path: Path) -> None:
    from kdpo_editor.compare.run.app import _quoted

    for argument in (
        "method=kdpo,rome",
        "-m",
        "protocol.eval_at=[1,10]",
        f"dataset.source={tmp_path}",
        f"method={'kdpo,' * 1000}",
    ):
        assert _quoted(argument) == argument


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The results of several methods, one of which fails and one of which the PyPI form lacks; and what was said."""
    folder = tmp_path_factory.mktemp("swept")
    own = folder / "own" / "method"
    own.mkdir(parents=True)
    layers = "defaults: [/method_schema, /FT-L@hparams: kdpo-llama-knowedit, _self_]\nhparams: {layers: [99]}\n"
    (own / "broken.yaml").write_text(f"{layers}name: broken\nlabel: Broken\n", "utf-8")
    methods = ["unedited", "broken", *(["grace"] if HAS_PYPI else []), "kdpo"]
    arguments = ["n_edits=2", "protocol.eval_at=[]", "protocol.known=0", "protocol.perplexity=false"]
    out = folder / "out"
    return out, compare(out, "--config-dir", str(own.parent), "-m", f"method={','.join(methods)}", *arguments)


@pytest.mark.slow
def test_one_failing_cell_leaves_the_others(swept: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, run = swept
    assert run.returncode == 1
    status = {name: manifest(cell)["status"] for name, cell in cells(out).items() if name != "grace"}
    assert status == {"unedited": "complete", "broken": "failed", "kdpo": "complete"}
    assert "Traceback" in (cells(out)["broken"] / "run.log").read_text("utf-8")
    assert "Traceback" not in run.stderr
    assert "KDPO" in run.stdout
    assert (out / "report" / "report.html").exists()


@pytest.mark.slow
def test_what_is_refused_does_not_end_with_the_table_of_earlier_cells(
    swept: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, before = swept
    run = compare(out, "method=kdpo", "dataset=file", "dataset.source=nowhere.json")
    assert run.returncode == 1
    assert "'nowhere.json' is no file" in run.stderr
    assert "report.html" in before.stdout
    assert "report.html" not in run.stdout


@pytest.mark.slow
@pytest.mark.skipif(not HAS_PYPI, reason="the PyPI form is not installed")
def test_what_is_only_skipped_exits_with_0(said: dict[str, tuple[int, str]]) -> None:
    assert said[LACKING][0] == 0, said[LACKING][1]


@pytest.mark.slow
def test_a_method_that_the_form_lacks_is_skipped_and_said(
    swept: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    if not HAS_PYPI:
        pytest.skip("the PyPI form is not installed")
    out, run = swept
    assert manifest(cells(out)["grace"])["status"] == "skipped"
    assert "PyPI form does not have this method" in run.stdout + run.stderr
    assert run.stderr.count("failed: ") == 1, "what is skipped is no failure"


@pytest.mark.slow
def test_a_full_disk_is_said_and_leaves_no_half_results(tmp_path: Path) -> None:
    import resource

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    run = subprocess.run(
        command(tmp_path, *SMALL), capture_output=True, text=True, env=environment(), preexec_fn=small_files,
        check=False,
    )  # fmt: skip
    assert run.returncode != 0
    assert "File too large" in run.stderr + run.stdout
    assert not list(tmp_path.glob("*/rows.parquet"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many threads in this process as in those of the command; sums depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_killed_run_goes_on_and_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    """With the second moments of the model before any edit, which the rest of the run must have too."""
    from kdpo_editor.compare.run.cell import run

    arguments = ["n_edits=5", "protocol.eval_at=[1,2]", *SMALL[2:], "method=kdpo", *SECOND_MOMENTS]
    whole = run(composed(tmp_path / "whole", *arguments)).folder
    assert manifest(whole)["status"] == "complete", (whole / "run.log").read_text("utf-8")
    folder = tmp_path / "killed"
    process = subprocess.Popen(
        command(folder, *arguments), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while process.poll() is None and not list(folder.glob("*/checkpoint-2")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (cell,) = cells(folder).values()
    assert manifest(cell)["status"] == "running", "it was over before it was killed"
    with pytest.raises(ResultsError, match="its status is 'running'"):
        read_cells(folder)
    unfinished, _ = read_cells(folder, partial=True)
    assert [c.label for c in unfinished] == ["KDPO (partial)"]
    again = compare(folder, *arguments)
    assert again.returncode == 0, again.stderr
    assert "going on after" in (cell / "run.log").read_text("utf-8")
    pd.testing.assert_frame_equal(figures(cell), figures(whole))
    assert (cell / "generations.jsonl").read_bytes() == (whole / "generations.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "package", "more", "methods"),
    [
        ("joblib", "hydra_joblib_launcher", ["hydra.launcher.n_jobs=2"], ["unedited", "kdpo"]),
        ("submitit_local", "hydra_submitit_launcher", [], ["kdpo"]),
    ],
)
def test_joblib_and_submitit_compute_cells_too(
    tmp_path: Path, launcher: str, package: str, more: list[str], methods: list[str]
) -> None:
    if importlib.util.find_spec(f"hydra_plugins.{package}") is None:
        pytest.skip(f"{package} is not installed")
    told = [
        f"hydra/launcher={launcher}",
        *more,
        f"method={','.join(methods)}",
        "n_edits=1",
        *SMALL[1:],
        "protocol.known=0",
    ]
    run = compare(tmp_path, "-m", *told)
    assert run.returncode == 0, run.stderr
    assert {manifest(c)["status"] for c in cells(tmp_path).values()} == {"complete"}
    assert set(cells(tmp_path)) == {*methods}
