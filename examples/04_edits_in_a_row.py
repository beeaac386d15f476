# %% [markdown]
# # Edits in a row: what is kept after six and after twelve
#
# One edit is easy. After many, are the first ones still there, and is the rest of the model? Methods differ most here.
# We edit twelve facts of CounterFact in SmolLM2-135M, one after another. That is what a few minutes on two cores
# allow; the command at the end makes a hundred.
#
# - **KDPO**: the paper's settings for single edits.
# - **KDPO-L**: the recipe for edits that must last. It trains earlier edits again where a new one harms them.
# - **cross-entropy**: fine-tuning of KDPO's matrix on the new answer, for as many steps as EasyEdit's FT-M. It is this
#   package's stand-in for it.

# %%
import logging
import time
from dataclasses import replace
from statistics import fmean

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import display

from kdpo_editor import KDPOHyperParams, edit, load
from kdpo_editor.compare.report.figures import COLOURS, SETTINGS
from kdpo_editor.compare.run.datasets import load as load_facts
from kdpo_editor.compare.run.derived_settings import derive
from kdpo_editor.compare.run.evaluate import Evaluator, accuracy, fingerprint
from kdpo_editor.compare.run.known import known_facts, right
from kdpo_editor.compare.run.scorer import HELD_OUT
from kdpo_editor.compare.run.statistics import read_text
from kdpo_editor.editing import prepare
from kdpo_editor.engine.weights import restore
from kdpo_editor.hparams import settings_folder

pd.options.display.max_colwidth = None
plt.rcParams.update(SETTINGS | {"figure.dpi": 110})
BLUE, RED, GREEN = COLOURS[:3]
logging.getLogger("kdpo_editor").setLevel(logging.ERROR)  # edits that miss their target are counted below, not listed

# %%
MODEL = "smollm2-135m"
CHECKPOINTS = (1, 6, 12)
KNOWN = 30  # facts that the model knows and nobody edits
DOCUMENTS = 4  # of held-out text

# %%
model, tok = load(MODEL)
evaluator = Evaluator(model, tok)
untouched = fingerprint(model)
records = [record for record in load_facts("counterfact") if record.subject_in_prompt][: CHECKPOINTS[-1]]
known = known_facts(evaluator, "counterfact", KNOWN, records)

paper = KDPOHyperParams.from_hparams(settings_folder() / "KDPO" / "auto.yaml", model_name=MODEL)
lifelong = KDPOHyperParams.from_hparams(settings_folder() / "KDPO-L" / "auto.yaml", model_name=MODEL)
ft = derive("FT-M", model, MODEL)
cross_entropy = replace(
    paper, objective="ce", layers=ft["layers"], lr=ft["lr"], num_steps=ft["num_steps"], cycles=1, stop_loss=1e-2
)  # one cycle of steps that ends at a loss of 0.01, as FT-M does
METHODS = {
    "KDPO": paper,
    "KDPO-L": lifelong,
    "cross-entropy": cross_entropy,
}

# %% [markdown]
# ## What is measured
#
# After some edits, over all of these: **success**, the share of the new answer's tokens that the model gets right;
# **rephrase**, the same after another wording; **neighbours**, the share of similar subjects' answers that stayed.
#
# Of the rest of the model: **known**, the share of facts that it knew and still knows; and **perplexity**, how well it
# reads ordinary text. Lower is better there.


# %%
def perplexity():
    return evaluator.read(read_text(HELD_OUT)[:DOCUMENTS]).perplexity


def predictions(some):
    """Of each record: what the model says, token by token, after its prompt, the other wording and the neighbour's."""
    asked = []
    for record in some:
        probe = record.locality["neighborhood"][0]
        asked += [(record.prompt, record.target_new), (record.rephrase_prompts[0], record.target_new)]
        asked.append((probe.prompt, probe.answers[0]))
    said = evaluator.predict(asked)
    return list(zip(said[::3], said[1::3], said[2::3], strict=True))


before = predictions(records)
perplexity_before = perplexity()


def score(done):
    """All scores of the model as it is after the first ``done`` edits, and which of these hold."""
    now = predictions(records[:done])
    success = [accuracy(*own) for own, _, _ in now]
    return {
        "success": fmean(success),
        "rephrase": fmean(accuracy(*rephrase) for _, rephrase, _ in now),
        "neighbours": fmean(accuracy(new[0], old[0]) for (*_, old), (*_, new) in zip(before, now, strict=False)),
        "known": fmean(right(evaluator, known)),
        "perplexity": perplexity(),
    }, success


print(f"before any edit: perplexity {perplexity_before:.2f}, {len(known)} known facts")

# %% [markdown]
# ## Twelve edits with each
#
# The model is put back before the next method begins.

# %%
results, held, seconds = [], {}, {}
for name, hparams in METHODS.items():
    prepare(model, tok, hparams)  # KDPO-L's second moments, once for a model
    originals, seconds[name] = {}, 0.0
    for done, record in enumerate(records, 1):
        request = {"prompt": record.prompt, "target_new": record.target_new, "subject": record.subject}
        start = time.process_time()
        _, was, _ = edit(model, tok, [request], hparams)
        seconds[name] += time.process_time() - start
        originals = {**was, **originals}  # those before the first edit
        if done in CHECKPOINTS:
            scores, held[name] = score(done)
            results.append({"method": name, "edits": done, **scores})
    restore(dict(model.named_parameters()), originals)
    assert fingerprint(model) == untouched
results = pd.DataFrame(results)

# %%
METRICS = {"success": "share of tokens", "rephrase": "share of tokens", "neighbours": "share of tokens kept",
           "known": "share of facts kept", "perplexity": "perplexity"}  # fmt: skip
LOOKS = dict(zip(METHODS, [(BLUE, "o", "--"), (RED, "s", "-"), (GREEN, "D", "-.")], strict=True))
fig, grid = plt.subplots(2, 3, figsize=(9, 5.2), layout="constrained")
for axes, (metric, unit) in zip(grid.flat, METRICS.items(), strict=False):
    for name, (colour, marker, line) in LOOKS.items():
        part = results[results["method"] == name]
        axes.plot(part["edits"], part[metric], color=colour, marker=marker, linestyle=line, markersize=5, label=name)
    axes.set(title=metric, xlabel="edits made", ylabel=unit)
    axes.set_xticks(CHECKPOINTS)
    axes.grid(axis="y", color="#eeeeee")
    if metric == "perplexity":
        axes.axhline(perplexity_before, color="#777777", linewidth=1, linestyle=(0, (2, 2)), label="before any edit")
    else:
        axes.set_ylim(-0.03, 1.03)
grid.flat[-1].axis("off")
grid.flat[-1].legend(*grid.flat[-2].get_legend_handles_labels(), loc="center", frameon=False, handlelength=3)
plt.show()

# %%
last = results[results["edits"] == len(records)].set_index("method").drop(columns="edits").round(2)
display(last.assign(**{"CPU seconds an edit": (pd.Series(seconds) / len(records)).round(2)}))

# %% [markdown]
# ## What is forgotten
#
# Which of the edits does the model still answer as it was told? The first edit is on the left. Dark is the whole new
# answer, white is none of it.

# %%
fig, axes = plt.subplots(figsize=(9, 1.9), layout="constrained")
image = axes.pcolormesh([held[name] for name in METHODS], cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=2)
axes.set_yticks([i + 0.5 for i in range(len(METHODS))], labels=METHODS)
axes.invert_yaxis()
axes.tick_params(length=0)
axes.set_xticks([edits - 0.5 for edits in CHECKPOINTS], labels=CHECKPOINTS)
axes.set_xlabel("edit, in the order made")
axes.spines[:].set_visible(False)
fig.colorbar(image, ax=axes, label="share of tokens", pad=0.02)
plt.show()

# %%
parts = [range(a, b) for a, b in zip((0, *CHECKPOINTS[1:-1]), CHECKPOINTS[1:], strict=True)]
quoted = pd.DataFrame(
    {name: [fmean(held[name][i] for i in part) for part in parts] for name in METHODS},
    index=[f"edits {part[0] + 1} to {part[-1] + 1}" for part in parts],
).T
print("Held after the last edit, by when it was made:")
display(quoted.round(2))

# %% [markdown]
# ## A hundred and more
#
# With a hundred edits, and with a report as tables and pictures (an hour on two cores):
#
# ```sh
# kdpo-compare -m method=kdpo,kdpo_sequence,ft_m,kdpo_l model=smollm2-135m dataset=counterfact n_edits=100
# ```
