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
import tempfile
import warnings
from pathlib import Path

from peft import PeftModel

from kdpo_editor import CompressionError, EditDelta, EditLedger, FingerprintError, KDPOHyperParams, edited, original
from kdpo_editor.compare.run.evaluate import fingerprint
from kdpo_editor.engine.generation import generate
from kdpo_editor.hparams import settings_folder
from kdpo_editor.models import load
from kdpo_editor.testbed import load_records

warnings.simplefilter("ignore", FutureWarning)  # names that peft uses and transformers is about to change

# %% [markdown]
# **On a real model:** change this line to the name of another file in `hparams/KDPO`, such as `"llama-2-7b"`.

# %%
MODEL = "kdpo-llama-knowedit"

# %%
FOLDER = Path(tempfile.mkdtemp())  # a place of your own keeps what is saved
hparams = KDPOHyperParams.from_hparams(settings_folder() / "KDPO" / f"{MODEL}.yaml")
model, tok = load(hparams.model_name)
records = load_records()
untouched = fingerprint(model)  # a hash of every bit of every weight


def ask(number, of=model):
    return generate(of, tok, records[number]["prompt"])


print(records[0]["prompt"], "->", ask(0))

# %% [markdown]
# ## An edit as a thing
#
# `EditDelta.make` edits the model and returns the change, with a manifest: what was asked, with which settings, on
# which model.

# %%
delta = EditDelta.make(model, tok, [records[0]], hparams)
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
second = EditDelta.make(model, tok, [records[1]], hparams)
second.revert(model)
both = EditDelta.merge([delta, second])
with edited(model, both):
    for number in (0, 1):
        print(records[number]["target_new"], "<- wanted, said ->", ask(number))

# %% [markdown]
# ## Small, and as a LoRA adapter
#
# `compress` makes the change a pair of thin matrices of the rank asked for, or refuses if that loses the edit.
# `save_lora` takes the smallest rank that keeps the answer, and writes what PEFT loads, here onto a fresh model.

# %%
try:
    small = delta.compress(model, tok, rank=8)
except CompressionError as error:
    print("refused:", error)
else:
    print(f"full: {delta.nbytes / 1e3:.0f} kB, rank {small.rank}: {small.nbytes / 1e3:.0f} kB")
    with edited(model, small):
        print("small:", ask(0))

rank = delta.save_lora(FOLDER / "adapter", model, tok)
print(f"an adapter of rank {rank}:", sorted(f.name for f in (FOLDER / "adapter").iterdir()))
fresh, _ = load(hparams.model_name)
adapted = PeftModel.from_pretrained(fresh, FOLDER / "adapter")
print("with PEFT:", ask(0, adapted))
with adapted.disable_adapter():
    print("adapter off:", ask(0, adapted))

# %% [markdown]
# ## A journal
#
# A ledger writes every edit down before it returns; a crash loses none. Three edits, one after the other:

# %%
assert fingerprint(model) == untouched
with EditLedger(FOLDER / "ledger", write=True) as ledger:
    for record in records[:3]:
        ledger.edit(model, tok, [record], hparams)
    for one in ledger.branch:
        print(one.number, one.info.requests[0]["prompt"], "->", one.info.requests[0]["target_new"])

# %% [markdown]
# Tomorrow, in another process: load the model, take it to where the ledger is, and go on; or go back.

# %%
model, tok = load(hparams.model_name)
with EditLedger(FOLDER / "ledger", write=True) as ledger:
    print("resumed after edit", ledger.restore(model), "->", [ask(n, model) for n in range(3)])
    print("undone to edit    ", ledger.undo(2, model), "->", [ask(n, model) for n in range(3)])
    print("redone to edit    ", ledger.redo(1, model), "->", [ask(n, model) for n in range(3)])
    print("before any edit   ", ledger.checkout(0, model), "->", [ask(n, model) for n in range(3)])
    assert fingerprint(model) == untouched
    shared = ledger.delta(3, since=0)  # all three edits as one delta, to send
print("bit for bit as at the start:", fingerprint(model) == untouched)

# %%
with edited(model, shared):
    print("the shared delta:", [ask(n, model) for n in range(3)])

# %% [markdown]
# Through EasyEdit's `BaseEditor` the same journal is one line in the settings, `ledger: some/folder`; on the command
# line there is `kdpo edit`, `kdpo log`, `kdpo undo` and others (`kdpo --help`).
