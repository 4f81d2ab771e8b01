"""Tensors of a memory that are not among its weights: in a mapped file, or in fewer bits.

The file is a safetensors file, mapped by safetensors' own reader: a read loads the rows it needs
and no more. The system may drop pages of a mapped file, so a table may be larger than RAM.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import mmap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, Self, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dmt.errors import UserError
from dmt.files import atomic_path, check_version, disk_error_class
from dmt.memory.approximate_search import Int8Matrix, quantize_int8

# Types that `value_dtype=` accepts for saved values.
VALUE_TYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}
# What stays in the file, by the name that `offload=` accepts.
OFFLOAD_MODES = ("none", "values", "slots")
# Version of the file.
FORMAT_VERSION = "1"
# The header is padded to a multiple of this, so that tensors begin where pages do.
HEADER_ALIGNMENT = 4_096
# Bytes of a tensor that are written at once.
COPY_CHUNK_BYTES = 64_000_000
# Row values that are converted at once.
MAX_CONVERTED_VALUES = 16_000_000
# Bags over which the rows of one token are split, for as many threads.
NUM_BAGS = 8
_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.int8: "I8"}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written in chunks, so that it need not be in memory as a whole.

    Attributes:
        dtype: its type.
        shape: its shape.
        chunks: consecutive rows of it.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Iterable[Tensor]


def make_spec(tensor: Tensor) -> TensorSpec:
    """Describe a tensor in memory for `write_tensor_file`."""
    tensor = tensor.detach().cpu()
    chunks: Iterable[Tensor] = [tensor]
    if tensor.numel() and tensor.dim():
        chunks = tensor.split(max(1, COPY_CHUNK_BYTES // tensor[0].nbytes))
    return TensorSpec(tensor.dtype, tuple(tensor.shape), chunks)


def quantize_rows(rows: Tensor, value_dtype: str) -> tuple[Tensor, Tensor | None]:
    """Convert rows to the type they are saved in.

    Args:
        rows: `(n, width)`.
        value_dtype: a key of `VALUE_TYPES`.

    Returns:
        The converted rows, and for `int8` a scale per row `(n,)` in float32.
    """
    if value_dtype != "int8":
        return rows.detach().to(VALUE_TYPES[value_dtype]), None
    return quantize_int8(rows)


def dequantize_rows(rows: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Convert rows `(n, width)` back from `quantize_rows`, up to its rounding."""
    if scales is None:
        return rows.to(dtype)
    return (rows.float() * scales.unsqueeze(-1)).to(dtype)


def write_tensor_file(path: Path, specs: Mapping[str, TensorSpec]) -> str:
    """Write tensors to a safetensors file, chunk by chunk; replaces the file when it is complete.

    safetensors' own writer needs all tensors in memory.

    Args:
        path: the file.
        specs: tensors by name.

    Returns:
        The SHA-256 of names, shapes and contents, which the file's metadata holds too.

    Raises:
        UserError: it cannot be written.
    """
    # By falling item size, so that each tensor begins at a multiple of its own.
    order = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)
    header, offset = {}, 0
    for name in order:
        spec = specs[name]
        num_bytes = math.prod(spec.shape) * spec.dtype.itemsize
        header[name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + num_bytes],
        }
        offset += num_bytes
    digest, placeholder = hashlib.sha256(json.dumps(header, sort_keys=True).encode()), "0" * 64
    header_text = json.dumps(
        {"__metadata__": {"format": FORMAT_VERSION, "digest": placeholder}, **header}
    )
    header_text += " " * (-(8 + len(header_text)) % HEADER_ALIGNMENT)
    try:
        # A process that maps the old file keeps reading it.
        with (
            atomic_path(path, fsync=False) as partial_path,
            partial_path.open("wb") as stream,
        ):
            stream.write(len(header_text).to_bytes(8, "little") + header_text.encode())
            for name in order:
                for chunk in specs[name].chunks:
                    data = chunk.contiguous().numpy().reshape(-1).view("uint8").data
                    digest.update(data)
                    stream.write(data)
            assert stream.tell() == 8 + len(header_text) + offset, (
                f"chunks of {path} do not have the shapes of their specs"
            )
            stream.seek(8)
            stream.write(header_text.replace(placeholder, digest.hexdigest(), 1).encode())
    except OSError as error:
        raise disk_error_class(error)(
            f"cannot write {path} ({error.strerror}); free some space, or save elsewhere"
        ) from None
    return digest.hexdigest()


class MmapTensorFile:
    """The tensors of a file by `write_tensor_file`, mapped; writing to them does not change it.

    Args:
        path: the file.

    Raises:
        UserError: it does not exist, is incomplete, or is something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, "pt")
            metadata = self._file.metadata() or {}
            version, self.digest = metadata["format"], metadata["digest"]
        except FileNotFoundError:
            raise UserError(
                f"{path} does not exist, and the memory's slots are in it; put it back beside "
                "model.safetensors"
            ) from None
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            reason = (
                f"no {error.args[0]} in its metadata"
                if isinstance(error, KeyError)
                else " ".join(str(error).split())
            )
            raise UserError(
                f"{path} is not a complete file of a memory's slots ({reason}); copy it again or "
                "save the student again"
            ) from None
        check_version(
            version,
            int(FORMAT_VERSION),
            f"{path}: its format is",
            "save the student again with the dmt that wrote it",
        )
        self._names = frozenset(self._file.keys())

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen_file, (self.path, self.digest)

    @property
    def shapes(self) -> list[list[int]]:
        """Shapes of all tensors."""
        return [list(self._file.get_slice(name).get_shape()) for name in self._names]

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Tensor:
        """Return the mapped tensor `name`, of which single rows will be read.

        Raises:
            UserError: there is none of this name.
        """
        tensor = self._map(name)
        # Without this, each row read would load the 128 kB around it too: 44 times as many bytes
        # from an 800 MB table of 2 kB rows.
        _advise(tensor, "MADV_RANDOM")
        return tensor

    def read_sequentially(self, name: str) -> Tensor:
        """Return the mapped tensor `name`, which will be read from end to end."""
        tensor = self._map(name)
        _advise(tensor, "MADV_SEQUENTIAL")
        return tensor

    def _map(self, name: str) -> Tensor:
        if name not in self._names:
            raise UserError(
                f"{self.path} has no tensor {name}, so it belongs to another student; replace it "
                "with this student's file"
            )
        return self._file.get_tensor(name)


def _reopen_file(path: Path, digest: str) -> MmapTensorFile:
    """Open the file of a copied or pickled model again.

    Raises:
        UserError: it is gone, or another file by now.
    """
    file = MmapTensorFile(path)
    if file.digest != digest:
        raise UserError(
            f"{path} is no longer the file that this student was loaded from; load the student "
            "again"
        )
    return file


def raise_not_attached() -> NoReturn:
    """Raise the `UserError` of a model whose file is not open."""
    raise UserError(
        "this memory's slots are in a file that is not open; load the student with from_pretrained"
    )


def _advise(tensor: Tensor, advice: str) -> None:
    """Tell the system how a mapped tensor will be read, where it supports that."""
    _advise_range(tensor.data_ptr(), tensor.nbytes, advice)


def _advise_range(address: int, num_bytes: int, advice: str) -> None:
    """Tell the system how the pages that hold bytes at an address will be read."""
    if not hasattr(mmap, advice) or not num_bytes:
        return
    start = address // mmap.PAGESIZE * mmap.PAGESIZE
    _load_madvise()(start, address + num_bytes - start, getattr(mmap, advice))


@cache
def _load_madvise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return cast(Callable[[int, int, int], int], function)


def prefetch_rows(table: Tensor, ids: Tensor) -> None:
    """Let the system begin to read rows of a mapped table, and do not wait for them.

    Args:
        table: `(rows, width)`, mapped.
        ids: rows `(n,)`.
    """
    start, row_bytes = table.data_ptr(), table.stride(0) * table.itemsize
    for row in ids.unique().tolist() if ids.numel() > 1 else ids.tolist():
        _advise_range(start + row * row_bytes, row_bytes, "MADV_WILLNEED")


@dataclass(frozen=True)
class MmapTensors:
    """What accompanies tensors in a file and is used for every token, so that it is in RAM.

    Or in the memory of the device that computes.

    Attributes:
        scales: of int8 values, `(num_slots,)`.
        value_norms: norm of each value in the metric, `(num_slots,)`.
        mean_output: sum of the means of all slots, `(width,)`, of a centered memory.
        key_codes: keys in 8 bits, where the keys themselves are in the file.
        gain_codes: gains in 8 bits, likewise.
    """

    scales: Tensor | None
    value_norms: Tensor
    mean_output: Tensor | None
    key_codes: Int8Matrix | None
    gain_codes: Int8Matrix | None

    @property
    def device(self) -> torch.device:
        """Where all of it is."""
        return self.value_norms.device

    @property
    def num_bytes(self) -> int:
        """Size of all of it in bytes."""
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

    def to(self, device: torch.device) -> MmapTensors:
        """Return all of it on a device."""
        moved: dict[str, Any] = {
            name: None if value is None else value.to(device) for name, value in vars(self).items()
        }
        return MmapTensors(**moved)

    def to_specs(self) -> dict[str, TensorSpec]:
        """Describe all of it for `write_tensor_file`, by the names in the file."""
        tensors = {
            "scales": self.scales,
            "value_norms": self.value_norms,
            "mean_output": self.mean_output,
        }
        for name, matrix in (("key", self.key_codes), ("gain", self.gain_codes)):
            if matrix is not None:
                tensors |= {f"{name}_codes": matrix.rows, f"{name}_scales": matrix.scales}
        return {
            name: make_spec(tensor.float() if tensor.is_floating_point() else tensor)
            for name, tensor in tensors.items()
            if tensor is not None
        }

    @staticmethod
    def from_file(file: MmapTensorFile, prefix: str) -> MmapTensors:
        """Read what accompanies the tensors of the memory `prefix` into RAM; codes stay mapped."""

        def read_optional(name: str) -> Tensor | None:
            return file[f"{prefix}.{name}"].clone() if f"{prefix}.{name}" in file else None

        def read_matrix(name: str) -> Int8Matrix | None:
            scales = read_optional(f"{name}_scales")
            if scales is None:
                return None
            codes = file.read_sequentially(f"{prefix}.{name}_codes")
            return Int8Matrix.from_quantized(codes, scales)

        return MmapTensors(
            read_optional("scales"),
            file[f"{prefix}.value_norms"].clone(),
            read_optional("mean_output"),
            read_matrix("key"),
            read_matrix("gain"),
        )


def gather_rows(table: Tensor, ids: Tensor) -> Tensor:
    """Return the rows `(..., width)` of ids `(...)` where the ids are.

    A table in a file stays on the CPU; only the rows that are read move.
    """
    return F.embedding(ids.to(table.device), table).to(ids.device)


def sum_embedding_bags(
    gather_rows: Callable[[Tensor], Tensor],
    width: int,
    ids: Tensor,
    weights: Tensor,
    offsets: Tensor | None = None,
) -> Tensor:
    """Compute `F.embedding_bag` with `mode="sum"` over rows that are converted as they are read.

    Args:
        gather_rows: returns the rows `(n, width)` of ids `(n,)`; called for each id once, for
            `MAX_CONVERTED_VALUES` values at a time.
        width: size of a row.
        ids: `(bags, n)`, or `(n,)` with `offsets`.
        weights: of the same shape.
        offsets: where bags begin, `(bags,)`.

    Returns:
        `(bags, width)`.
    """
    if offsets is None:
        offsets = torch.arange(len(ids), device=ids.device) * ids.shape[1]
        ids, weights = ids.flatten(), weights.flatten()
    ends = F.pad(offsets[1:], (0, 1), value=len(ids))
    max_ids = max(1, MAX_CONVERTED_VALUES // width)
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


class ExternalTensorsMixin(nn.Module):
    """A module that saves tensors to a file of their own and reads them there after loading.

    Before saving it computes in float32 and can be trained; with a file attached it cannot.

    Args:
        value_dtype: type of saved values, a key of `VALUE_TYPES`.
        offload: what stays in the file after loading, one of `OFFLOAD_MODES`.

    Raises:
        ValueError: either is unknown.
    """

    width: int  # of a row

    def __init__(self, value_dtype: str, offload: str) -> None:
        super().__init__()
        if value_dtype not in VALUE_TYPES:
            raise ValueError(
                f"value_dtype must be one of {', '.join(VALUE_TYPES)}, got {value_dtype}"
            )
        if offload not in OFFLOAD_MODES:
            raise ValueError(f"offload must be one of {', '.join(OFFLOAD_MODES)}, got {offload}")
        self.value_dtype, self.offload = value_dtype, offload
        self._attached_file: tuple[MmapTensorFile, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles map the file again, instead of holding a table that may exceed RAM.
        state = self.__dict__.copy()
        if self.is_attached and self.offload != "none":
            state |= dict.fromkeys(self.external_names, torch.empty(0, self.width))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._attached_file is not None and self.offload != "none":
            self.attach_file(*self._attached_file)

    @property
    def has_external_tensors(self) -> bool:
        """Whether saving puts some of it into a file of its own."""
        return self.offload != "none" or self.value_dtype != "float32"

    @property
    def is_attached(self) -> bool:
        """Whether its tensors are those of a file."""
        return self._attached_file is not None

    @property
    def external_names(self) -> tuple[str, ...]:
        """Names of the tensors that are saved in that file instead of among the weights."""
        raise NotImplementedError

    def get_external_type(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Return the shape and the type in the file of a tensor in `external_names`."""
        raise NotImplementedError

    def export_specs(self) -> dict[str, TensorSpec]:
        """Describe what the file of this module holds, by name; values in `value_dtype`."""
        raise NotImplementedError

    def read_companions(self, file: MmapTensorFile, prefix: str) -> None:
        """Read into RAM what the file has beside the tensors in `external_names`."""
        raise NotImplementedError

    @property
    def companion_bytes(self) -> int:
        """Bytes in RAM of what `read_companions` has read."""
        raise NotImplementedError

    def release_tensors(self) -> None:
        """Drop the tensors in `external_names`; `attach_file` replaces them."""
        for name in self.external_names:
            delattr(self, name)
            setattr(self, name, torch.empty(0, self.width))

    def attach_file(self, file: MmapTensorFile, prefix: str) -> None:
        """Use the tensors of a file; with `offload="none"` copies of them in RAM.

        Args:
            file: the file.
            prefix: name of this module in it.

        Raises:
            UserError: the file belongs to another student.
        """
        for name in self.external_names:
            tensor = file[f"{prefix}.{name}"]
            if (tuple(tensor.shape), tensor.dtype) != self.get_external_type(name):
                raise UserError(
                    f"{prefix}.{name} in {file.path} does not match config.json; replace the file "
                    "with this student's"
                )
            setattr(self, name, tensor.clone() if self.offload == "none" else tensor)
        self.read_companions(file, prefix)
        self._attached_file = file, prefix

    def external_sizes(self) -> dict[str, int]:
        """Return the bytes of a file's tensors held in `ram` and left on `disk`."""
        if not self.is_attached:
            return {"ram": 0, "disk": 0}
        num_bytes = sum(getattr(self, name).nbytes for name in self.external_names)
        return {
            "ram": self.companion_bytes + num_bytes * (self.offload == "none"),
            "disk": num_bytes * (self.offload != "none"),
        }

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation mode.

        Raises:
            UserError: a file is attached, whose tensors cannot be trained.
        """
        if mode and self.is_attached:
            raise UserError(
                f"this memory was saved with offload={self.offload} and "
                f"value_dtype={self.value_dtype} and cannot be trained; distill with offload=none "
                "and value_dtype=float32, or keep it in eval mode"
            )
        return super().train(mode)


class MmapTensorsMixin(ExternalTensorsMixin):
    """A table of slots that is saved partly to a file of its own and reads it after loading.

    Args and errors are those of `ExternalTensorsMixin`.
    """

    num_slots: int
    keys: Tensor
    values: Tensor
    output_bias: Tensor
    gains: Tensor | None
    means: Tensor | None
    metric: Tensor | None
    output: Tensor | None

    def __init__(self, value_dtype: str, offload: str) -> None:
        super().__init__(value_dtype, offload)
        self._mmap_tensors: MmapTensors | None = None

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        if self.is_attached and self.offload != "none":
            state["_mmap_tensors"] = None
        return state

    @property
    def mmap_tensors(self) -> MmapTensors | None:
        """What accompanies the tensors of the file; None where no file is attached.

        It follows the parameters to the device that computes, as copies of the file's tensors in
        RAM do: they are no buffers, which a change of the dtype would round. So it does not matter
        who moves the parameters, or when.
        """
        device = self.output_bias.device
        attached = self._mmap_tensors
        if attached is not None and device.type != "meta" and attached.device != device:
            self._mmap_tensors = attached.to(device)
            for name in self.external_names if self.offload == "none" else ():
                setattr(self, name, getattr(self, name).to(device))
        return self._mmap_tensors

    def gather_values(self, ids: Tensor) -> Tensor:
        """Return the values `(n, width)` of the slots `ids` `(n,)` in the type of computation."""
        attached = self.mmap_tensors
        scales = (
            None
            if attached is None or attached.scales is None
            else attached.scales.index_select(0, ids)
        )
        rows = self.values.index_select(0, ids.to(self.values.device)).to(ids.device)
        return dequantize_rows(rows, scales, self.output_bias.dtype)

    def sum_values(self, ids: Tensor, weights: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Sum weighted values per token: `(tokens, width)`.

        Args:
            ids: slots, `(tokens, n)`, or `(n,)` with `offsets`.
            weights: of the same shape.
            offsets: where each token's ids begin, `(tokens,)`.
        """
        weights = weights.to(self.output_bias.dtype)
        if self._sums_in_place(weights):
            return F.embedding_bag(
                ids, self.values, offsets, per_sample_weights=weights, mode="sum"
            )
        return sum_embedding_bags(self.gather_values, self.width, ids, weights, offsets)

    def sum_token_values(self, ids: Tensor, weights: Tensor) -> Tensor:
        """Sum the weighted values of one token, ids and weights `(n,)`: `(width,)`.

        A bag is summed by one thread and copies no row, so the ids are split over bags.
        """
        weights = weights.to(self.output_bias.dtype)
        table = self.values
        if not self._sums_in_place(weights):
            table, ids = self.gather_values(ids), torch.arange(len(ids), device=ids.device)
        offsets = torch.arange(NUM_BAGS, device=ids.device) * (len(ids) // NUM_BAGS)
        return F.embedding_bag(ids, table, offsets, per_sample_weights=weights, mode="sum").sum(0)

    def _sums_in_place(self, weights: Tensor) -> bool:
        """Return whether rows can be summed without being converted or moved."""
        is_mapped = self.mmap_tensors is not None and self.values.device != weights.device
        return self.values.dtype == weights.dtype and not is_mapped

    @property
    def external_names(self) -> tuple[str, ...]:
        """Names of the tensors that are saved in that file instead of among the weights."""
        names = ("values",) if self.offload == "none" else ("values", "metric")
        names = (*names, "keys", "gains") if self.offload == "slots" else names
        return tuple(
            name for name in names if self.has_external_tensors and getattr(self, name) is not None
        )

    @torch.no_grad()
    def export_specs(self) -> dict[str, TensorSpec]:
        """Describe what the file of this memory holds, by name; values in `value_dtype`."""
        assert self._mmap_tensors is None, "it has a file already, which can be copied"
        encoded, scales = quantize_rows(self.values, self.value_dtype)
        values = dequantize_rows(encoded, scales, self.values.dtype)
        key_codes, gain_codes = (
            None if tensor is None or self.offload != "slots" else Int8Matrix(tensor)
            for tensor in (self.keys, self.gains)
        )
        mmap_tensors = MmapTensors(
            scales,
            compute_value_norms(values, self.metric, self.output),
            None if self.means is None else self.means @ values,
            key_codes,
            gain_codes,
        )
        external = {
            name: make_spec(getattr(self, name).float())
            for name in self.external_names
            if name != "values"
        }
        return {"values": make_spec(encoded), **external, **mmap_tensors.to_specs()}

    def get_external_type(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Return the shape and the type in the file of a tensor in `external_names`."""
        num_rows = self.width if name == "metric" else self.num_slots
        dtype = VALUE_TYPES[self.value_dtype] if name == "values" else torch.float32
        return (num_rows, self.width), dtype

    def read_companions(self, file: MmapTensorFile, prefix: str) -> None:
        """Read into RAM what accompanies the tensors of the file."""
        self._mmap_tensors = MmapTensors.from_file(file, prefix)

    @property
    def companion_bytes(self) -> int:
        """Bytes in RAM of what accompanies the tensors of the file."""
        return 0 if self._mmap_tensors is None else self._mmap_tensors.num_bytes

    def check_attached(self) -> None:
        """Raise `UserError` where the tensors are in a file that is not attached."""
        if not len(self.values):
            raise_not_attached()


def compute_value_norms(values: Tensor, metric: Tensor | None, output: Tensor | None) -> Tensor:
    """Compute the norms of values `(n, width)` in a metric after the output projection: `(n,)`."""
    if metric is not None:
        values = (values if output is None else values @ output.t()) @ metric
    return values.norm(dim=-1)
