"""Before a fact is in the book: its rows, how near is near enough, and whether it is known or contradicts another.

One gradient a fact: what a row has to add to a block's answer so that the model says the fact.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from dmt.editing.calibration import Calibration
from dmt.editing.fact import Fact
from dmt.errors import UserError
from dmt.memory.edit_memory import PhraseMatcher
from dmt.memory.slot_table import TensorCache
from dmt.models.architectures import get_architecture
from dmt.models.fact_hooks import SUBJECT_WINDOW
from dmt.models.forward import (
    batch_by_length,
    capture,
    check_length,
    encode_text,
    forward_with_activations,
    pad_token_ids,
)
from dmt.store.records import FactRecord

SCALES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Lengths of a value that are tried, as multiples of the mean length of states there."""
COVARIANCE_DAMPING = 1.0
"""Added to every direction's variance among the head's rows, as a share of the mean; .001 to 1 do as well (EXPERIMENTS.md)."""
CONFIDENT_PROB = 0.99
"""The smallest scale is taken with which the answer is as likely as this; without one, that which makes it likeliest."""


_HEAD_COVARIANCES: WeakKeyDictionary[Any, TensorCache] = WeakKeyDictionary()
"""Of each head what is made of it once: with a large vocabulary it costs as much as a pass through a small model."""


@dataclass(frozen=True)
class TokenEdit:
    """One token of a fact's answer, not yet a row.

    Attributes:
        fact: number of the fact among those drafted.
        lead: token ids of the answer before it.
        key: `(width,)` the state in which it is to be said.
        value: `(width,)` what makes the model say it.
        likely: probability of the token with that value.
        before: probability without.
        scale: which of `SCALES` it is.
    """

    fact_index: int
    prefix_ids: tuple[int, ...]
    key: Tensor
    value: Tensor
    prob_after: float
    prob_before: float
    scale: float


def compute_edits(
    model: PreTrainedModel, tokenizer: Any, facts: Sequence[Fact], key_layer: int, value_layer: int
) -> list[TokenEdit]:
    """Rows for `facts`, heard in layer `listens` and said in `answers`: one gradient, and a forward pass for each scale.

    Raises:
        UserError: a fact is longer than the model reads.
    """
    prompt_ids = [encode_text(tokenizer, fact.prompt) for fact in facts]
    answer_ids = [
        encode_text(tokenizer, fact.answer + fact.closing, add_prefix=False) for fact in facts
    ]
    for fact, prompt, answer in zip(facts, prompt_ids, answer_ids, strict=True):
        check_length(model, [*prompt, *answer], f"the fact {fact.prompt[:40]!r}")
    edits: list[TokenEdit] = []
    for batch in batch_by_length(
        [len(p) + len(a) for p, a in zip(prompt_ids, answer_ids, strict=True)]
    ):
        edits += _compute_batch_edits(
            model,
            [prompt_ids[i] for i in batch],
            [answer_ids[i] for i in batch],
            batch,
            key_layer,
            value_layer,
        )
    return sorted(edits, key=lambda edit: (edit.fact_index, len(edit.prefix_ids)))


def choose_value_layer(
    model: PreTrainedModel,
    tokenizer: Any,
    facts: Sequence[Fact],
    key_layer: int,
    layers: Sequence[int],
    max_facts: int = 8,
) -> tuple[int, dict[int, float]]:
    """Of `layers` not below `listens`, the one in which one gradient does most for the first facts; share that it makes sure.

    Of equally good ones the highest: what is added there goes through least and costs least.
    """
    shares = {}
    for layer in sorted((layer for layer in layers if layer >= key_layer), reverse=True):
        edits = compute_edits(model, tokenizer, facts[:max_facts], key_layer, layer)
        shares[layer] = sum(edit.prob_after >= CONFIDENT_PROB for edit in edits) / max(
            1, len(edits)
        )
    return max(shares, key=lambda layer: shares[layer]), shares


def _compute_batch_edits(
    model: PreTrainedModel,
    prompts: list[list[int]],
    answers: list[list[int]],
    fact_indices: list[int],
    key_layer: int,
    value_layer: int,
) -> list[TokenEdit]:
    device = next(model.parameters()).device
    tokens = pad_token_ids(
        [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    ).to(device)
    positions = [
        (index, len(prompt) - 1 + offset)
        for index, prompt in enumerate(prompts)
        for offset in range(len(answers[index]))
    ]
    rows, columns = (
        torch.tensor(coordinates, device=device) for coordinates in zip(*positions, strict=True)
    )
    targets = torch.tensor([token for answer in answers for token in answer], device=device)
    solution = solve_value(model, tokens, rows, columns, targets, value_layer, key_layer)
    edits = []
    for index, (row, column) in enumerate(positions):
        prefix_ids = tuple(answers[row][: column - len(prompts[row]) + 1])
        stats = (
            float(values[index])
            for values in (solution.prob_after, solution.prob_before, solution.scales)
        )
        edits.append(
            TokenEdit(
                fact_indices[row],
                prefix_ids,
                solution.keys[index].cpu(),
                solution.values[index].cpu(),
                *stats,
            )
        )
    return edits


@dataclass(frozen=True)
class ValueSolution:
    """What makes a model say what it should at some places, arrays over the same `n` places.

    Attributes:
        keys: `(n, width)` states in which it should be said.
        values: `(n, width)` what has to be added to a block's answer.
        likely, before: probability of the token with and without it.
        scales: `(n,)` which of `SCALES` it is.
    """

    keys: Tensor
    values: Tensor
    prob_after: Tensor
    prob_before: Tensor
    scales: Tensor


def solve_value(
    model: PreTrainedModel,
    tokens: Tensor,
    rows: Tensor,
    columns: Tensor,
    targets: Tensor,
    value_layer: int,
    key_layer: int,
) -> ValueSolution:
    """What to add at `layer` so that token ids `(batch, time)` go on with `targets` `(n,)` after the places (row, column).

    One gradient of the nats of all targets, with respect to what the block says there, in the metric of the head; its
    length at each place is the smallest of `SCALES` that makes the target sure, tried by a forward pass each.

    Source: the gradient is DESIGN 5's. Its metric is ours: in a vocabulary of 49,152 the plain gradient never reaches 77 % of
        SmolLM2's facts, however long it is made, since a word much like the target overtakes it; so all are (EXPERIMENTS.md).
    """
    with torch.no_grad():
        outputs = forward_with_activations(model, tokens, capture_blocks=True)
        keys = outputs.block_inputs[key_layer][rows, columns].float()
        layer_output = outputs.layer_outputs[value_layer][rows, columns].float()
    is_last = value_layer == len(outputs.layer_outputs) - 1
    compute_logits = (
        _make_last_layer_logits(model, layer_output)
        if is_last
        else _make_inner_layer_logits(model, tokens, rows, columns, value_layer)
    )
    delta = torch.zeros_like(keys, requires_grad=True)
    with torch.enable_grad():
        nll = F.cross_entropy(compute_logits(delta), targets, reduction="none")
        (grad,) = torch.autograd.grad(nll.sum(), delta)
    direction = -F.normalize(_precondition(model, grad), dim=-1) * layer_output.norm(
        dim=-1, keepdim=True
    )
    log_probs = []
    with torch.no_grad():
        for scale in SCALES:
            log_probs.append(
                -F.cross_entropy(compute_logits(scale * direction), targets, reduction="none")
            )
    probs = torch.stack(log_probs).exp()  # (scales, n)
    confident = probs >= CONFIDENT_PROB
    scale_index = torch.where(confident.any(0), confident.long().argmax(0), probs.argmax(0))
    scales = torch.tensor(SCALES, device=tokens.device)[scale_index]
    best_prob = probs.gather(0, scale_index.unsqueeze(0))[0]
    return ValueSolution(
        keys, scales.unsqueeze(-1) * direction, best_prob, (-nll.detach()).exp(), scales
    )


def _precondition(model: PreTrainedModel, grads: Tensor) -> Tensor:
    """Slopes `(n, width)` in the metric in which the head's rows vary alike in all directions, as far as `EVEN` allows.

    What tells a token from those that are written much like it weighs more then, what all have in common less.
    """
    norm: Any = model.get_submodule(get_architecture(model.config.model_type).final_norm)
    head: Any = model.get_output_embeddings()
    cache, weights = _HEAD_COVARIANCES.setdefault(head, TensorCache()), (head.weight, norm.weight)
    return torch.linalg.solve(cache("evened", _compute_head_covariance, weights), grads.t()).t()


def _compute_head_covariance(head: Tensor, scale: Tensor) -> Tensor:
    """Covariance of the head's rows, as the norm before it scales them, and `EVEN` of it in all directions."""
    covariance = torch.cov((head.detach().float() * scale.detach().float()).t(), correction=0)
    return covariance + COVARIANCE_DAMPING * covariance.trace() / len(covariance) * torch.eye(
        len(covariance), device=head.device
    )


def _make_last_layer_logits(model: PreTrainedModel, layer_output: Tensor) -> Any:
    """Logits `(n, vocabulary)` when so much is added to each of the states `(n, width)` after the last layer."""
    norm = model.get_submodule(get_architecture(model.config.model_type).final_norm)
    head = model.get_output_embeddings()
    return lambda delta: head(
        norm((layer_output + delta).to(next(head.parameters()).dtype))
    ).float()


def _make_inner_layer_logits(
    model: PreTrainedModel, tokens: Tensor, rows: Tensor, columns: Tensor, layer: int
) -> Any:
    """The same for a layer below: the whole model runs, and each place hears what is added before it too."""
    block = get_architecture(model.config.model_type).blocks(model)[layer]

    def logits(delta: Tensor) -> Tensor:
        def add_delta(_: int, output: Tensor) -> Tensor:
            return output.index_put((rows, columns), delta.to(output.dtype), accumulate=True)

        with capture({layer: block}, on_output=add_delta):
            return forward_with_activations(model, tokens).logits[rows, columns].float()

    return logits


FALSE_POSITIVE_RATE = 0.01
"""Share of places and questions at which a row may answer although it was not asked (`Calibration.reach`)."""
LATER_TOKEN_RATE_FACTOR = 5
"""A row that waits for a word of the answer before it may be so many times as far away: it cannot be met by chance."""
MIN_SUBJECTLESS_THRESHOLD = 0.8
"""Cosine from which on, at least, a row without a subject answers."""
SAME_QUERY_COSINE = 0.8
"""Cosine from which on two facts about the same subject say the same thing, or contradict each other: safely above what two
different questions about somebody have, so that nothing is replaced that should not be (EXPERIMENTS.md, "Facts")."""


@dataclass(frozen=True)
class WriteResult:
    """What became of a fact that was to be written.

    Attributes:
        what: `written`; `known`, it was there already; or `replaced`, it was written and another one left for it.
        fact: the fact as it is there now.
        old: the one that it contradicted.
        before: probability of its answer before, all tokens together.
        likely: the same now, where it was written.
    """

    status: str
    fact: FactRecord
    replaced_fact: FactRecord | None = None
    prob_before: float = 0.0
    prob_after: float = 0.0


@dataclass(frozen=True)
class PreparedFact:
    """A fact as it would be written.

    Attributes:
        told: without number and rows.
        keys, values: `(tokens, width)`, one for each token of its answer.
        asks: `(width,)` the state that asks for it, as states are compared.
        before, likely: probability of its answer without and with them.
    """

    record: FactRecord
    keys: Tensor
    values: Tensor
    whitened_key: Tensor
    prob_before: float
    prob_after: float


def prepare_facts(
    model: PreTrainedModel,
    tokenizer: Any,
    facts: Sequence[Fact],
    layers: tuple[int, int],
    calibration: Calibration,
    false_positive_rate: float,
) -> list[PreparedFact]:
    """`facts` as they would be written, heard and answered in `layers`; see `drafting` and `Calibration.reach`.

    Raises:
        UserError: a fact is too long for the model, or would not know its own prompt.
    """
    for fact in facts:
        _check_subject(tokenizer, fact)
    edits_by_fact: list[list[Any]] = [[] for _ in facts]
    for edit in compute_edits(model, tokenizer, facts, *layers):
        edits_by_fact[edit.fact_index].append(edit)
    prepared_facts = []
    for fact, edits in zip(facts, edits_by_fact, strict=True):
        keys, values = (
            torch.stack([getattr(edit, name) for edit in edits]) for name in ("key", "value")
        )
        answer_ids = encode_text(tokenizer, fact.answer + fact.closing, add_prefix=False)
        record = make_record(
            tokenizer,
            fact,
            answer_ids,
            compute_thresholds(calibration, keys, false_positive_rate, bool(fact.subject)),
        )
        prob_before, prob_after = (
            float(np.prod([getattr(edit, name) for edit in edits]))
            for name in ("prob_before", "prob_after")
        )
        prepared_facts.append(
            PreparedFact(
                record, keys, values, calibration.whiten(keys[:1])[0], prob_before, prob_after
            )
        )
    return prepared_facts


def compute_thresholds(
    calibration: Calibration, keys: Tensor, false_positive_rate: float, has_subject: bool
) -> Tensor:
    """From which cosine on rows of one fact with the keys `(tokens, width)` answer, `(tokens,)`.

    Args:
        named: whether the fact has a subject.
    """
    thresholds = calibration.thresholds(
        keys, LATER_TOKEN_RATE_FACTOR * false_positive_rate, calibration.min_threshold / 2
    )
    thresholds[:1] = calibration.thresholds(keys[:1], false_positive_rate)
    return thresholds if has_subject else thresholds.clamp_min(MIN_SUBJECTLESS_THRESHOLD)


def _check_subject(tokenizer: Any, fact: Fact) -> None:
    """Raise `UserError` where a fact's own prompt does not name its subject in a way, or at a time, that it would notice."""
    if not fact.subject:
        return
    prompt_ids = torch.tensor([encode_text(tokenizer, fact.prompt)])
    spellings = [
        encode_text(tokenizer, spelling, add_prefix=False)
        for spelling in (fact.subject, " " + fact.subject)
    ]
    _, ends, _ = PhraseMatcher(spellings).find_ends(prompt_ids)
    if not len(ends):
        raise UserError(
            f"the subject {fact.subject!r} is not a word of its own in the prompt {fact.prompt!r}; give it as it stands there"
        )
    if (distance := prompt_ids.shape[1] - 1 - int(ends.max())) >= SUBJECT_WINDOW:
        raise UserError(
            f"the subject {fact.subject!r} is named {distance} tokens before the answer; a fact knows of it for {SUBJECT_WINDOW}, so name it "
            "nearer to the end"
        )


def make_record(
    tokenizer: Any, fact: Fact, answer_ids: Sequence[int], thresholds: Tensor
) -> FactRecord:
    """A fact whose answer has these token ids, and whose rows reach so far, `(tokens,)`; without number and rows."""
    spellings = {
        tuple(encode_text(tokenizer, spelling, add_prefix=False))
        for spelling in (fact.subject, " " + fact.subject)
        if fact.subject
    }
    return FactRecord(
        0,
        fact.prompt,
        fact.answer,
        fact.subject,
        fact.tag,
        fact.source,
        time.time(),
        tuple(sorted(spellings)),
        tuple(answer_ids),
        thresholds=tuple(thresholds.tolist()),
    )


@dataclass(eq=False)
class ConflictCandidate:
    """A fact that is there, or will be when its batch is written, and the state that asks for it."""

    prompt: str
    answer: str
    whitened_key: Tensor
    record: FactRecord | None
    index: int = -1
    replaced_fact: FactRecord | None = None


def find_conflict(
    candidates: Sequence[ConflictCandidate], prepared: PreparedFact
) -> ConflictCandidate | None:
    """Of facts about the same subject the one that is asked for in the same words, or in a state that is nearly the same."""
    for candidate in candidates:
        if normalize_text(candidate.prompt) == normalize_text(prepared.record.prompt):
            return candidate
    if not candidates or not prepared.record.subject:
        return None
    cosines = (
        torch.stack([candidate.whitened_key for candidate in candidates]) @ prepared.whitened_key
    )
    best = int(cosines.argmax())
    return candidates[best] if float(cosines[best]) >= SAME_QUERY_COSINE else None


def conflicting_facts(history: Mapping[int, FactRecord], fact_id: int) -> list[FactRecord]:
    """Of a history those that are there instead of fact `number`: what took its place, or the place of that, or says the same."""
    conflicts, replacement_id = [], history[fact_id].replaced_by
    while replacement_id is not None:
        conflicts += (
            [history[replacement_id]] if history[replacement_id].deleted_reason is None else []
        )
        replacement_id = history[replacement_id].replaced_by
    query = history[fact_id].subject, normalize_text(history[fact_id].prompt)
    active_facts = [
        other
        for other in history.values()
        if other.deleted_reason is None and (other.subject, normalize_text(other.prompt)) == query
    ]
    return conflicts + [other for other in active_facts if other not in conflicts]


def normalize_text(text: str) -> str:
    """As it is compared with others."""
    return " ".join(text.lower().split())
