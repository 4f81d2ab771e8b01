"""What a pass through an associative memory leaves behind: what it would like to write, what its reads came to."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


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

    @property
    def share(self) -> float:
        """Of the base in what was said, from 0 to 1."""
        return self.of_base / self.tokens if self.tokens else 1.0
