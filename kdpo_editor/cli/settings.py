"""Which settings a command uses, and ``kdpo settings``, which prints them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from ..errors import HyperParamsError, ModelError
from ..hparams import KDPOHyperParams, ready_made, settings_folder
from .loading import load_model
from .options import Changes, Device, HParams, Model, Recipe, RecipeOption, Trust
from .terminal import say


def settings(
    model: Model,
    hparams: HParams = None,
    recipe: RecipeOption = Recipe.KDPO,
    changes: Changes = None,
    device: Device = None,
    trust_remote_code: Trust = False,
) -> int:
    """Print all settings for a model, as a YAML file to keep and change."""
    from ..derived import complete
    from ..models.loading import outline

    chosen, source = chosen_settings(model, hparams, recipe.value, changes or ())
    try:
        loaded = outline(model, trust_remote_code=trust_remote_code)
    except ModelError:
        if not Path(model).exists():
            raise
        # A kind of file without a configuration beside it.
        loaded, _ = load_model(model, "auto", device or "cpu", trust_remote_code)
    found = complete(chosen, loaded)
    say(f"# {recipe.value} for {model}, from {source}. To be used with kdpo edit --hparams.")
    if found != chosen:
        say(f"# From the model's structure: {derived(chosen, found)}.")
    lines = yaml.safe_dump(found.to_dict(), sort_keys=False, default_flow_style=None, allow_unicode=True, width=1000)
    for line in lines.splitlines():
        say(line)
    return 0


def chosen_settings(
    model: str, hparams: str | None = None, recipe: str = Recipe.KDPO.value, changes: Sequence[str] = ()
) -> tuple[KDPOHyperParams, str]:
    """Settings, and where they are from; then what ``changes`` say. Those that the model decides may be left out.

    They are those of the file ``hparams``; or the recipe's ready-made ones for the model; or those that the recipe has
    for any model.
    """
    folder = settings_folder() / recipe
    file = ready_made(model, recipe)
    if hparams:
        file = Path(hparams)
        if not file.exists() and not file.with_name(file.name + ".yaml").exists() and file.name == hparams:
            file = folder / hparams
    elif file is None and (folder / "auto.yaml").exists():
        file = folder / "auto.yaml"
    elif file is None and recipe != Recipe.KDPO.value:
        raise HyperParamsError(f"--recipe {recipe}: it has no settings for {model}; give --hparams")
    chosen = KDPOHyperParams(model_name=model) if file is None else KDPOHyperParams.from_hparams(file, model)
    values = chosen.to_dict()
    for pair in changes:
        key, equals, text = pair.partition("=")
        if not equals:
            raise HyperParamsError(f"--set {pair}: write it as key=value")
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            values[key] = text
    if values["ledger"] is not None:
        raise HyperParamsError("ledger: here the ledger is what --out names")
    source = "the defaults, which are the paper's" if file is None else f"{file.parent.name}/{file.name}"
    return KDPOHyperParams.from_config({**values, "model_name": model}), source


def derived(chosen: KDPOHyperParams, found: KDPOHyperParams) -> str:
    """What ``found`` has beyond ``chosen``."""
    before, after = chosen.to_dict(), found.to_dict()
    return ", ".join(f"{key} {after[key]}" for key in after if after[key] != before[key])
