"""Facts in a store: what they say, which rows say it, and what became of them. Nothing is ever written over."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, bindparam, delete, func, insert, select, update

from dmt.errors import UserError
from dmt.records import Changes, Floats, Insert, Namespace, Numbers, Told
from dmt.store.connect import DAMAGED, told
from dmt.store.schema import FACTS_VERSION, about, fact_rows, fact_tables, facts, states, tensors
from dmt.store.store import Store
from dmt.versions import check_version

SPACE = "facts"
"""Namespace of their rows."""
SETTLED = "settled "
"""Begins the names under which `dmt_about` keeps which namespaces have been settled."""
BY = "dmt"
"""What marks rows that no run wrote."""
SLEPT = "slept"
"""Why a fact is gone that is in slots now (`dmt sleep`)."""


class Ledger:
    """The facts of one model in its store.

    Args:
        store: stays open and is closed by whoever opened it.
    """

    def __init__(self, store: Store) -> None:
        self.store = store

    @property
    def exists(self) -> bool:
        """Whether there has been a fact.

        Raises:
            UserError: the tables are of another version.
        """
        with told(self.store.place), self.store.engine.connect() as connection:
            known = dict(connection.execute(select(about.c.name, about.c.value)).all())  # type: ignore[arg-type]
        version = known.get("facts")
        if version is not None:
            older = "use the dmt that made it, or write its facts anew"
            check_version(version, FACTS_VERSION, f"store {self.store.place}: facts of version", older)
        return version is not None

    def begin(self, width: int, settings: dict[str, int], calibration: dict[str, NDArray[np.float32]]) -> None:
        """Make room for facts: numbers to be kept by name, and tensors; what was there of these is replaced."""
        self.store.namespace(SPACE, width, width)

        def write(connection: Connection) -> None:
            fact_tables.create_all(connection, checkfirst=True)
            connection.execute(delete(tensors))
            connection.execute(
                insert(tensors),
                [
                    {"name": name, "shape": json.dumps(array.shape), "data": array.astype("<f4").tobytes()}
                    for name, array in calibration.items()
                ],
            )
            kept = {"facts": FACTS_VERSION, **{f"facts_{name}": value for name, value in settings.items()}}
            connection.execute(delete(about).where(about.c.name.in_(list(kept))))
            connection.execute(insert(about), [{"name": name, "value": str(value)} for name, value in kept.items()])

        self.store.commit(BY, 0, {}, also=write)

    def settings(self) -> dict[str, int]:
        """What `begin` was given."""
        with told(self.store.place), self.store.engine.connect() as connection:
            found = connection.execute(select(about).where(about.c.name.startswith("facts_"))).all()
        return {row.name.removeprefix("facts_"): int(row.value) for row in found}

    def calibration(self) -> dict[str, NDArray[np.float32]]:
        """What `begin` was given."""
        with told(self.store.place), self.store.engine.connect() as connection:
            found = connection.execute(select(tensors)).all()
        return {row.name: np.frombuffer(row.data, "<f4").reshape(json.loads(row.shape)).copy() for row in found}

    @property
    def space(self) -> Namespace:
        """Where the rows are."""
        return next(space for space in self.store.namespaces() if space.name == SPACE)

    def add(self, new: Sequence[tuple[Told, Floats, Floats]], replaces: dict[int, int] | None = None) -> list[Told]:
        """Write facts with keys and values `(tokens, width)` of each, all or none; with their numbers.

        Args:
            replaces: which fact that is there is replaced by which of `new`.
        """
        rows = self.store.take_ids(sum(len(keys) for _, keys, _ in new))
        with told(self.store.place), self.store.engine.connect() as connection:
            last = connection.execute(select(func.max(facts.c.id))).scalar_one() or 0  # facts never leave the table
        added, given = [], 0
        for number, (fact, keys, _) in enumerate(new, last + 1):
            added.append(replace(fact, id=number, rows=tuple(rows[given : given + len(keys)].tolist())))
            given += len(keys)
        changes = {self.space: Changes([_insert(rows, added, new)])} if len(rows) else {}
        gone = {old: added[by].id for old, by in (replaces or {}).items()}

        def write(connection: Connection) -> None:
            if added:
                connection.execute(insert(facts), [_columns(fact) for fact in added])
                parts = [
                    {"row": row, "fact": fact.id, "said": said, "reach": fact.reach[said]}
                    for fact in added
                    for said, row in enumerate(fact.rows)
                ]
                connection.execute(insert(fact_rows), parts)
            if gone:
                _leave(connection, list(gone), "replaced", gone)

        self.store.commit(BY, 0, changes, also=write)
        return added

    def leave(self, ids: Sequence[int], why: str) -> None:
        """Facts are there no more: `forgotten` or `evicted`. What they said stays in the history."""
        if ids:
            self.store.commit(BY, 0, {}, also=lambda connection: _leave(connection, list(ids), why, {}))

    def come_back(self, number: int, instead_of: Sequence[int]) -> None:
        """A fact is there again; others, which contradict it, are replaced by it.

        Raises:
            UserError: it has slept: slots say it now, and its rows belong to the model of the evening before.
        """
        with told(self.store.place), self.store.engine.connect() as connection:
            why = connection.execute(select(facts.c.gone).where(facts.c.id == number)).scalar_one_or_none()
        if why == SLEPT:
            raise UserError(f"fact {number} has slept: it is in the student's slots; to have it as a row too, write it again")

        def write(connection: Connection) -> None:
            if instead_of:
                _leave(connection, list(instead_of), "replaced", dict.fromkeys(instead_of, number))
            back = {"gone": None, "gone_at": None, "replaced_by": None}
            connection.execute(update(facts).where(facts.c.id == number).values(back))
            its = select(fact_rows.c.row).where(fact_rows.c.fact == number)
            undone = {"deleted": None, "deleted_run": None, "deleted_step": None}
            connection.execute(update(states).where(states.c.id.in_(its)).values(undone))

        self.store.commit(BY, 0, {}, also=write)

    def read(self, gone: bool = False) -> list[Told]:
        """Facts that are there, in the order of their numbers; with `gone` those that were, too."""
        which = select(facts).order_by(facts.c.id)
        if not gone:
            which = which.where(facts.c.gone.is_(None))
        with told(self.store.place), self.store.engine.connect() as connection:
            found = connection.execute(which).all()
            parts: dict[int, list[Any]] = {}
            for part in connection.execute(select(fact_rows).order_by(fact_rows.c.fact, fact_rows.c.said)):
                parts.setdefault(part.fact, []).append(part)
        try:
            return [_told(row, parts.get(row.id, [])) for row in found]
        except (ValueError, TypeError) as error:  # token ids that are no JSON
            raise UserError(f"store {self.store.place}: {DAMAGED} ({error})") from None

    def states_of(self, known: Iterable[Told]) -> tuple[Numbers, Floats, Floats]:
        """Rows of these facts that are there: numbers `(n,)`, keys and values `(n, width)`, in the order of their numbers."""
        wanted = np.array(sorted(row for fact in known for row in fact.rows), np.int64)
        page = self.store.get(self.space, wanted)
        return page.ids, page.keys, page.values

    def uses(self) -> dict[int, tuple[int, float]]:
        """How often each row has answered, and when last (0: never)."""
        which = select(states.c.id, states.c.reads, states.c.last_read).where(states.c.namespace == self.space.number)
        with told(self.store.place), self.store.engine.connect() as connection:
            return {row.id: (int(row.reads), float(row.last_read or 0)) for row in connection.execute(which)}

    def used(self, times: dict[int, int]) -> None:
        """Note that rows have answered so many times, now."""
        if not times:
            return
        note = update(states).where(states.c.id == bindparam("row"))
        note = note.values(reads=states.c.reads + bindparam("more"), last_read=bindparam("when"))
        now = time.time()
        noted = [{"row": row, "more": more, "when": now} for row, more in times.items()]

        def write(connection: Connection) -> None:
            connection.execute(note, noted)

        self.store.commit(BY, 0, {}, also=write)


def pass_on(store: Store, model: str) -> None:
    """Let a store be that of another model from now on, by its fingerprint: one made from the model it was of."""

    def write(connection: Connection) -> None:
        connection.execute(update(about).where(about.c.name == "model").values(value=model))

    store.commit(BY, 0, {}, also=write)


def settled(store: Store) -> set[str]:
    """Names of the namespaces into which all rows of a saved model's memory have been taken: from then on they count, not its."""
    with told(store.place), store.engine.connect() as connection:
        names = connection.execute(select(about.c.name).where(about.c.name.startswith(SETTLED, autoescape=True))).scalars()
        return {name.removeprefix(SETTLED) for name in names}


def settle(connection: Connection, namespace: str) -> None:
    """Say so, in the transaction that takes them in."""
    connection.execute(insert(about), {"name": f"{SETTLED}{namespace}", "value": str(time.time())})


def _insert(rows: Numbers, added: Sequence[Told], new: Sequence[tuple[Told, Floats, Floats]]) -> Insert:
    keys, values = (np.concatenate([each[at] for each in new]).astype(np.float32) for at in (1, 2))
    tags = [fact.tag for fact in added for _ in fact.rows]
    created = [fact.created for fact in added for _ in fact.rows]
    return Insert(rows, keys, values, np.ones(len(rows), np.float32), tags, created=created)


def _leave(connection: Connection, ids: list[int], why: str, replaced_by: dict[int, int]) -> None:
    now = time.time()
    leave = update(facts).where(facts.c.id == bindparam("number"), facts.c.gone.is_(None))
    leave = leave.values(gone=why, gone_at=now, replaced_by=bindparam("by"))
    connection.execute(leave, [{"number": number, "by": replaced_by.get(number)} for number in ids])
    off = update(states).where(states.c.id == bindparam("part"), states.c.deleted.is_(None))
    off = off.values(deleted=why, deleted_run=BY, deleted_step=0)
    for start in range(0, len(ids), 500):
        its = connection.execute(select(fact_rows.c.row).where(fact_rows.c.fact.in_(ids[start : start + 500]))).scalars().all()
        if its:
            connection.execute(off, [{"part": row} for row in its])


def _columns(fact: Told) -> dict[str, Any]:
    return {
        "id": fact.id, "prompt": fact.prompt, "answer": fact.answer, "subject": fact.subject, "tag": fact.tag,
        "source": fact.source, "created": fact.created, "subject_ids": json.dumps(fact.subject_ids),
        "answer_ids": json.dumps(fact.answer_ids),
    }  # fmt: skip


def _told(row: Any, parts: Sequence[Any]) -> Told:
    return Told(
        row.id, row.prompt, row.answer, row.subject, row.tag, row.source, row.created,
        tuple(tuple(way) for way in json.loads(row.subject_ids)), tuple(json.loads(row.answer_ids)),
        tuple(part.row for part in parts), tuple(part.reach for part in parts), row.gone, row.gone_at, row.replaced_by,
    )  # fmt: skip
