"""The text of a pass and of the cache before it: token ids and positions.

Facts and memories that look tokens up read the text itself, not hidden states. Its ids are among
the arguments of a backbone's forward pass; those of earlier passes are stored in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from dmt.memory.token_context import UNKNOWN_TOKEN
from dmt.models.class_extension import extend_class, reduce_extended

MAX_SCORES = 16_000_000  # numbers that `_find_embedding_ids` computes at once


class _HistoryLayer(CacheLayerMixin):
    """Added to a cache's first layer: the text, which is cut, sorted and copied as its keys are.

    The cache keeps as many layers as the model has, for code that counts them.
    """

    _layer_type = None  # transformers registers layers that have one
    text_histories: Mapping[str, Tensor] = {}
    __reduce__ = reduce_extended

    def crop(self: Any, *args: Any, **kwargs: Any) -> None:
        length = int(self.get_seq_length())
        super().crop(*args, **kwargs)  # type: ignore[misc]
        removed = length - int(self.get_seq_length())
        self._change_histories(lambda history: history[:, : history.shape[1] - removed])

    def reset(self: Any) -> None:
        super().reset()  # type: ignore[misc]
        self.text_histories = {}

    def reorder_cache(self: Any, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._change_histories(lambda history: history[beam_idx.to(history.device)])

    def batch_repeat_interleave(self: Any, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._change_histories(lambda history: history.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self: Any, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._change_histories(lambda history: history[indices])

    def _change_histories(self, change: Callable[[Tensor], Tensor]) -> None:
        self.text_histories = {
            name: change(history) for name, history in self.text_histories.items()
        }


def find_cache(output: Any) -> Cache | None:
    """Return the cache in what a pass returns, with `return_dict=False` a tuple."""
    values = output if isinstance(output, tuple) else output.values()
    return next((value for value in values if isinstance(value, Cache)), None)


def read_history(past: Any, name: str) -> tuple[Tensor | None, int]:
    """Return what `write_history` stored in a cache, and the number of tokens in the cache.

    Args:
        past: the cache of a pass; None where there is none.
        name: of the history.

    Returns:
        The history `(batch, time, ...)`; None where none was stored.
    """
    layers = getattr(past, "layers", None)
    if not layers:
        return None, 0
    history = getattr(layers[0], "text_histories", {}).get(name)
    return history, int(past.get_seq_length())


def write_history(past: Any, name: str, history: Tensor) -> None:
    """Store a history `(batch, time, ...)` of a text in its cache, which may be None."""
    layers = getattr(past, "layers", None)
    if not layers:
        return
    extend_class(layers[0], _HistoryLayer)
    layers[0].text_histories = {**layers[0].text_histories, name: history}


def is_paged(backbone: Any, arguments: Mapping[str, Any]) -> bool:
    """Check whether a pass keeps its keys in pages, where a row holds tokens of several texts."""
    implementation = str(getattr(backbone.config, "_attn_implementation", ""))
    return arguments.get("cache") is not None or implementation.startswith("paged|")


def find_positions(tokens: Tensor, arguments: Mapping[str, Any]) -> Tensor | None:
    """Return the positions of tokens `(batch, time)` in their documents, where they are stated."""
    positions, starts = arguments.get("position_ids"), arguments.get("cu_seq_lens_q")
    if positions is not None:
        return positions if positions.shape[-1:] == tokens.shape[1:] else None
    if starts is None:
        return None
    indices = torch.arange(tokens.shape[1], device=tokens.device)
    starts = starts[:-1].to(tokens.device)
    return (indices - starts[torch.bucketize(indices, starts, right=True) - 1]).unsqueeze(0)


def find_token_ids(
    backbone: Any, arguments: Mapping[str, Any], *, search: bool = True
) -> Tensor | None:
    """Return the token ids `(batch, time)` of a pass.

    Args:
        backbone: runs the pass.
        arguments: of its forward pass, by name.
        search: whether ids are searched where the pass is given embeddings; else all are unknown.

    Returns:
        The ids, of an embedding that is in no table `UNKNOWN_TOKEN`; None without any argument.
    """
    tokens, embeddings = arguments.get("input_ids"), arguments.get("inputs_embeds")
    if tokens is not None or embeddings is None:
        return tokens
    if not search:
        return embeddings.new_full(embeddings.shape[:2], UNKNOWN_TOKEN, dtype=torch.long)
    return _find_embedding_ids(embeddings, backbone.get_input_embeddings())


@torch.no_grad()
def _find_embedding_ids(embeddings: Tensor, table: nn.Module) -> Tensor:
    """Return the ids `(batch, time)` of embeddings `(batch, time, width)`.

    An embedding that is not in the table, such as one of prompt tuning, is an unknown token.
    """
    rows = table.weight
    assert isinstance(rows, Tensor), "an embedding has one weight"
    flat = embeddings.reshape(-1, embeddings.shape[-1])
    half_norms = rows.float().square().sum(1) / 2
    ids = torch.cat(
        [
            (chunk.float() @ rows.float().t() - half_norms).argmax(1)
            for chunk in flat.split(max(1, MAX_SCORES // len(rows)))
        ]
    )
    is_known = (rows[ids] == flat).all(-1)
    return ids.masked_fill(~is_known, UNKNOWN_TOKEN).view(embeddings.shape[:2])
