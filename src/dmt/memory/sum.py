"""Memories that add up, such as slots and a lookup beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from dmt.config import SumConfig, name_part
from dmt.memory.base import BlockShape, MemoryLayer
from dmt.memory.registry import get_memory_class, register_memory


@register_memory("sum", config=SumConfig)
class SumMemory(MemoryLayer):
    """A layer whose output is the sum of those of its parts.

    The first part that can begins as the block that is replaced. Calibration goes through the
    parts in order; each is set to what those before it lack.

    Args:
        parts: the memories.
        block_part: index of the part that begins as the block; None where none does.
    """

    def __init__(self, parts: Sequence[MemoryLayer], block_part: int | None = None) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.block_part = block_part

    @classmethod
    def make_arguments(cls, config: SumConfig, block: BlockShape) -> dict[str, Any]:
        """Return the kind and the arguments of each part.

        Raises:
            ArgumentError: a part does not fit the block.
        """
        copying = [index for index, part in enumerate(config.parts) if part.copies_block]
        parts = []
        for index, part in enumerate(config.parts):
            with name_part(index):
                arguments = get_memory_class(part.kind).make_arguments(part, block)
            parts.append({"kind": part.kind, **arguments})
        return {"parts": parts, "block_part": copying[0] if copying else None}

    @classmethod
    def from_arguments(cls, width: int, gated: bool, arguments: Mapping[str, Any]) -> Self:
        """Create the memory from the values of `make_arguments`."""
        parts = [
            get_memory_class(part["kind"]).from_arguments(
                width, gated, {name: part[name] for name in part if name != "kind"}
            )
            for part in arguments["parts"]
        ]
        return cls(parts, arguments["block_part"])

    def saved_arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return `arguments` as they are when the student is saved; sizes may have changed."""
        saved = [
            part.saved_arguments(part_arguments)
            for part, part_arguments in zip(self.list_parts(), arguments["parts"], strict=True)
        ]
        return {**arguments, "parts": saved}

    def list_parts(self) -> list[MemoryLayer]:
        """Return the memories that add up."""
        return list(self.parts)  # type: ignore[arg-type]

    @property
    def context_length(self) -> int:
        """The most token ids that a part reads."""
        return max(part.context_length for part in self.list_parts())

    @property
    def block_slots(self) -> int | None:
        """Neurons that the part which begins as the block wants it to have."""
        return None if self.block_part is None else self.list_parts()[self.block_part].block_slots

    def reset(self) -> None:
        """Reset the parts."""
        for part in self.list_parts():
            part.reset()

    def load_block(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Begin as the block, in one part."""
        if self.block_part is None:
            return {}
        names = self.list_parts()[self.block_part].load_block(tensors)
        return {tensor: f"parts.{self.block_part}.{name}" for tensor, name in names.items()}

    @property
    def reads_token_outputs(self) -> bool:
        """Whether the first part does; those after it are set to what is lacking."""
        return self.list_parts()[0].reads_token_outputs

    def load_token_outputs(self, outputs: Tensor) -> None:
        """Set the first part from what the block computes for each token."""
        self.list_parts()[0].load_token_outputs(outputs)

    def fit_selection(self, hidden: Tensor, target: Tensor) -> None:
        """Set what tokens read of each part."""
        for part in self.list_parts():
            part.fit_selection(hidden, target)

    @torch.no_grad()
    def calibrate(self, hidden: Tensor, target: Tensor) -> None:
        """Set each part from what those before it lack."""
        for part, lacking in self._walk_parts(hidden, target):
            part.calibrate(hidden, lacking)

    def _walk_parts(self, hidden: Tensor, target: Tensor) -> Iterator[tuple[MemoryLayer, Tensor]]:
        """Yield each part and what those before it lack, as they are when it is reached."""
        for part in self.list_parts():
            yield part, target
            target = target - part(hidden)

    @property
    def observes_text(self) -> bool:
        """Whether a part does."""
        return any(part.observes_text for part in self.list_parts())

    @torch.no_grad()
    def observe(self, hidden: Tensor, target: Tensor) -> None:
        """Add tokens to what each part sets its rows from: what those before it lack."""
        for part, lacking in self._walk_parts(hidden, target):
            if part.observes_text:
                part.observe(hidden, lacking)

    def set_rows(self) -> None:
        """Set the rows of the parts that have observed a text."""
        for part in self.list_parts():
            part.set_rows()

    def prefetch(self, shape: torch.Size) -> None:
        """Read ahead for the parts."""
        for part in self.list_parts():
            part.prefetch(shape)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `(..., width)` to the same shape."""
        first, *others = self.list_parts()
        output: Tensor = first(hidden)
        for part in others:
            output = output + part(hidden)
        return output
