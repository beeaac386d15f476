"""``kdpo locate``: where a model recalls its facts, as a map, a settings file and what later edits use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from ..errors import RequestError
from .loading import load_model
from .options import Device, Model, Recipe, Trust
from .settings import chosen_settings
from .terminal import say, table

if TYPE_CHECKING:
    from ..lifelong.locating import CausalTrace


def locate(
    model: Model,
    facts: Annotated[int, typer.Option(metavar="N", min=1, help="Facts that the model knows, to be traced.")] = 20,
    picture: Annotated[Path | None, typer.Option(metavar="PNG", help="Draw the map into this file.")] = None,
    to: Annotated[Path | None, typer.Option(metavar="YAML", help="Write KDPO-L's settings into this file.")] = None,
    device: Device = None,
    trust_remote_code: Trust = False,
) -> int:
    """Find the layers that a model recalls facts in, by causal tracing; later edits through a subject use them."""
    from ..lifelong.located import keep
    from ..lifelong.locating import trace, traced_modules

    settings, _ = chosen_settings(model, recipe=Recipe.KDPO_L.value)
    loaded, tok = load_model(model, "float32", device, trust_remote_code)
    traced_modules(loaded, settings)  # said before anything is asked
    known = _known(loaded, tok, facts)
    found = trace(loaded, tok, known, settings)
    _print(found)
    layers = found.layers
    keep(settings.model_name, found.matrix, layers)
    use = "The settings of this model have layers of their own, which edits use."
    if settings.layers is None:
        use = "Edits of this model through a subject's tokens use them from now on."
    say(f"Layers {', '.join(map(str, layers))}. {use}")
    if to is not None:
        values = {**settings.to_dict(), "layers": layers, "rewrite_module_tmp": found.matrix}
        to.write_text(yaml.safe_dump(values, sort_keys=False, default_flow_style=None, allow_unicode=True), "utf-8")
        say(f"Settings are in {to}.")
    if picture is not None:
        _draw(found, model, picture)
        say(f"The map is in {picture}.")
    return 0


def _known(model: Any, tok: Any, count: int) -> list[dict[str, str]]:
    """CounterFact's facts that ``model`` knows, as requests for what it says already."""
    from ..compare.run.evaluate import Evaluator
    from ..compare.run.known import known_facts

    evaluator = Evaluator(model, tok, progress="known facts")
    found = known_facts(evaluator, "counterfact", count, [])
    if not found:
        raise RequestError("the model knows too few of CounterFact's facts to trace any")
    return [
        {"prompt": fact.prompt, "subject": fact.subject, "target_new": fact.ground_truth}
        for fact in found
        if fact.subject_in_prompt
    ]


def _print(found: CausalTrace) -> None:
    """The map in numbers: a row for each layer, a column for each kind of token."""
    from ..lifelong.locating import TOKENS

    rows = []
    for layer, effects in enumerate(found.effects.T.tolist()):
        mark = " *" if layer in found.layers else ""
        rows.append([f"{layer}{mark}", *("" if value != value else f"{value:.3f}" for value in effects)])
    table(["layer", *TOKENS], rows)
    say(
        f"Indirect effects on the probability of the answer, over {found.facts} facts: {found.clean:.3f} as it is, "
        f"{found.corrupted:.3f} with the subject unreadable. * are the layers to edit."
    )


def _draw(found: CausalTrace, model: str, file: Path) -> None:
    """The map as a picture, as in figure 1 of Meng et al. 2022."""
    from matplotlib.figure import Figure

    from ..lifelong.locating import TOKENS

    figure = Figure(figsize=(1.5 + 0.22 * found.effects.shape[1], 2.6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(found.effects.numpy(), cmap="Purples", vmin=0, aspect="auto")
    axes.set_yticks(range(len(TOKENS)), TOKENS)
    axes.set_xlabel("center of the layers whose MLP is restored")
    axes.set_title(f"{model}: indirect effect of MLPs, {found.facts} facts", fontsize="medium")
    for layer in found.layers:
        axes.axvspan(layer - 0.5, layer + 0.5, fill=False, edgecolor="tab:orange", linewidth=1.5)
    figure.colorbar(image, label="probability")
    figure.savefig(file, dpi=150)
