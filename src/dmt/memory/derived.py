"""Tensors made from others that rarely change: made once, and again when one of those is another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Derived:
    """Keeps what is derived, by name, in full precision: under autocast it would be another tensor than without."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Any, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, name: str, make: Callable[..., Tensor], sources: tuple[Tensor | None, ...], again: bool = False) -> Tensor:
        """`make(*sources)`, from memory where no source has been written to or exchanged since; `again` makes it anew.

        A write that goes around autograd's version counter (`tensor.data`) is not noticed.
        """
        there = [tensor for tensor in sources if tensor is not None]
        known = not again and not any(tensor.is_inference() for tensor in there)
        state = [(tensor.data_ptr(), tensor._version, tensor.dtype) for tensor in there] if known else None
        if state is None or name not in self._kept or self._kept[name][0] != state:
            with torch.autocast(there[0].device.type, enabled=False):
                self._kept[name] = state, make(*sources)
        return self._kept[name][1]
