"""The book of a model: facts that were written into it, and that can be taken out again. No weight ever changes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from dmt.errors import UserError
from dmt.facts.beginning import measured
from dmt.facts.calibration import Calibration
from dmt.facts.lines import RATE, Entry, Line, Outcome, lines_of, plain, rivals, same_thing
from dmt.facts.sentences import Fact
from dmt.models.books import overlay_in, parts_in, parts_of
from dmt.models.overlay import Overlay, Part, lay_over, lift, overlay_of, silence
from dmt.records import Told
from dmt.store import Store
from dmt.store.ledger import Ledger

AT_ONCE = 256
"""Facts written in one transaction."""
TENSORS = ("mean", "metric", "elsewhere", "otherwise", "apart")
"""Of a calibration, as a store keeps them."""


class Book:
    """Facts of one model in one store, and the model as it speaks with them.

    Args:
        model: facts are laid over it; in eval mode.
        tokenizer: its own.
        store: of this model; closed by `close`. Without one only guests can be there.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, store: Store | None) -> None:
        self.model, self.tokenizer, self.store = model.eval(), tokenizer, store
        self.known: dict[int, Told] = {}
        self.guests: dict[str, list[tuple[Told, list[Part]]]] = {}
        """Facts that are there for now, by where they came from: `packs.load`."""
        self._parts: dict[int, list[Part]] = {}
        self._calibration: Calibration | None = None
        lift(model)  # what it was loaded with is in the store too, if the store is its own
        overlay = None if store is None else overlay_in(store, model.config.eos_token_id)
        if overlay is not None:
            self._lay_over(overlay)
            self.known = {fact.id: fact for fact in self.ledger.read()}
            self._parts = parts_in(self.ledger, list(self.known.values()))
            self._hold()

    def close(self) -> None:
        """Let others write. The model goes on speaking with its facts."""
        if self.store is not None:
            self.store.close()

    def __enter__(self) -> Book:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def overlay(self) -> Overlay:
        """What is laid over the model.

        Raises:
            UserError: it has never had a fact.
        """
        found = overlay_of(self.model)
        if found is None:
            raise UserError("no facts were ever written here; dmt memory write begins")
        return found

    @property
    def ledger(self) -> Ledger:
        """Where facts are written down.

        Raises:
            UserError: nowhere, so far.
        """
        if self.store is None:
            raise UserError("no facts were ever written here; dmt memory write begins")
        return Ledger(self.store)

    @property
    def calibration(self) -> Calibration:
        """In which facts are compared."""
        if self._calibration is None:
            known = self.ledger.calibration()
            self._calibration = Calibration(**{name: torch.from_numpy(known[name]) for name in TENSORS})  # type: ignore[arg-type]
        return self._calibration

    def begin(
        self,
        facts: Sequence[Fact],
        prose: Sequence[str] | None = None,
        told: Callable[[str], None] = lambda _: None,
        layers: tuple[int, int] | None = None,
        answers: int | None = None,
    ) -> None:
        """Calibrate, once, before the first fact; nothing where that has been done.

        Args:
            facts: the first to be written; a few are tried in several layers.
            prose: held-out text; built-in speeches where it is None.
            told: is given lines about what is going on.
            layers: where facts are heard and answered; measured where it is None.
            answers: where they are answered; the other is measured.
        """
        if self.ledger.exists:
            return
        with silence(self.model):
            listens, answers, chosen = measured(self.model, self.tokenizer, facts, prose, told, layers, answers)
        tensors = {name: getattr(chosen, name).cpu().numpy() for name in TENSORS}
        self.ledger.begin(len(chosen.mean), {"listens": listens, "answers": answers}, tensors)
        self._lay_over(overlay_in(self.ledger.store, self.model.config.eos_token_id))

    def write(self, facts: Sequence[Fact], rate: float = RATE, progress: Callable[[int], None] = lambda _: None) -> list[Outcome]:
        """Write facts; each is noticed where it is known, and wins where it contradicts an earlier one.

        Args:
            rate: as in `Calibration.reach`.
            progress: is told how many more facts are done.

        Raises:
            UserError: a fact is too long for the model, or its subject is not in its prompt; none of its `AT_ONCE` is written.
        """
        if not facts:
            return []
        self.begin(facts)
        outcomes: list[Outcome] = []
        for start in range(0, len(facts), AT_ONCE):
            try:
                outcomes += self._write(facts[start : start + AT_ONCE], rate)
            finally:
                self._hold()  # what was written before something failed, too
            progress(len(facts[start : start + AT_ONCE]))
        return outcomes

    def _write(self, facts: Sequence[Fact], rate: float) -> list[Outcome]:
        layers = self.overlay.listens, self.overlay.answers
        with silence(self.model):
            return self._take(lines_of(self.model, self.tokenizer, facts, layers, self.calibration, rate))

    def take(self, lines: Sequence[Line], wins: bool = True) -> list[Outcome]:
        """Write facts whose rows were made elsewhere, all or none; unless one `wins` it gives way to what is there."""
        outcomes = self._take(lines, wins)
        self._hold()
        return outcomes

    def _take(self, lines: Sequence[Line], wins: bool = True) -> list[Outcome]:
        entries = self._entries()
        outcomes: dict[int, Outcome] = {}
        pending: list[Entry] = []
        for number, line in enumerate(lines):
            there = entries.setdefault(line.told.subject, [])
            same = same_thing(there, line)
            if same in pending:  # two facts of one batch about the same thing, one after the other
                self._commit(pending, lines, outcomes)
                pending = []
            if same is not None and (not wins or plain(same.answer) == plain(line.told.answer)):
                outcomes[number] = Outcome("known", same.told, None, line.before, line.likely)  # type: ignore[arg-type]
                continue
            if same is not None:
                there.remove(same)
            old = None if same is None else same.told
            there.append(Entry(line.told.prompt, line.told.answer, line.asks, None, number, old))
            pending.append(there[-1])
        self._commit(pending, lines, outcomes)
        return [outcomes[number] for number in range(len(lines))]

    def _commit(self, pending: Sequence[Entry], lines: Sequence[Line], outcomes: dict[int, Outcome]) -> None:
        """Write what is pending, in one transaction."""
        new = [lines[entry.number] for entry in pending]
        replaces = {entry.old.id: at for at, entry in enumerate(pending) if entry.old is not None}
        written = self.ledger.add([(line.told, line.keys.numpy(), line.values.numpy()) for line in new], replaces)
        for entry, told, line in zip(pending, written, new, strict=True):
            entry.told = told
            self.known[told.id] = told
            self._parts[told.id] = parts_of(told, list(zip(line.keys, line.values, strict=True)))
            if entry.old is not None:
                self._drop([entry.old.id])
            what = "written" if entry.old is None else "replaced"
            outcomes[entry.number] = Outcome(what, told, entry.old, line.before, line.likely)

    def add(self, facts: Sequence[tuple[Told, list[Part]]]) -> list[Outcome]:
        """Take in facts that have rows already, such as a pack's; like `write` otherwise."""
        entries, replaces = self._entries(), dict[int, int]()
        outcomes: list[Outcome] = []
        new: list[tuple[Told, Any, Any]] = []
        asks: Any = self.calibration.compared(torch.stack([parts[0].key for _, parts in facts])) if facts else []
        for (told, parts), state in zip(facts, asks, strict=True):
            keys, values = (torch.stack([getattr(part, name) for part in parts]) for name in ("key", "value"))
            same = same_thing(entries.get(told.subject, []), Line(told, keys, values, state, 0, 0))
            if same is not None and plain(same.answer) == plain(told.answer):
                outcomes.append(Outcome("known", same.told))  # type: ignore[arg-type]
                continue
            if same is not None and same.told is not None and same.told.id not in replaces:
                replaces[same.told.id] = len(new)
            outcomes.append(Outcome("written" if same is None else "replaced", told, None if same is None else same.told))
            new.append((told, keys.numpy(), values.numpy()))
        written = iter(self.ledger.add(new, replaces))
        outcomes = [each if each.what == "known" else replace(each, fact=next(written)) for each in outcomes]
        self._drop(replaces)
        fresh = [each.fact for each in outcomes if each.what != "known"]
        self.known |= {fact.id: fact for fact in fresh}
        self._parts |= parts_in(self.ledger, fresh)
        self._hold()
        return outcomes

    def parts(self, number: int) -> list[Part]:
        """Rows of a fact that is there, a guest's included."""
        guests = {fact.id: parts for facts in self.guests.values() for fact, parts in facts}
        return self._parts[number] if number in self._parts else guests[number]

    def _entries(self) -> dict[str, list[Entry]]:
        """Facts that are there by subject, with the states that ask for them."""
        found: dict[str, list[Entry]] = {}
        numbers = list(self.known)
        states: Any = self.calibration.compared(torch.stack([self._parts[n][0].key for n in numbers])) if numbers else []
        for number, asks in zip(numbers, states, strict=True):
            told = self.known[number]
            found.setdefault(told.subject, []).append(Entry(told.prompt, told.answer, asks, told))
        return found

    def forget(self, ids: Sequence[int], why: str = "forgotten") -> list[Told]:
        """Take facts out; they stay in the history, from which `restore` brings them back.

        Raises:
            UserError: one of them is not there; then none is taken out.
        """
        facts = [self._there(number) for number in dict.fromkeys(ids)]
        self.ledger.leave([fact.id for fact in facts], why)
        self._drop([fact.id for fact in facts])
        self._hold()
        return [replace(fact, gone=why, gone_at=time.time()) for fact in facts]

    def restore(self, number: int) -> tuple[Told, list[Told]]:
        """Bring back a fact that was forgotten, replaced or evicted; with the facts that it now replaces.

        Raises:
            UserError: it was never there, or is there.
        """
        history = {fact.id: fact for fact in self.ledger.read(gone=True)}
        if number not in history or history[number].gone is None:
            what = "is there" if number in history else "was never there"
            raise UserError(f"fact {number} {what}, so it cannot be brought back; dmt memory list --all shows what can")
        fact = replace(history[number], gone=None, gone_at=None, replaced_by=None)
        against = rivals(history, number)
        self.ledger.come_back(number, [each.id for each in against])
        self._drop([each.id for each in against])
        self.known[number] = fact
        self._parts |= parts_in(self.ledger, [fact])
        self._hold()
        return fact, against

    def evict(self, keep: int) -> list[Told]:
        """Take out all but the `keep` facts that answered last, of those that never did the newest; who left."""
        uses = self.ledger.uses()
        warmth = {fact.id: (*max(uses[row][::-1] for row in fact.rows), fact.created) for fact in self.known.values()}
        cold = sorted(warmth, key=lambda number: warmth[number])[: max(0, len(warmth) - keep)]
        return self.forget(cold, "evicted")

    def fact_of_row(self, row: int) -> Told:
        """The fact that a row belongs to, a guest's included."""
        guests = (fact for facts in self.guests.values() for fact, _ in facts)
        return next(fact for fact in (*self.known.values(), *guests) if row in fact.rows)

    def hold_guests(self, guests: dict[str, list[tuple[Told, list[Part]]]], overlay: Overlay | None = None) -> None:
        """Have these facts, by where they came from, beside those of the book, and no other guests.

        Args:
            overlay: what is laid over the model where nothing is.
        """
        self.guests = guests
        if overlay_of(self.model) is None and overlay is not None:
            self._lay_over(overlay)
        if overlay_of(self.model) is not None:
            self._hold()

    def _there(self, number: int) -> Told:
        if number not in self.known:
            raise UserError(f"fact {number} is not there; dmt memory list shows {len(self.known)} that are")
        return self.known[number]

    def _drop(self, ids: Iterable[int]) -> None:
        for number in ids:
            del self.known[number], self._parts[number]

    def _lay_over(self, overlay: Overlay | None) -> None:
        assert overlay is not None, "it has begun"
        overlay.origin = None if self.store is None else self.store.path
        lay_over(self.model, overlay)

    def _hold(self) -> None:
        guests = [part for facts in self.guests.values() for _, parts in facts for part in parts]
        self.overlay.hold([part for parts in self._parts.values() for part in parts] + guests)
