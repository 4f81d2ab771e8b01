"""Hidden states of a model at the places that matter to facts, in padded batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dmt.distill.signals import observe
from dmt.errors import UserError

TOKENS = 2_048
"""Tokens, padding included, that a batch has at most where it has more than one text."""


@dataclass(frozen=True)
class Places:
    """States at some places of some texts, arrays over the same `n` places.

    Attributes:
        inputs: by layer `(n, width)`: what the feed-forward block is given.
        streams: by layer `(n, width)`: the state after the layer.
        texts: which text each place is in.
        positions: where in it.
    """

    inputs: dict[int, Tensor]
    streams: dict[int, Tensor]
    texts: Tensor
    positions: Tensor


def start_of(tokenizer: Any) -> list[int]:
    """What a text begins with, for the model."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


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
) -> Places:
    """States of `texts` (token ids) at the `wanted` positions of each, in the order of the texts."""
    inputs: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    streams: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    order: list[int] = []
    device = next(model.parameters()).device
    for group in batches([len(text) for text in texts]):
        tokens = padded([texts[i] for i in group]).to(device)
        seen = observe(model, tokens, blocks=True)
        rows = torch.tensor([at for at, i in enumerate(group) for _ in wanted[i]], device=device)
        columns = torch.tensor([position for i in group for position in wanted[i]], device=device)
        for layer in layers:
            inputs[layer].append(seen.block_inputs[layer][rows, columns])
            streams[layer].append(seen.streams[layer][rows, columns])
        order += group
    places = torch.tensor([i for i in order for _ in wanted[i]], dtype=torch.long)
    positions = torch.tensor([position for i in order for position in wanted[i]], dtype=torch.long)
    back = places.argsort(stable=True)
    in_order = [{layer: torch.cat(found)[back.to(device)] for layer, found in each.items()} for each in (inputs, streams)]
    return Places(in_order[0], in_order[1], places[back], positions[back])


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
