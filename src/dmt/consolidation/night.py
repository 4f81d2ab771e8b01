"""One night: slots learn to say what rows say, while prose and what earlier nights have learnt stay what they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dmt.consolidation.dreaming import Telling, parted
from dmt.consolidation.moving import Moves
from dmt.consolidation.rowing import RowStates
from dmt.distill.losses import kl
from dmt.distill.signals import observe
from dmt.errors import UserError
from dmt.facts.states import padded
from dmt.memory import FeaturalMemory

TOLD = 64
"""Tellings in a step of what is new, and half as many of what earlier nights have learnt."""
WINDOWS = 6
"""Windows of prose in a step."""
KEEP = 58.0
"""What a nat of prose counts beside one of what is told."""
BOTH = 1 / 3
"""What a nat of what is new counts, and one of what is known, where there is both; prose pays for them together."""
NOTICED = 64
"""Windows of prose by which it is measured what prose would notice."""
ENOUGH = 0.1
"""Nats a position of what is new may lack: it is not pushed further, which would cost prose more than it gives."""
FLOOR = 0.05
"""Nats added to what a telling lacks, for what lacks nothing to be told now and then too."""
MOMENTUM, CLIP, WARM = 0.9, 1.0, 10


@dataclass(frozen=True)
class Matter:
    """What a night is about.

    Attributes:
        new: tellings of what is to be learnt.
        known: tellings of what earlier nights have learnt.
        prose: windows of training text, token ids `(windows, time)`.
        rows: states in which rows of associative memories answer, by layer.
    """

    new: Sequence[Telling]
    known: Sequence[Telling]
    prose: Tensor
    rows: dict[int, RowStates]


class _Told:
    """Tellings, what the teacher says of them, and how far from it the student was when it was last asked."""

    def __init__(self, teacher: PreTrainedModel, tellings: Sequence[Telling], lacking: float, enough: float) -> None:
        self.enough = enough
        self.tellings, self.weights = tellings, [each.weights() for each in tellings]
        self.lacks = torch.full((len(tellings),), lacking)
        self._said: list[Tensor] = [torch.empty(0)] * len(tellings)
        for group, tokens in parted(tellings):
            with torch.no_grad():
                hidden = observe(teacher, tokens.to(_device(teacher))).hidden
            for row, i in enumerate(group):
                self._said[i] = hidden[row, : len(tellings[i].ids)].clone()

    def loss(self, student: PreTrainedModel, count: int, generator: torch.Generator) -> Tensor:
        """KL of some of them per position that counts, those most often that lack most."""
        chosen = torch.multinomial(self.lacks + FLOOR, min(count, len(self.tellings)), generator=generator).tolist()
        device = _device(student)
        tokens = padded([self.tellings[i].ids for i in chosen]).to(device)
        weights = torch.nn.utils.rnn.pad_sequence([self.weights[i] for i in chosen], batch_first=True).to(device)
        counts = weights > 0
        head = student.get_output_embeddings()
        mine = head(observe(student, tokens).hidden[counts])
        each = kl(mine, head(torch.cat([self._said[i] for i in chosen]))) * weights[counts]
        lacks = torch.zeros_like(weights).masked_scatter(counts, each.detach()).sum(1) / weights.sum(1)
        self.lacks[chosen] = lacks.cpu()
        return (each - self.enough * weights[counts]).clamp_min(0).sum() / weights.sum()


def learn(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    memories: dict[int, FeaturalMemory],
    matter: Matter,
    steps: int,
    lr: float,
    seed: int,
    heard: Callable[[int, dict[str, float]], None] = lambda step, found: None,
) -> None:
    """Change the slots of `memories` until `student` says what `teacher` says.

    Args:
        teacher: has the rows, speaks; in eval mode like `student`, which does not have them.
        lr: length of the longest step, see `Moves`.
        heard: is told what the loss was at each step, in its parts.

    Raises:
        UserError: a loss or a gradient is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    new, known = _Told(teacher, matter.new, 5.0, ENOUGH), _Told(teacher, matter.known, 0.0, 0.0)
    prose = [observe_hidden(teacher, part) for part in matter.prose.split(8)]
    wanted = torch.cat(prose)
    moves = Moves(student, memories, _noticed(matter))
    for part in moves.learnt:
        part.requires_grad_(True)
    optimizer = torch.optim.SGD(moves.steps, lr=lr, momentum=MOMENTUM)
    head, told = student.get_output_embeddings(), BOTH if matter.new and matter.known else 1.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / WARM) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)
        found: dict[str, float] = {}
        for name, loss, weight in (
            *((("new", new.loss(student, TOLD, generator), told),) if matter.new else ()),
            *((("known", known.loss(student, TOLD // 2, generator), told),) if matter.known else ()),
            *((f"rows_{layer}", rows.loss(generator), 1.0) for layer, rows in matter.rows.items()),
        ):
            (weight * loss).backward()
            found[name] = float(loss.detach())
        chosen = torch.randperm(len(matter.prose), generator=generator)[:WINDOWS]
        mine = observe(student, matter.prose[chosen].to(_device(student))).hidden
        apart = kl(head(mine), head(wanted[chosen])).mean()
        (KEEP * apart).backward()
        moves.take_gradients()
        norm = torch.nn.utils.clip_grad_norm_(moves.steps, CLIP)
        if not math.isfinite(float(apart.detach() + norm) + sum(found.values())):
            bad = next((name for name, loss in {**found, "prose": float(apart.detach())}.items() if not math.isfinite(loss)), None)
            what = "the gradient" if bad is None else f"the loss of {bad}"
            raise UserError(
                f"step {step + 1} of the night: {what} is not finite; nothing was kept; sleep with a lower --lr than {lr:g}"
            )
        optimizer.step()
        moves.move()
        heard(step, found | {"prose": float(apart.detach())})
    student.requires_grad_(False)


@torch.no_grad()
def observe_hidden(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Last hidden states `(windows, time, width)`."""
    return observe(model, tokens.to(_device(model))).hidden


def _noticed(matter: Matter) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Prose, which should notice nothing. What earlier nights have learnt is no part of it: of facts so much more is at stake
    that beside them prose would be free (EXPERIMENTS.md); they are told again instead."""
    parts = matter.prose[:NOTICED].split(8)
    for tokens in parts:
        yield tokens, torch.ones_like(tokens, dtype=torch.bool), 1 / len(parts)


def _device(model: PreTrainedModel) -> torch.device:
    return next(model.parameters()).device
