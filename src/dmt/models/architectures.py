"""Where the feed-forward blocks are. The only module that knows the names inside a model; a family is one entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from dmt.errors import UserError


@dataclass(frozen=True)
class FeedForward:
    """A block as a memory sees it: `sum_i act(x . keys[i] + key_bias[i]) values[i] + output_bias`."""

    keys: Tensor  # (slots, width)
    key_bias: Tensor  # (slots,)
    values: Tensor  # (slots, width)
    output_bias: Tensor  # (width,)


@dataclass(frozen=True)
class Architecture:
    """One family of models.

    Args:
        layers: path of the list of transformer blocks from the language model.
        block: attribute of a transformer block that holds its feed-forward block.
        read: a feed-forward block as a `FeedForward`, sharing its tensors.
        activation: config attribute that names the block's function.
        tensors: what `read` used, names relative to the feed-forward block, so that a report can account for each.
        backbone: attribute of the language model that gives hidden states, the head left out.
        no_dropout: config values that switch every dropout off.
    """

    layers: str
    block: str
    read: Callable[[nn.Module], FeedForward]
    activation: str
    tensors: tuple[str, ...]
    backbone: str
    no_dropout: dict[str, float]

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """Feed-forward blocks of `model` in order, or the memories that stand in their places."""
        layers = model.get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList), f"{self.layers} is a list of layers"
        return [layer.get_submodule(self.block) for layer in layers]

    def replace(self, model: nn.Module, layer: int, block: nn.Module) -> None:
        """Put `block` where layer `layer` has its feed-forward block."""
        setattr(model.get_submodule(f"{self.layers}.{layer}"), self.block, block)

    def block_name(self, layer: int) -> str:
        """Full name of a layer's feed-forward block, as it begins the names of its tensors."""
        return f"{self.layers}.{layer}.{self.block}"


def _read_gpt2(block: nn.Module) -> FeedForward:
    # Conv1D holds its weight as (in, out): neuron i is column i of the first and row i of the second.
    first, second = block.get_submodule("c_fc"), block.get_submodule("c_proj")
    return FeedForward(first.weight.t(), first.bias, second.weight, second.bias)  # type: ignore[arg-type,operator]


ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture(
        layers="transformer.h",
        block="mlp",
        read=_read_gpt2,
        activation="activation_function",
        tensors=("c_fc.weight", "c_fc.bias", "c_proj.weight", "c_proj.bias"),
        backbone="transformer",
        no_dropout={"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
}


def architecture_of(model_type: str) -> Architecture:
    """The entry of a transformers `model_type`, for a teacher or for a student made from it.

    Raises:
        UserError: the family is not in the table.
    """
    family = model_type.removeprefix("dmt_")
    if family not in ARCHITECTURES:
        raise UserError(f"teacher: a model of type {model_type!r} is not supported; supported are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[family]
