"""WISE, which upstream alone has."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D


def mend_wise() -> None:
    """Let WISE's side memory add the bias of the matrix that it stands beside, and go by its kind, not its name."""
    adapter: Any = importlib.import_module("easyeditor.models.wise.WISE").WISEAdapter

    def new_weight_forward(self: Any, input: Tensor) -> Tensor:
        weight = self.new_weight.T if isinstance(self.layer, Conv1D) else self.new_weight
        return F.linear(input, weight, self.layer.bias)

    adapter.new_weight_forward = new_weight_forward
