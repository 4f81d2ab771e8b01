"""Hidden states of a model at the places that matter to facts, in padded batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dmt.data.encoding import start_of
from dmt.distill.signals import observe
from dmt.errors import UserError

TOKENS = 2_048
"""Tokens, padding included, that a batch has at most where it has more than one text."""


def encoded(tokenizer: Any, text: str, start: bool = True) -> list[int]:
    """Token ids of a text, with the token that begins a document where `start`."""
    return (start_of(tokenizer) if start else []) + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def check_length(model: PreTrainedModel, ids: Sequence[int], what: str) -> None:
    """Raise `UserError` where `what` has more tokens than the model has positions."""
    most = model.config.max_position_embeddings
    if len(ids) > most:
        raise UserError(f"{what} has {len(ids):,} tokens, the model reads {most:,} at most; give a shorter text")


@torch.no_grad()
def states_at(
    model: PreTrainedModel, texts: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]], layers: Sequence[int]
) -> dict[int, Tensor]:
    """What the feed-forward block of each of `layers` is given, `(n, width)`, at the `wanted` positions of `texts` (token ids).

    In the order of the texts, and of the positions of each.
    """
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    order: list[int] = []
    device = next(model.parameters()).device
    for group in batches([len(text) for text in texts]):
        seen = observe(model, padded([texts[i] for i in group]).to(device), blocks=True)
        rows = torch.tensor([at for at, i in enumerate(group) for _ in wanted[i]], device=device)
        columns = torch.tensor([position for i in group for position in wanted[i]], device=device)
        for layer in layers:
            found[layer].append(seen.block_inputs[layer][rows, columns])
        order += group
    back = torch.tensor([i for i in order for _ in wanted[i]], device=device).argsort(stable=True)
    return {layer: torch.cat(states)[back] for layer, states in found.items()}


def batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Numbers of texts in batches of about `TOKENS` tokens, those of like length together."""
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if group and (len(group) + 1) * lengths[i] > TOKENS:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def padded(texts: Sequence[Sequence[int]]) -> Tensor:
    """Token ids `(batch, time)`; padding stands on the right, where a causal model cannot see it."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(list(text)) for text in texts], batch_first=True)
