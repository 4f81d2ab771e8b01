"""The contract of a memory: a layer that stands in place of a feed-forward block.

A kind of memory is a `MemoryConfig` with its settings and a `MemoryLayer` that is registered with
`register_memory`. `dmt.testing.check_memory` checks that it keeps the contract.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from dmt.config import MemoryConfig


@torch.no_grad()
def load_output_bias(bias: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Copy the output bias of a block, where it has one; return what `load_block` does."""
    if "output_bias" not in tensors:
        return {}
    bias.copy_(tensors["output_bias"])
    return {"output_bias": "output_bias"}


@dataclass(frozen=True)
class BlockShape:
    """The feed-forward block that a memory replaces.

    Attributes:
        width: size of a hidden state.
        num_neurons: neurons of the block.
        gated: whether a neuron has a second, linear score (Llama).
        activation_function: the block's function, by its transformers name.
        vocab_size: tokens of the model.
    """

    width: int
    num_neurons: int
    gated: bool
    activation_function: str
    vocab_size: int = 0


class MemoryLayer(nn.Module):
    """A layer that maps hidden states `(..., width)` to the same shape in place of a block.

    The contract, checked by `dmt.testing.check_memory`:

    - `__init__(width, config)`, where `config` is of the registered class.
    - `forward(hidden)`: the output for a token depends on the hidden state of that token, on the
      last `context_length` token ids up to it and on the memory's state alone, never on other
      tokens of the batch. So it is causal, and a cache of attention keys changes nothing in
      generation.
    - All state is in parameters and buffers, so that checkpoints and saved students hold it.
    - `reset()` sets every parameter and every non-persistent buffer to its initial value:
      transformers creates a model's layers without values.
    """

    kind: ClassVar[str] = ""  # set by `register_memory`, as is `config_class`
    config_class: ClassVar[type[MemoryConfig]] = MemoryConfig
    row_kind: ClassVar[str] = "slot"  # what a trace calls the rows of `select`

    @classmethod
    def make_arguments(cls, config: Any, block: BlockShape) -> dict[str, Any]:
        """Return what a student's config.json says of this memory, as plain JSON values.

        Args:
            config: settings of the memory, of `config_class`.
            block: the block that it replaces.
        """
        return {name: value for name, value in asdict(config).items() if name != "kind"}

    @classmethod
    def from_arguments(cls, width: int, gated: bool, arguments: Mapping[str, Any]) -> Self:
        """Create the memory from the values of `make_arguments`."""
        return cls(width, cls.config_class(**arguments))  # type: ignore[call-arg]

    def saved_arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return `arguments` as they are when the student is saved; sizes may have changed."""
        return arguments

    def reset(self) -> None:
        """Set parameters and buffers to their initial values."""
        for child in self.children():
            if isinstance(child, MemoryLayer):
                child.reset()
            elif callable(reset_parameters := getattr(child, "reset_parameters", None)):
                reset_parameters()

    @property
    def context_length(self) -> int:
        """Last token ids, its own included, that the output for a token depends on.

        `dmt.memory.token_context.get_contexts` returns them; 0 where hidden states are enough.
        """
        return 0

    @property
    def block_slots(self) -> int | None:
        """Neurons that `load_block` wants the block to have; None takes it as it is."""
        return None

    def load_block(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Begin as the block that is replaced; without this method the memory begins fresh.

        Args:
            tensors: the block's `keys` and `values` `(neurons, width)` and, where it has them,
                `gains`, `key_bias`, `gain_bias` and `output_bias`. The block computes
                `sum_i act(x . keys[i] + key_bias[i]) (x . gains[i] + gain_bias[i]) values[i]
                + output_bias`.

        Returns:
            For each tensor that was taken over, the name of the parameter that took it.
        """
        return {}

    @property
    def reads_token_outputs(self) -> bool:
        """Whether `load_token_outputs` is to be called, which takes a pass over the vocabulary."""
        return False

    def load_token_outputs(self, outputs: Tensor) -> None:
        """Begin as what the block computes for each token at the start of a text.

        Called before each `calibrate` where `reads_token_outputs`.

        Args:
            outputs: of the teacher's block `(vocab_size, width)`.
        """

    def fit_selection(self, hidden: Tensor, target: Tensor) -> None:
        """Set from text what a token reads, where no gradient will; by default nothing is set.

        Called before `calibrate`.

        Args:
            hidden: inputs `(tokens, width)` of the teacher's block, to which training brings those
                of the student.
            target: its outputs, of the same shape.
        """

    def calibrate(self, hidden: Tensor, target: Tensor) -> None:
        """Set from text what the output lacks; by default nothing is set.

        Called once or more before training, the lowest layer first.

        Args:
            hidden: inputs `(tokens, width)`, as the student computes them.
            target: outputs of the teacher's block for the same tokens, of the same shape.
        """

    @property
    def observes_text(self) -> bool:
        """Whether `observe` and `set_rows` are to be called, which takes a long text."""
        return False

    def observe(self, hidden: Tensor, target: Tensor) -> None:
        """Add tokens of a text to what `set_rows` sets rows from.

        Args:
            hidden: inputs `(tokens, width)` of the teacher's block.
            target: its outputs, of the same shape.
        """

    def set_rows(self) -> None:
        """Set rows from the tokens that were observed, and forget these.

        Called after `calibrate`, before training.
        """

    def prefetch(self, shape: torch.Size) -> None:
        """Let the system begin to read the rows of the coming pass that are on disk.

        Called before each pass, inside `use_contexts`; by default nothing is read ahead.

        Args:
            shape: that of the tokens, such as `(batch, time)`.
        """

    def select(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return the rows that a trace shows for `hidden` `(tokens, width)`.

        Returns:
            Ids and weights `(tokens, n)` and values `(tokens, n, width)`; None where the memory
            has no rows.
        """
        return None
