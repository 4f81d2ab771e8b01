"""Calibration of the layer that questions are compared in, and of how near is near enough.

Two phrasings of a question should be near, two different questions should not. The bank of
relations in `assets/relations.json` asks common questions in several phrasings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from dmt.errors import UserError
from dmt.matching.relations import (
    RelationMatcher,
    StateSamples,
    fit_matcher,
    list_bank_clauses,
)
from dmt.models.fact_matching import PLACEHOLDER, SUBJECT, TextCodec
from dmt.models.forward import collect_hidden_states, encode_text

PROSE_WINDOW_TOKENS = 128  # length of a window of prose, or as many as the model has positions
PROSE_TOKENS = 4_096  # tokens of prose that are measured
PREFIX_STRIDE = 3  # of the places where phrasings of the bank are cut, one in so many is taken
# Share of phrasings that are recognized, below which a model does not know their language.
MIN_PARAPHRASE_RECALL = 0.1
RECALL_TOLERANCE = 0.005  # share of paraphrases within which a lower layer is as good


def calibrate(
    model: PreTrainedModel,
    tokenizer: Any,
    codec: TextCodec,
    prose: Sequence[str],
    layers: Sequence[int],
) -> dict[int, RelationMatcher]:
    """Calibrate each of `layers`.

    Args:
        model: without facts, or with its facts disabled.
        tokenizer: of the model.
        codec: the same tokenizer as facts use it.
        prose: held-out documents.
        layers: the candidates for the key layer.

    Raises:
        UserError: there is too little prose.
    """
    max_tokens = model.config.max_position_embeddings
    window_length = min(PROSE_WINDOW_TOKENS, max_tokens)
    prose_windows = _tokenize_windows(tokenizer, prose, window_length)
    if not prose_windows:
        raise UserError(
            f"calibration needs held-out prose of {window_length} tokens at least; give a longer "
            "text"
        )
    prose_positions = [list(range(1, len(text))) for text in prose_windows]
    prose_states = collect_hidden_states(model, prose_windows, prose_positions, layers)
    clauses = list_bank_clauses()
    complete = {clause.text for clause in clauses}
    texts, positions, prefixes = [], [], []
    for index, clause in enumerate(clauses):
        ids = codec.encode_clause(clause.text)[-max_tokens:]
        head = clause.text.split(SUBJECT)[0] + PLACEHOLDER
        incomplete = []
        for position in range(index % PREFIX_STRIDE, len(ids) - 1, PREFIX_STRIDE):
            text = codec.decode(ids[: position + 1]).strip()
            prefix = text.replace(PLACEHOLDER, SUBJECT)
            is_incomplete = len(text) > len(head) and text.startswith(head)
            if is_incomplete and prefix not in complete:
                incomplete.append(position)
                prefixes.append((prefix, index))
        texts.append(ids)
        positions.append([*incomplete, len(ids) - 1])
    states = collect_hidden_states(model, texts, positions, layers)
    ends = [index for chosen in positions for index in [False] * (len(chosen) - 1) + [True]]
    is_end = torch.tensor(ends, device=model.device)
    return {
        layer: fit_matcher(
            prefixes,
            StateSamples(prose_states[layer], states[layer][is_end], states[layer][~is_end]),
        )
        for layer in layers
    }


def list_candidate_layers(num_layers: int) -> list[int]:
    """List the candidates for the key layer: at a quarter, half, three quarters and the end."""
    return sorted({min(num_layers - 1, num_layers * quarter // 4) for quarter in (1, 2, 3, 4)})


def choose_key_layer(matchers: dict[int, RelationMatcher]) -> int:
    """Choose the lowest layer that recognizes about as many paraphrases as the best.

    For a model that does not know the language of the bank this is the lowest layer, where states
    are nearest to the words.
    """
    best_recall = max(matcher.paraphrase_recall for matcher in matchers.values())
    if best_recall < MIN_PARAPHRASE_RECALL:
        return min(matchers)
    return min(
        layer
        for layer, matcher in matchers.items()
        if matcher.paraphrase_recall >= best_recall - RECALL_TOLERANCE
    )


def _tokenize_windows(tokenizer: Any, prose: Sequence[str], length: int) -> list[list[int]]:
    """Cut windows of `length` tokens from all documents in turn."""
    count = PROSE_TOKENS // length
    windows: list[list[int]] = []
    for index in range(count):
        if not prose:
            break
        text = prose[index % len(prose)]
        start = index // len(prose) * 6 * length
        ids = encode_text(tokenizer, text[start : start + 8 * length])[:length]
        if len(ids) == length:
            windows.append(ids)
    return windows
