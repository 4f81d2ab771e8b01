"""Things made from tensors that rarely change: made once, and again when one of those is another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Derived:
    """Keeps what is derived, by name, in full precision: under autocast it would be another tensor than without."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Any, Any]] = {}
        self._waited: dict[str, int] = {}

    @torch.no_grad()
    def __call__(
        self, name: str, make: Callable[..., Any], sources: tuple[Tensor | None, ...], again: bool = False, patience: int = 1
    ) -> Any:
        """`make(*sources)`, from memory where no source has been written to or exchanged since; `again` makes it anew.

        With `patience` more than 1 it is made anew only at the so-manieth call that found a source changed. A write that
        goes around autograd's version counter (`tensor.data`) is not noticed.
        """
        there = [tensor for tensor in sources if tensor is not None]
        known = not again and not any(tensor.is_inference() for tensor in there)
        state = [(tensor.data_ptr(), tensor._version, tensor.dtype) for tensor in there] if known else None
        if state is None or name not in self._kept or self._kept[name][0] != state:
            self._waited[name] = self._waited.get(name, patience - 1) + 1
            if self._waited[name] >= patience:
                with torch.autocast(there[0].device.type, enabled=False):
                    self._kept[name] = state, make(*sources)
                self._waited[name] = 0
        return self._kept[name][1]
