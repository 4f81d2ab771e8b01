"""A model's linear maps by the faster of torch's libraries, `memory.products`, with nothing else changed."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dmt.memory.products import QuickLinear, linear

Model = TypeVar("Model", bound=nn.Module)


class QuickConv1D(Conv1D):
    """GPT-2's way of writing a linear map, by `linear`."""

    def forward(self, hidden: Tensor) -> Tensor:
        """`(..., inputs)` to `(..., outputs)`."""
        return linear(hidden, self.weight.t(), self.bias)


def quicken(model: Model) -> Model:
    """Let every linear map in `model` take `linear`; same parameters, same names, same object."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = QuickLinear
        elif type(module) is Conv1D:
            module.__class__ = QuickConv1D
    return model
