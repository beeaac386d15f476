# %% [markdown]
# # Inside KDPO: one edit, step by step
#
# KDPO treats an edit as a preference: the new answer `y_w` (*chosen*) should beat `y_l` (*rejected*), what the model
# would say instead. This notebook takes one edit apart, with the editor's own functions.
#
# One edit, as in the paper (Rozner et al. 2024, section 3):
#
# 1. Run the model once over prompt and new answer. At each position of the answer, the token that the model likes best
#    is a token of `y_l`. If `y_l` is the new answer, stop.
# 2. Take up to 8 steps of Adam on **one matrix** with the loss
#    $-\log\sigma\big(\beta\,[(\log\pi(y_w)-\log\pi_{ref}(y_w))-(\log\pi(y_l)-\log\pi_{ref}(y_l))]\big)$,
#    where $\pi_{ref}$ is the model before the edit.
# 3. Go to 1, with a **new** `y_l`. This is one *cycle*.

# %%
import matplotlib.pyplot as plt
import pandas as pd
import torch
from IPython.display import display

from kdpo_editor import KDPOHyperParams, edit
from kdpo_editor.engine.cached_forward import CachedForward
from kdpo_editor.engine.weights import blocks_name, find_matrices, restore
from kdpo_editor.hparams import settings_folder
from kdpo_editor.models import load
from kdpo_editor.objectives import answer_logps, ce_loss, hardest_rejected, kdpo_loss
from kdpo_editor.requests import tokenize
from kdpo_editor.testbed import load_records

BLUE, RED, GREEN = "#0072B2", "#D55E00", "#009E73"  # Okabe and Ito's, told apart by most eyes
plt.rcParams.update({"figure.dpi": 90, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# **On a real model:** change this line to the name of another file in `hparams/KDPO`, such as `"llama-2-7b"`.

# %%
MODEL = "kdpo-llama-knowedit"

# %% [markdown]
# A fifth of the learning rate, which the paper takes for edits in a row, makes the edit slow enough to watch.

# %%
hparams = KDPOHyperParams.from_hparams(settings_folder() / "KDPO" / f"{MODEL}.yaml")
hparams.lr /= 5
model, tok = load(hparams.model_name)
records = load_records()
record = records[7]
print(record["prompt"])
print("now:", record["ground_truth"], "  wanted:", record["target_new"])

# %% [markdown]
# ## The loop
#
# `CachedForward` runs the model once and then only what lies above the edited matrix. `hardest_rejected` reads off
# `y_l`, `kdpo_loss` is the loss. The rest is Adam. `regenerate=False` keeps the first `y_l` for ever; that is not KDPO,
# and below we see why.


# %%
def watch(record, regenerate=True, lr=hparams.lr):
    """Edit, note everything, and put the model back. One entry per step, and one for the end."""
    ((tokens,),) = tokenize(tok, [record])
    matrices = find_matrices(model, hparams)
    ((name, matrix),) = matrices.items()
    original = matrix.detach().clone()
    matrix.requires_grad_(True)
    adam = torch.optim.Adam([matrix], lr=lr)
    forward = CachedForward(model, blocks_name(hparams), hparams.layers[0], name.removesuffix(".weight"))
    first = len(tokens.prompt) - 1
    cache, hidden = forward.capture(tokens.sequence[None], torch.arange(first, len(tokens.sequence))[None])
    chosen = tokens.chosen.to(forward.device)
    reference = forward.logits(hidden)[0].detach()
    entries = []
    for cycle in range(hparams.cycles):
        for step in range(hparams.num_steps):
            logits = forward.logits(forward.from_cache(cache))[0]  # [answer tokens, vocabulary]
            if step == 0:
                best, _ = hardest_rejected(logits.detach().clone(), chosen)
                if regenerate or cycle == 0:
                    rejected = best
                if torch.equal(best, chosen):
                    break
            pair = torch.stack([chosen, rejected], -1)
            loss = kdpo_loss(logits.gather(-1, pair), reference.gather(-1, pair), hparams.beta)
            entries.append({"cycle": cycle, "loss": loss.item(), "rejected": rejected, "logits": logits.detach()})
            if loss < hparams.stop_loss:
                break
            adam.zero_grad()
            loss.backward()
            adam.step()
        if torch.equal(best, chosen) or (loss < hparams.stop_loss and not regenerate):
            break
    logits = forward.logits(forward.from_cache(cache))[0].detach()
    won = torch.equal(logits.argmax(-1), chosen)
    entries.append({"cycle": cycle, "loss": None, "rejected": rejected, "logits": logits})
    matrix.requires_grad_(False)
    restore(matrices, {name: original})
    return chosen, entries, won


def text(ids):
    return " | ".join(tok.convert_ids_to_tokens(ids)).replace("Ġ", "␣").replace("▁", "␣")


chosen, entries, won = watch(record)
steps = entries[:-1]
cycles = sorted({e["cycle"] for e in steps})
print(f"won: {won}, cycles: {len(cycles)}, steps: {len(steps)}")

# %% [markdown]
# Is this really what the editor does? `edit` returns a trace of every edit. Its rejected answers and losses are the
# same.

# %%
_, weights, (trace,) = edit(model, tok, [record], hparams)
restore(dict(model.named_parameters()), weights)
assert [c.rejected for c in trace.cycles] == [
    next(e["rejected"].tolist() for e in steps if e["cycle"] == c) for c in cycles
]
worst = max(abs(a - b["loss"]) for a, b in zip([x for c in trace.cycles for x in c.losses], steps, strict=True))
assert worst < 1e-3
print(f"same rejected answers; the losses differ by {worst:.0e} at most")

# %% [markdown]
# ## The cycles
#
# `␣` is a space. Positions where `y_l` has the new answer's token are won and take no part in the loss.

# %%
rows = [{"cycle": "the new answer", "tokens": text(chosen)}]
for c in cycles:
    inside = [e for e in steps if e["cycle"] == c]
    rows.append(
        {
            "cycle": f"y_l of cycle {c + 1}",
            "tokens": text(inside[0]["rejected"]),
            "loss, first step": inside[0]["loss"],
            "last": inside[-1]["loss"],
        }
    )
rows.append({"cycle": "the model at the end", "tokens": text(entries[-1]["logits"].argmax(-1))})
display(pd.DataFrame(rows).set_index("cycle").round(3).astype(object).fillna(""))

# %% [markdown]
# ## Chosen and rejected, step by step
#
# Within a cycle the loss falls as the new answer gains on `y_l`. At the start of a cycle (grey line) `y_l` is read off
# anew: where it is another answer now, the rejected curve jumps to the model's present favourite, and the loss rises
# again. The panel on the right shows every position of the answer: the edit is won when all leads are above 0.

# %%
fig, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.3), layout="constrained")
at = range(len(steps))
left.plot(at, [e["loss"] for e in steps], color="black", marker=".")
left.set(title="loss", xlabel="step", ylabel="nats")
for label, colour, marker in (("chosen $y_w$", BLUE, "o"), ("rejected $y_l$", RED, "s")):
    values = [answer_logps(e["logits"], chosen if colour == BLUE else e["rejected"]).item() for e in steps]
    middle.plot(at, values, color=colour, marker=marker, markersize=4, label=label)
middle.set(title="log-probability of the answer", xlabel="step", ylabel="nats")
middle.legend(frameon=False)
for position, (token, marker) in enumerate(zip(chosen, "os^Dv<>*" * 9, strict=False)):
    values = [
        (e["logits"][position, token] - e["logits"][position].scatter(0, token, -torch.inf).max()).item()
        for e in entries
    ]
    right.plot(range(len(entries)), values, marker=marker, markersize=4, label=text([token]))
right.axhline(0, color="black", linewidth=0.8)
right.set(title="lead over the best other token", xlabel="step", ylabel="logits")
right.legend(frameon=False, title="new token", loc="lower right")
for axes in (left, middle, right):
    for c in cycles[1:]:
        axes.axvline(next(i for i, e in enumerate(steps) if e["cycle"] == c), color="#bbbbbb", linewidth=1, zorder=0)
plt.show()

# %% [markdown]
# ## Two logits
#
# Both answers are read from one forward pass, so the softmax's normaliser is the same for both and cancels. What
# remains of the loss at each wrong position is the difference of **two logits**. Cross-entropy (fine-tuning) pushes
# every logit of the vocabulary. Here is the gradient that arrives at the logits in the first step.

# %%
logits = steps[0]["logits"].clone().requires_grad_(True)
rejected = steps[0]["rejected"]
pair = torch.stack([chosen, rejected], -1)
(kdpo,) = torch.autograd.grad(
    kdpo_loss(logits.gather(-1, pair), logits.detach().gather(-1, pair), hparams.beta), logits
)
(ce,) = torch.autograd.grad(ce_loss(logits, chosen), logits)
display(
    pd.DataFrame(
        {
            "new token": [text([t]) for t in chosen],
            "rejected token": [text([t]) for t in rejected],
            "logits with a gradient, KDPO": (kdpo != 0).sum(-1).tolist(),
            "logits with a gradient, cross-entropy": (ce != 0).sum(-1).tolist(),
        }
    ).rename_axis("position")
)
assert (kdpo != 0).sum() == 2 * (rejected != chosen).sum()

# %% [markdown]
# The gradient touches two logits, but all logits share the matrix below them, so others move too. How far did they go
# in the whole edit, at the first position that was wrong? Most of those that were never aimed at move much less.

# %%
position = int((rejected != chosen).nonzero()[0])
moved = entries[-1]["logits"][position] - entries[0]["logits"][position]
aimed = {int(chosen[position]), *(int(e["rejected"][position]) for e in steps)}
rest = torch.tensor([i for i in range(len(moved)) if i not in aimed], device=moved.device)
others = moved[rest]

fig, axes = plt.subplots(figsize=(7, 3), layout="constrained")
axes.hist(others.tolist(), bins=80, color="#999999", label=f"the other {len(others)}")
for token in sorted(aimed, key=lambda i: i != int(chosen[position])):
    new = token == int(chosen[position])
    axes.axvline(
        moved[token].item(), color=BLUE if new else RED, linestyle="-" if new else "--",
        label=f"{'new' if new else 'rejected'}: {text([token])}",
    )  # fmt: skip
axes.set(xlabel="change of the logit", ylabel="tokens", yscale="log", title=f"position {position}, before and after")
fig.legend(loc="outside right upper", frameon=False)
plt.show()
print(f"half of the others moved by less than {others.abs().median().item():.1f} logits")

# %% [markdown]
# ## Why `y_l` must be made anew
#
# Keep the first `y_l` instead, for as many steps as KDPO may take. The loss is content once the new answer is far ahead
# of **that** `y_l`, whatever else comes out on top.

# %%
_, frozen, frozen_won = watch(record, regenerate=False)
rejected, final = frozen[0]["rejected"], frozen[-1]["logits"].argmax(-1)
print(f"y_l made anew: won {won}, {len(entries) - 1} steps")
print(f"y_l kept:      won {frozen_won}, {len(frozen) - 1} steps")
display(
    pd.DataFrame(
        {"new answer": [text([t]) for t in chosen], "y_l, kept": [text([t]) for t in rejected],
         "the model then says": [text([t]) for t in final]}
    ).rename_axis("position")
)  # fmt: skip

# %%
wrong = (final != chosen).nonzero().flatten()
position = int(wrong[0]) if len(wrong) else position
names = {int(chosen[position]): "new"}
for token, role in ((int(rejected[position]), "first rejected"), (int(final[position]), "winner on the left")):
    names[token] = f"{names[token]} and {role}" if token in names else role
fig, panels = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True, layout="constrained")
for axes, some, title in zip(panels, (frozen[:60], entries), ("$y_l$ kept", "$y_l$ made anew"), strict=True):
    for (token, role), colour, marker in zip(names.items(), (BLUE, RED, GREEN), "os^", strict=False):
        values = [e["logits"][position, token].item() for e in some]
        axes.plot(values, color=colour, marker=marker, markersize=4, linewidth=1, label=f"{text([token])}  ({role})")
    axes.set(title=title, xlabel="step")
panels[0].set_ylabel(f"logit at position {position}")
fig.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
plt.show()

# %% [markdown]
# On the shipped model this is a position that was *won* at the start: both answers have the same token there, so the
# loss does not push it. But it shares the matrix with the position that is pushed, is dragged down with it, and a third
# token passes. With `y_l` made anew that token is rejected next, and is sent away within a few steps.

# %% [markdown]
# Is this rare? The same for forty records, at this learning rate and at the one chosen for single edits.

# %%
counts = []
for lr in (hparams.lr, 5 * hparams.lr):
    kept = sum(watch(r, regenerate=False, lr=lr)[2] for r in records[:40])
    anew = sum(watch(r, lr=lr)[2] for r in records[:40])
    counts.append({"learning rate": f"{lr:g}", "won with y_l kept": kept, "won with y_l made anew": anew, "of": 40})
display(pd.DataFrame(counts).set_index("learning rate"))

# %% [markdown]
# Most edits need no second `y_l`; those that do fail without it, however long they are trained.
