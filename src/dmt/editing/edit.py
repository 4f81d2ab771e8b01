"""Edits: the rows that make a model state a fact, their thresholds, and conflicts between facts.

Each token of an answer becomes one row. Its value is one gradient step at a block's output, long
enough to make the token probable; no weight changes.
"""

from __future__ import annotations

import math
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

from dmt.editing.fact import Fact
from dmt.errors import UserError
from dmt.matching.mentions import find_mentions
from dmt.matching.relations import RelationMatcher, may_ask_the_same
from dmt.memory.slot_table import TensorCache
from dmt.models.architectures import get_architecture
from dmt.models.fact_matching import SUBJECT_WINDOW, TextCodec, parse_prompt
from dmt.models.forward import (
    batch_by_length,
    capture,
    check_length,
    collect_hidden_states,
    encode_text,
    forward_with_activations,
    pad_token_ids,
)
from dmt.store.records import FactRecord
from dmt.text import USER_SUBJECT, fold_text, name_user

# Lengths of a value that are tried, as multiples of the norm of the hidden state at its position.
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
# Probability that is enough: the smallest scale that reaches it is taken, else the best scale.
CONFIDENT_PROB = 0.99
# Steps to larger scales after that, while they are enough, too: a margin for other contexts.
MARGIN_STEPS = 2
# Added to the head's covariance in every direction, as a share of the mean variance; .001 to 1 do
# as well (EXPERIMENTS.md).
COVARIANCE_DAMPING = 1.0
# Share of other questions about its subject that a fact may answer.
FALSE_POSITIVE_RATE = 0.004
# The same for two facts about one subject that are about the same thing and contradict each other.
CONFLICT_RATE = 0.003
# Text before a prompt, one of the contexts that a value is solved for.
CONTEXT_SENTENCE = "It rained for most of the day."

# The damped covariance of each head, computed once: with a large vocabulary it costs as much as a
# pass through a small model.
_HEAD_COVARIANCES: WeakKeyDictionary[Any, TensorCache] = WeakKeyDictionary()


@dataclass(frozen=True, repr=False)
class WriteResult:
    """Result of writing one fact.

    Attributes:
        status: `written`; `unchanged`, the fact was stored already; `replaced`, it was written and
            replaces a fact that it contradicts; or `added`, it replaces a fact whose answer, a
            list, it has with one value more.
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
        keys: `(tokens, width)`, the hidden state after the clause that asks for the fact, for each
            token of the answer.
        values: `(tokens, width)`.
        prob_before: probability of the answer without the rows.
        prob_after: probability of the answer with the rows.
    """

    record: FactRecord
    keys: Tensor
    values: Tensor
    prob_before: float = 0.0
    prob_after: float = 0.0


@dataclass(frozen=True)
class TokenEdit:
    """The edit for one token of a fact's answer.

    Attributes:
        fact_index: index of the fact in its batch.
        prefix_ids: token IDs of the answer before the token.
        value: `(width,)` what makes the model predict it.
        prob_after: probability of the token with the value.
        prob_before: probability without.
        scale: the element of `SCALES` that was taken.
    """

    fact_index: int
    prefix_ids: tuple[int, ...]
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
        record: the fact, without an ID while its batch is not written.
        key: `(width,)`.
        index: of the fact in its batch; -1 for a stored one.
        replaced_fact: the stored fact that it replaces.
    """

    record: FactRecord
    key: Tensor
    index: int = -1
    replaced_fact: FactRecord | None = None


def prepare_facts(
    model: PreTrainedModel,
    tokenizer: Any,
    facts: Sequence[Fact],
    layers: tuple[int, int],
    codec: TextCodec,
    false_positive_rate: float,
) -> list[PreparedFact]:
    """Compute the rows of facts and their thresholds.

    Args:
        model: without facts, or with its facts disabled.
        tokenizer: of the model.
        facts: what to write.
        layers: key and value layer.
        codec: the tokenizer as facts use it.
        false_positive_rate: share of other questions about its subject that a fact may answer.

    Raises:
        UserError: a fact is too long for the model, or its prompt does not name its subject in a
            way that would be matched.
    """
    for fact in facts:
        check_subject(codec, fact)
    edits_by_fact: list[list[TokenEdit]] = [[] for _ in facts]
    for edit in compute_edits(model, tokenizer, facts, layers[1]):
        edits_by_fact[edit.fact_index].append(edit)
    keys = compute_keys(model, codec, facts, layers[0])
    prepared_facts = []
    for fact, key, edits in zip(facts, keys, edits_by_fact, strict=True):
        answer_ids = encode_text(tokenizer, fact.answer + fact.closing, add_prefix=False)
        prepared_facts.append(
            PreparedFact(
                make_record(fact, answer_ids, false_positive_rate),
                key.expand(len(edits), -1),
                torch.stack([edit.value for edit in edits]),
                float(np.prod([edit.prob_before for edit in edits])),
                float(np.prod([edit.prob_after for edit in edits])),
            )
        )
    return prepared_facts


def compute_keys(
    model: PreTrainedModel, codec: TextCodec, facts: Sequence[Fact], key_layer: int
) -> Tensor:
    """Compute the keys `(facts, width)`: the states after the clauses that ask for facts.

    Args:
        model: without facts, or with its facts disabled.
        codec: the tokenizer as facts use it.
        facts: what is written.
        key_layer: the layer whose block input is the key.
    """
    max_tokens = model.config.max_position_embeddings
    texts = []
    for fact in facts:
        question = parse_prompt(fact.prompt, fact.subject).question
        clause = fact.prompt if question is None else question.clause
        texts.append(codec.encode_clause(clause)[-max_tokens:])
    positions = [[len(text) - 1] for text in texts]
    return collect_hidden_states(model, texts, positions, [key_layer])[key_layer].float().cpu()


def check_subject(codec: TextCodec, fact: Fact) -> None:
    """Raise `UserError` where the subject in the fact's own prompt would not be matched."""
    if not fact.subject:
        return
    name = fold_text(fact.subject)
    ids = codec.tokenizer.encode(fact.prompt, add_special_tokens=False).ids
    prompt, recent = fact.prompt, codec.decode(ids[-SUBJECT_WINDOW:])
    if name == USER_SUBJECT:
        prompt, recent = name_user(prompt), name_user(recent)
    if not find_mentions(prompt, {name}, len(name.split())):
        raise UserError(
            f"the subject {fact.subject!r} is not a word of its own in the prompt {fact.prompt!r}; "
            "spell it as the prompt does"
        )
    if name not in fold_text(recent):
        raise UserError(
            f"the subject {fact.subject!r} is not within the {SUBJECT_WINDOW} tokens before the "
            "answer, where a fact looks for it; name it nearer to the end"
        )


def make_record(fact: Fact, answer_ids: Sequence[int], false_positive_rate: float) -> FactRecord:
    """Make the record of a fact that is not stored yet.

    Args:
        fact: the fact.
        answer_ids: token IDs of its answer.
        false_positive_rate: share of other questions about its subject that it may answer.
    """
    return FactRecord(
        0,
        fact.prompt,
        fact.answer,
        fact.subject,
        fact.tag,
        fact.source,
        time.time(),
        tuple(answer_ids),
        thresholds=(-math.log10(false_positive_rate),) * len(answer_ids),
    )


@torch.inference_mode(False)  # whose tensors have no gradients, even where they are enabled
def compute_edits(
    model: PreTrainedModel, tokenizer: Any, facts: Sequence[Fact], value_layer: int
) -> list[TokenEdit]:
    """Compute one edit for each token of each fact's answer, in the order of facts and tokens.

    Each is solved for several contexts at once, so that it holds wherever the fact is asked for.

    Raises:
        UserError: a fact has more tokens than the model has positions.
    """
    answer_ids = [
        encode_text(tokenizer, fact.answer + fact.closing, add_prefix=False) for fact in facts
    ]
    max_tokens = model.config.max_position_embeddings
    prompts: list[list[list[int]]] = []  # by fact, in each context
    for fact, answer in zip(facts, answer_ids, strict=True):
        alone = encode_text(tokenizer, fact.prompt)
        check_length(model, tokenizer, [*alone, *answer], f"the fact {fact.prompt[:40]!r}")
        after_text = encode_text(tokenizer, f"{CONTEXT_SENTENCE} {fact.prompt}")
        contexts = [alone, after_text]
        prompts.append(
            [prompt for prompt in contexts if 0 < len(prompt) <= max_tokens - len(answer)]
        )
    edits: list[TokenEdit] = []
    for batch in batch_by_length(
        [
            sum(len(prompt) + len(answer) for prompt in contexts)
            for contexts, answer in zip(prompts, answer_ids, strict=True)
        ]
    ):
        edits += _compute_batch_edits(
            model,
            [prompts[index] for index in batch],
            [answer_ids[index] for index in batch],
            batch,
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
        edits = compute_edits(model, tokenizer, facts[:max_facts], layer)
        num_confident = sum(edit.prob_after >= CONFIDENT_PROB for edit in edits)
        shares[layer] = num_confident / max(1, len(edits))
    return max(shares, key=lambda layer: shares[layer]), shares


def _compute_batch_edits(
    model: PreTrainedModel,
    prompts: list[list[list[int]]],
    answers: list[list[int]],
    fact_indices: list[int],
    value_layer: int,
) -> list[TokenEdit]:
    device = next(model.parameters()).device
    texts: list[list[int]] = []
    positions: list[tuple[int, int]] = []
    targets: list[int] = []
    groups: list[int] = []  # the edit that is made at each position
    edited: list[tuple[int, int]] = []  # index and offset of each edit
    for index, (contexts, answer) in enumerate(zip(prompts, answers, strict=True)):
        for prompt in contexts:
            positions += [(len(texts), len(prompt) - 1 + offset) for offset in range(len(answer))]
            groups += range(len(edited), len(edited) + len(answer))
            targets += answer
            texts.append([*prompt, *answer])
        edited += [(index, offset) for offset in range(len(answer))]
    rows, columns = (
        torch.tensor(coordinates, device=device) for coordinates in zip(*positions, strict=True)
    )
    solution = solve_value(
        model,
        pad_token_ids(texts).to(device),
        rows,
        columns,
        torch.tensor(targets, device=device),
        value_layer,
        value_layer,
        torch.tensor(groups, device=device),
    )
    edits = []
    for group, (index, offset) in enumerate(edited):
        stats = (
            float(values[group])
            for values in (solution.prob_after, solution.prob_before, solution.scales)
        )
        prefix_ids = tuple(answers[index][:offset])
        edits.append(
            TokenEdit(fact_indices[index], prefix_ids, solution.values[group].cpu(), *stats)
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
    groups: Tensor | None = None,
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
        groups: `(n,)` positions of one group get one value, and there is one solution for each;
            every position has its own where it is None.

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
    if groups is None:
        groups = torch.arange(len(targets), device=targets.device)
    size = int(groups.max()) + 1
    counts = groups.bincount(minlength=size).unsqueeze(1)

    def average(values: Tensor) -> Tensor:
        return values.new_zeros(size, values.shape[1]).index_add(0, groups, values) / counts

    def reduce_least(log_probs: Tensor) -> Tensor:
        return log_probs.new_zeros(size).scatter_reduce(
            0, groups, log_probs, "amin", include_self=False
        )

    delta = torch.zeros_like(average(layer_output), requires_grad=True)
    with torch.enable_grad():
        nll = F.cross_entropy(compute_logits(delta[groups]), targets, reduction="none")
        (grad,) = torch.autograd.grad(nll.sum(), delta)
    norms = average(layer_output.norm(dim=-1, keepdim=True))
    direction = -F.normalize(_precondition(model, grad), dim=-1) * norms
    log_probs = []
    with torch.no_grad():
        for scale in SCALES:
            logits = compute_logits(scale * direction[groups])
            log_probs.append(reduce_least(-F.cross_entropy(logits, targets, reduction="none")))
    probs = torch.stack(log_probs).exp()  # (scales, groups)
    confident = probs >= CONFIDENT_PROB
    scale_index = torch.where(confident.any(0), confident.long().argmax(0), probs.argmax(0))
    for _ in range(MARGIN_STEPS):
        larger = (scale_index + 1).clamp(max=len(SCALES) - 1)
        is_confident = confident.gather(0, larger.unsqueeze(0))[0]
        scale_index = torch.where(is_confident, larger, scale_index)
    scales = torch.tensor(SCALES, device=tokens.device)[scale_index]
    best_prob = probs.gather(0, scale_index.unsqueeze(0))[0]
    return ValueSolution(
        average(keys),
        scales.unsqueeze(-1) * direction,
        best_prob,
        reduce_least(-nll.detach()).exp(),
        scales,
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
    candidates: Sequence[ConflictCandidate], prepared: PreparedFact, relations: RelationMatcher
) -> ConflictCandidate | None:
    """Find the fact that has the same prompt as a new one, or answers the same question.

    Args:
        candidates: facts with the same subject.
        prepared: the new fact.
        relations: compares their clauses.
    """
    record = prepared.record
    for candidate in candidates:
        if fold_text(candidate.record.prompt) == fold_text(record.prompt):
            return candidate
    question = parse_prompt(record.prompt, record.subject).question
    if not record.subject or question is None:
        return None
    clauses, comparable = [], []
    for candidate in candidates:
        other = parse_prompt(candidate.record.prompt, candidate.record.subject).question
        is_of_one_statement = _continues(record, candidate.record) or _continues(
            candidate.record, record
        )
        if other is not None and not is_of_one_statement and may_ask_the_same(question, other):
            clauses.append(other.clause)
            comparable.append(candidate)
    if not comparable:
        return None
    rarities = relations.compute_rarity(
        relations.describe([question.clause], prepared.keys[:1]),
        relations.describe(clauses, torch.stack([candidate.key for candidate in comparable])),
    )[0]
    nearest = int(rarities.argmax())
    return comparable[nearest] if rarities[nearest] >= -math.log10(CONFLICT_RATE) else None


def _continues(longer: FactRecord, shorter: FactRecord) -> bool:
    """Check whether a prompt goes on with the answer of another fact, as parts of one statement."""
    if not longer.prompt.startswith(shorter.prompt):
        return False
    rest = longer.prompt[len(shorter.prompt) :]
    return rest.strip() != "" and (
        shorter.answer.startswith(rest) or rest.startswith(shorter.answer)
    )


def conflicting_facts(history: Mapping[int, FactRecord], fact_id: int) -> list[FactRecord]:
    """List the active facts that a deleted fact contradicts: its replacements, and its prompt's.

    Args:
        history: by ID the fact, its replacements, and the active facts about its subject.
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
