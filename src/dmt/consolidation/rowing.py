"""Rows of an associative memory as states: where each is read, and what is said there with it and without."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dmt.memory import AssociativeMemory

STATES = 64
"""Rows in a step."""
SPREAD = 0.1
"""How far from a row's own state it is asked for, as a share of what states are apart."""


class RowStates:
    """Hidden states in which rows of one memory answer, made from their keys; no text is needed that wrote them.

    Args:
        teacher: the memory with the rows.
        student: the memory without them, whose base is to say what they say.
        ids: numbers of the rows.
        hidden: states `(n, width)` that the memory is given by prose, for how long and how far apart states are.
    """

    def __init__(self, teacher: AssociativeMemory, student: AssociativeMemory, ids: Iterable[int], hidden: Tensor) -> None:
        self.teacher, self.student = teacher, student
        places = [teacher.rows.place_of[number] for number in ids]
        with torch.no_grad():
            self.keys = teacher.rows.keys[places].float()
            self._back = torch.linalg.pinv(teacher.key.weight.float())
            self._length = float(teacher.key(hidden).norm(dim=-1).mean())
            self._apart = float((hidden - hidden.mean(0)).norm(dim=-1).mean()) / hidden.shape[1] ** 0.5
            states = self.states(self.keys)
            self._said = float((teacher(states) - student(states)).square().sum(-1).mean().clamp_min(1e-12))

    def states(self, keys: Tensor) -> Tensor:
        """Hidden states whose keys are `keys` `(n, width)`, as long as those of prose are."""
        return (keys * self._length - self.teacher.key.bias) @ self._back.t()

    def loss(self, generator: torch.Generator) -> Tensor:
        """Of what some of the rows say near to where they were written, the share (of squares) that the student does not."""
        chosen = torch.randperm(len(self.keys), generator=generator)[:STATES].to(self.keys.device)
        states = self.states(self.keys[chosen])
        noise = torch.randn(states.shape, generator=generator).to(states) * self._apart * SPREAD
        with torch.no_grad():
            wanted = self.teacher(states + noise)
        return (self.student(states + noise) - wanted).square().sum(-1).mean() / self._said

    @torch.no_grad()
    def kept(self) -> float:
        """Of what all rows say where they were written, the share (of squares) that the student says; 1 is all."""
        states = self.states(self.keys)
        lacks = (self.student(states) - self.teacher(states)).square().sum(-1).mean()
        return 1 - float(lacks) / self._said
