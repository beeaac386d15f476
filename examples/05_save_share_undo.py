# %% [markdown]
# # Saving, sharing and undoing edits
#
# An edit can be a thing of its own: a file to send, a switch to turn, a line in a journal, a LoRA adapter.
#
# | | what for |
# |---|---|
# | `EditDelta` | one change: save, load, apply, take back, merge, make small |
# | `edited`, `original` | look at the model with or without it, for as long as a `with` block lasts |
# | `EditLedger` | a journal of edits on disk: resume, undo, redo |
# | `save_lora` | the change as a PEFT adapter, for programs that know nothing of this one |

# %%
import logging
import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from IPython.display import display
from peft import PeftModel

from kdpo_editor import (
    CompressionError,
    EditDelta,
    EditLedger,
    FingerprintError,
    KDPOHyperParams,
    edited,
    load,
    original,
)
from kdpo_editor.compare.report.figures import COLOURS, SETTINGS
from kdpo_editor.compare.run.evaluate import fingerprint
from kdpo_editor.engine.generation import answers
from kdpo_editor.hparams import settings_folder

plt.rcParams.update(SETTINGS | {"figure.dpi": 110})
BLUE, RED = COLOURS[:2]
pd.options.display.max_colwidth = None
logging.getLogger("kdpo_editor").setLevel(logging.ERROR)  # KDPO-L says that edits which were taken back are forgotten
warnings.simplefilter("ignore", FutureWarning)  # names that peft uses and transformers is about to change

# %% [markdown]
# The model is SmolLM2-135M, the recipe KDPO-L. **Another model:** change the first line.

# %%
MODEL = "smollm2-135m"
FOLDER = Path(tempfile.mkdtemp())  # a place of your own keeps what is saved
REQUESTS = [
    {"prompt": "The Eiffel Tower is in the city of", "target_new": "Rome", "subject": "Eiffel Tower"},
    {"prompt": "The capital of Australia is", "target_new": "Melbourne", "subject": "Australia"},
    {"prompt": "The inventor of the telephone was", "target_new": "Thomas Edison", "subject": "telephone"},
]

# %%
hparams = KDPOHyperParams.from_hparams(settings_folder() / "KDPO-L" / "auto.yaml", model_name=MODEL)
model, tok = load(MODEL)
untouched = fingerprint(model)  # a hash of every bit of every weight


def ask(number=None, of=model):
    """The first words of the answer to one request's prompt, or of the answers to all of them."""
    asked = REQUESTS if number is None else [REQUESTS[number]]
    said = [text.split(".")[0].split(",")[0].strip() for text in answers(of, tok, [r["prompt"] for r in asked], 6)]
    return said if number is None else said[0]


for request, said in zip(REQUESTS, ask(), strict=True):
    print(f"{request['prompt']} -> {said}")

# %% [markdown]
# ## An edit as a thing
#
# `EditDelta.make` edits the model and returns the change, with a manifest: what was asked, with which settings, on
# which model.

# %%
delta = EditDelta.make(model, tok, [REQUESTS[0]], hparams)
print("edited:  ", ask(0))
with original(model):
    print("original:", ask(0))
delta.revert(model)
assert fingerprint(model) == untouched
print("reverted, bit for bit:", fingerprint(model) == untouched)
print("on", delta.info.requests[0]["prompt"], "->", delta.info.requests[0]["target_new"])

# %%
with edited(model, delta):
    print("inside the block: ", ask(0))
print("after the block:  ", ask(0))

# %% [markdown]
# ## Save, load, and what is refused
#
# A delta fits the model that it was made on, in the state that it was made in. Anything else is refused, and says why.

# %%
size = delta.save(FOLDER / "delta")
print(f"{size / 1e6:.2f} MB:", sorted(f.name.split("-")[0] for f in (FOLDER / "delta").iterdir()))
loaded = EditDelta.load(FOLDER / "delta")
_ = loaded.apply(model)  # returns the matrices as they were
print("loaded and applied:", ask(0))
try:
    _ = loaded.apply(model)
except FingerprintError as error:
    print("twice:", error)
_ = loaded.revert(model)

# %% [markdown]
# ## Several as one
#
# Two edits, each made on the unedited model, merged: their differences are added. One may then disturb the other, so
# look. (Edits that were made one on top of the other merge exactly.)

# %%
second = EditDelta.make(model, tok, [REQUESTS[1]], hparams)
second.revert(model)
both = EditDelta.merge([delta, second])
with edited(model, both):
    for number in (0, 1):
        print(REQUESTS[number]["target_new"], "<- wanted, said ->", ask(number))

# %% [markdown]
# ## Small
#
# The change of a matrix is nearly a product of two thin ones. How thin? The picture shows how much of the change is
# left out by a product of some rank, for each matrix that KDPO-L changed. Beside it is the same edit by the paper's
# KDPO, whose optimiser spreads its steps over the whole matrix.

# %%
paper = KDPOHyperParams.from_hparams(settings_folder() / "KDPO" / "auto.yaml", model_name=MODEL)
spread = EditDelta.make(model, tok, [REQUESTS[0]], paper)
spread.revert(model)


def left_out(change):
    """The share of the norm that the best product of each rank leaves out, from rank 1 on."""
    squares = torch.linalg.svdvals(change).double().square()
    return (1 - squares.cumsum(0) / squares.sum()).clamp(min=0).sqrt()


RANKS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
fig, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
for number, change in enumerate(delta.change().values()):
    shares = left_out(change)
    axes.plot(range(1, len(shares) + 1), shares, color=RED, alpha=0.7, label=None if number else "KDPO-L, each matrix")
for change in spread.change().values():
    shares = left_out(change)
    axes.plot(range(1, len(shares) + 1), shares, color=BLUE, linewidth=2, label="KDPO, its one matrix")
axes.set(xscale="log", ylim=(0, 1.02), xlabel="rank", ylabel="share of the change left out")
axes.set_xticks(RANKS, labels=RANKS)
axes.minorticks_off()
axes.grid(axis="y", color="#eeeeee")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# `compress` makes the change such a product of the rank asked for, or refuses if that loses the edit.

# %%
try:
    small = delta.compress(model, tok, rank=8)
except CompressionError as error:
    print("refused:", error)
else:
    print(f"full: {delta.nbytes / 1e6:.1f} MB, rank {small.rank}: {small.nbytes / 1e6:.2f} MB")
    with edited(model, small):
        print("small:", ask(0))

# %% [markdown]
# ## As a LoRA adapter
#
# `save_lora` takes the smallest rank that keeps the answer, and writes what PEFT loads. Here it is loaded onto a fresh
# model.

# %%
rank = delta.save_lora(FOLDER / "adapter", model, tok)
files = sorted((FOLDER / "adapter").iterdir())
print(f"an adapter of rank {rank}:", ", ".join(f"{f.name} ({f.stat().st_size / 1e6:.2f} MB)" for f in files))
fresh, _ = load(MODEL)
adapted = PeftModel.from_pretrained(fresh, FOLDER / "adapter")
print("with PEFT:  ", ask(0, adapted))
with adapted.disable_adapter():
    print("adapter off:", ask(0, adapted))
del fresh, adapted

# %% [markdown]
# ## A journal
#
# A ledger writes every edit down before it returns; a crash loses none. Three edits, one after the other:

# %%
assert fingerprint(model) == untouched
with EditLedger(FOLDER / "ledger", write=True) as ledger:
    for request in REQUESTS:
        ledger.edit(model, tok, [request], hparams)
    for one in ledger.branch:
        print(one.number, one.info.requests[0]["prompt"], "->", one.info.requests[0]["target_new"])

# %% [markdown]
# Tomorrow, in another process: load the model, take it to where the ledger is, and go on; or go back.

# %%
model, tok = load(MODEL)
seen = {"as loaded": ask(of=model)}
with EditLedger(FOLDER / "ledger", write=True) as ledger:
    moves = {
        "restore": lambda: ledger.restore(model),
        "undo 2": lambda: ledger.undo(2, model),
        "redo 1": lambda: ledger.redo(1, model),
        "check out 0": lambda: ledger.checkout(0, model),
    }
    for name, move in moves.items():
        number = move()
        seen[f"{name}: after edit {number}"] = ask(of=model)
    assert fingerprint(model) == untouched
    shared = ledger.delta(3, since=0)  # all three edits as one delta, to send
print("bit for bit as at the start:", fingerprint(model) == untouched)

# %%
with edited(model, shared):
    seen["the shared delta"] = ask(of=model)
display(pd.DataFrame(seen, index=[request["prompt"] for request in REQUESTS]).T)

# %% [markdown]
# ## Go on
#
# Through EasyEdit's `BaseEditor` the same journal is one line in the settings, `ledger: some/folder`. On the command
# line there is `kdpo edit`, `kdpo log`, `kdpo undo` and others (`kdpo --help`).
