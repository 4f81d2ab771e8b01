"""Where the feed-forward blocks of a model are.

The only module that knows names inside a model. A family of models is one entry in
`ARCHITECTURES`, or one call of `dmt.register_architecture`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dmt.errors import UserError

# Other names of transformers for functions that memories have.
ACTIVATION_ALIASES = {
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_accurate": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_python_tanh": "gelu_pytorch_tanh",
}


@dataclass(frozen=True)
class Architecture:
    """One family of models.

    Args:
        classes: names of the config, the backbone and the language model in transformers.
        layers: path of the list of transformer blocks from the language model.
        block: attribute of a transformer block that holds its feed-forward block.
        tensor_names: names within the block of a memory's `keys`, `values` `(num_slots, width)`
            and, where the block has them, `gains`, `key_bias`, `gain_bias`, `output_bias`. The
            block computes `sum_i act(x . keys[i] + key_bias[i]) (x . gains[i] + gain_bias[i])
            values[i] + output_bias`.
        transposed: those of them that are stored as `(width, num_slots)`.
        activation: config attribute that names the block's function.
        backbone: attribute of the language model that computes hidden states, without the head.
        final_norm: path of the norm between the last transformer block and the head.
        no_dropout: config values that switch every dropout off.
        position_embedding: path of the table of positions, of which each token reads a row; empty
            where there is none.
    """

    classes: tuple[str, str, str]
    layers: str
    block: str
    tensor_names: dict[str, str]
    transposed: tuple[str, ...]
    activation: str
    backbone: str
    final_norm: str
    no_dropout: dict[str, float]
    position_embedding: str = ""

    def read_activation(self, config: Any) -> str:
        """Return the name of the blocks' function in a model's config; one name for each."""
        name = getattr(config, self.activation)
        return ACTIVATION_ALIASES.get(name, name)

    @property
    def gated(self) -> bool:
        """Whether a neuron is the product of an activation and a second, linear score."""
        return "gains" in self.tensor_names

    def read_tensors(self, block: nn.Module) -> dict[str, Tensor]:
        """Return a block's tensors under the names of a memory's parameters, sharing storage."""
        state = block.state_dict(keep_vars=True)
        tensors = {
            parameter: state[name] for parameter, name in self.tensor_names.items() if name in state
        }
        return {
            parameter: tensor.t() if parameter in self.transposed else tensor
            for parameter, tensor in tensors.items()
        }

    def local_name(self, model: nn.Module, name: str) -> str:
        """Return a name that begins at the language model as one that begins at `model`.

        Args:
            model: a language model, its backbone alone, or a backbone with another head.
            name: of a module or tensor of the backbone.
        """
        return self._backbone_prefix(model) + name.removeprefix(f"{self.backbone}.")

    def global_name(self, model: nn.Module, name: str) -> str:
        """Return a name that begins at `model` as one that begins at the language model."""
        return f"{self.backbone}.{name.removeprefix(self._backbone_prefix(model))}"

    def _backbone_prefix(self, model: nn.Module) -> str:
        return f"{self.backbone}." if hasattr(model, self.backbone) else ""

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """Return the feed-forward blocks of `model` in order, or the memories that replace them."""
        return [layer.get_submodule(self.block) for layer in self.transformer_blocks(model)]

    def transformer_blocks(self, model: nn.Module) -> nn.ModuleList:
        """Return the transformer blocks of `model` in order."""
        layers = model.get_submodule(self.local_name(model, self.layers))
        assert isinstance(layers, nn.ModuleList), f"{self.layers} is a list of layers"
        return layers

    def replace_block(self, model: nn.Module, layer: int, block: nn.Module) -> None:
        """Replace the feed-forward block of a layer."""
        setattr(self.transformer_blocks(model)[layer], self.block, block)

    def block_name(self, layer: int) -> str:
        """Return the full name of a layer's block, with which the names of its tensors begin."""
        return f"{self.layers}.{layer}.{self.block}"


ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture(
        classes=("GPT2Config", "GPT2Model", "GPT2LMHeadModel"),
        layers="transformer.h",
        block="mlp",
        # Conv1D stores its weight as (in, out): neuron i is column i of c_fc and row i of c_proj.
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
        classes=("LlamaConfig", "LlamaModel", "LlamaForCausalLM"),
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
    """Return the entry of a transformers `model_type`, of a teacher or a student made from it.

    Raises:
        UserError: the family is not supported.
    """
    family = model_type.removeprefix("dmt_")
    if family not in ARCHITECTURES:
        raise UserError(
            f"teacher: a model of type {model_type!r} is not supported; supported are "
            f"{', '.join(ARCHITECTURES)}, others with dmt.register_architecture"
        )
    return ARCHITECTURES[family]
