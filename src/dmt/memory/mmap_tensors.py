"""A memory's tables when they are not among its weights: in a file, or in fewer bits than they are computed in.

Tables that stay in a file: safetensors, mapped into memory, so that a read brings in the rows it needs and no more.

Pages of a mapped file are the system's to drop: a table may be larger than the memory a process is allowed.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmt.errors import UserError
from dmt.files import check_version
from dmt.memory.approximate_search import Int8Matrix, quantize_int8

VALUE_TYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}
"""Types that rows of values are kept in, by the name that `memory.value_dtype` takes."""
OFFLOAD_MODES = ("none", "values", "slots")
"""What stays in the file, by the name that `memory.offload` takes."""
FORMAT_VERSION = "1"
"""Version of the file."""
HEADER_ALIGNMENT = 4_096
"""Bytes that a header is filled up to a multiple of, so that tables begin where pages do."""
MAX_HEADER_BYTES = 100_000_000
"""Bytes of the longest header that is read."""
COPY_CHUNK_BYTES = 64_000_000
"""Bytes of a table that are copied at once."""
_SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "I8": torch.int8}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: its type, its shape, and its rows in pieces, so that it need not be in memory as a whole."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Iterable[Tensor]


def make_spec(tensor: Tensor) -> TensorSpec:
    """A tensor that is there, to be written."""
    tensor = tensor.detach().cpu()
    if not tensor.numel() or not tensor.dim():
        return TensorSpec(tensor.dtype, tuple(tensor.shape), [tensor])
    return TensorSpec(
        tensor.dtype,
        tuple(tensor.shape),
        tensor.split(max(1, COPY_CHUNK_BYTES // tensor[0].nbytes)),
    )


def quantize_rows(rows: Tensor, value_dtype: str) -> tuple[Tensor, Tensor | None]:
    """Rows `(n, width)` as they are kept, and of `int8` what each is to be multiplied by, `(n,)` in float32."""
    if value_dtype != "int8":
        return rows.detach().to(VALUE_TYPES[value_dtype]), None
    return quantize_int8(rows)


def dequantize_rows(rows: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What `encode` was given, up to its rounding, in the type `dtype`."""
    if scales is None:
        return rows.to(dtype)
    return (rows.float() * scales.unsqueeze(-1)).to(dtype)


def write_tensor_file(path: Path, specs: Mapping[str, TensorSpec]) -> str:
    """Write `tables` by name; their digest, which also stands in the file. What was there before stays until all is written.

    Raises:
        UserError: it cannot be written.
    """
    order = sorted(
        specs, key=lambda name: -specs[name].dtype.itemsize
    )  # so that each begins at a multiple of its size
    header, offset = {}, 0
    dtype_names = {dtype: name for name, dtype in _SAFETENSORS_DTYPES.items()}
    for name in order:
        spec = specs[name]
        num_bytes = math.prod(spec.shape) * spec.dtype.itemsize
        header[name] = {
            "dtype": dtype_names[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + num_bytes],
        }
        offset += num_bytes
    digest, placeholder = hashlib.sha256(json.dumps(header, sort_keys=True).encode()), "0" * 64
    header_text = json.dumps(
        {"__metadata__": {"format": FORMAT_VERSION, "digest": placeholder}, **header}
    )
    header_text += " " * (-(8 + len(header_text)) % HEADER_ALIGNMENT)
    partial_path = path.with_name(f"{path.name}.partial")
    try:
        with partial_path.open("wb") as stream:
            stream.write(len(header_text).to_bytes(8, "little") + header_text.encode())
            for name in order:
                for chunk in specs[name].chunks:
                    data = chunk.contiguous().numpy().reshape(-1).view("uint8").data
                    digest.update(data)
                    stream.write(data)
            assert stream.tell() == 8 + len(header_text) + offset, (
                f"pieces of {path} are not of the shapes that were announced"
            )
            stream.seek(8)
            stream.write(header_text.replace(placeholder, digest.hexdigest(), 1).encode())
        partial_path.replace(path)  # another file of the name may be mapped; it lives on without it
    except OSError as error:
        partial_path.unlink(missing_ok=True)
        raise UserError(
            f"{path} cannot be written ({error.strerror}); free some room, or save elsewhere"
        ) from None
    return digest.hexdigest()


class MmapTensorFile:
    """Tables of a file that `write` made, mapped into memory; writing to them changes no file.

    Raises:
        UserError: there is no such file, it is cut short, or it is something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as stream:
                num_bytes = os.fstat(stream.fileno()).st_size
                header_bytes = int.from_bytes(stream.read(8), "little")
                if not 0 < header_bytes <= min(MAX_HEADER_BYTES, num_bytes - 8):
                    raise ValueError("it has no header")
                header = json.loads(stream.read(header_bytes))
                metadata = header.pop("__metadata__")
                self.digest, self._entries, self._data_start = (
                    str(metadata["digest"]),
                    header,
                    8 + header_bytes,
                )
                check_version(
                    metadata["format"],
                    int(FORMAT_VERSION),
                    f"{path}: its format is",
                    "save the student anew by the dmt that made it",
                )
                self._check_header(num_bytes)
                self._mmap = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        except FileNotFoundError:
            raise UserError(
                f"{path} is not there: the memory's rows are in it; put it back beside model.safetensors"
            ) from None
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = (
                f"{type(error).__name__} {error}" if isinstance(error, KeyError) else f"{error}"
            )
            raise UserError(
                f"{path} is not a whole file of a memory's rows ({reason}); copy it or save the student anew"
            ) from None
        if hasattr(mmap, "MADV_RANDOM"):
            self._mmap.madvise(mmap.MADV_RANDOM)  # the rows around one that is read are not wanted

    def _check_header(self, num_bytes: int) -> None:
        end = 0
        for name, entry in self._entries.items():
            begin, stop = entry["data_offsets"]
            if (
                begin != end
                or stop - begin
                != math.prod(entry["shape"]) * _SAFETENSORS_DTYPES[entry["dtype"]].itemsize
            ):
                raise ValueError(f"its header is wrong about {name}")
            end = stop
        if num_bytes != self._data_start + end:
            raise ValueError(
                f"it has {num_bytes:,} bytes, its header says {self._data_start + end:,}"
            )

    @property
    def shapes(self) -> list[list[int]]:
        """Of all tables."""
        return [entry["shape"] for entry in self._entries.values()]

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> Tensor:
        """The table `name`, its pages in the file."""
        if name not in self._entries:
            raise UserError(
                f"{self.path} does not hold {name}; it belongs to another student, put the right one in its place"
            )
        entry = self._entries[name]
        begin, end = entry["data_offsets"]
        dtype, shape = _SAFETENSORS_DTYPES[entry["dtype"]], entry["shape"]
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(
            self._mmap, dtype=dtype, offset=self._data_start + begin, count=math.prod(shape)
        ).view(shape)

    def read_sequentially(self, name: str) -> Tensor:
        """The table `name`, which is read from end to end: the system may read ahead."""
        begin, end = (
            self._data_start + offset
            for offset in self._entries.get(name, {}).get("data_offsets", (0, 0))
        )
        if hasattr(mmap, "MADV_SEQUENTIAL") and end > begin:
            page_start = begin // mmap.PAGESIZE * mmap.PAGESIZE
            self._mmap.madvise(mmap.MADV_SEQUENTIAL, page_start, end - page_start)
        return self[name]


MAX_CONVERTED_VALUES = 16_000_000
"""Numbers of rows converted at once."""


@dataclass(frozen=True)
class MmapTensors:
    """What goes with tables that are in a file, and is looked at for every token, so that it is in RAM where there is room.

    Attributes:
        scales: what each row of values is to be multiplied by, `(slots,)`, where they are int8.
        lengths: how long each value is in the metric, `(slots,)`.
        said: what the means of all slots say together, `(width,)`, where there are means.
        key_codes: keys in 8 bits, where the keys themselves are in the file.
        gain_codes: the same of gains.
    """

    scales: Tensor | None
    value_norms: Tensor
    mean_output: Tensor | None
    key_codes: Int8Matrix | None
    gain_codes: Int8Matrix | None

    @property
    def num_bytes(self) -> int:
        """Bytes of all of it."""
        code_tensors = [
            tensor
            for matrix in (self.key_codes, self.gain_codes)
            if matrix is not None
            for tensor in (matrix.rows, matrix.scales)
        ]
        return sum(
            tensor.nbytes
            for tensor in (self.scales, self.value_norms, self.mean_output, *code_tensors)
            if tensor is not None
        )

    def to_specs(self) -> dict[str, TensorSpec]:
        """All of it by the names it has in a file."""
        tensors = {"scales": self.scales, "lengths": self.value_norms, "said": self.mean_output}
        for name, matrix in (("key", self.key_codes), ("gain", self.gain_codes)):
            if matrix is not None:
                tensors |= {f"{name}_codes": matrix.rows, f"{name}_scales": matrix.scales}
        return {
            name: make_spec(tensor.float() if tensor.is_floating_point() else tensor)
            for name, tensor in tensors.items()
            if tensor is not None
        }

    @staticmethod
    def from_file(file: MmapTensorFile, memory: str) -> MmapTensors:
        """What a file says goes with the tables of `memory`, read into RAM; codes, a quarter of float32, as they are looked at."""

        def read_optional(name: str) -> Tensor | None:
            return file[f"{memory}.{name}"].clone() if f"{memory}.{name}" in file else None

        def read_matrix(name: str) -> Int8Matrix | None:
            scales = read_optional(f"{name}_scales")
            return (
                None
                if scales is None
                else Int8Matrix.from_quantized(
                    file.read_sequentially(f"{memory}.{name}_codes"), scales
                )
            )

        return MmapTensors(
            read_optional("scales"),
            file[f"{memory}.lengths"].clone(),
            read_optional("said"),
            read_matrix("key"),
            read_matrix("gain"),
        )


def sum_embedding_bags(
    gather_rows: Callable[[Tensor], Tensor],
    width: int,
    ids: Tensor,
    weights: Tensor,
    offsets: Tensor | None = None,
) -> Tensor:
    """As `F.embedding_bag` with `mode="sum"` where `rows_at(ids)` gives rows `(n, width)`: each once, so many at a time.

    Args:
        ids: `(bags, n)`; or `(n,)`, where bags begin at `starts` `(bags,)`.
        weights: of the same shape.
    """
    if offsets is None:
        offsets = torch.arange(len(ids), device=ids.device) * ids.shape[1]
        ids, weights = ids.flatten(), weights.flatten()
    ends, max_ids = (
        F.pad(offsets[1:], (0, 1), value=len(ids)),
        max(1, MAX_CONVERTED_VALUES // width),
    )
    parts, first_bag = [weights.new_zeros(0, width)], 0
    while first_bag < len(offsets):
        start = int(offsets[first_bag])
        last_bag = max(first_bag + 1, int(torch.searchsorted(ends, start + max_ids, right=True)))
        span = slice(start, int(ends[last_bag - 1]))
        unique_ids, inverse = ids[span].unique(return_inverse=True)
        bag_offsets = offsets[first_bag:last_bag] - start
        parts.append(
            F.embedding_bag(
                inverse,
                gather_rows(unique_ids),
                bag_offsets,
                per_sample_weights=weights[span],
                mode="sum",
            )
        )
        first_bag = last_bag
    return torch.cat(parts)


class MmapTensorsMixin(nn.Module):
    """A table of slots that, saved, leaves tensors to a file (`tables`), and loaded again (`leave`, `take`) reads them there.

    In RAM it holds and computes float32 and learns; from a file it does not learn any more.

    Args:
        value_type: what values are kept in there, one of `VALUE_TYPES`.
        disk: what stays on the disk once it is loaded, one of `DISKS`.
    """

    width: int
    num_slots: int
    keys: Tensor
    values: Tensor
    output_bias: Tensor
    gains: Tensor | None
    means: Tensor | None
    metric: Tensor | None
    output: Tensor | None

    def __init__(self, value_dtype: str, offload: str) -> None:
        super().__init__()
        if value_dtype not in VALUE_TYPES or offload not in OFFLOAD_MODES:
            requirement = f"value_type must be one of {', '.join(VALUE_TYPES)} and disk one of {', '.join(OFFLOAD_MODES)}"
            raise ValueError(f"{requirement}, got {value_dtype} and {offload}")
        self.value_dtype, self.offload = value_dtype, offload
        self.mmap_tensors: MmapTensors | None = None

    def gather_values(self, ids: Tensor) -> Tensor:
        """Values `(n, width)` of the slots `ids` `(n,)`, in the type that is computed in, wherever they are."""
        scales = (
            None
            if self.mmap_tensors is None or self.mmap_tensors.scales is None
            else self.mmap_tensors.scales.index_select(0, ids)
        )
        return dequantize_rows(self.values.index_select(0, ids), scales, self.output_bias.dtype)

    def sum_values(self, ids: Tensor, weights: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Values times weights, summed, `(tokens, width)`: of ids `(tokens, n)`, or of flat ones, a token's from `starts` on."""
        weights = weights.to(self.output_bias.dtype)
        if self.values.dtype == weights.dtype:
            return F.embedding_bag(
                ids, self.values, offsets, per_sample_weights=weights, mode="sum"
            )
        return sum_embedding_bags(self.gather_values, self.width, ids, weights, offsets)

    @property
    def has_external_tensors(self) -> bool:
        """Whether, when it is saved, some of it goes into a file of its own."""
        return self.offload != "none" or self.value_dtype != "float32"

    @property
    def external_names(self) -> tuple[str, ...]:
        """Names of tensors that are then not among the weights."""
        names = ("values",) if self.offload == "none" else ("values", "metric")
        names = (*names, "keys", "gains") if self.offload == "slots" else names
        return tuple(
            name for name in names if self.has_external_tensors and getattr(self, name) is not None
        )

    @torch.no_grad()
    def export_specs(self) -> dict[str, TensorSpec]:
        """What the file of a memory that is in RAM is to hold, by name; values in `value_type`."""
        assert self.mmap_tensors is None, "it is in a file already, which can be copied"
        encoded, scales = quantize_rows(self.values, self.value_dtype)
        values = dequantize_rows(encoded, scales, self.values.dtype)
        matrices = [
            None if tensor is None or self.offload != "slots" else Int8Matrix(tensor)
            for tensor in (self.keys, self.gains)
        ]
        mean_output = None if self.means is None else self.means @ values
        mmap_tensors = MmapTensors(
            scales, compute_value_norms(values, self.metric, self.output), mean_output, *matrices
        )
        external = {
            name: make_spec(getattr(self, name).float())
            for name in self.external_names
            if name != "values"
        }
        return {"values": make_spec(encoded), **external, **mmap_tensors.to_specs()}

    def release_tensors(self) -> None:
        """Give up the tensors that are `away`; `take` brings what a file has of them."""
        for name in self.external_names:
            delattr(self, name)
            setattr(self, name, torch.empty(0, self.width))

    def attach_file(self, file: MmapTensorFile, prefix: str) -> None:
        """Read from now on what a file holds under `name`; where nothing is to stay on the disk, from a copy in RAM.

        Raises:
            UserError: the file is another student's.
        """
        expected_shapes = {
            "values": (self.num_slots, self.width),
            "keys": (self.num_slots, self.width),
            "gains": (self.num_slots, self.width),
        }
        for tensor_name in self.external_names:
            tensor = file[f"{prefix}.{tensor_name}"]
            expected_dtype = (
                VALUE_TYPES[self.value_dtype] if tensor_name == "values" else torch.float32
            )
            if (
                tuple(tensor.shape) != expected_shapes.get(tensor_name, (self.width, self.width))
                or tensor.dtype != expected_dtype
            ):
                raise UserError(
                    f"{file.path} holds another {prefix}.{tensor_name} than config.json says; put the right file in its place"
                )
            setattr(self, tensor_name, tensor.clone() if self.offload == "none" else tensor)
        self.mmap_tensors = MmapTensors.from_file(file, prefix)

    def check_attached(self) -> None:
        """Raise `UserError` where its tables are in a file that nobody has opened."""
        if not len(self.values):
            raise UserError(
                "this memory's slots are in a file that was not opened; load the student with from_pretrained"
            )

    def external_sizes(self) -> dict[str, int]:
        """Bytes of what a file was read for: held in RAM beside the parameters, and left on the disk."""
        if self.mmap_tensors is None:
            return {"ram": 0, "disk": 0}
        num_bytes = sum(getattr(self, name).nbytes for name in self.external_names)
        return {
            "ram": self.mmap_tensors.num_bytes + num_bytes * (self.offload == "none"),
            "disk": num_bytes * (self.offload != "none"),
        }

    def train(self, mode: bool = True) -> MmapTensorsMixin:
        """As ever.

        Raises:
            UserError: its slots are in a file, where they cannot learn.
        """
        if mode and self.mmap_tensors is not None:
            raise UserError(
                f"this memory was saved with memory.offload={self.offload} and memory.value_dtype={self.value_dtype} and cannot be trained "
                "again; distil with memory.offload=none memory.value_dtype=float32, or leave it in eval mode"
            )
        return super().train(mode)


def compute_value_norms(values: Tensor, metric: Tensor | None, output: Tensor | None) -> Tensor:
    """How long values `(n, width)` are after the map `output` in `metric`, `(n,)`."""
    if metric is not None:
        values = (values if output is None else values @ output.t()) @ metric
    return values.norm(dim=-1)
