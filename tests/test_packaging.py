"""What a wheel and a source distribution hold, and that a wheel's settings are found without a clone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import kdpo_editor
from kdpo_editor import KDPOHyperParams
from kdpo_editor.cli.main import main
from kdpo_editor.compare.command import main as compare
from kdpo_editor.hparams import settings_folder

pytest.importorskip("setuptools")
ROOT = Path(__file__).parents[1]
if not (ROOT / "setup.cfg").is_file():
    pytest.skip("there is nothing to build beside these tests", allow_module_level=True)
TRAINING = ("shipped_model", "facts.json")  # what the shipped model is trained by and with


@pytest.fixture(scope="module")
def wheel() -> set[str]:
    """The files that a wheel takes from the package and from ``hparams``, by their paths in it."""
    from setuptools import Distribution

    with pytest.MonkeyPatch.context() as here:
        here.chdir(ROOT)
        distribution = Distribution({"script_name": "setup.py"})
        distribution.parse_config_files(filenames=["setup.cfg"])
        command = distribution.get_command_obj("build_py")
        command.ensure_finalized()
        built = command.get_outputs(include_bytecode=False)
        return {Path(file).relative_to(command.build_lib).as_posix() for file in built}


@pytest.fixture(scope="module")
def source() -> set[str]:
    """The files that ``MANIFEST.in`` adds to a source distribution."""
    from setuptools.command.egg_info import FileList

    with pytest.MonkeyPatch.context() as here:
        here.chdir(ROOT)
        files = FileList()
        for line in Path("MANIFEST.in").read_text("utf-8").splitlines():
            if line and not line.startswith("#"):
                files.process_template_line(line)
        return {Path(file).as_posix() for file in files.files}


def in_folder(folder: Path) -> set[str]:
    files = (f for f in folder.rglob("*") if f.is_file() and "__pycache__" not in f.parts)
    return {f.relative_to(folder).as_posix() for f in files}


def test_a_wheel_has_all_of_the_package_and_the_settings(wheel: set[str]) -> None:
    package = {f"kdpo_editor/{file}" for file in in_folder(ROOT / "kdpo_editor")}
    settings = {f"kdpo_editor/settings/{file}" for file in in_folder(ROOT / "hparams")}
    assert wheel == package | settings


def test_neither_a_wheel_nor_a_source_distribution_has_training_data(wheel: set[str], source: set[str]) -> None:
    assert not [file for file in wheel | source if any(name in Path(file).parts for name in TRAINING)]


def test_a_source_distribution_has_tests_documentation_and_measured_figures(source: set[str]) -> None:
    for folder in ("tests", "docs", "benchmarks/results", "hparams"):
        wanted = {f"{folder}/{file}" for file in in_folder(ROOT / folder)}
        assert wanted <= source, folder


def test_data_of_others_has_its_licence_beside_it(wheel: set[str]) -> None:
    for file in ("compare/data/counterfact.json.xz", "testbed/records.json", "compare/run/held_out.txt"):
        name = Path(file).name.partition(".")[0]
        assert f"kdpo_editor/{Path(file).parent}/{name}.LICENSE" in wheel
    assert "kdpo_editor/lifelong/text/LICENSE" in wheel


def test_settings_written_for_a_clone_are_found_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = KDPOHyperParams.from_hparams("hparams/KDPO-L/auto", "a-model")
    assert found == KDPOHyperParams.from_hparams(settings_folder() / "KDPO-L" / "auto", "a-model")


def test_a_file_of_ones_own_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hparams/KDPO-L").mkdir(parents=True)
    Path("hparams/KDPO-L/auto.yaml").write_text("cycles: 3\n", "utf-8")
    assert KDPOHyperParams.from_hparams("hparams/KDPO-L/auto", "a-model").cycles == 3


def test_settings_that_are_nowhere_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no hyperparameter file hparams/KDPO-L/mine\.yaml"):
        KDPOHyperParams.from_hparams("hparams/KDPO-L/mine")


def test_the_command_says_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"kdpo_editor {kdpo_editor.__version__}\n"


def test_the_comparison_says_which_extra_brings_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "hydra", None)
    monkeypatch.delitem(sys.modules, "kdpo_editor.compare.run.app", raising=False)
    assert compare() == 1
    assert capsys.readouterr().err == "kdpo-compare needs hydra: pip install 'kdpo-editor[compare]'\n"
