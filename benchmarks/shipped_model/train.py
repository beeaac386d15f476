"""Train the shipped model, a small Llama that knows the facts of ``facts.json``.

    python benchmarks/shipped_model/train.py --out DIR

It takes under ten minutes on two cores. Every sequence is a prompt, its answer and an end token; a part of them stand
behind another fact, as a question in running text does. Afterwards the recall of taught and of held-out phrasings is
measured and written to ``report.json`` beside the weights.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kdpo_editor.testbed import HERE

LOG = logging.getLogger(__name__)
END = "<|endoftext|>"
# A fact asked plainly is answered plainly: the last message, as it stands, is the prompt.
CHAT_TEMPLATE = "{{ messages[-1]['content'] }}"
HEAD = 32  # width of an attention head
FACTS = Path(__file__).with_name("facts.json")
ELSEWHERE = ("facts", "records", "out", "verbose")  # arguments that a report's settings leave out


def make_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learned from ``texts``; one token ends, pads and begins a text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tok = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END, unk_token=END)
    tok.chat_template = CHAT_TEMPLATE
    return tok


@dataclass(frozen=True)
class Row:
    """Token ids of prompt, answer and end token; where the answer begins; first and last token of each subject."""

    ids: list[int]
    answer: int
    subjects: tuple[tuple[int, int], ...]

    def behind(self, before: Row, stop: int) -> Row:
        """This sequence behind another one, whose end token gives way to ``stop``."""
        n = len(before.ids)
        moved = tuple((first + n, last + n) for first, last in self.subjects)
        return Row([*before.ids[:-1], stop, *self.ids], self.answer + n, before.subjects + moved)


def encode(tok: PreTrainedTokenizerFast, prompt: str, answer: str, subject: str = "") -> Row:
    """``prompt`` must contain ``subject``; a leading space belongs to the first token."""
    start = len(tok(prompt)["input_ids"])
    at = prompt.find(subject)
    text = tok(f"{prompt} {answer}", return_offsets_mapping=True)
    spans = enumerate(text["offset_mapping"])
    inside = [i for i, (a, b) in spans if a < at + len(subject) and b > at] or [0]
    return Row([*text["input_ids"], tok.eos_token_id], start, ((inside[0], inside[-1]),))


def batches(
    sequences: list[tuple[Row, Row]], stop: int, budget: int, prefixed: float, rng: random.Random
) -> list[list[Row]]:
    """One epoch: shuffled, grouped by length, ``budget`` tokens a batch.

    ``sequences`` hold each prompt twice: as a text's beginning and as its continuation, which begins with a space.
    A share ``prefixed`` stands behind some other fact and a full stop (``stop``).
    """
    rows = []
    for alone, continued in rng.sample(sequences, len(sequences)):
        if rng.random() < prefixed:
            rows.append(continued.behind(rng.choice(sequences)[0], stop))
        else:
            rows.append(alone)
    rows.sort(key=lambda row: len(row.ids) + rng.uniform(-2, 2))
    out: list[list[Row]] = [[]]
    for row in rows:
        if out[-1] and (len(out[-1]) + 1) * max(len(row.ids), len(out[-1][-1].ids)) > budget:
            out.append([])
        out[-1].append(row)
    rng.shuffle(out)
    return out


def loss_of(
    model: LlamaForCausalLM, rows: list[Row], prompt_weight: float, hidden: float, rng: random.Random
) -> torch.Tensor:
    """Mean next-token cross-entropy (a scalar) over the answers, plus ``prompt_weight`` times that of all other tokens.

    In a share ``hidden`` of the rows nothing after the subject sees more of it than its last token, so that what the
    model knows of a subject is gathered there, where causal tracing finds it in large models (Meng et al. 2022).
    """
    longest = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    weight = torch.zeros(len(rows), longest)
    # Right padding under a causal mask: no real token sees a pad.
    seen = torch.ones(longest, longest, dtype=torch.bool).tril().repeat(len(rows), 1, 1, 1)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        weight[i, : len(row.ids)] = prompt_weight
        weight[i, row.answer : len(row.ids)] = 1.0
        if rng.random() < hidden:
            for first, last in row.subjects:
                seen[i, :, last + 1 :, first:last] = False
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weight = weight[:, 1:].flatten()
    return (losses * weight).sum() / weight.sum()


@torch.no_grad()
def hits(
    model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, questions: Sequence[tuple[str, str]]
) -> list[list[bool]]:
    """Of each question, which tokens of the answer and its end are the argmax behind those before them."""
    rows = [encode(tok, *q) for q in questions]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    found: list[list[bool]] = [[] for _ in rows]
    for at in range(0, len(order), 64):
        chunk = order[at : at + 64]
        longest = len(rows[chunk[-1]].ids)
        ids = torch.tensor([rows[i].ids + [0] * (longest - len(rows[i].ids)) for i in chunk])
        right = model(input_ids=ids).logits[:, :-1].argmax(-1) == ids[:, 1:]
        for i, row in zip(chunk, right.tolist(), strict=True):
            found[i] = row[rows[i].answer - 1 : len(rows[i].ids) - 1]
    return found


def recall(
    model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, questions: Sequence[tuple[str, str]]
) -> dict[str, float]:
    """``teacher_forced``: share of answer tokens (end token left out) that are the argmax; ``generated``:
    share of questions whose greedy answer is right to the letter and stops."""
    found = hits(model, tok, questions)
    tokens = [hit for of in found for hit in of[:-1]]
    exact = sum(map(all, found))  # greedy decoding yields the answer exactly when every step agrees
    return {
        "teacher_forced": sum(tokens) / len(tokens),
        "generated": exact / len(questions),
        "questions": len(questions),
    }


def train(out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Train, measure and save; returns the report."""
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    settings = {k: v for k, v in vars(args).items() if k not in ELSEWHERE}
    records = json.loads(args.records.read_text("utf-8"))
    facts = json.loads(args.facts.read_text("utf-8"))
    taught = [(p, f["answer"]) for f in facts for p in f["trained"]]
    tok = make_tokenizer([f"{p} {a}" for p, a in taught], args.vocabulary)
    config = LlamaConfig(
        attn_implementation="eager",
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // HEAD,
        num_key_value_heads=args.width // HEAD,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tok.eos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.eos_token_id,
    )
    model = LlamaForCausalLM(config).train()
    LOG.info("%d parameters, %d taught prompts", model.num_parameters(), len(taught))
    sequences = [
        (encode(tok, p, f["answer"], f["subject"]), encode(tok, f" {p}", f["answer"], f["subject"]))
        for f in facts
        for p in f["trained"]
    ]
    (stop,) = tok(".")["input_ids"]
    decayed = [p for p in model.parameters() if p.ndim == 2]
    plain = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.98),
        fused=True,
    )
    started = time.time()
    plan = [b for _ in range(args.epochs) for b in batches(sequences, stop, args.tokens, args.prefixed, rng)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=len(plan), pct_start=0.1, cycle_momentum=False
    )
    bar = tqdm(plan, unit="batch", disable=None)
    for i, rows in enumerate(bar):
        loss = loss_of(model, rows, args.prompt_weight, args.hidden, rng)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if i % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
            if args.verbose and i % 200 == 0:
                LOG.info("%d of %d: loss %.4f, %.0f s", i, len(plan), loss.item(), time.time() - started)
    seconds = time.time() - started
    model = model.half().float().eval()  # what is measured is what is shipped
    own = {(r["prompt"], r["ground_truth"]) for r in records}
    own |= {(f["prompt"], f["ground_truth"]) for r in records for f in r["locality"]}
    held = {(r["rephrase_prompt"], r["ground_truth"]) for r in records}
    held_out = [(p, f["answer"]) for f in facts for p in f["held_out"]]
    report: dict[str, Any] = {
        "parameters": model.num_parameters(),
        "facts": len(facts),
        "records": len(records),
        "recall": {
            "record and locality prompts": recall(model, tok, sorted(own)),
            "all taught prompts": recall(model, tok, taught),
            "held-out phrasings": recall(model, tok, held_out),
            "of these, KnowEdit's own rephrasings": recall(model, tok, [q for q in held_out if q in held]),
        },
        "settings": settings,
        "seconds": round(seconds),
    }
    out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(out)
    tok.save_pretrained(out)
    # Newer transformers write a class name that older ones do not know, and older ones add token_type_ids.
    settings = json.loads((out / "tokenizer_config.json").read_text("utf-8"))
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    return report


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that the model is written to")
    parser.add_argument("--facts", type=Path, default=FACTS, help="other facts, in that file's form")
    parser.add_argument("--records", type=Path, default=HERE / "records.json", help="other records, likewise")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=1536, help="tokens in a batch")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--prompt-weight", type=float, default=0.1, help="weight of tokens outside the answer")
    parser.add_argument("--prefixed", type=float, default=0.3, help="share of prompts behind another fact")
    parser.add_argument("--hidden", type=float, default=0.9, help="share whose subject shows its last token only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="log the loss also where no bar is shown")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    LOG.info("%s", json.dumps(train(args.out, args), indent=1))


if __name__ == "__main__":
    main()
