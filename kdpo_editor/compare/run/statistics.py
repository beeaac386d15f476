"""Second moments of the edited matrices' inputs, which MEMIT, AlphaEdit and (optionally) ROME weigh a change by.

    kdpo-statistics --model gpt2-xl --text corpus.txt.xz --hparams hparams/MEMIT/gpt2-xl.yaml --out data/stats

EasyEdit computes them from Wikipedia's dump, which it downloads. Here any text serves; the results lie where
both forms of the framework look and have the form that they read (Meng et al. 2022, MEMIT, section 4.2: the moments
``C0 = E[k k^T]`` of the inputs ``k``, over all tokens of the text).
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import hashlib
import lzma
import random
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from ...errors import DataError, KDPOError, explained
from ...hparams import settings_file
from ...lifelong.second_moments import GENERAL_TEXT, second_moments
from ...testbed import known_texts
from ...whole_files import appearing, make_folder
from .derived_settings import fill, is_template

OPENERS: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
WINDOW = 256


def ensure(
    model: nn.Module,
    tok: Any,
    config: dict[str, Any],
    text: str | None,
    characters: int | None,
    folder: Path,
    tokens_per_input: int | None = None,
) -> bool:
    """Compute the moments that the method settings ``config`` ask for, unless they lie in ``folder``.

    ``text``: a file for :func:`read_text`, at most ``characters`` of it; "general", the text that comes with the
    package; or "shipped": what the shipped model knows. ``tokens_per_input``: at most so many for each input of
    the widest matrix, from documents in a shuffled order that is always the same.

    Returns whether any had to be computed. Raises :class:`~kdpo_editor.errors.DataError` if some are missing and
    there is no text to compute them from, or too little: moments of fewer tokens than a matrix has inputs have no
    inverse.
    """
    if not config.get("mom2_adjustment"):
        return False
    modules = [config["rewrite_module_tmp"].removesuffix(".weight").format(n) for n in config["layers"]]
    wanted = {module: _files(model, config, module, folder) for module in modules}
    missing = {module: files for module, files in wanted.items() if not all(file.exists() for file in files)}
    if not missing:
        return False
    if text is None:
        raise DataError(
            f"{config['alg_name']} needs second moments, and {next(iter(missing.values()))[0]} does not exist. Compute "
            "them with kdpo-statistics, or name a text in model.text"
        )
    inputs = max(_inputs(model.get_submodule(module)) for module in missing)
    most = None if tokens_per_input is None else tokens_per_input * inputs
    windows = _windows(tok, _documents(text, characters), most)
    counted = sum(map(len, windows))
    if counted < inputs:
        raise DataError(
            f"model.text: {text} gives {counted} tokens, and the second moments of {config['alg_name']} in "
            f"{next(iter(missing))} need at least as many as it has inputs, {inputs}"
        )
    for name, (moment, count) in second_moments(model, list(missing), windows, "all").items():
        for file in missing[name]:
            _save(file, moment, count, config["mom2_n_samples"])
    return True


def text_digest(text: str | None, characters: int | None, tokens_per_input: int | None) -> str:
    """Name what second moments are of, by the text's content and by how much of it is taken."""
    file = GENERAL_TEXT if text == "general" else text
    content = b"" if text in (None, "shipped") or not Path(str(file)).is_file() else Path(str(file)).read_bytes()
    told = f"{text if text in (None, 'shipped') else ''} {characters} {tokens_per_input} all tokens ".encode()
    return hashlib.sha256(told + content).hexdigest()[:8]


def _documents(text: str, characters: int | None) -> list[str]:
    if text == "shipped":
        return known_texts()
    if text == "general":
        return GENERAL_TEXT.read_text("utf-8").splitlines()
    return read_text(text, characters)


def _windows(tok: Any, documents: list[str], tokens: int | None) -> list[Tensor]:
    """Cut ``documents`` into token ids of ``WINDOW`` at most; so many tokens if that is given.

    Those are of shuffled documents, in an order that is always the same.
    """
    if tokens is not None:
        documents = random.Random(0).sample(documents, len(documents))
    windows: list[Tensor] = []
    left = sys.maxsize if tokens is None else tokens
    for document in documents:
        for ids in torch.tensor(tok(document)["input_ids"], dtype=torch.int64).split(WINDOW):
            window = ids[:left]
            if len(window):
                windows.append(window)
                left -= len(window)
        if not left:
            break
    return windows


def _inputs(module: Any) -> int:
    """The width of a matrix's input; GPT-2's modules call it otherwise."""
    return int(module.in_features if hasattr(module, "in_features") else module.nx)


def read_text(path: str | Path, most: int | None = None) -> list[str]:
    """Documents of a plain or compressed (xz, gz, bz2) text file: what blank lines or ``</doc>`` separate.

    ``most``: characters to read at most. Raises :class:`~kdpo_editor.errors.DataError` naming the file.
    """
    file = Path(path)
    try:
        with OPENERS.get(file.suffix, open)(file, "rt", encoding="utf-8") as stream:
            text = stream.read() if most is None else stream.read(most)
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: {error}") from error
    separator = "</doc>" if "</doc>" in text else "\n\n"
    documents = [d.partition(">")[2] if d.lstrip().startswith("<doc") else d for d in text.split(separator)]
    return [d.strip() for d in documents if d.strip()]


def _files(model: nn.Module, config: dict[str, Any], module: str, folder: Path) -> list[Path]:
    """Where either form of the framework looks for a module's moments."""
    path: str = model.config._name_or_path  # type: ignore[union-attr, assignment]
    data = f"{config['mom2_dataset']}_stats/{module}_{config['mom2_dtype']}_mom2_{config['mom2_n_samples']}.npz"
    return [folder / name / data for name in dict.fromkeys((path.rsplit("/")[-1], path.replace("/", "_")))]


def _save(file: Path, moment: Tensor, count: int, samples: int) -> None:
    import numpy as np

    make_folder(file.parent)
    arrays: dict[str, Any] = {
        "mom2.constructor": np.array("util.runningstats.SecondMoment()"),
        "mom2.count": np.array(count),
        "mom2.mom2": moment.float().cpu().numpy(),
        "sample_size": np.array(samples),
    }
    with appearing(file) as part, open(part, "wb") as stream:
        np.savez(stream, **arrays)


def main(argv: list[str] | None = None) -> int:
    """The command ``kdpo-statistics``."""
    parser = argparse.ArgumentParser(prog="kdpo-statistics", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="Hugging Face id, folder, .gguf file, or like smollm2-135m")
    parser.add_argument("--text", required=True, help='a text file (plain, .xz, .gz, .bz2), "general" or "shipped"')
    parser.add_argument("--hparams", required=True, help="a MEMIT, AlphaEdit or ROME settings file: layers and names")
    parser.add_argument("--out", default="data/stats", help="the stats_dir of those settings (default data/stats)")
    parser.add_argument("--characters", type=int, default=20_000_000, help="of the text, at most (default 20 million)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    from ...models.loading import load

    try:
        config = {**yaml.safe_load(settings_file(args.hparams).read_text("utf-8")), "mom2_adjustment": True}
        model, tok = load(args.model, device=args.device)
        if is_template(config):
            config = fill(config, model, args.model)
        fresh = ensure(model, tok, config, args.text, args.characters, Path(args.out))
    except (OSError, KeyError, KDPOError) as error:
        sys.stderr.write(f"kdpo-statistics: {explained(error)}\n")
        return 1
    sys.stdout.write(f"{'computed' if fresh else 'already'} in {args.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
