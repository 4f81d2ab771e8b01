"""Which tokens a memory is at: the last token ids up to each token of the current pass.

Most memories read hidden states alone. One that looks tokens up states how many ids it reads
(`MemoryLayer.context_length`) and gets them with `get_contexts`. A student sets them for each pass,
those before the pass from its cache (`dmt.models.token_hooks`); code that calls a memory itself
sets them with `use_contexts`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor

UNKNOWN_TOKEN = -1  # id before the start of a text, and of an embedding without one
PADDING_TOKEN = -2  # id of what stands in a batch and in no text


class _Contexts(threading.local):
    """The contexts of the tokens that this thread computes, and what was derived from them."""

    current: Tensor | None = None
    derived: dict[Hashable, tuple[Tensor, ...]] | None = None


_contexts = _Contexts()


def list_contexts(tokens: Tensor, length: int, positions: Tensor | None = None) -> Tensor:
    """Return the last `length` ids up to each token, `(batch, time, length)`, its own the last.

    Args:
        tokens: token ids `(batch, time)`. `PADDING_TOKEN` is left out, wherever it stands, and has
            no context.
        length: ids of a context.
        positions: `(batch, time)`; where one does not follow the one before it, a text begins.
            They count on where it is None.
    """
    is_padding = tokens == PADDING_TOKEN
    columns = is_padding.long().argsort(dim=1, stable=True)  # padding goes last, where none sees it
    tokens = tokens.gather(1, columns)
    positions = None if positions is None else positions.gather(1, columns)
    contexts = _list_in_order(tokens, length, positions)
    columns = columns.argsort(dim=1).unsqueeze(-1).expand_as(contexts)
    return contexts.gather(1, columns).masked_fill(is_padding.unsqueeze(-1), UNKNOWN_TOKEN)


def take_last(history: Tensor, count: int) -> Tensor:
    """Return the last entries of a history that are no padding, in order; padding before them.

    Args:
        history: `(batch, time, ...)`, whose first number is a token id.
        count: entries `(batch, count, ...)` to return, fewer where the history is shorter.
    """
    count = min(count, history.shape[1])
    ranks = torch.arange(1, history.shape[1] + 1, device=history.device)
    ranks = ranks * (history[..., 0] != PADDING_TOKEN)
    columns = ranks.topk(count, dim=1).indices.flip(1)
    return history.gather(1, columns.unsqueeze(-1).expand(-1, -1, history.shape[-1]))


def _list_in_order(tokens: Tensor, length: int, positions: Tensor | None) -> Tensor:
    """Return the contexts of texts without padding."""
    contexts = _list_last(tokens, length, UNKNOWN_TOKEN)
    if positions is None:
        return contexts
    # The first is compared with the last, which starts no text in the middle.
    text_ids = (positions != positions.roll(1, 1) + 1).cumsum(1)
    is_other_text = _list_last(text_ids, length, -1) != text_ids.unsqueeze(-1)
    return contexts.masked_fill(is_other_text, UNKNOWN_TOKEN)


def _list_last(values: Tensor, length: int, before: int) -> Tensor:
    # Not padded and unfolded: an exported model could take no other number of tokens.
    ends = torch.arange(values.shape[1], device=values.device).unsqueeze(1)
    indices = ends + torch.arange(1 - length, 1, device=values.device)
    return values[:, indices.clamp_min(0)].masked_fill(indices < 0, before)


@contextmanager
def use_contexts(
    contexts: Tensor | None, derived: dict[Hashable, tuple[Tensor, ...]] | None = None
) -> Iterator[None]:
    """Set the contexts of memories that are called inside.

    Args:
        contexts: ids `(..., length)`; None changes nothing.
        derived: what memories have derived from them, to which others add.
    """
    previous = _contexts.current, _contexts.derived
    if contexts is not None:
        _contexts.current, _contexts.derived = contexts, {} if derived is None else derived
    try:
        yield
    finally:
        _contexts.current, _contexts.derived = previous


def get_contexts(length: int, shape: torch.Size) -> Tensor:
    """Return the last `length` ids up to each token that a memory is called for.

    Args:
        length: ids of a context.
        shape: that of the tokens, such as `(batch, time)`.

    Returns:
        Ids `(*shape, length)`, the token's own the last; unknown ones are `UNKNOWN_TOKEN`.

    Raises:
        RuntimeError: nobody has set them, or for other tokens.
    """
    contexts = peek_contexts()
    if contexts is None:
        raise RuntimeError(
            "this memory looks tokens up, and is called without their ids; call it in a student, "
            "or inside dmt.memory.token_context.use_contexts"
        )
    if contexts.shape[:-1] != shape or contexts.shape[-1] < length:
        raise RuntimeError(
            f"this memory is called for tokens of shape {tuple(shape)} and contexts of {length} "
            f"ids, and the contexts have shape {tuple(contexts.shape)}"
        )
    return contexts[..., contexts.shape[-1] - length :]


def derive_from_contexts(
    key: Hashable, length: int, shape: torch.Size, derive: Callable[[Tensor], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """Return what follows from contexts alone, computed once for all layers of a pass.

    Args:
        key: names `derive`, with all that it depends on but the contexts.
        length: ids of a context.
        shape: that of the tokens.
        derive: computes it from the contexts `(*shape, length)`.
    """
    contexts, derived = get_contexts(length, shape), _contexts.derived
    assert derived is not None, "set with the contexts"
    if key not in derived:
        derived[key] = derive(contexts)
    return derived[key]


def list_context_tensors() -> list[Tensor]:
    """Return the contexts that are set in this thread and what was derived from them."""
    if _contexts.current is None:
        return []
    return [_contexts.current, *chain.from_iterable((_contexts.derived or {}).values())]


def peek_contexts() -> Tensor | None:
    """Return the contexts that are set in this thread, None where there are none."""
    return _contexts.current
