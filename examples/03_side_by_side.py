# %% [markdown]
# # Side by side: KDPO, KDPO-L and fine-tuning
#
# Five facts of CounterFact, edited one after another in SmolLM2-135M by each method. Everything goes through EasyEdit:
# its editor, its methods, its metrics. All settings are in `hparams/<METHOD>/auto.yaml`, filled from the model's
# structure where a method needs layers and names of modules.
#
# - **KDPO**: the paper's settings.
# - **KDPO-L**: this package's recipe for edits that must last.
# - **FT-L**: EasyEdit's fine-tuning of one matrix on the last token of the prompt.
# - **FT-M**: the same on the new answer. Only EasyEdit's upstream form has it.
#
# With so few edits, one answer more or less changes a figure a lot. This is a demonstration, not a result.
# `kdpo-compare` makes real comparisons.

# %%
import logging
import time

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import Markdown, display

from kdpo_editor import KDPOHyperParams  # before easyeditor: registers KDPO with it
from kdpo_editor.cli.demo import timed
from kdpo_editor.compare.report.figures import COLOURS, SETTINGS
from kdpo_editor.compare.run.datasets import load as load_facts
from kdpo_editor.compare.run.derived_settings import derive
from kdpo_editor.easyedit import form, is_upstream, quietly, settings
from kdpo_editor.editing import prepare
from kdpo_editor.engine.generation import answers
from kdpo_editor.hparams import settings_folder
from kdpo_editor.models.loading import outline
from kdpo_editor.requests.answers import begins_with

from easyeditor import BaseEditor  # isort: skip

pd.options.display.max_colwidth = None
logging.getLogger("kdpo_editor").setLevel(logging.ERROR)  # EasyEdit shows every message of every package
plt.rcParams.update(SETTINGS | {"figure.dpi": 110})
print(f"EasyEdit's {form()} form")

# %%
MODEL = "smollm2-135m"
EDITS = 5

# %% [markdown]
# ## Facts
#
# Each record has the old and the new answer, another wording, and a question about a neighbour: a subject with the same
# old answer.

# %%
records = [record for record in load_facts("counterfact", seed=0) if record.subject_in_prompt][:EDITS]
neighbours = [record.locality["neighborhood"][0] for record in records]
display(
    pd.DataFrame(
        [
            {"prompt": r.prompt, "old": r.ground_truth, "new": r.target_new, "in other words": r.rephrase_prompts[0],
             "neighbour": n.prompt}
            for r, n in zip(records, neighbours, strict=True)
        ]
    )
)  # fmt: skip

# %% [markdown]
# ## Methods


# %%
def of_the_framework(folder):
    """Settings of one of EasyEdit's own methods for this model, as the installed form reads them."""
    hparams, _ = settings({**derive(folder, outline(MODEL), MODEL), "device": None})
    return hparams


METHODS = {
    "KDPO": KDPOHyperParams.from_hparams(settings_folder() / "KDPO" / "auto.yaml", model_name=MODEL),
    "KDPO-L": KDPOHyperParams.from_hparams(settings_folder() / "KDPO-L" / "auto.yaml", model_name=MODEL),
    "FT-L": of_the_framework("FT-L"),
}
if is_upstream():
    METHODS["FT-M"] = of_the_framework("FT-M")
for hparams in METHODS.values():
    hparams.max_length = 100  # tokens of a question that EasyEdit's metrics read; some rephrasings have more than 40

# %% [markdown]
# ## The edits
#
# EasyEdit asks each question right before an edit and right after it. Edits are kept, so a later one may harm an
# earlier one. At the end we ask every question once more.

# %%
ASKED = {
    "edit": [record.prompt for record in records],
    "in other words": [record.rephrase_prompts[0] for record in records],
    "neighbour": [probe.prompt for probe in neighbours],
}
keep = {"sequential_edit": True} if is_upstream() else {"keep_original_weight": False}
scores, said = [], {}
for name, hparams in METHODS.items():
    with quietly():  # EasyEdit prints every step
        editor = timed(BaseEditor.from_hparams(hparams), time.process_time)  # which notes its CPU seconds
    if not said:
        said["before"] = {kind: answers(editor.model, editor.tok, asked, 6) for kind, asked in ASKED.items()}
    if isinstance(hparams, KDPOHyperParams):
        prepare(editor.model, editor.tok, hparams)  # once for each model, and not part of an edit's time
    for record, probe in zip(records, neighbours, strict=True):
        with quietly():
            metrics, _, _ = editor.edit(
                prompts=[record.prompt],
                target_new=[record.target_new],
                ground_truth=[record.ground_truth],
                subject=[record.subject],
                rephrase_prompts=[record.rephrase_prompts[0]],
                locality_inputs={"neighbour": {"prompt": [probe.prompt], "ground_truth": [probe.answers[0]]}},
                verbose=False,
                **keep,
            )
        post = metrics[0]["post"]
        scores.append(
            {
                "method": name,
                "subject": record.subject,
                "success": float(post["rewrite_acc"][0]),
                "rephrase": float(post["rephrase_acc"][0]),
                "locality": float(post["locality"]["neighbour_acc"][0]),
                "CPU seconds": editor.seconds,
            }
        )
    said[name] = {kind: answers(editor.model, editor.tok, asked, 6) for kind, asked in ASKED.items()}

# %% [markdown]
# ## Figures
#
# *success*: the share of the new answer's tokens that the model gets right. *rephrase*: the same after the other
# wording. *locality*: the share of the neighbour's answer that is as it was before that edit. Each is taken right after
# its edit. A small mark is one fact, a large one the mean.

# %%
results = pd.DataFrame(scores)
METRICS = ["success", "rephrase", "locality"]
LOOKS = dict(zip(METHODS, zip(COLOURS, "osD^", strict=False), strict=False))
fig, panels = plt.subplots(1, len(METRICS), figsize=(9, 2.6), sharey=True, layout="constrained")
for axes, metric in zip(panels, METRICS, strict=True):
    for place, (name, (colour, marker)) in enumerate(LOOKS.items()):
        values = results.loc[results["method"] == name, metric]
        spread = [place + 0.09 * (i - (len(values) - 1) / 2) for i in range(len(values))]
        axes.scatter(
            values, spread, color=colour, marker=marker, s=14, alpha=0.5, linewidths=0, clip_on=False, zorder=2
        )
        axes.scatter(
            values.mean(), place, color=colour, marker=marker, s=90, edgecolors="white", zorder=3, clip_on=False
        )
    axes.set(title=metric, xlim=(-0.02, 1.02), xlabel="share of tokens")
    axes.grid(axis="x", color="#eeeeee")
    axes.tick_params(axis="y", length=0)
panels[0].set_yticks(range(len(LOOKS)), labels=LOOKS)
panels[0].invert_yaxis()
plt.show()

# %%
table = results.groupby("method", sort=False)[[*METRICS, "CPU seconds"]].mean().round(2)
display(table)

# %% [markdown]
# ## What they say
#
# Figures hide what an edit sounds like. Here is every answer after all edits. Those before any edit are in the first
# column.

# %%
for kind, asked in ASKED.items():
    words = pd.DataFrame({"asked": asked, **{name: texts[kind] for name, texts in said.items()}})
    if kind != "neighbour":
        words.insert(1, "wanted", [record.target_new for record in records])
    display(Markdown(f"**{kind}**"))
    display(words)

# %% [markdown]
# ## Still there after the last edit?
#
# Counted over those answers. *said*: the answer begins with the new one. *kept*: the first word of the neighbour's
# answer is that of before.

# %%
wanted = [record.target_new for record in records]
counts = {}
for name in METHODS:
    was, now = said["before"]["neighbour"], said[name]["neighbour"]
    counts[name] = {
        "edits said": sum(begins_with(text, new) for text, new in zip(said[name]["edit"], wanted, strict=True)),
        "said in other words": sum(
            begins_with(text, new) for text, new in zip(said[name]["in other words"], wanted, strict=True)
        ),
        "neighbours kept": sum(a.split()[:1] == b.split()[:1] for a, b in zip(was, now, strict=True)),
        "of": len(records),
    }
display(pd.DataFrame(counts).T)

# %% [markdown]
# ## A real comparison
#
# Twenty facts of one model and more methods, with known facts, perplexity, tables and figures:
#
# ```sh
# kdpo-compare -m method=kdpo,kdpo_l,ft_l,ft_m,rome,memit model=smollm2-135m dataset=counterfact n_edits=20
# ```
