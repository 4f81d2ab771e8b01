"""A table of rows that a memory reads by number, in RAM or in the file of a saved student."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmt.memory.mmap_tensors import (
    VALUE_TYPES,
    ExternalTensorsMixin,
    MmapTensorFile,
    TensorSpec,
    dequantize_rows,
    gather_rows,
    make_spec,
    prefetch_rows,
    quantize_rows,
    raise_not_attached,
    sum_embedding_bags,
)


class LookupTable(ExternalTensorsMixin):
    """Rows `(num_rows, width)` that are read by number.

    Args:
        num_rows: rows of the table.
        width: numbers of a row.
        learn_rows: whether rows have a gradient.
        value_dtype: type of saved rows; `int8` has a scale for each row.
        offload: `values` leaves the rows of a saved student in the file.
    """

    def __init__(
        self,
        num_rows: int,
        width: int,
        *,
        learn_rows: bool = True,
        value_dtype: str = "float32",
        offload: str = "none",
    ) -> None:
        super().__init__(value_dtype, offload)
        self.num_rows, self.width = num_rows, width
        self.rows: Tensor = nn.Parameter(torch.empty(num_rows, width), requires_grad=learn_rows)
        self.scales: Tensor | None = None  # of int8 rows `(num_rows,)`, in RAM

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Map ids `(...)` to rows `(..., width)` of a type, on the device of the ids.

        Raises:
            UserError: the rows are in a file that is not open.
        """
        self._prepare(ids.device)
        scales = None if self.scales is None else self.scales[ids]
        return dequantize_rows(gather_rows(self.rows, ids), scales, dtype)

    def sum_rows(self, ids: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """Return weighted sums of rows `(tokens, width)` of a type.

        Args:
            ids: `(tokens, n)`.
            weights: of the same shape.
            dtype: type of the sums.

        Raises:
            UserError: the rows are in a file that is not open.
        """
        self._prepare(ids.device)
        if self.is_attached:
            gather = partial(self, dtype=dtype)
            return sum_embedding_bags(gather, self.width, ids, weights.to(dtype))
        weights = weights.to(self.rows.dtype)
        return F.embedding_bag(ids, self.rows, per_sample_weights=weights, mode="sum").to(dtype)

    @property
    def is_on_disk(self) -> bool:
        """Whether each row is read from the file."""
        return self.is_attached and self.offload != "none"

    def prefetch(self, ids: Tensor) -> None:
        """Let the system begin to read the rows of ids `(...)` from the file."""
        prefetch_rows(self.rows, ids.flatten().cpu())

    def _prepare(self, device: torch.device) -> None:
        """Move what is in RAM and no parameter to the device where it is used.

        Raises:
            UserError: the rows are in a file that is not open.
        """
        if not len(self.rows):
            raise_not_attached()
        if not self.is_attached:
            return
        if self.scales is not None and self.scales.device != device:
            self.scales = self.scales.to(device)
        if self.offload == "none" and self.rows.device != device:
            self.rows = self.rows.to(device)

    @property
    def external_names(self) -> tuple[str, ...]:
        """The rows, where they are saved in the file instead of among the weights."""
        return ("rows",) if self.has_external_tensors else ()

    def get_external_type(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Return the shape and the type of the rows in the file."""
        return (self.num_rows, self.width), VALUE_TYPES[self.value_dtype]

    @torch.no_grad()
    def export_specs(self) -> dict[str, TensorSpec]:
        """Describe the rows in the type in which they are saved, and their scales."""
        assert not self.is_attached, "it has a file already, which can be copied"
        encoded, scales = quantize_rows(self.rows, self.value_dtype)
        specs = {"rows": make_spec(encoded)}
        return specs if scales is None else specs | {"scales": make_spec(scales.float())}

    def read_companions(self, file: MmapTensorFile, prefix: str) -> None:
        """Read the scales of int8 rows."""
        name = f"{prefix}.scales"
        self.scales = file[name].clone() if name in file else None

    @property
    def companion_bytes(self) -> int:
        """Bytes of the scales."""
        return 0 if self.scales is None else self.scales.nbytes
