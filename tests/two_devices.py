"""A model spread over two devices, on a machine that has one: nothing is computed, but where each tensor lies is kept.

    python tests/two_devices.py ARCHITECTURE ...

Each model's blocks are divided between ``privateuseone:0`` and ``privateuseone:1`` as ``device_map="auto"`` divides
them, with accelerate's hooks, and one edit's capture, replay, losses and step are made. Torch's fake tensors refuse to
bring tensors of two devices together, as a GPU does. Prints a line of JSON: for each architecture ``null`` or what went
wrong.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from test_cached_forward import ARCHITECTURES
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from kdpo_editor import KDPOHyperParams
from kdpo_editor.engine.batches import Batch, PreferenceBatch
from kdpo_editor.engine.cached_forward import CachedForward
from kdpo_editor.engine.optimizers import Stepper
from kdpo_editor.hparams import OBJECTIVES

FIRST, SECOND = "privateuseone:0", "privateuseone:1"


def spread(name: str) -> Any:
    """The first half of the blocks and the embeddings on one device, the rest on the other; a tied head goes with the
    embeddings."""
    family, blocks_name, _, settings, _ = ARCHITECTURES[name]
    config = getattr(transformers, f"{family}Config")(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embeddings.weight
    blocks = model.get_submodule(blocks_name)
    half = len(blocks) // 2
    places = {block: FIRST if i < half else SECOND for i, block in enumerate(blocks)}
    for child in model.get_submodule(blocks_name.rpartition(".")[0]).children():
        if child is not blocks:
            places[child] = SECOND if "norm" in type(child).__name__.lower() else FIRST
    places |= {head: FIRST if tied else SECOND}
    moved: dict[nn.Parameter, nn.Parameter] = {}
    for module, device in places.items():
        for part in module.modules():
            for key, p in part._parameters.items():
                if p is not None:
                    part._parameters[key] = moved.setdefault(p, nn.Parameter(torch.empty(p.shape, device=device)))
            for key, b in part._buffers.items():
                if b is not None:
                    part._buffers[key] = torch.empty(b.shape, dtype=b.dtype, device=device)
        add_hook_to_module(module, AlignDevicesHook(execution_device=device))
    add_hook_to_module(model, AlignDevicesHook(execution_device=FIRST, io_same_device=True))
    return model


@torch.no_grad()
def check(model: Any, name: str, layer: int, inside: bool) -> None:
    _, blocks, matrix, _, _ = ARCHITECTURES[name]
    forward = CachedForward(model, blocks, layer, f"{blocks}.{layer}.{matrix}")
    last = forward.blocks[-1]
    ids = torch.zeros(3, 12, dtype=torch.int64, device=FIRST)
    chosen, mask = ids[:, :2], ids[:, :2] == 0
    cache, hidden = forward.run(ids, chosen, inside)
    real = torch.arange(6, device=FIRST)
    batch = Batch(forward, [0, 1, 2], cache, chosen, mask, 0.0, hidden, hidden, real, chosen, ids[:, 0])
    batch.refresh()
    assert next(last.parameters()).device == torch.device(SECOND)
    assert forward.head_rows(chosen.unsqueeze(-1)) is not None, "the head is not divided"
    cache = cache.rows(ids[0, :3])
    hidden = forward.from_cache(cache)
    settings = {"model_name": name, "layers": [layer], "rewrite_module_tmp": "{}", "margin": 1.0}
    for objective in OBJECTIVES:
        if objective != "dpo":
            # Hidden states that need a gradient are taken as they are, and not computed again for each objective.
            rows = PreferenceBatch(replace(batch, cache=cache, hidden=hidden.detach().requires_grad_()))
            losses = rows.losses(KDPOHyperParams(**settings, objective=objective))
            assert losses.device == torch.device(FIRST)
    weight = forward.module.weight
    polyak = Stepper([weight], KDPOHyperParams(**settings, optimizer="polyak")).optimizer
    weight.grad = torch.zeros_like(weight)
    polyak.step(losses.sum)


def main() -> None:
    _setup_privateuseone_for_python_backend()
    found: dict[str, str | None] = {}
    for name in sys.argv[1:]:
        layer = None
        try:
            with FakeTensorMode():
                model = spread(name)
                for layer in (1, 2):  # the last block of the first device, the first of the second
                    for inside in {ARCHITECTURES[name][4], False}:
                        check(model, name, layer, inside)
            found[name] = None
        except Exception as error:
            found[name] = f"layer {layer}: {type(error).__name__}: {str(error)[:600]}"
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
