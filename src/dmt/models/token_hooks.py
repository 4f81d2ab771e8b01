"""Hooks that tell the memories of a student which tokens they are at.

Before a pass of the backbone the last token ids up to each token are listed, those of earlier
passes from the cache. Each transformer block receives them as an argument of `forward`, so that one
that is computed again (gradient checkpointing) has those of its own pass, and sets them for its
memory (`dmt.memory.token_context`).
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dmt.errors import UserError
from dmt.memory.base import MemoryLayer
from dmt.memory.token_context import (
    PADDING_TOKEN,
    UNKNOWN_TOKEN,
    list_contexts,
    take_last,
    use_contexts,
)
from dmt.models.architectures import Architecture, get_architecture
from dmt.models.class_extension import extend_class, reduce_extended
from dmt.models.text_history import (
    find_cache,
    find_positions,
    find_token_ids,
    is_paged,
    read_history,
    write_history,
)

ARGUMENT = "token_texts"  # of the backbone and its transformer blocks, set by the hooks
HISTORY_NAME = "tokens"  # of what a cache holds for the hooks


@dataclass(frozen=True)
class _TokenTexts:
    """The text of a pass.

    Attributes:
        history: ids and positions `(batch, earlier + time, 2)`, those in the cache first.
        contexts: the last ids up to each token of the pass `(batch, time, length)`.
        derived: what memories have derived from these, which those of other layers find.
    """

    history: Tensor
    contexts: Tensor
    derived: dict[Hashable, tuple[Tensor, ...]] = field(default_factory=dict)


def register_token_hooks(backbone: nn.Module, architecture: Architecture) -> None:
    """Give the memories of a student's backbone the token ids that they read, if any do."""
    length = max(
        (
            block.context_length
            for block in architecture.blocks(backbone)
            if isinstance(block, MemoryLayer)
        ),
        default=0,
    )
    if not length:
        return
    names = tuple(inspect.signature(backbone.forward).parameters)
    backbone.register_forward_pre_hook(
        partial(_before_pass, length=length, argument_names=names), with_kwargs=True
    )
    backbone.register_forward_hook(_after_pass, with_kwargs=True)
    for layer in architecture.transformer_blocks(backbone):
        extend_class(layer, _TextLayer)


class _TextLayer(nn.Module):
    """Added to the class of a transformer block: takes the text of a pass for its memory."""

    __reduce__ = reduce_extended

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        texts = kwargs.pop(ARGUMENT, None)
        with nullcontext() if texts is None else use_contexts(texts.contexts, texts.derived):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


def _before_pass(
    backbone: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    length: int,
    argument_names: tuple[str, ...],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    arguments = dict(zip(argument_names, args, strict=False)) | kwargs
    if is_paged(backbone, arguments):
        raise UserError(
            "this student looks tokens up, which continuous batching does not tell it; generate "
            "with its generate method"
        )
    tokens = find_token_ids(backbone, arguments)
    if tokens is None:
        return args, kwargs  # transformers says what is missing
    tokens = _hide_padding(tokens, arguments.get("attention_mask"))
    texts = _extend_text(
        tokens, find_positions(tokens, arguments), arguments.get("past_key_values"), length
    )
    if getattr(backbone, "slots_file", None) is not None and not torch.compiler.is_compiling():
        _prefetch_rows(backbone, texts)
    return args, {**kwargs, ARGUMENT: texts}


def _prefetch_rows(backbone: Any, texts: _TokenTexts) -> None:
    """Let memories read ahead what the text tells them to read from disk."""
    with use_contexts(texts.contexts, texts.derived):
        for block in get_architecture(backbone.config.model_type).blocks(backbone):
            if isinstance(block, MemoryLayer):
                block.prefetch(texts.contexts.shape[:-1])


def _hide_padding(tokens: Tensor, mask: Any) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < tokens.shape[1]:
        return tokens
    return tokens.masked_fill(mask[:, -tokens.shape[1] :] == 0, PADDING_TOKEN)


def _extend_text(tokens: Tensor, positions: Tensor | None, past: Any, length: int) -> _TokenTexts:
    earlier, num_earlier = read_history(past, HISTORY_NAME)
    if earlier is None:
        # Of a cache that was built by hand, such as one of prefix tuning, no text is known.
        earlier = tokens.new_full((tokens.shape[0], num_earlier, 2), UNKNOWN_TOKEN)
        earlier[..., 1] = torch.arange(num_earlier, device=tokens.device)
    earlier = earlier.to(tokens.device)
    if positions is None:
        first = earlier[:, -1:, 1] + 1 if earlier.shape[1] else tokens.new_zeros(1, 1)
        positions = first + torch.arange(tokens.shape[1], device=tokens.device)
    new = torch.stack([tokens, positions.expand_as(tokens).to(tokens)], dim=-1)
    history = torch.cat([earlier, new], dim=1)
    recent = torch.cat([take_last(earlier, length - 1), new], dim=1)
    contexts = list_contexts(recent[..., 0], length, recent[..., 1])
    return _TokenTexts(history, contexts[:, contexts.shape[1] - tokens.shape[1] :])


def _after_pass(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    texts = kwargs.get(ARGUMENT)
    if texts is not None:
        write_history(find_cache(output), HISTORY_NAME, texts.history)
