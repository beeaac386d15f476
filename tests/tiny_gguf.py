"""A ``.gguf`` file of a Llama with random weights, a few dozen KB, as llama.cpp writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

WIDTH, HIDDEN, BLOCKS, HEADS = 32, 64, 2, 2
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("t h", "th e", "Ġ t", "Ġ a", "i n", "e r", "o n", "Ġ s")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def byte_letters() -> list[str]:
    """The letters that byte-level vocabularies write the 256 bytes with."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 256 + 68))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


def write(file: Path, *, seed: int = 0, without: str = "") -> Path:
    """Write the file, its matrices in eight bits.

    ``without``: the name of a tensor to leave out.
    """
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    words = [*SPECIAL, *byte_letters(), *("".join(merge.split()) for merge in MERGES)]
    writer = GGUFWriter(file, "llama")
    writer.add_name("Tiny")
    for add, value in (
        (writer.add_block_count, BLOCKS),
        (writer.add_context_length, 128),
        (writer.add_embedding_length, WIDTH),
        (writer.add_feed_forward_length, HIDDEN),
        (writer.add_head_count, HEADS),
        (writer.add_head_count_kv, 1),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_freq_base, 10000.0),
        (writer.add_vocab_size, len(words)),
    ):
        add(value)  # type: ignore[operator]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(words) - len(SPECIAL)))
    writer.add_token_merges(list(MERGES))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    generator = np.random.default_rng(seed)
    for name, shape in _shapes(len(words)).items():
        if name == without:
            continue
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, dtype=np.float32))
            continue
        matrix = generator.normal(0, 0.3, shape).astype(np.float32)
        kind = GGMLQuantizationType.Q8_0
        writer.add_tensor(name, quantize(matrix, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _shapes(words: int) -> dict[str, Any]:
    shapes: dict[str, Any] = {"token_embd.weight": (words, WIDTH), "output_norm.weight": (WIDTH,)}
    for i in range(BLOCKS):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (WIDTH,),
            f"blk.{i}.attn_q.weight": (WIDTH, WIDTH),
            f"blk.{i}.attn_k.weight": (WIDTH // HEADS, WIDTH),
            f"blk.{i}.attn_v.weight": (WIDTH // HEADS, WIDTH),
            f"blk.{i}.attn_output.weight": (WIDTH, WIDTH),
            f"blk.{i}.ffn_norm.weight": (WIDTH,),
            f"blk.{i}.ffn_gate.weight": (HIDDEN, WIDTH),
            f"blk.{i}.ffn_up.weight": (HIDDEN, WIDTH),
            f"blk.{i}.ffn_down.weight": (WIDTH, HIDDEN),
        }
    return shapes
