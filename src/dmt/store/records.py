"""What goes into a store and comes out of it, many rows at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

VALUE_TYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}


@dataclass(frozen=True)
class Namespace:
    """One layer's part of a store."""

    id: int
    name: str
    key_width: int
    value_width: int
    value_dtype: str


@dataclass(frozen=True)
class RowInsert:
    """Rows to be written: numbers `(n,)`, keys `(n, key width)`, values `(n, value width)`, entries each stands for."""

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
    """How rows have been used, of those read since this was last written: all `(n,)`, and all as of now."""

    ids: IntArray
    reads: IntArray
    last_read: NDArray[np.float64]
    scores: FloatArray
    score_steps: IntArray


@dataclass(frozen=True)
class StepChanges:
    """What one step does to one namespace; removals are numbers and why they leave."""

    inserts: list[RowInsert] = field(default_factory=list)
    removals: list[tuple[IntArray, str]] = field(default_factory=list)
    usage: RowUsage | None = None


@dataclass(frozen=True)
class RowBatch:
    """Rows as read: arrays over the same `n` rows, `about` the other columns by name."""

    ids: IntArray
    keys: FloatArray
    values: FloatArray
    metadata: dict[str, list[Any]]


@dataclass(frozen=True)
class FactRecord:
    """One fact as a store knows it.

    Attributes:
        prompt, answer: the text that asks and the text that follows it.
        subject: whom it is about; empty where that does not matter.
        subject_ids: token ids of each way the subject is written.
        answer_ids: of the answer, and of the full stop that ends it where one was written.
        rows: numbers of its rows, in the order of the answer's tokens.
        reach: cosine from which on each of them answers.
        gone: why it is not there any more; None: it is.
        replaced_by: number of the fact that took its place.
    """

    id: int
    prompt: str
    answer: str
    subject: str
    tag: str
    source: str
    created: float
    subject_ids: tuple[tuple[int, ...], ...]
    answer_ids: tuple[int, ...]
    rows: tuple[int, ...] = ()
    thresholds: tuple[float, ...] = ()
    deleted_reason: str | None = None
    deleted_at: float | None = None
    replaced_by: int | None = None

    @property
    def sentence(self) -> str:
        """What it says."""
        return self.prompt + self.answer
