"""Edits: the rows that make a model state a fact, their thresholds, and conflicts between facts.

Each token of an answer becomes one row. Its value is one gradient step at a block's output, long
enough to make the token probable; no weight changes.
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
from dmt.text import fold_text, list_spellings

# Lengths of a value that are tried, as multiples of the norm of the hidden state at its position.
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
# Probability that is enough: the smallest scale that reaches it is taken, else the best scale.
CONFIDENT_PROB = 0.99
# Added to the head's covariance in every direction, as a share of the mean variance; .001 to 1 do
# as well (EXPERIMENTS.md).
COVARIANCE_DAMPING = 1.0
# Share of unrelated positions at which a row may fire (`Calibration.thresholds`).
FALSE_POSITIVE_RATE = 0.01
# Rows after the first need the previous token of the answer too, and may have so many times the
# false positive rate.
LATER_TOKEN_RATE_FACTOR = 5
MIN_SUBJECTLESS_THRESHOLD = 0.8  # lowest threshold of a row without a subject
# Cosine from which on two facts about the same subject are about the same thing: safely above
# that of two different questions (EXPERIMENTS.md, "Facts").
SAME_QUERY_COSINE = 0.8

# The damped covariance of each head, computed once: with a large vocabulary it costs as much as a
# pass through a small model.
_HEAD_COVARIANCES: WeakKeyDictionary[Any, TensorCache] = WeakKeyDictionary()


@dataclass(frozen=True, repr=False)
class WriteResult:
    """Result of writing one fact.

    Attributes:
        status: `written`; `unchanged`, the fact was stored already; or `replaced`, it was written
            and replaces a fact that it contradicts.
        fact: the fact as it is stored now.
        replaced_fact: the fact that it replaces.
        prob_before: probability of its answer before writing, all tokens together.
        prob_after: the same after writing.
    """

    status: str
    fact: FactRecord
    replaced_fact: FactRecord | None = None
    prob_before: float = 0.0
    prob_after: float = 0.0

    @property
    def id(self) -> int:
        """ID of the fact."""
        return self.fact.id

    def __repr__(self) -> str:
        replaced = "" if self.replaced_fact is None else f", replaced={self.replaced_fact.id}"
        return (
            f"WriteResult(id={self.id}, status={self.status!r}, "
            f"prob_before={self.prob_before:.3g}, prob_after={self.prob_after:.3g}{replaced}, "
            f"sentence={self.fact.sentence!r})"
        )


@dataclass(frozen=True)
class PreparedFact:
    """A fact with its rows, not yet stored.

    Attributes:
        record: without IDs of fact and rows.
        keys: `(tokens, width)`, one for each token of the answer.
        values: `(tokens, width)`.
        whitened_key: `(width,)` the whitened key of the first row.
        prob_before: probability of the answer without the rows.
        prob_after: probability of the answer with the rows.
    """

    record: FactRecord
    keys: Tensor
    values: Tensor
    whitened_key: Tensor
    prob_before: float = 0.0
    prob_after: float = 0.0


@dataclass(frozen=True)
class TokenEdit:
    """The edit for one token of a fact's answer.

    Attributes:
        fact_index: index of the fact in its batch.
        prefix_ids: token IDs of the answer before the token.
        key: `(width,)` the hidden state at which the token is to be predicted.
        value: `(width,)` what makes the model predict it.
        prob_after: probability of the token with the value.
        prob_before: probability without.
        scale: the element of `SCALES` that was taken.
    """

    fact_index: int
    prefix_ids: tuple[int, ...]
    key: Tensor
    value: Tensor
    prob_after: float
    prob_before: float
    scale: float


@dataclass(frozen=True)
class ValueSolution:
    """Edits at `n` positions, tensors over the same positions.

    Attributes:
        keys: `(n, width)` hidden states at the key layer.
        values: `(n, width)` what to add to the block's output.
        prob_after: `(n,)` probability of the target with the value.
        prob_before: `(n,)` probability without.
        scales: `(n,)` elements of `SCALES` that were taken.
    """

    keys: Tensor
    values: Tensor
    prob_after: Tensor
    prob_before: Tensor
    scales: Tensor


@dataclass(eq=False)
class ConflictCandidate:
    """A fact that may contradict a new one.

    Attributes:
        prompt: of the fact.
        answer: of the fact.
        whitened_key: `(width,)` the whitened key of its first row.
        record: the stored fact; None while its batch is not written.
        index: of the fact in its batch.
        replaced_fact: the stored fact that it replaces.
    """

    prompt: str
    answer: str
    whitened_key: Tensor
    record: FactRecord | None
    index: int = -1
    replaced_fact: FactRecord | None = None


def prepare_facts(
    model: PreTrainedModel,
    tokenizer: Any,
    facts: Sequence[Fact],
    layers: tuple[int, int],
    calibration: Calibration,
    false_positive_rate: float,
) -> list[PreparedFact]:
    """Compute the rows of facts and their thresholds.

    Args:
        model: without facts, or with its facts disabled.
        tokenizer: of the model.
        facts: what to write.
        layers: key and value layer.
        calibration: of the key layer.
        false_positive_rate: share of unrelated positions at which a row may fire.

    Raises:
        UserError: a fact is too long for the model, or its prompt does not contain its subject in
            a way that its rows would match.
    """
    for fact in facts:
        _check_subject(tokenizer, fact)
    edits_by_fact: list[list[TokenEdit]] = [[] for _ in facts]
    for edit in compute_edits(model, tokenizer, facts, *layers):
        edits_by_fact[edit.fact_index].append(edit)
    prepared_facts = []
    for fact, edits in zip(facts, edits_by_fact, strict=True):
        keys = torch.stack([edit.key for edit in edits])
        values = torch.stack([edit.value for edit in edits])
        answer_ids = encode_text(tokenizer, fact.answer + fact.closing, add_prefix=False)
        thresholds = compute_thresholds(calibration, keys, false_positive_rate, bool(fact.subject))
        prepared_facts.append(
            PreparedFact(
                make_record(tokenizer, fact, answer_ids, thresholds),
                keys,
                values,
                calibration.whiten(keys[:1])[0],
                float(np.prod([edit.prob_before for edit in edits])),
                float(np.prod([edit.prob_after for edit in edits])),
            )
        )
    return prepared_facts


def compute_thresholds(
    calibration: Calibration, keys: Tensor, false_positive_rate: float, has_subject: bool
) -> Tensor:
    """Compute the cosines `(tokens,)` from which on the rows of one fact fire.

    Args:
        calibration: of the key layer.
        keys: `(tokens, width)` of the fact's rows.
        false_positive_rate: share of unrelated positions at which the first row may fire.
        has_subject: whether the fact has a subject.
    """
    thresholds = calibration.thresholds(
        keys, LATER_TOKEN_RATE_FACTOR * false_positive_rate, calibration.min_threshold / 2
    )
    thresholds[:1] = calibration.thresholds(keys[:1], false_positive_rate)
    return thresholds if has_subject else thresholds.clamp_min(MIN_SUBJECTLESS_THRESHOLD)


def _check_subject(tokenizer: Any, fact: Fact) -> None:
    """Raise `UserError` where the rows would not match the subject in the fact's own prompt."""
    if not fact.subject:
        return
    prompt_ids = torch.tensor([encode_text(tokenizer, fact.prompt)])
    _, ends, _ = PhraseMatcher(_encode_spellings(tokenizer, fact.subject)).find_ends(prompt_ids)
    if not len(ends):
        raise UserError(
            f"the subject {fact.subject!r} is not a word of its own in the prompt {fact.prompt!r}; "
            "spell it as the prompt does"
        )
    distance = prompt_ids.shape[1] - 1 - int(ends.max())
    if distance >= SUBJECT_WINDOW:
        raise UserError(
            f"the subject {fact.subject!r} is {distance} tokens before the answer; a fact matches "
            f"its subject within {SUBJECT_WINDOW}, so name it nearer to the end"
        )


def _encode_spellings(tokenizer: Any, subject: str) -> list[list[int]]:
    """Encode the spellings of a subject, at the start of a text and after a space."""
    spellings = [start + spelling for spelling in list_spellings(subject) for start in ("", " ")]
    # All at once, in half the time.
    token_ids: list[list[int]] = tokenizer(spellings, add_special_tokens=False)["input_ids"]
    return token_ids


def make_record(
    tokenizer: Any, fact: Fact, answer_ids: Sequence[int], thresholds: Tensor
) -> FactRecord:
    """Make the record of a fact that is not stored yet.

    Args:
        tokenizer: of the model.
        fact: the fact.
        answer_ids: token IDs of its answer.
        thresholds: `(tokens,)` of its rows.
    """
    spellings = _encode_spellings(tokenizer, fact.subject) if fact.subject else []
    return FactRecord(
        0,
        fact.prompt,
        fact.answer,
        fact.subject,
        fact.tag,
        fact.source,
        time.time(),
        tuple(sorted({tuple(token_ids) for token_ids in spellings})),
        tuple(answer_ids),
        thresholds=tuple(thresholds.tolist()),
    )


def compute_edits(
    model: PreTrainedModel, tokenizer: Any, facts: Sequence[Fact], key_layer: int, value_layer: int
) -> list[TokenEdit]:
    """Compute one edit for each token of each fact's answer, in the order of facts and tokens.

    Raises:
        UserError: a fact has more tokens than the model has positions.
    """
    prompt_ids = [encode_text(tokenizer, fact.prompt) for fact in facts]
    answer_ids = [
        encode_text(tokenizer, fact.answer + fact.closing, add_prefix=False) for fact in facts
    ]
    for fact, prompt, answer in zip(facts, prompt_ids, answer_ids, strict=True):
        check_length(model, tokenizer, [*prompt, *answer], f"the fact {fact.prompt[:40]!r}")
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
    """Choose the layer in which edits make most answer tokens confident.

    Among equally good layers the highest is taken: its values pass through the fewest blocks.

    Args:
        model: without facts, or with its facts disabled.
        tokenizer: of the model.
        facts: the first of them are tried.
        key_layer: the value layer is not below it.
        layers: the candidates.
        max_facts: number of facts to try.

    Returns:
        The layer, and the share of confident tokens by layer.
    """
    shares = {}
    for layer in sorted((layer for layer in layers if layer >= key_layer), reverse=True):
        edits = compute_edits(model, tokenizer, facts[:max_facts], key_layer, layer)
        num_confident = sum(edit.prob_after >= CONFIDENT_PROB for edit in edits)
        shares[layer] = num_confident / max(1, len(edits))
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


def solve_value(
    model: PreTrainedModel,
    tokens: Tensor,
    rows: Tensor,
    columns: Tensor,
    targets: Tensor,
    value_layer: int,
    key_layer: int,
) -> ValueSolution:
    """Compute what to add to a block's output so that the model predicts `targets`.

    One gradient of the summed NLL of all targets with respect to the block's output, in the metric
    of the head. Its length at each position is the smallest of `SCALES` that makes the target
    confident; each scale costs a forward pass.

    Args:
        model: without facts, or with its facts disabled.
        tokens: token IDs `(batch, time)`.
        rows: `(n,)` batch indices of the positions.
        columns: `(n,)` time indices of the positions.
        targets: `(n,)` token IDs to predict after the positions.
        value_layer: the layer to whose block output the values are added.
        key_layer: the layer whose block input is the key.

    Source: ours. With a vocabulary of 49,152 the plain gradient never makes 77 % of SmolLM2's
        facts probable, however long it is, since a similar token overtakes the target; in the
        metric of the head all become so (EXPERIMENTS.md).
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
    """Multiply gradients `(n, width)` by the inverse of the damped covariance of the head's rows.

    Directions that distinguish a token from similar ones gain weight, common directions lose it.
    """
    norm: Any = model.get_submodule(get_architecture(model.config.model_type).final_norm)
    head: Any = model.get_output_embeddings()
    cache, weights = _HEAD_COVARIANCES.setdefault(head, TensorCache()), (head.weight, norm.weight)
    return torch.linalg.solve(cache("covariance", _compute_head_covariance, weights), grads.t()).t()


def _compute_head_covariance(head: Tensor, scale: Tensor) -> Tensor:
    """Compute the covariance of the head's rows, scaled by the norm before it, and damp it."""
    covariance = torch.cov((head.detach().float() * scale.detach().float()).t(), correction=0)
    return covariance + COVARIANCE_DAMPING * covariance.trace() / len(covariance) * torch.eye(
        len(covariance), device=head.device
    )


def _make_last_layer_logits(model: PreTrainedModel, layer_output: Tensor) -> Any:
    """Return a function from added states `(n, width)` to logits, after the last layer."""
    norm = model.get_submodule(get_architecture(model.config.model_type).final_norm)
    head = model.get_output_embeddings()
    return lambda delta: head(
        norm((layer_output + delta).to(next(head.parameters()).dtype))
    ).float()


def _make_inner_layer_logits(
    model: PreTrainedModel, tokens: Tensor, rows: Tensor, columns: Tensor, layer: int
) -> Any:
    """Return the same for a layer below: the whole model runs, with all values added."""
    block = get_architecture(model.config.model_type).blocks(model)[layer]

    def logits(delta: Tensor) -> Tensor:
        def add_delta(_: int, output: Tensor) -> Tensor:
            return output.index_put((rows, columns), delta.to(output.dtype), accumulate=True)

        with capture({layer: block}, on_output=add_delta):
            return forward_with_activations(model, tokens).logits[rows, columns].float()

    return logits


def find_conflict(
    candidates: Sequence[ConflictCandidate], prepared: PreparedFact
) -> ConflictCandidate | None:
    """Find the fact that has the same prompt as a new one, or nearly the same key.

    Args:
        candidates: facts with the same subject.
        prepared: the new fact.
    """
    for candidate in candidates:
        if fold_text(candidate.prompt) == fold_text(prepared.record.prompt):
            return candidate
    if not candidates or not prepared.record.subject:
        return None
    keys = torch.stack([candidate.whitened_key for candidate in candidates])
    cosines = keys @ prepared.whitened_key
    best = int(cosines.argmax())
    return candidates[best] if float(cosines[best]) >= SAME_QUERY_COSINE else None


def conflicting_facts(history: Mapping[int, FactRecord], fact_id: int) -> list[FactRecord]:
    """List the active facts that a deleted fact contradicts: its replacements, and its prompt's.

    Args:
        history: all facts by ID, deleted ones included.
        fact_id: ID of the deleted fact.
    """
    conflicts: list[FactRecord] = []
    replacement_id = history[fact_id].replaced_by
    while replacement_id is not None:
        replacement = history[replacement_id]
        if replacement.deleted_reason is None:
            conflicts.append(replacement)
        replacement_id = replacement.replaced_by
    for other in history.values():
        is_same_query = other.query == history[fact_id].query
        if other.deleted_reason is None and is_same_query and other not in conflicts:
            conflicts.append(other)
    return conflicts
