"""What the command line shows when a run has ended: the results, notes, and where everything is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dmt.report.tables import Table


@dataclass(frozen=True)
class Summary:
    """The results of a run for people.

    Attributes:
        table: the results.
        notes: how they were measured and what they cost, one sentence each.
        locations: files of the run and commands that use it, by name.
    """

    table: Table
    notes: Sequence[str]
    locations: Mapping[str, str]

    @property
    def lines(self) -> list[str]:
        """Notes and locations, one per line."""
        return [
            *self.notes,
            *(f"{name:8} {location}" for name, location in self.locations.items()),
        ]

    def __str__(self) -> str:
        return "\n".join([self.table.to_text(), *self.lines])
