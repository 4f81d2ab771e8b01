"""A memory's tables when they are not among its weights: in a file, or in fewer bits than they are computed in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmt.errors import UserError
from dmt.memory.finding import Codes
from dmt.memory.paging import DISKS, VALUE_TYPES, Mapped, Table, decode, encode, whole

CONVERTED = 16_000_000
"""Numbers of rows converted at once."""


@dataclass(frozen=True)
class Filed:
    """What goes with tables that are in a file, and is looked at for every token, so that it is in RAM where there is room.

    Attributes:
        scales: what each row of values is to be multiplied by, `(slots,)`, where they are int8.
        lengths: how long each value is in the metric, `(slots,)`.
        said: what the means of all slots say together, `(width,)`, where there are means.
        key_codes: keys in 8 bits, where the keys themselves are in the file.
        gain_codes: the same of gains.
    """

    scales: Tensor | None
    lengths: Tensor
    said: Tensor | None
    key_codes: Codes | None
    gain_codes: Codes | None

    @property
    def bytes(self) -> int:
        """Bytes of all of it."""
        codes = [part for code in (self.key_codes, self.gain_codes) if code is not None for part in (code.rows, code.scales)]
        return sum(part.nbytes for part in (self.scales, self.lengths, self.said, *codes) if part is not None)

    def tables(self) -> dict[str, Table]:
        """All of it by the names it has in a file."""
        named = {"scales": self.scales, "lengths": self.lengths, "said": self.said}
        for name, codes in (("key", self.key_codes), ("gain", self.gain_codes)):
            if codes is not None:
                named |= {f"{name}_codes": codes.rows, f"{name}_scales": codes.scales}
        return {name: whole(part.float() if part.is_floating_point() else part) for name, part in named.items() if part is not None}

    @staticmethod
    def of(mapped: Mapped, memory: str) -> Filed:
        """What a file says goes with the tables of `memory`, read into RAM; codes, a quarter of float32, as they are looked at."""

        def there(name: str) -> Tensor | None:
            return mapped[f"{memory}.{name}"].clone() if f"{memory}.{name}" in mapped else None

        def codes(name: str) -> Codes | None:
            scales = there(f"{name}_scales")
            return None if scales is None else Codes.kept(mapped.scanned(f"{memory}.{name}_codes"), scales)

        return Filed(there("scales"), mapped[f"{memory}.lengths"].clone(), there("said"), codes("key"), codes("gain"))


def sums(rows_at: Callable[[Tensor], Tensor], width: int, ids: Tensor, weights: Tensor, starts: Tensor | None = None) -> Tensor:
    """As `F.embedding_bag` with `mode="sum"` where `rows_at(ids)` gives rows `(n, width)`: each once, so many at a time.

    Args:
        ids: `(bags, n)`; or `(n,)`, where bags begin at `starts` `(bags,)`.
        weights: of the same shape.
    """
    if starts is None:
        starts = torch.arange(len(ids), device=ids.device) * ids.shape[1]
        ids, weights = ids.flatten(), weights.flatten()
    ends, most = F.pad(starts[1:], (0, 1), value=len(ids)), max(1, CONVERTED // width)
    said, first = [weights.new_zeros(0, width)], 0
    while first < len(starts):
        begin = int(starts[first])
        last = max(first + 1, int(torch.searchsorted(ends, begin + most, right=True)))
        part = slice(begin, int(ends[last - 1]))
        rows, places = ids[part].unique(return_inverse=True)
        bags = starts[first:last] - begin
        said.append(F.embedding_bag(places, rows_at(rows), bags, per_sample_weights=weights[part], mode="sum"))
        first = last
    return torch.cat(said)


class Fileable(nn.Module):
    """A table of slots that, saved, leaves tensors to a file (`tables`), and loaded again (`leave`, `take`) reads them there.

    In RAM it holds and computes float32 and learns; from a file it does not learn any more.

    Args:
        value_type: what values are kept in there, one of `VALUE_TYPES`.
        disk: what stays on the disk once it is loaded, one of `DISKS`.
    """

    width: int
    slots: int
    keys: Tensor
    values: Tensor
    output_bias: Tensor
    gains: Tensor | None
    means: Tensor | None
    metric: Tensor | None
    output: Tensor | None

    def __init__(self, value_type: str, disk: str) -> None:
        super().__init__()
        if value_type not in VALUE_TYPES or disk not in DISKS:
            known = f"value_type must be one of {', '.join(VALUE_TYPES)} and disk one of {', '.join(DISKS)}"
            raise ValueError(f"{known}, got {value_type} and {disk}")
        self.value_type, self.disk = value_type, disk
        self.filed: Filed | None = None

    def value_rows(self, ids: Tensor) -> Tensor:
        """Values `(n, width)` of the slots `ids` `(n,)`, in the type that is computed in, wherever they are."""
        scales = None if self.filed is None or self.filed.scales is None else self.filed.scales.index_select(0, ids)
        return decode(self.values.index_select(0, ids), scales, self.output_bias.dtype)

    def sum_values(self, ids: Tensor, weights: Tensor, starts: Tensor | None = None) -> Tensor:
        """Values times weights, summed, `(tokens, width)`: of ids `(tokens, n)`, or of flat ones, a token's from `starts` on."""
        weights = weights.to(self.output_bias.dtype)
        if self.values.dtype == weights.dtype:
            return F.embedding_bag(ids, self.values, starts, per_sample_weights=weights, mode="sum")
        return sums(self.value_rows, self.width, ids, weights, starts)

    @property
    def is_filed(self) -> bool:
        """Whether, when it is saved, some of it goes into a file of its own."""
        return self.disk != "none" or self.value_type != "float32"

    @property
    def away(self) -> tuple[str, ...]:
        """Names of tensors that are then not among the weights."""
        names = ("values",) if self.disk == "none" else ("values", "metric")
        names = (*names, "keys", "gains") if self.disk == "slots" else names
        return tuple(name for name in names if self.is_filed and getattr(self, name) is not None)

    @torch.no_grad()
    def tables(self) -> dict[str, Table]:
        """What the file of a memory that is in RAM is to hold, by name; values in `value_type`."""
        assert self.filed is None, "it is in a file already, which can be copied"
        rows, scales = encode(self.values, self.value_type)
        values = decode(rows, scales, self.values.dtype)
        codes = [None if part is None or self.disk != "slots" else Codes(part) for part in (self.keys, self.gains)]
        said = None if self.means is None else self.means @ values
        filed = Filed(scales, lengths_of(values, self.metric, self.output), said, *codes)
        found = {name: whole(getattr(self, name).float()) for name in self.away if name != "values"}
        return {"values": whole(rows), **found, **filed.tables()}

    def leave(self) -> None:
        """Give up the tensors that are `away`; `take` brings what a file has of them."""
        for name in self.away:
            delattr(self, name)
            setattr(self, name, torch.empty(0, self.width))

    def take(self, mapped: Mapped, name: str) -> None:
        """Read from now on what a file holds under `name`; where nothing is to stay on the disk, from a copy in RAM.

        Raises:
            UserError: the file is another student's.
        """
        wanted = {"values": (self.slots, self.width), "keys": (self.slots, self.width), "gains": (self.slots, self.width)}
        for part in self.away:
            table = mapped[f"{name}.{part}"]
            right = VALUE_TYPES[self.value_type] if part == "values" else torch.float32
            if tuple(table.shape) != wanted.get(part, (self.width, self.width)) or table.dtype != right:
                raise UserError(f"{mapped.file} holds another {name}.{part} than config.json says; put the right file in its place")
            setattr(self, part, table.clone() if self.disk == "none" else table)
        self.filed = Filed.of(mapped, name)

    def check_there(self) -> None:
        """Raise `UserError` where its tables are in a file that nobody has opened."""
        if not len(self.values):
            raise UserError("this memory's slots are in a file that was not opened; load the student with from_pretrained")

    def filed_sizes(self) -> dict[str, int]:
        """Bytes of what a file was read for: held in RAM beside the parameters, and left on the disk."""
        if self.filed is None:
            return {"ram": 0, "disk": 0}
        tables = sum(getattr(self, name).nbytes for name in self.away)
        return {"ram": self.filed.bytes + tables * (self.disk == "none"), "disk": tables * (self.disk != "none")}

    def train(self, mode: bool = True) -> Fileable:
        """As ever.

        Raises:
            UserError: its slots are in a file, where they cannot learn.
        """
        if mode and self.filed is not None:
            raise UserError(
                f"this memory was saved with memory.disk={self.disk} and memory.value_type={self.value_type} and cannot be trained "
                "again; distil with memory.disk=none memory.value_type=float32, or leave it in eval mode"
            )
        return super().train(mode)


def lengths_of(values: Tensor, metric: Tensor | None, output: Tensor | None) -> Tensor:
    """How long values `(n, width)` are after the map `output` in `metric`, `(n,)`."""
    if metric is not None:
        values = (values if output is None else values @ output.t()) @ metric
    return values.norm(dim=-1)
