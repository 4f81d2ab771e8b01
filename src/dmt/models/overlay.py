"""Facts laid over a model: hooks add what their rows say to what feed-forward blocks say; no weight changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from dmt.memory.facts import NOBODY, Answered, FactMemory, FactRows
from dmt.memory.spotting import AGAIN, Spotted, Spotter, spot
from dmt.models.architectures import architecture_of

WINDOW = 64
"""Tokens for which somebody is talked about after having been named."""
ATTRIBUTE = "facts"
"""Where a model keeps what is laid over it."""


@dataclass(frozen=True)
class Part:
    """One row of a fact: the state that asks for a token of its answer, and what makes the model say it.

    Attributes:
        row: its number.
        key, value: `(width,)`.
        reach: cosine from which on it answers.
        subject: token ids of each way the subject is written; empty where it answers whoever is talked about.
        lead: token ids of the answer said so far.
        answer: of all of it.
    """

    row: int
    key: Tensor
    value: Tensor
    reach: float
    subject: tuple[tuple[int, ...], ...] = ()
    lead: tuple[int, ...] = ()
    answer: tuple[int, ...] = ()


class _Seen(DynamicLayer):
    """Token ids read so far, as one more layer of a cache: it is cut, reordered and copied like the others."""


class Overlay(nn.Module):
    """Facts of one model: what is asked is heard in one layer, what is answered is said in the same or a higher one.

    Args:
        memory: without rows yet.
        listens: layer whose block's input is compared with keys.
        answers: layer to whose block's output values are added.
        end: token id that ends a document, or several.
        window: tokens for which a subject is talked about after having been named.
    """

    def __init__(
        self, memory: FactMemory, listens: int, answers: int, end: int | Sequence[int] | None, window: int = WINDOW
    ) -> None:
        super().__init__()
        if not 0 <= listens <= answers:
            raise ValueError(f"a fact is heard before it is answered; got layers {listens} and {answers}")
        self.memory = memory
        self.listens, self.answers, self.end, self.window = listens, answers, end, window
        self.silent = False
        """Nothing is answered while this is set."""
        self.origin: Path | None = None
        """The book that the facts come from."""
        self._spotted: Spotted | None = None
        self._found: Answered | None = None
        self._hooks: list[Any] = []
        self.hold(())

    def hold(self, parts: Sequence[Part]) -> None:
        """Have these rows and no others."""
        subjects: dict[tuple[tuple[int, ...], ...], int] = {}
        leads: dict[tuple[int, ...], int] = {}
        for part in parts:
            if part.subject:
                subjects.setdefault(part.subject, len(subjects))
            for said in (part.lead, part.answer):
                if said:
                    leads.setdefault(said, len(leads))
        ways = [(way, number) for written, number in subjects.items() for way in written]
        self._subjects, self._subject_of = Spotter([way for way, _ in ways]), torch.tensor([number for _, number in ways]).long()
        self._leads = Spotter(list(leads))
        self._reach_back = self.window + self._subjects.longest + self._leads.longest + AGAIN
        if not parts:
            self.memory.hold(FactRows.none(self.memory.width))
            return
        rows = FactRows(
            ids=torch.tensor([part.row for part in parts]),
            keys=torch.stack([part.key for part in parts]).float(),
            values=torch.stack([part.value for part in parts]).float(),
            reach=torch.tensor([part.reach for part in parts]),
            subjects=torch.tensor([subjects.get(part.subject, NOBODY) for part in parts]),
            leads=torch.tensor([leads.get(part.lead, NOBODY) for part in parts]),
            answers=torch.tensor([leads.get(part.answer, NOBODY) for part in parts]),
        )
        self.memory.hold(rows)

    def __len__(self) -> int:
        return len(self.memory.rows)

    def begin(self, tokens: Tensor | None, cache: Any) -> None:
        """Before a pass over token ids `(batch, time)` that continues what `cache` has seen: who is talked about?"""
        self._spotted = self._found = None
        if tokens is None or self.silent or not len(self):  # of embeddings without ids nobody knows whom they name
            return
        seen = _seen(cache)
        ids = None if seen is None else seen.keys
        before = tokens[:, :0] if ids is None else ids[:, 0, -self._reach_back :, 0]
        stream = torch.cat([before.to(tokens.device), tokens], dim=1)
        self._spotted = spot(stream, tokens.shape[1], self._subjects, self._subject_of, self._leads, self.window, self.end)

    def listen(self, hidden: Tensor) -> None:
        """What is asked: `hidden` `(batch, time, width)`, the input of the block that listens."""
        if self._spotted is not None:
            self._found = self.memory.find(hidden.reshape(-1, self.memory.width), self._spotted)

    def answer(self, said: Tensor) -> Tensor:
        """`said` `(batch, time, width)` and what the rows found add to it."""
        return said if self._found is None else self.memory.add(said, self._found)

    def finish(self, tokens: Tensor | None, cache: Any) -> None:
        """After the pass: what was read goes along with the cache."""
        self._spotted = self._found = None
        if tokens is None or cache is None:
            return
        seen = _seen(cache)
        if seen is None:
            seen = _Seen()
            cache.layers.append(seen)
            missing = cache.get_seq_length() - tokens.shape[1]  # of text read before facts were laid over nothing is known
            if missing > 0:
                tokens = nn.functional.pad(tokens, (missing, 0), value=-1)
        ids = tokens[:, None, :, None]
        seen.update(ids, ids)


def _seen(cache: Any) -> _Seen | None:
    return next((layer for layer in getattr(cache, "layers", ()) if isinstance(layer, _Seen)), None)


def lay_over(model: PreTrainedModel, facts: Overlay) -> None:
    """Let `facts` speak in `model` from now on, in place of what was laid over it before; `lift` ends it."""
    lift(model)
    arch = architecture_of(model.config.model_type)
    given: dict[str, Any] = {}

    def before(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        given["tokens"] = named.get("input_ids", args[0] if args else None)
        facts.begin(given["tokens"], next((each for each in (*args[1:], *named.values()) if isinstance(each, Cache)), None))

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        facts.finish(given.pop("tokens"), getattr(output, "past_key_values", None))

    backbone, blocks = model.get_submodule(arch.backbone), arch.blocks(model)
    facts._hooks = [
        backbone.register_forward_pre_hook(before, with_kwargs=True),
        backbone.register_forward_hook(after),
        blocks[facts.listens].register_forward_pre_hook(lambda _, args: facts.listen(args[0])),
        # Before any hook that records: what others see of a block is what it says with its facts.
        blocks[facts.answers].register_forward_hook(lambda _, args, said: facts.answer(said), prepend=True),
    ]
    facts.to(next(model.parameters()).device)
    setattr(model, ATTRIBUTE, facts)


def lift(model: PreTrainedModel) -> None:
    """Take away what was laid over `model`; nothing where nothing was."""
    facts = overlay_of(model)
    if facts is not None:
        for hook in facts._hooks:
            hook.remove()
        facts._hooks = []
        delattr(model, ATTRIBUTE)


def overlay_of(model: PreTrainedModel) -> Overlay | None:
    """What is laid over a model."""
    found = getattr(model, ATTRIBUTE, None)
    return found if isinstance(found, Overlay) else None


@contextmanager
def silence(model: PreTrainedModel) -> Iterator[None]:
    """The model as it is without its facts."""
    overlay = overlay_of(model)
    if overlay is None:
        yield
        return
    before, overlay.silent = overlay.silent, True
    try:
        yield
    finally:
        overlay.silent = before


@contextmanager
def answers_of(model: PreTrainedModel) -> Iterator[list[Answered]]:
    """What facts answer in each pass from here on; nothing is noted of a model without any."""
    overlay = overlay_of(model)
    noted: list[Answered] = []
    if overlay is None:
        yield noted
        return
    before, overlay.memory.asked = overlay.memory.asked, noted
    try:
        yield noted
    finally:
        overlay.memory.asked = before
