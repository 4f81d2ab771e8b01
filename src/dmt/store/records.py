"""Typed records that go into a store and come out of it, many rows at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmt.text import fold_text

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

# How values are stored, by the name of their type; keys are always float32.
VALUE_DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}


@dataclass(frozen=True)
class Namespace:
    """The part of a store that holds the rows of one layer, or of the facts.

    Attributes:
        id: primary key.
        name: `layer_<n>` or `facts`.
        key_width: numbers in a key.
        value_width: numbers in a value.
        value_dtype: a key of `VALUE_DTYPES`.
    """

    id: int
    name: str
    key_width: int
    value_width: int
    value_dtype: str


@dataclass(frozen=True)
class RowInsert:
    """Rows to write, arrays over the same `n` rows.

    Attributes:
        ids: `(n,)` row IDs, from `RowStore.reserve_ids`.
        keys: `(n, key_width)`.
        values: `(n, value_width)`.
        scores: `(n,)` LRFU scores.
        tag: one tag for all rows, or one for each.
        entries: `(n,)` insertions that each row stands for; 1 where it is None.
        created: seconds since 1970; now where it is None.
        pinned: whether a row is exempt from eviction.
    """

    ids: IntArray
    keys: FloatArray
    values: FloatArray
    scores: FloatArray
    tag: str | Sequence[str] = ""
    entries: IntArray | None = None
    created: float | Sequence[float] | None = None
    pinned: bool | Sequence[bool] = False


@dataclass(frozen=True)
class RowUsage:
    """Usage of rows that were read since the last commit, arrays over the same `n` rows.

    Attributes:
        ids: `(n,)` row IDs.
        reads: `(n,)` total reads.
        last_read: `(n,)` seconds since 1970.
        scores: `(n,)` LRFU scores.
        score_steps: `(n,)` the step at which each score was computed.
    """

    ids: IntArray
    reads: IntArray
    last_read: NDArray[np.float64]
    scores: FloatArray
    score_steps: IntArray


@dataclass(frozen=True)
class StepChanges:
    """What one step changes in one namespace.

    Attributes:
        inserts: new rows.
        removals: row IDs `(n,)` and the reason for their removal.
        usage: new usage statistics.
    """

    inserts: list[RowInsert] = field(default_factory=list)
    removals: list[tuple[IntArray, str]] = field(default_factory=list)
    usage: RowUsage | None = None


@dataclass(frozen=True)
class RowBatch:
    """Rows read from a store, arrays over the same `n` rows.

    Attributes:
        ids: `(n,)` row IDs.
        keys: `(n, key_width)`.
        values: `(n, value_width)`.
        metadata: the other columns, lists of `n` by column name.
    """

    ids: IntArray
    keys: FloatArray
    values: FloatArray
    metadata: dict[str, list[Any]]


@dataclass(frozen=True)
class FactRecord:
    """One stored fact.

    Attributes:
        id: fact ID.
        prompt: the text up to the answer.
        answer: the text that follows the prompt.
        subject: the entity that the fact is about; empty where it applies to any.
        tag: label to filter by.
        source: where the fact comes from.
        created: seconds since 1970.
        answer_ids: token IDs of the answer, its final full stop included where one was written.
        rows: row IDs, in the order of the answer's tokens.
        thresholds: how many decades rarer than between different questions a match has to be, for
            each row.
        deleted_reason: why the fact was deleted; None while it is active.
        deleted_at: when, in seconds since 1970.
        replaced_by: ID of the fact that replaced this one.
    """

    id: int
    prompt: str
    answer: str
    subject: str
    tag: str
    source: str
    created: float
    answer_ids: tuple[int, ...]
    rows: tuple[int, ...] = ()
    thresholds: tuple[float, ...] = ()
    deleted_reason: str | None = None
    deleted_at: float | None = None
    replaced_by: int | None = None

    @property
    def sentence(self) -> str:
        """Prompt and answer as one text."""
        return self.prompt + self.answer

    @property
    def subject_key(self) -> str:
        """The subject, however it is written; empty where the fact has none."""
        return fold_text(self.subject)

    @property
    def query(self) -> tuple[str, str]:
        """What the fact answers, however it is written: two facts about it contradict or agree."""
        return self.subject_key, fold_text(self.prompt)

    @property
    def search_text(self) -> str:
        """Sentence and subject, however they are written."""
        return fold_text(f"{self.sentence} {self.subject}")

    def has_words(self, words: str) -> bool:
        """Check whether sentence and subject have all words, however they are written."""
        text = self.search_text
        return all(word in text for word in fold_text(words).split())


@dataclass(frozen=True)
class StoredFact:
    """A fact with its rows.

    Attributes:
        record: the fact.
        keys: `(tokens, width)`, in the order of `record.rows`.
        values: `(tokens, width)`.
    """

    record: FactRecord
    keys: FloatArray
    values: FloatArray


def hash_subject(subject_key: str) -> int:
    """Return 64 bits of a subject as a signed integer, the same in every process."""
    digest = hashlib.blake2b(subject_key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
