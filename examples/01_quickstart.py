# %% [markdown]
# # Quickstart: correct one fact, look, take it back
#
# A language model has a fact in its weights. We want another answer, and everything else left as it is. KDPO does that
# by changing one matrix. Here it runs inside [EasyEdit](https://github.com/zjunlp/EasyEdit), on a model of 4M
# parameters that is part of the package: no GPU, no download.

# %%
import pandas as pd
import torch
from IPython.display import display

from kdpo_editor import KDPOHyperParams, apply_kdpo_to_model, original  # before easyeditor: registers KDPO with it
from kdpo_editor.compare.run.evaluate import fingerprint
from kdpo_editor.easyedit import is_upstream, quietly
from kdpo_editor.engine.generation import generate
from kdpo_editor.engine.weights import find_matrices, restore
from kdpo_editor.hparams import settings_folder
from kdpo_editor.testbed import load_records

from easyeditor import BaseEditor  # isort: skip

pd.options.display.max_colwidth = None

# %% [markdown]
# **On a real model:** change this line to the name of another file in `hparams/KDPO`, such as `"llama-2-7b"`.

# %%
MODEL = "kdpo-llama-knowedit"

# %%
hparams = KDPOHyperParams.from_hparams(settings_folder() / "KDPO" / f"{MODEL}.yaml")
with quietly():  # EasyEdit prints every step
    editor = BaseEditor.from_hparams(hparams)
model, tok = editor.model, editor.tok
print(f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters")

# %% [markdown]
# ## Before
#
# The fact is a record of KnowEdit's ZsRE (MIT licence). We ask the question that will be edited, the same in other
# words, another fact about the same subject, and facts about two other subjects. Only the first two should change.

# %%
record, *others = load_records()[:3]
questions = {
    "the edit": record["prompt"],
    "in other words": record["rephrase_prompt"],
    "same subject": record["locality"][0]["prompt"],
    "another subject": others[0]["prompt"],
    "yet another": others[1]["prompt"],
}


def ask():
    return [generate(model, tok, question) for question in questions.values()]


answers = pd.DataFrame({"question": questions.values(), "before": ask()}, index=questions.keys())
print(f"{record['subject']}: the new answer will be {record['target_new']!r}")
display(answers)

# %% [markdown]
# ## The edit
#
# One call. We want to talk to the edited model afterwards, so the edit has to stay: EasyEdit's upstream form wants
# `sequential_edit=True` for that, its PyPI form does so anyway. To be able to go back we keep a copy of the one matrix
# that KDPO may change, and the fingerprint (a hash of every bit of every weight) of the model as it is now.

# %%
before = fingerprint(model)
matrices = find_matrices(model, hparams)
originals = {name: weight.detach().clone() for name, weight in matrices.items()}

with quietly():
    metrics, _, _ = editor.edit(
        prompts=[record["prompt"]],
        target_new=[record["target_new"]],
        ground_truth=[record["ground_truth"]],
        rephrase_prompts=[record["rephrase_prompt"]],
        locality_inputs={"same": {k: [record["locality"][0][k]] for k in ("prompt", "ground_truth")}},
        **({"sequential_edit": True} if is_upstream() else {}),
    )

answers["after"] = ask()
display(answers)

# %% [markdown]
# EasyEdit's own figures: the share of the answer's tokens that the model gets right when the right ones before them are
# given, and for locality the share that stayed the same. The start may be well above 0: an old and a new answer often
# share tokens.

# %%
pre, post = metrics[0]["pre"], metrics[0]["post"]
print(f"rewrite   {float(pre['rewrite_acc'][0]):.2f} -> {float(post['rewrite_acc'][0]):.2f}")
print(f"rephrase  {float(pre['rephrase_acc'][0]):.2f} -> {float(post['rephrase_acc'][0]):.2f}")
print(f"locality  {float(post['locality']['same_acc'][0]):.2f}")

# %% [markdown]
# ## What changed
#
# One matrix of the model and nothing else. In so small a model the change is almost as large as the matrix itself.

# %%
changed = [n for n, w in model.named_parameters() if n in originals and not torch.equal(w, originals[n])]
for name in changed:
    share = ((matrices[name].detach() - originals[name]).norm() / originals[name].norm()).item()
    print(f"{name} {tuple(matrices[name].shape)}: changed by {share:.0%} of its norm")

# %% [markdown]
# ## Take it back

# %%
restore(matrices, originals)
answers["taken back"] = ask()
display(answers)
assert fingerprint(model) == before
print("bit for bit as before:", fingerprint(model) == before)

# %% [markdown]
# ## Without the framework
#
# The same edit on any decoder-only `transformers` model and tokenizer. The call returns the original weights, and
# `original(...)` shows the unedited model for as long as the `with` block lasts.

# %%
model, weights_copy = apply_kdpo_to_model(model, tok, [record], hparams, return_orig_weights=True)
print("edited:  ", generate(model, tok, record["prompt"]))
with original(model, weights_copy):
    print("original:", generate(model, tok, record["prompt"]))
print("edited:  ", generate(model, tok, record["prompt"]))

restore(dict(model.named_parameters()), weights_copy)
assert fingerprint(model) == before
print("taken back, bit for bit as before:", fingerprint(model) == before)
