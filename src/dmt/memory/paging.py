"""Tables that stay in a file: safetensors, mapped into memory, so that a read brings in the rows it needs and no more.

Pages of a mapped file are the system's to drop: a table may be larger than the memory a process is allowed.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dmt.errors import UserError
from dmt.memory.finding import in_eight_bits
from dmt.versions import check_version

VALUE_TYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}
"""Types that rows of values are kept in, by the name that `memory.value_type` takes."""
DISKS = ("none", "values", "slots")
"""What stays in the file, by the name that `memory.disk` takes."""
FORMAT = "1"
"""Version of the file."""
PAGE = 4_096
"""Bytes that a header is filled up to a multiple of, so that tables begin where pages do."""
LONGEST = 100_000_000
"""Bytes of the longest header that is read."""
AT_ONCE = 64_000_000
"""Bytes of a table that are copied at once."""
_NAMES = {"F32": torch.float32, "F16": torch.float16, "I8": torch.int8}


@dataclass(frozen=True)
class Table:
    """A tensor to be written: its type, its shape, and its rows in pieces, so that it need not be in memory as a whole."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Iterable[Tensor]


def whole(tensor: Tensor) -> Table:
    """A tensor that is there, to be written."""
    tensor = tensor.detach().cpu()
    if not tensor.numel() or not tensor.dim():
        return Table(tensor.dtype, tuple(tensor.shape), [tensor])
    return Table(tensor.dtype, tuple(tensor.shape), tensor.split(max(1, AT_ONCE // tensor[0].nbytes)))


def encode(rows: Tensor, value_type: str) -> tuple[Tensor, Tensor | None]:
    """Rows `(n, width)` as they are kept, and of `int8` what each is to be multiplied by, `(n,)` in float32."""
    if value_type != "int8":
        return rows.detach().to(VALUE_TYPES[value_type]), None
    return in_eight_bits(rows)


def decode(rows: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What `encode` was given, up to its rounding, in the type `dtype`."""
    if scales is None:
        return rows.to(dtype)
    return (rows.float() * scales.unsqueeze(-1)).to(dtype)


def write(file: Path, tables: Mapping[str, Table]) -> str:
    """Write `tables` by name; their digest, which also stands in the file. What was there before stays until all is written.

    Raises:
        UserError: it cannot be written.
    """
    order = sorted(tables, key=lambda name: -tables[name].dtype.itemsize)  # so that each begins at a multiple of its size
    header, at = {}, 0
    named = {dtype: name for name, dtype in _NAMES.items()}
    for name in order:
        table = tables[name]
        size = math.prod(table.shape) * table.dtype.itemsize
        header[name] = {"dtype": named[table.dtype], "shape": list(table.shape), "data_offsets": [at, at + size]}
        at += size
    digest, empty = hashlib.sha256(json.dumps(header, sort_keys=True).encode()), "0" * 64
    text = json.dumps({"__metadata__": {"format": FORMAT, "digest": empty}, **header})
    text += " " * (-(8 + len(text)) % PAGE)
    partial = file.with_name(f"{file.name}.partial")
    try:
        with partial.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text.encode())
            for name in order:
                for piece in tables[name].pieces:
                    data = piece.contiguous().numpy().reshape(-1).view("uint8").data
                    digest.update(data)
                    out.write(data)
            assert out.tell() == 8 + len(text) + at, f"pieces of {file} are not of the shapes that were announced"
            out.seek(8)
            out.write(text.replace(empty, digest.hexdigest(), 1).encode())
        partial.replace(file)  # another file of the name may be mapped; it lives on without it
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{file} cannot be written ({error.strerror}); free some room, or save elsewhere") from None
    return digest.hexdigest()


class Mapped:
    """Tables of a file that `write` made, mapped into memory; writing to them changes no file.

    Raises:
        UserError: there is no such file, it is cut short, or it is something else.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            with file.open("rb") as opened:
                size = os.fstat(opened.fileno()).st_size
                length = int.from_bytes(opened.read(8), "little")
                if not 0 < length <= min(LONGEST, size - 8):
                    raise ValueError("it has no header")
                found = json.loads(opened.read(length))
                about = found.pop("__metadata__")
                self.digest, self._tables, self._start = str(about["digest"]), found, 8 + length
                check_version(
                    about["format"], int(FORMAT), f"{file}: its format is", "save the student anew by the dmt that made it"
                )
                self._check(size)
                self._map = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        except FileNotFoundError:
            raise UserError(f"{file} is not there: the memory's rows are in it; put it back beside model.safetensors") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else f"{error}"
            raise UserError(f"{file} is not a whole file of a memory's rows ({reason}); copy it or save the student anew") from None
        if hasattr(mmap, "MADV_RANDOM"):
            self._map.madvise(mmap.MADV_RANDOM)  # the rows around one that is read are not wanted

    def _check(self, size: int) -> None:
        end = 0
        for name, table in self._tables.items():
            begin, stop = table["data_offsets"]
            if begin != end or stop - begin != math.prod(table["shape"]) * _NAMES[table["dtype"]].itemsize:
                raise ValueError(f"its header is wrong about {name}")
            end = stop
        if size != self._start + end:
            raise ValueError(f"it has {size:,} bytes, its header says {self._start + end:,}")

    @property
    def shapes(self) -> list[list[int]]:
        """Of all tables."""
        return [table["shape"] for table in self._tables.values()]

    def __contains__(self, name: str) -> bool:
        return name in self._tables

    def __getitem__(self, name: str) -> Tensor:
        """The table `name`, its pages in the file."""
        if name not in self._tables:
            raise UserError(f"{self.file} does not hold {name}; it belongs to another student, put the right one in its place")
        about = self._tables[name]
        begin, end = about["data_offsets"]
        dtype, shape = _NAMES[about["dtype"]], about["shape"]
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, offset=self._start + begin, count=math.prod(shape)).view(shape)

    def scanned(self, name: str) -> Tensor:
        """The table `name`, which is read from end to end: the system may read ahead."""
        begin, end = (self._start + at for at in self._tables.get(name, {}).get("data_offsets", (0, 0)))
        if hasattr(mmap, "MADV_SEQUENTIAL") and end > begin:
            first = begin // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_SEQUENTIAL, first, end - first)
        return self[name]
