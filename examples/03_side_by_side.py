# %% [markdown]
# # Side by side: KDPO and its rivals
#
# A small comparison: a few edits in a row with each method, all scored alike. KDPO comes from this package, the others
# are EasyEdit's own code (but for FT-M on its PyPI form, see the note under the table). All settings are in
# `hparams/<METHOD>/<model>.yaml`.
#
# This is a demonstration, not a result: with so few edits one answer more or less changes a figure a lot, and a
# model of 4M parameters is not Llama. `kdpo-compare experiment=shipped` and `experiment=paper_100` make real
# comparisons; in longer rows of edits FT-M does better than KDPO in some columns (see `04_a_hundred_edits`).

# %%
import tempfile
from pathlib import Path

import pandas as pd
from hydra import compose, initialize_config_module
from IPython.display import Image, display
from omegaconf import OmegaConf

import kdpo_editor.compare.run.app  # noqa: F401  (registers the settings' types with Hydra)
from kdpo_editor.compare.report.report import report
from kdpo_editor.compare.run.cell import run

# %% [markdown]
# **On a real model:** change this line to the name of a file in `kdpo_editor/compare/conf/model`, such as
# `"llama-2-7b"`. MEMIT then needs second moments of the model's keys: `kdpo-statistics`.

# %%
MODEL = "kdpo-llama-knowedit"

# %%
METHODS = ["unedited", "kdpo", "ft_l", "ft_m", "lora", "rome", "memit"]
FOLDER = Path(tempfile.mkdtemp())  # give it a name of your own, and a second run goes on where the first one was
SETTINGS = [
    f"model={MODEL}",
    "dataset=shipped",  # of KnowEdit ZsRE; counterfact is in the package too, others are on the hub
    "n_edits=3",
    "protocol.eval_at=[]",  # score after the last edit only
    "protocol.right_after=false",
    "protocol.known=30",
    "protocol.perplexity=false",
    "model.characters=50000",  # of the text for MEMIT's statistics
    f"out={FOLDER}/results",
    f"cache={FOLDER}/cache",
]

# %% [markdown]
# Each method is a *cell* with a folder of its own: its settings, every figure, all generated text. On the command line
# this would be `kdpo-compare -m method=unedited,kdpo,ft_l,ft_m,lora,rome,memit n_edits=3 ...`.

# %%
with initialize_config_module("kdpo_editor.compare.conf", version_base="1.3"):
    configs = [compose("config", [f"method={method}", *SETTINGS]) for method in METHODS]
cells = [run(OmegaConf.to_object(config)) for config in configs]
print({method: cell.manifest()["status"] for method, cell in zip(METHODS, cells, strict=True)})

# %% [markdown]
# ## The table
#
# `*_acc` is EasyEdit's teacher-forced accuracy; `*_gen` asks the model to answer freely. The best
# value of each column is marked, ties included. `kdpo-report` makes this, as text, CSV, Markdown, LaTeX or a page.

# %%
files = report(FOLDER / "results", FOLDER / "report", {"terminal", "figures"})

# %% [markdown]
# ## The radar plot
#
# As in the paper: further out is better on every axis.

# %%
for file in [file for file in files if file.match("radar*.png")]:
    display(Image(file.read_bytes(), width=520))

# %% [markdown]
# ## What they say
#
# Figures hide what an edit sounds like. The question in other words, and each method's own answer.

# %%
said = {}
for cell in cells:
    texts = pd.read_json(cell.folder / "generations.jsonl", lines=True)
    texts = texts[(texts["kind"] == "rephrase") & (texts["when"] == "checkpoint")].drop_duplicates("prompt")
    said["wanted"] = texts.set_index("prompt")["wanted"].str[0]
    label = OmegaConf.load(cell.folder / "config.yaml").method.label
    said[label] = texts.set_index("prompt")["text"]
display(pd.DataFrame(said).T)

# %% [markdown]
# ## Who wins
#
# Counted rather than told, since it depends on the settings: in how many of the scores each method is best, or as good
# as the best.

# %%
rows = pd.concat(
    pd.read_parquet(cell.folder / "rows.parquet").assign(
        method=OmegaConf.load(cell.folder / "config.yaml").method.label
    )
    for cell in cells[1:]
)
scores = rows[(rows["when"] == "checkpoint") & rows["metric"].str.contains("_acc|_gen")]
scores = scores.pivot_table(index="method", columns="metric", values="value")
best = (scores >= scores.max() - 1e-9).sum(axis=1).sort_values(ascending=False)
seconds = rows[rows["metric"] == "seconds"].groupby("method")["value"].mean()
print(f"Best, or as good as the best, in how many of {scores.shape[1]} scores:")
display(pd.DataFrame({"best": best, "seconds per edit": seconds.round(2)}).loc[best.index])
