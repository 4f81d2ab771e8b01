"""Where the feed-forward blocks are. The only module that knows the names inside a model; a family is one entry."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from dmt.errors import UserError


@dataclass(frozen=True)
class Architecture:
    """One family of models.

    Args:
        layers: path of the list of transformer blocks from the language model.
        block: attribute of a transformer block that holds its feed-forward block.
        tensors: where a memory's `keys`, `values` `(slots, width)` and, where the block has them, `gains`, `key_bias`,
            `gain_bias`, `output_bias` are found: names within the block. A block is then
            `sum_i act(x . keys[i] + key_bias[i]) (x . gains[i] + gain_bias[i]) values[i] + output_bias`.
        transposed: those of them that are stored as `(width, slots)`.
        activation: config attribute that names the block's function.
        backbone: attribute of the language model that gives hidden states, the head left out.
        norm: path of the norm between the last transformer block and the head.
        no_dropout: config values that switch every dropout off.
        positions: path of the table of positions, of which each token reads a row; empty where there is none.
    """

    layers: str
    block: str
    tensor_names: dict[str, str]
    transposed: tuple[str, ...]
    activation: str
    backbone: str
    final_norm: str
    no_dropout: dict[str, float]
    position_embedding: str = ""

    @property
    def gated(self) -> bool:
        """Whether a neuron is the product of an activation and a second, linear score."""
        return "gains" in self.tensor_names

    def read_tensors(self, block: nn.Module) -> dict[str, Tensor]:
        """A feed-forward block's tensors under the names of a memory's parameters, sharing storage."""
        state = block.state_dict(keep_vars=True)
        tensors = {
            parameter: state[name] for parameter, name in self.tensor_names.items() if name in state
        }
        return {
            parameter: tensor.t() if parameter in self.transposed else tensor
            for parameter, tensor in tensors.items()
        }

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """Feed-forward blocks of `model` in order, or the memories that stand in their places."""
        return [layer.get_submodule(self.block) for layer in self.transformer_blocks(model)]

    def transformer_blocks(self, model: nn.Module) -> nn.ModuleList:
        """Transformer blocks of `model` in order: attention, feed-forward block and what is around them."""
        layers = model.get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList), f"{self.layers} is a list of layers"
        return layers

    def replace_block(self, model: nn.Module, layer: int, block: nn.Module) -> None:
        """Put `block` where layer `layer` has its feed-forward block."""
        setattr(model.get_submodule(f"{self.layers}.{layer}"), self.block, block)

    def block_name(self, layer: int) -> str:
        """Full name of a layer's feed-forward block, as it begins the names of its tensors."""
        return f"{self.layers}.{layer}.{self.block}"


ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture(
        layers="transformer.h",
        block="mlp",
        # Conv1D holds its weight as (in, out): neuron i is column i of the first and row i of the second.
        tensor_names={
            "keys": "c_fc.weight",
            "key_bias": "c_fc.bias",
            "values": "c_proj.weight",
            "output_bias": "c_proj.bias",
        },
        transposed=("keys",),
        activation="activation_function",
        backbone="transformer",
        final_norm="transformer.ln_f",
        no_dropout={"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        position_embedding="transformer.wpe",
    ),
    "llama": Architecture(
        layers="model.layers",
        block="mlp",
        tensor_names={
            "keys": "gate_proj.weight",
            "gains": "up_proj.weight",
            "values": "down_proj.weight",
            "key_bias": "gate_proj.bias",
            "gain_bias": "up_proj.bias",
            "output_bias": "down_proj.bias",
        },
        transposed=("values",),
        activation="hidden_act",
        backbone="model",
        final_norm="model.norm",
        no_dropout={"attention_dropout": 0.0},
    ),
}


def get_architecture(model_type: str) -> Architecture:
    """The entry of a transformers `model_type`, for a teacher or for a student made from it.

    Raises:
        UserError: the family is not in the table.
    """
    family = model_type.removeprefix("dmt_")
    if family not in ARCHITECTURES:
        raise UserError(
            f"teacher: a model of type {model_type!r} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[family]
