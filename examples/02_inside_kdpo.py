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
import logging

import matplotlib.pyplot as plt
import pandas as pd
import torch
from IPython.display import display

from kdpo_editor import KDPOHyperParams, edit, load
from kdpo_editor.compare.report.figures import COLOURS, SETTINGS
from kdpo_editor.compare.run.datasets import load as load_facts
from kdpo_editor.derived import complete
from kdpo_editor.engine.cached_forward import CachedForward
from kdpo_editor.engine.generation import answers
from kdpo_editor.engine.weights import blocks_name, find_matrices, restore
from kdpo_editor.hparams import settings_folder
from kdpo_editor.objectives import ce_loss, hardest_rejected, kdpo_loss
from kdpo_editor.requests.tokens import tokenize

logging.getLogger("kdpo_editor").setLevel(logging.ERROR)
plt.rcParams.update(SETTINGS | {"figure.dpi": 110})
BLUE, RED, GREY = *COLOURS[:2], "#777777"

# %% [markdown]
# ## The fact
#
# It is a record of CounterFact. The model is SmolLM2-135M. The settings are the paper's for single edits.

# %%
MODEL = "smollm2-135m"
SUBJECT = "Giorgione"
FACTS = 4  # looked at in the last section

# %%
model, tok = load(MODEL)
hparams = KDPOHyperParams.from_hparams(settings_folder() / "KDPO" / "auto.yaml", model_name=MODEL)
hparams = complete(hparams, model)  # layer and matrix, found from the model
records = load_facts("counterfact")
record = next(record for record in records if record.subject == SUBJECT)
request = {"prompt": record.prompt, "target_new": record.target_new}
print(f"layer {hparams.layers[0]}, learning rate {hparams.lr:g}")
print(f"prompt:   {record.prompt}")
print(f"now:      {answers(model, tok, [record.prompt], 6)[0]}")
print(f"wanted:   {record.target_new}")

# %% [markdown]
# ## The loop
#
# `CachedForward` runs the model once and then only what lies above the edited matrix. `hardest_rejected` reads off
# `y_l`, `kdpo_loss` is the loss. The rest is Adam. `regenerate=False` keeps the first `y_l` for ever. That is not KDPO;
# below we see what difference it makes.


# %%
def watch(request, regenerate=True, most=hparams.cycles):
    """Edit, note everything, and put the model back. One entry per step, and one for the end."""
    ((tokens,),) = tokenize(tok, [request])
    matrices = find_matrices(model, hparams)
    ((name, matrix),) = matrices.items()
    original = matrix.detach().clone()
    matrix.requires_grad_(True)
    adam = torch.optim.Adam([matrix], lr=hparams.lr)
    forward = CachedForward(model, blocks_name(hparams), hparams.layers[0], name.removesuffix(".weight"))
    first = len(tokens.prompt) - 1
    cache, hidden = forward.capture(tokens.sequence[None], torch.arange(first, len(tokens.sequence))[None])
    chosen = tokens.chosen.to(forward.device)
    reference = forward.logits(hidden)[0].detach()
    entries = []
    for cycle in range(most):
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


chosen, entries, won = watch(request)
steps = entries[:-1]
cycles = sorted({e["cycle"] for e in steps})
print(f"won: {won}, cycles: {len(cycles)}, steps: {len(steps)}")

# %% [markdown]
# Is this really what the editor does? `edit` returns a trace of every edit. Its rejected answers and losses are the
# same.

# %%
_, weights, (trace,) = edit(model, tok, [request], hparams)
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
# anew. Where it is another answer, the loss begins anew, too. On the right are the logits of the new answer and of all
# that were rejected, at the first position that was wrong. An answer is drawn thick while it is the rejected one.

# %%
position = int((steps[0]["rejected"] != chosen).nonzero()[0])
new = int(chosen[position])
aimed = list(dict.fromkeys(int(e["rejected"][position]) for e in steps))
aimed = [token for token in aimed if token != new]


def mark_cycles(axes):
    for c in cycles[1:]:
        axes.axvline(next(i for i, e in enumerate(steps) if e["cycle"] == c), color="#dddddd", linewidth=1, zorder=0)


def logits_of(token, some):
    return [e["logits"][position, token].item() for e in some]


fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), width_ratios=(2, 3), layout="constrained")
for c in cycles:
    of = [(i, e["loss"]) for i, e in enumerate(steps) if e["cycle"] == c]
    left.plot(*zip(*of, strict=True), color="black", marker=".", linewidth=1)
left.set(title="loss", xlabel="step", ylabel="nats", ylim=(0, None))
right.plot(logits_of(new, entries), color="black", linewidth=2.5, label=f"new: {text([new])}")
shades = [*COLOURS[:6], *COLOURS[7:]]
for place, token in enumerate(aimed):
    values = logits_of(token, entries)
    colour = shades[place % len(shades)]
    right.plot(values, color=colour, linewidth=1, label=text([token]))
    now = [
        v if i < len(steps) and steps[i]["rejected"][position] == token else float("nan") for i, v in enumerate(values)
    ]
    right.plot(now, color=colour, linewidth=4, alpha=0.6, solid_capstyle="butt")
right.set(title="logits of the new answer and of the rejected ones", xlabel="step", ylabel="logit")
right.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), title="in order of rejection")
for axes in (left, right):
    mark_cycles(axes)
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
# in the whole edit, at the first position that was wrong?

# %%
moved = entries[-1]["logits"][position] - entries[0]["logits"][position]
rest = torch.ones(len(moved), dtype=torch.bool)
rest[[new, *aimed]] = False
others = moved[rest]

fig, axes = plt.subplots(figsize=(9, 3.2), layout="constrained")
axes.hist(others.tolist(), bins=80, color="#bbbbbb")
top = axes.get_ylim()[1]
for place, token in enumerate(sorted([new, *aimed], key=lambda token: moved[token].item())):
    colour, at = (BLUE if token == new else RED), moved[token].item()
    axes.axvline(at, color=colour, linewidth=1.5)
    axes.annotate(
        text([token]), (at, 1.02 + 0.1 * (place % 3)), xycoords=axes.get_xaxis_transform(), color=colour, ha="center",
        fontsize=9,
    )  # fmt: skip
axes.set(xlabel="change of the logit in the whole edit", ylabel="tokens of the vocabulary", yscale="log")
axes.yaxis.set_major_formatter("{x:,.0f}")
plt.show()
print(f"new answer {moved[new].item():+.1f}, rejected ones {moved[aimed].mean().item():+.1f} on average")
print(f"half of the other {len(others)} tokens moved by less than {others.abs().median().item():.1f} logits")

# %% [markdown]
# ## What making `y_l` anew is for
#
# Keep the first `y_l` instead. Then nothing pushes the other answers down, but that they share the matrix with it. The
# picture shows the lead of the new answer over the best other token. The edit is won above 0.

# %%
_, frozen, frozen_won = watch(request, regenerate=False)


def leads(some):
    """At each step, the least lead of a new token over the best other one, in logits."""
    found = []
    for e in some:
        rest = e["logits"].scatter(1, chosen[:, None], -torch.inf).max(-1).values
        found.append((e["logits"].gather(1, chosen[:, None])[:, 0] - rest).min().item())
    return found


fig, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
axes.plot(leads(entries), color=BLUE, linewidth=2, label="y_l made anew, as KDPO does")
axes.plot(leads(frozen), color=GREY, linewidth=2, linestyle="--", label="the first y_l kept")
axes.axhline(0, color="black", linewidth=0.8)
axes.set(xlabel="step", ylabel="lead of the new answer, logits")
axes.legend(frameon=False)
plt.show()

# %%
for name, won_it, some in (("made anew", won, entries), ("kept", frozen_won, frozen)):
    said = text(some[-1]["logits"].argmax(-1))
    print(f"y_l {name}: {'won' if won_it else 'not won'} after {len(some) - 1} steps, the model says {said}")

# %% [markdown]
# ## Other facts
#
# The same for a few more records of CounterFact. Where `y_l` is kept, an edit may take twice as many cycles as it took
# with `y_l` made anew.

# %%
rows = []
for r in records[:FACTS]:
    one = {"prompt": r.prompt, "target_new": r.target_new}
    _, anew, anew_won = watch(one)
    count = len({e["cycle"] for e in anew[:-1]})
    _, kept, kept_won = watch(one, regenerate=False, most=max(1, 2 * count))
    rows.append(
        {
            "new answer": r.target_new,
            "cycles": count,
            "different y_l": len({tuple(e["rejected"].tolist()) for e in anew[:-1]}),
            "steps, y_l made anew": len(anew) - 1 if anew_won else "not won",
            "steps, y_l kept": len(kept) - 1 if kept_won else f"not won in {len(kept) - 1}",
        }
    )
display(pd.DataFrame(rows).set_index("new answer"))
