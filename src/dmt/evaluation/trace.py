"""Trace what each token activates: slots, stored rows and facts, and which tokens they promote.

for token in dmt.trace(model, tokenizer, "Ada was born in"):
    print(token.token, token.activations)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from transformers import PreTrainedModel

from dmt.data.tokenizer import get_prefix_ids
from dmt.errors import UserError
from dmt.evaluation.metrics import eval_mode
from dmt.memory import AssociativeMemory, FeaturalMemory, SumMemory
from dmt.memory.base import MemoryLayer
from dmt.memory.token_context import use_contexts
from dmt.models.architectures import get_architecture
from dmt.models.fact_hooks import Matches, get_fact_hooks, record_matches
from dmt.models.fact_matching import stack_values
from dmt.models.forward import forward_with_activations
from dmt.models.memories import list_student_contexts

NUM_NEXT_TOKENS = 5  # most likely next tokens in a trace
LOGIT_CHUNK_SIZE = 256  # hidden states whose logits exist at once


@dataclass(frozen=True)
class Activation:
    """One slot, row or fact that a token activated in one layer.

    Attributes:
        layer: the layer.
        kind: `slot`, `row` of an associative memory, `token` or `ngram` of a lookup, or `fact`.
        index: index of the slot or row in its memory, or ID of the row or fact.
        weight: factor by which its value was multiplied.
        share: |weight| times the norm of the value, as a fraction of the sum over everything that
            the token activated in this layer.
        tag: where a row or fact comes from; empty if unknown.
        top_tokens: tokens that weight times value promotes most.
    """

    layer: int
    kind: str
    index: int
    weight: float
    share: float
    tag: str
    top_tokens: tuple[str, ...]


@dataclass(frozen=True)
class TokenTrace:
    """One token, the model's prediction after it, and what it activated.

    Attributes:
        position: position in the sequence.
        token: the token's text.
        next_tokens: the most likely next tokens with their probabilities.
        activations: by layer, in each layer the largest contribution first.
    """

    position: int
    token: str
    next_tokens: tuple[tuple[str, float], ...]
    activations: tuple[Activation, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the trace as dictionaries and lists that JSON can hold."""
        return json.loads(json.dumps(asdict(self)))


class Traces(list[TokenTrace]):
    """Traces of a text, one for each token; prints as a table."""

    def to_dict(self) -> list[dict[str, Any]]:
        """Return the traces as dictionaries and lists that JSON can hold."""
        return [token_trace.to_dict() for token_trace in self]

    def to_table(self) -> Table:
        """Return the traces as a table for a rich console."""
        return format_table(self)

    def __str__(self) -> str:
        return _render(self.to_table(), "export_text")

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        return _render(self.to_table(), "export_html")


@dataclass(frozen=True)
class _Contributions:
    """What slots, rows or facts add for every token.

    Attributes:
        kind: as in `Activation`.
        indices: `(tokens, n)`, as `Activation.index`.
        weights: `(tokens, n)`.
        active: `(tokens, n)`, whether it was activated at all.
        values: `(tokens, n, width)`, as they are added to the residual stream.
        norms: `(tokens, n)`, of the values.
        tags: tags by index.
    """

    kind: str
    indices: Tensor
    weights: Tensor
    active: Tensor
    values: Tensor
    norms: Tensor
    tags: dict[int, str] = field(default_factory=dict)


@torch.no_grad()
def trace(
    model: PreTrainedModel,
    tokenizer: Any,
    text: str | Tensor,
    layers: Sequence[int] | None = None,
    top_reads: int = 3,
    *,
    top_tokens: int = 5,
) -> Traces:
    """Trace what each token of a text activates.

    The model is left as it was. The start token, if the model has one, comes first and has no
    activations.

    Args:
        model: a student; a model without memories has traces without activations.
        tokenizer: its tokenizer.
        text: the text, or its token ids `(time,)` with the start token.
        layers: the layers to trace; None means all. Layers with a dense block have only facts.
        top_reads: maximum number of slots and rows for each token and layer.
        top_tokens: number of promoted tokens for each of them.

    Returns:
        A list with a `TokenTrace` for each token.

    Raises:
        UserError: the text is empty or too long, a layer does not exist, or a number is too small.
    """
    prefix_ids = get_prefix_ids(tokenizer)
    if isinstance(text, Tensor):
        text_ids = text.tolist()[len(prefix_ids) :]
    else:
        text_ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    max_tokens = model.config.max_position_embeddings - len(prefix_ids)
    blocks = get_architecture(model.config.model_type).blocks(model)
    selected_layers = range(len(blocks)) if layers is None else sorted(set(layers))
    if not text_ids:
        raise UserError("text is empty; give at least one word")
    if len(text_ids) > max_tokens:
        raise UserError(
            f"text must have at most {max_tokens:,} tokens for this model, got {len(text_ids):,}; "
            "shorten it"
        )
    if unknown_layers := set(selected_layers) - set(range(len(blocks))):
        raise UserError(
            f"layers must be in [0, {len(blocks) - 1}] for this model, got {min(unknown_layers)}"
        )
    if top_reads < 1:
        raise UserError(f"top_reads must be at least 1, got {top_reads}")
    if top_tokens < 0:
        raise UserError(f"top_tokens must be at least 0, got {top_tokens}")
    ids = prefix_ids + text_ids
    tokens = torch.tensor([ids], device=next(model.parameters()).device)
    contexts = list_student_contexts(model, tokens)
    if contexts is not None:
        contexts = contexts.flatten(0, 1)
    hooks = get_fact_hooks(model)
    activations: list[list[Activation]] = [[] for _ in ids]
    with eval_mode(model):
        with record_matches(model) as matches:
            outputs = forward_with_activations(model, tokens, capture_blocks=True)
        for layer in selected_layers:
            hidden = outputs.block_inputs[layer].flatten(0, 1)
            with use_contexts(contexts):
                contributions = _block_contributions(blocks[layer], hidden)
            if hooks is not None and layer == hooks.value_layer and matches:
                contributions.append(_fact_contributions(outputs.block_inputs[layer], matches[0]))
            if contributions:
                strongest = _strongest_activations(
                    contributions, model, tokenizer, layer, top_reads, top_tokens
                )
                for token_activations, additions in zip(activations, strongest, strict=True):
                    token_activations += additions
        next_tokens = map(
            tuple, _next_tokens(outputs.hidden.flatten(0, 1), outputs.head, tokenizer)
        )
        activations[: len(prefix_ids)] = [[] for _ in prefix_ids]
        columns = zip(map(tokenizer.decode, ids), next_tokens, map(tuple, activations), strict=True)
        return Traces(TokenTrace(position, *column) for position, column in enumerate(columns))


@torch.no_grad()
def logit_lens(
    model: PreTrainedModel, tokenizer: Any, values: Tensor, count: int = 5
) -> list[list[tuple[str, float]]]:
    """Return which tokens each value promotes most when it is added to the residual stream.

    Scores are logits through the scale of the final norm, minus their mean over the vocabulary, so
    a value that raises all logits equally promotes none. They are comparable among values: the
    norm's divisor depends on the token, and is left out.

    Source: nostalgebraist 2020, the logit lens; for single values, Geva et al. 2022, arXiv
    2203.14680.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        values: `(n, width)`.
        count: maximum number of tokens for each value.

    Returns:
        For each value, tokens with positive scores, the largest first.
    """
    scale = getattr(
        model.get_submodule(get_architecture(model.config.model_type).final_norm), "weight", None
    )
    head = model.get_output_embeddings().weight[: len(tokenizer)].float()  # the rest is padding
    results: list[list[tuple[str, float]]] = []
    for chunk in values.float().split(LOGIT_CHUNK_SIZE):
        logits = (chunk if scale is None else chunk * scale.float()) @ head.t()
        topk = (logits - logits.mean(-1, keepdim=True)).topk(min(count, len(head)))
        results += [
            [(token, score) for token, score in pairs if score > 0]
            for pairs in _decode_topk(topk, tokenizer)
        ]
    return results


def _block_contributions(block: nn.Module, hidden: Tensor) -> list[_Contributions]:
    """Return what slots and rows of a block add for `hidden` `(tokens, width)`."""
    if isinstance(block, FeaturalMemory):
        return [_slot_contributions(block, hidden)]
    if isinstance(block, SumMemory):
        return [item for part in block.list_parts() for item in _block_contributions(part, hidden)]
    if not isinstance(block, AssociativeMemory):
        if not isinstance(block, MemoryLayer) or (selection := block.select(hidden)) is None:
            return []
        ids, weights, values = selection
        norms = values.norm(dim=-1)
        return [_Contributions(block.row_kind, ids, weights, weights != 0, values, norms)]
    slots = (
        [_slot_contributions(block.base, hidden)] if isinstance(block.base, FeaturalMemory) else []
    )
    if not len(block.rows):
        return slots
    rows = _row_contributions(block, hidden)
    if block.value_target == "teacher":  # rows replace the output of the base
        slots = [
            replace(
                contribution,
                weights=contribution.weights * (1 - rows.weights.sum(-1, keepdim=True)),
            )
            for contribution in slots
        ]
    return [*slots, rows]


def _slot_contributions(memory: FeaturalMemory, hidden: Tensor) -> _Contributions:
    active, weights = memory.select_with_weights(hidden)
    slot_ids = active.any(0).nonzero().flatten()
    active, weights = active[:, slot_ids], weights[:, slot_ids]
    values = (
        memory.gather_values(slot_ids)
        if memory.output is None
        else memory.gather_values(slot_ids) @ memory.output.t()
    )
    indices, norms = slot_ids.expand_as(weights), values.norm(dim=-1).expand_as(weights)
    return _Contributions(
        "slot", indices, weights, active, values.expand(len(hidden), -1, -1), norms
    )


def _row_contributions(memory: AssociativeMemory, hidden: Tensor) -> _Contributions:
    indices, weights = memory.select_rows(hidden)
    row_ids, values = (
        memory.rows.ids[indices],
        memory.output(memory.rows.values[indices].to(weights.dtype)),
    )
    tags = {
        int(memory.rows.ids[index]): memory.rows.stats.tags[index]
        for index in indices[weights > 0].unique().tolist()
    }
    return _Contributions("row", row_ids, weights, weights > 0, values, values.norm(dim=-1), tags)


def _fact_contributions(hidden: Tensor, matches: Matches) -> _Contributions:
    """Return what facts add for each token of `hidden` `(1, time, width)`: one row, or none."""
    time, device = hidden.shape[1], hidden.device
    fact_ids = torch.full((time, 1), -1, device=device)
    weights = torch.zeros(time, 1, device=device)
    values = torch.zeros(time, 1, hidden.shape[2], device=device)
    if matches:
        tokens = torch.tensor([match.token for match in matches], device=device)
        ids = [match.fact.id for match in matches]
        fact_ids[tokens, 0] = torch.tensor(ids, dtype=torch.long, device=device)
        weights[tokens, 0] = 1.0
        values[tokens, 0] = torch.from_numpy(stack_values(matches)).to(values)
    tags = {match.fact.id: match.fact.tag for match in matches}
    return _Contributions("fact", fact_ids, weights, weights > 0, values, values.norm(dim=-1), tags)


def _strongest_activations(
    contributions: list[_Contributions],
    model: PreTrainedModel,
    tokenizer: Any,
    layer: int,
    top_reads: int,
    count: int,
) -> list[list[Activation]]:
    """Return the largest contributions in `layer` for each token, the largest first."""
    columns = [
        (contribution, column)
        for contribution in contributions
        for column in range(contribution.weights.shape[1])
    ]
    shares = F.normalize(
        torch.cat([contribution.weights * contribution.norms for contribution in contributions], 1)
        .float()
        .abs(),
        p=1,
    )
    topk = shares.masked_fill(
        ~torch.cat([contribution.active for contribution in contributions], 1), -1
    ).topk(min(top_reads, len(columns)))  # sorted
    ranked = enumerate(zip(topk.values.tolist(), topk.indices.tolist(), strict=True))
    selected = [
        (token, share, *columns[column])
        for token, pairs in ranked
        for share, column in zip(*pairs, strict=True)
        if share >= 0
    ]
    added_values = [
        contribution.weights[token, column] * contribution.values[token, column]
        for token, _, contribution, column in selected
    ]
    lens_results = (
        logit_lens(model, tokenizer, torch.stack(added_values), count) if added_values else []
    )
    activations: list[list[Activation]] = [[] for _ in shares]
    for (token, share, contribution, column), lens_result in zip(
        selected, lens_results, strict=True
    ):
        index, weight, top_tokens = (
            int(contribution.indices[token, column]),
            float(contribution.weights[token, column]),
            tuple(token_text for token_text, _ in lens_result),
        )
        activations[token].append(
            Activation(
                layer,
                contribution.kind,
                index,
                weight,
                share,
                contribution.tags.get(index, ""),
                top_tokens,
            )
        )
    return activations


def _next_tokens(
    hidden: Tensor, head: nn.Module, tokenizer: Any
) -> Iterable[list[tuple[str, float]]]:
    for chunk in hidden.split(LOGIT_CHUNK_SIZE):
        yield from _decode_topk(
            head(chunk)
            .float()
            .softmax(-1)[:, : len(tokenizer)]
            .topk(min(NUM_NEXT_TOKENS, len(tokenizer))),
            tokenizer,
        )


def _decode_topk(
    topk: torch.return_types.topk, tokenizer: Any
) -> Iterable[list[tuple[str, float]]]:
    for scores, ids in zip(topk.values.tolist(), topk.indices.tolist(), strict=True):
        yield [
            (tokenizer.decode([token_id]), score)
            for token_id, score in zip(ids, scores, strict=True)
        ]


def to_json(traces: Sequence[TokenTrace]) -> list[dict[str, Any]]:
    """Return traces as dictionaries and lists that JSON can hold."""
    return [token_trace.to_dict() for token_trace in traces]


def format_table(traces: Sequence[TokenTrace]) -> Table:
    """Return a table with a row for each token and layer.

    Tokens are in quotes, so that spaces and line ends are visible.
    """
    table = Table("token", "next", "layer", "activations")
    for token_trace in traces:
        lines_by_layer: dict[int, list[str]] = {}
        for activation in token_trace.activations:
            lines_by_layer.setdefault(activation.layer, []).append(_format_activation(activation))
        for index, (layer, lines) in enumerate(lines_by_layer.items() or [("", [])]):
            token_cells = ["", ""]
            if index == 0:
                next_token, prob = token_trace.next_tokens[0]
                token_cells = [_quote(token_trace.token), f"{_quote(next_token)} {prob:.2f}"]
            # Text, because a token may look like markup.
            table.add_row(*map(Text, [*token_cells, str(layer), "\n".join(lines)]))
        table.add_section()
    return table


def _format_activation(activation: Activation) -> str:
    tag = f" [{activation.tag}]" if activation.tag else ""
    top_tokens = ", ".join(map(_quote, activation.top_tokens))
    return (
        f"{activation.kind} {activation.index} {activation.weight:+.2f} "
        f"({activation.share:.0%}){tag} → {top_tokens}"
    )


def _quote(token: str) -> str:
    return json.dumps(token, ensure_ascii=False)


def _render(table: Table, method: str) -> str:
    from io import StringIO

    from rich.console import Console

    console = Console(width=140, record=True, file=StringIO())
    console.print(table)
    return getattr(console, method)()
