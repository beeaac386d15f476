# %% [markdown]
# # Locating: where does a model recall a fact?
#
# KDPO-L edits a few early layers, through the last token of the subject. Why there? *Causal tracing* looks for the
# place (Meng et al. 2022, [Locating and Editing Factual Associations in GPT](https://arxiv.org/abs/2202.05262)):
#
# 1. Ask for a fact that the model knows. Note how likely the answer is, and what every MLP writes at every token.
# 2. Add noise to the subject's embeddings. The model no longer knows whom the question is about, and the answer
#    becomes unlikely.
# 3. Keep the noise, but put back what the MLPs of a few layers wrote at **one** token. How far does the answer come
#    back? This is the *indirect effect* of that layer and token.
#
# `kdpo locate` does this for any model. Here we do it step by step on SmolLM2-135M.

# %%
import logging
from dataclasses import replace
from itertools import pairwise
from statistics import fmean

import matplotlib.pyplot as plt
import pandas as pd
import torch
from IPython.display import display
from matplotlib.patches import Rectangle

from kdpo_editor import KDPOHyperParams, edit, load
from kdpo_editor.compare.report.figures import COLOURS, SETTINGS
from kdpo_editor.compare.run.evaluate import Evaluator, accuracy, fingerprint
from kdpo_editor.compare.run.known import known_facts, right
from kdpo_editor.derived import default_layers
from kdpo_editor.engine.weights import restore
from kdpo_editor.hparams import settings_folder
from kdpo_editor.lifelong.locating import SUBJECT_LAST, TOKENS, WINDOW, trace
from kdpo_editor.requests.tokens import tokenize

pd.options.display.max_colwidth = None
logging.getLogger("kdpo_editor").setLevel(logging.ERROR)  # KDPO-L says that edits which were taken back are forgotten
plt.rcParams.update(SETTINGS | {"figure.dpi": 110})
BLUE, RED, GREY = *COLOURS[:2], "#777777"

# %%
MODEL = "smollm2-135m"
FACTS = 8  # traced
EDITS = 3  # made at each place
OTHERS = 12  # facts that are asked again after each edit

# %%
hparams = KDPOHyperParams.from_hparams(settings_folder() / "KDPO-L" / "auto.yaml", model_name=MODEL)
model, tok = load(MODEL)
evaluator = Evaluator(model, tok)
untouched = fingerprint(model)

# %% [markdown]
# ## Facts that the model knows
#
# They are CounterFact records. The model knows one if its answer begins with the right one. We trace eight of them,
# so that it takes a minute or two. `kdpo locate` takes twenty.

# %%
known = [record for record in known_facts(evaluator, "counterfact", 30, []) if record.subject_in_prompt]
facts = [{"prompt": r.prompt, "subject": r.subject, "target_new": r.ground_truth} for r in known[:FACTS]]
print(f"{len(facts)} facts that the model knows:")
display(pd.DataFrame(facts).rename(columns={"target_new": "answer"}))

# %% [markdown]
# ## One fact
#
# First the fact that the noise harms most, of those with all kinds of tokens. A row is a part of the prompt, a column a
# layer.

# %%
single = [trace(model, tok, [fact], hparams) for fact in facts]
lost = [one.clean - one.corrupted for one in single]
whole = [i for i, each in enumerate(single) if not each.effects.isnan().any()]
which = max(whole or range(len(facts)), key=lost.__getitem__)
fact, one = facts[which], single[which]
print(f"{fact['prompt']} {fact['target_new']}")
print(f"probability of the answer: {one.clean:.2f} as it is, {one.corrupted:.2f} with the subject unreadable")


# %%
def words(fact):
    """What of the prompt stands in each row of a map."""
    ((tokens,),) = tokenize(tok, [fact], with_subject=True)
    (begin, end), last = tokens.subject, len(tokens.prompt) - 1
    cuts = [begin, begin + 1, end - 1, end, end + 1, last, last + 1]
    texts = [tok.decode(tokens.prompt[a:b]).strip() for a, b in pairwise(cuts)]
    return [text if len(text) < 24 else f"{text[:10]} ... {text[-10:]}" for text in texts]


def draw(axes, effects, labels, layers=()):
    """A map of effects: a row for each kind of token, a column for each layer; a frame around each of ``layers``."""
    image = axes.imshow(effects, cmap="Purples", vmin=0, aspect="auto", interpolation="none")
    axes.set_yticks(range(len(labels)), labels=labels)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("layer in the middle of those put back")
    for layer in layers:
        edges = {"facecolor": "none", "edgecolor": RED, "linewidth": 1.8, "clip_on": False}
        axes.add_patch(Rectangle((layer - 0.5, SUBJECT_LAST - 0.5), 1, 1, **edges))
    axes.figure.colorbar(image, ax=axes, label="probability regained", pad=0.02)


fig, axes = plt.subplots(figsize=(8, 2.5), layout="constrained")
draw(axes, one.effects, words(fact))
axes.set_title(f"{fact['prompt']} ... {fact['target_new']}")
plt.show()

# %% [markdown]
# ## All facts
#
# The mean over all of them. Rows are kinds of tokens now, since prompts differ. The frames are around the layers that
# `kdpo locate` would edit. They are spread as those that KDPO-L edits. They end where the last token of the subject has
# its largest effect, or begin at the bottom.

# %%
found = replace(
    one,
    effects=torch.stack([each.effects for each in single]).nanmean(0),
    clean=fmean(each.clean for each in single),
    corrupted=fmean(each.corrupted for each in single),
    facts=len(single),
)
depth = found.effects.shape[1]
print(
    f"{found.facts} facts: probability of the answer {found.clean:.2f} as it is, {found.corrupted:.2f} with the "
    f"subject unreadable"
)

# %%
fig, axes = plt.subplots(figsize=(8, 2.5), layout="constrained")
draw(axes, found.effects, TOKENS, found.layers)
axes.set_title(f"indirect effect of MLPs in {MODEL}, mean of {found.facts} facts")
plt.show()

# %% [markdown]
# Now the row of the subject's last token alone, fact by fact.

# %%
recipe = default_layers(depth, range(depth), all_tokens=False)
at_subject = found.effects[SUBJECT_LAST]
fig, axes = plt.subplots(figsize=(8, 3), layout="constrained")
for each in single:
    axes.plot(each.effects[SUBJECT_LAST], color="#cccccc", linewidth=1)
axes.plot([], color="#cccccc", linewidth=1, label="one fact")
axes.plot(at_subject, color=BLUE, marker="o", markersize=4, label="mean")
axes.axhline(0, color="black", linewidth=0.8)
top = axes.get_ylim()[1]
for layers, name, height, colour in ((recipe, "the recipe's layers", 1.03, GREY), (found.layers, "located", 1.1, RED)):
    axes.plot(layers, [top * height] * len(layers), color=colour, marker="s", linestyle="none", label=name)
axes.set(xlabel="layer in the middle of those put back", ylabel="probability regained", xlim=(-0.5, depth - 0.5))
axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %%
window = max(1, round(WINDOW * depth))
strongest = int(at_subject.argmax())
print(f"largest at layer {strongest}: {at_subject[strongest]:.3f}, with {window} layers put back at a time")
print(f"located layers {found.layers}, the recipe's {recipe}")
print(f"of {len(single)} facts, the largest effect lies in the recipe's layers for", end=" ")
print(sum(int(each.effects[SUBJECT_LAST].argmax()) in recipe for each in single))

# %% [markdown]
# ## An edit with each
#
# The map says where a fact is read. Is it also the best place to write? (Hase et al. 2023, [Does Localization Inform
# Editing?](https://arxiv.org/abs/2301.04213), doubt it.) We make a few edits of CounterFact at each place, each on the
# unedited model.

# %%
places = {"the recipe's": recipe, "located": found.layers}
edited = known[:EDITS]
others = known[FACTS:][:OTHERS]


def predictions(record):
    """What the model says after a record's prompt, the other wording and the neighbour's prompt, and what is wanted."""
    probe = record.locality["neighborhood"][0]
    new = [(prompt, record.target_new) for prompt in (record.prompt, record.rephrase_prompts[0])]
    return evaluator.predict([*new, (probe.prompt, probe.answers[0])])


def measured(record, layers):
    """Edit one record in ``layers``, score it, and put the model back."""
    request = {"prompt": record.prompt, "target_new": record.target_new, "subject": record.subject}
    (*_, (neighbour, _)) = predictions(record)
    _, originals, _ = edit(model, tok, [request], replace(hparams, layers=layers))
    own, rephrase, (after, _) = predictions(record)
    still = right(evaluator, others)
    restore(dict(model.named_parameters()), originals)
    return {
        "success": accuracy(*own),
        "rephrase": accuracy(*rephrase),
        "neighbours": accuracy(after, neighbour),
        "known": fmean(still),
    }


scores = {place: [measured(record, layers) for record in edited] for place, layers in places.items()}
assert fingerprint(model) == untouched

# %% [markdown]
# *success*: the share of the new answer's tokens that the model gets right, after the edit's prompt, and for *rephrase*
# after another wording. *neighbours*: the share of a similar subject's answer that stayed. *known*: of facts about
# other subjects that the model knew, those that it still knows.

# %%
table = pd.DataFrame({place: pd.DataFrame(of).mean() for place, of in scores.items()}).T
table.insert(0, "layers", [", ".join(map(str, layers)) for layers in places.values()])
display(table.round(2))
