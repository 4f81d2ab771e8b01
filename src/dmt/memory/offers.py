"""What a pass through an associative memory leaves behind: what it would like to write, what its reads came to."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dmt.memory.together import gathered, summed


@dataclass
class Offer:
    """What one forward pass would like to write."""

    hidden: Tensor
    keys: Tensor
    values: Tensor | None  # where they are taught: not yet
    base: Tensor | None
    tag: str

    def only(self, where: Tensor) -> Offer:
        """Of the tokens in a mask `(tokens,)`."""
        values, base = (None if part is None else part[where] for part in (self.values, self.base))
        return Offer(self.hidden[where], self.keys[where], values, base, self.tag)


@dataclass
class Heard:
    """What reads came to, of all tokens since it was asked for."""

    tokens: int = 0
    of_base: float = 0.0  # weight that was the base's, summed over tokens
    nearest: list[Tensor] = field(default_factory=list)  # distance of each token's nearest row

    def of_all(self, device: torch.device) -> Heard:
        """What this and those of all other processes that train together add up to; all have to ask."""
        tokens, of_base = summed(torch.tensor([self.tokens, self.of_base], dtype=torch.double)).tolist()
        nearest = gathered(torch.cat([torch.zeros(0, device=device), *(part.float() for part in self.nearest)]))
        return Heard(int(tokens), of_base, [nearest] if len(nearest) else [])

    @property
    def share(self) -> float:
        """Of the base in what was said, from 0 to 1."""
        return self.of_base / self.tokens if self.tokens else 1.0
