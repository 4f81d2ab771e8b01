"""Open a memory: which slots and rows each token read, with what weight, and which tokens what they said pushes up."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from transformers import PreTrainedModel

from dmt.data.windows import get_prefix_ids
from dmt.errors import UserError
from dmt.memory import AssociativeMemory, FeaturalMemory
from dmt.memory.edit_memory import EditMemory, Matches
from dmt.models.architectures import get_architecture
from dmt.models.fact_hooks import get_fact_hooks, record_matches
from dmt.models.forward import forward_with_activations

NUM_NEXT_TOKENS, LOGIT_CHUNK_SIZE = 5, 256
"""Likely next tokens that are told of each token; states whose logits exist at once."""


@dataclass(frozen=True)
class Activation:
    """One slot or row that one token read in one layer, and what it said there."""

    layer: int
    kind: str  # `slot`; `row` of an associative memory; or `fact`
    index: int  # of the slot in its memory, or the row's or the fact's own
    weight: float  # what its value was multiplied by
    share: float  # of |weight| x length of the value in that of all slots and rows this token read in this layer, told or not
    tag: str  # where a row comes from, as far as that is known
    top_tokens: tuple[str, ...]  # tokens of the vocabulary that weight x value pushes up most


@dataclass(frozen=True)
class TokenTrace:
    """One token, what the model expects after it, and what it read: by layer, in each the longest contribution first."""

    position: int
    token: str
    next_tokens: tuple[tuple[str, float], ...]  # with probabilities
    activations: tuple[Activation, ...]


@dataclass(frozen=True)
class _Contributions:
    # What slots, or rows, said to every token: all `(tokens, n)`, values `(tokens, n, width)` as they reach the stream.
    kind: str
    indices: Tensor
    weights: Tensor
    active: Tensor  # whether it was read at all
    values: Tensor
    norms: Tensor  # of values
    tags: dict[int, str] = field(default_factory=dict)


@torch.no_grad()
def trace_activations(
    model: PreTrainedModel,
    tokenizer: Any,
    text: str | Tensor,
    top_reads: int = 5,
    top_tokens: int = 5,
    layers: Sequence[int] | None = None,
    resolve_row: Callable[[int], tuple[int, str]] = lambda row: (row, ""),
) -> list[TokenTrace]:
    """What each token of `text` read; the start token, where the model has one, stands first and without reads.

    Args:
        text: or its token ids `(time,)`, the start token included.
        most: slots and rows that are told of a token and layer.
        lens: tokens of the vocabulary that are told of each of them.
        layers: which ones; None means all. Layers whose block is dense read nothing but facts.
        name: number and tag of the fact that a row laid over the model (`models/overlay.py`) belongs to.

    Raises:
        UserError: the text is empty or longer than the model can read, there is no such layer, or a count is too small.
    """
    prefix_ids = get_prefix_ids(tokenizer)
    if isinstance(text, Tensor):
        text_ids = text.tolist()[len(prefix_ids) :]
    else:
        text_ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    max_tokens, blocks = (
        model.config.max_position_embeddings - len(prefix_ids),
        get_architecture(model.config.model_type).blocks(model),
    )
    selected_layers = range(len(blocks)) if layers is None else sorted(set(layers))
    if not text_ids:
        raise UserError(
            "text is empty; give at least one word, so that there is a token to look at"
        )
    if len(text_ids) > max_tokens:
        raise UserError(
            f"text must have at most {max_tokens:,} tokens for this model, got {len(text_ids):,}; shorten it"
        )
    if unknown_layers := set(selected_layers) - set(range(len(blocks))):
        raise UserError(
            f"layers must be in [0, {len(blocks) - 1}] for this model, got {min(unknown_layers)}"
        )
    if top_reads < 1 or top_tokens < 0:
        raise UserError(
            f"most must be at least 1 and lens at least 0, got {top_reads} and {top_tokens}"
        )
    ids, was_training = prefix_ids + text_ids, model.training
    model.eval()
    tokens, hooks = (
        torch.tensor([ids], device=next(model.parameters()).device),
        get_fact_hooks(model),
    )
    with record_matches(model) as matches:
        outputs = forward_with_activations(model, tokens, capture_blocks=True)
    activations: list[list[Activation]] = [[] for _ in ids]
    for layer in selected_layers:
        contributions = _block_contributions(
            blocks[layer], outputs.block_inputs[layer].flatten(0, 1)
        )
        if hooks is not None and layer == hooks.value_layer and matches:
            contributions.append(
                _fact_contributions(hooks.memory, matches[0], len(ids), resolve_row)
            )
        if contributions:
            for token_activations, strongest in zip(
                activations,
                _strongest_activations(
                    contributions, model, tokenizer, layer, top_reads, top_tokens
                ),
                strict=True,
            ):
                token_activations += strongest
    model.train(was_training)
    next_tokens = map(tuple, _next_tokens(outputs.hidden.flatten(0, 1), outputs.head, tokenizer))
    activations[: len(prefix_ids)] = [[] for _ in prefix_ids]
    columns = zip(map(tokenizer.decode, ids), next_tokens, map(tuple, activations), strict=True)
    return [TokenTrace(position, *column) for position, column in enumerate(columns)]


@torch.no_grad()
def logit_lens(
    model: PreTrainedModel, tokenizer: Any, values: Tensor, count: int = 5
) -> list[list[tuple[str, float]]]:
    """Which tokens each of `value` `(n, width)` pushes up most when it is added to the stream, and by how much.

    Logits through the scale of the final norm alone, less their mean over the vocabulary; a value that moves all alike
    pushes none. They are comparable among values: what the norm divides by depends on the token, and is left out.

    Source: nostalgebraist 2020, the logit lens; of single values, Geva et al. 2022, arXiv 2203.14680.
    """
    scale = getattr(
        model.get_submodule(get_architecture(model.config.model_type).final_norm), "weight", None
    )
    head = model.get_output_embeddings().weight[: len(tokenizer)].float()  # rows beyond are padding
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
    """All that the memory `block` said to `hidden` `(tokens, width)` out of slots and rows."""
    if isinstance(block, FeaturalMemory):
        return [_slot_contributions(block, hidden)]
    if not isinstance(block, AssociativeMemory):
        return []
    slots = (
        [_slot_contributions(block.base, hidden)] if isinstance(block.base, FeaturalMemory) else []
    )
    if not len(block.rows):
        return slots
    rows = _row_contributions(block, hidden)
    if (
        block.value_target == "teacher"
    ):  # whole answers: rows speak instead of the base, not beside it
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


def _fact_contributions(
    memory: EditMemory, matches: Matches, tokens: int, resolve_row: Callable[[int], tuple[int, str]]
) -> _Contributions:
    """What facts said to each token: one row, or none."""
    labels = [resolve_row(int(memory.rows.ids[row])) for row in matches.rows]
    device = memory.mean.device
    fact_ids, weights = (
        torch.full((tokens, 1), -1, device=device),
        torch.zeros(tokens, 1, device=device),
    )
    values = torch.zeros(tokens, 1, memory.width, device=device)
    fact_ids[matches.tokens, 0] = torch.tensor(
        [fact_id for fact_id, _ in labels], dtype=torch.long, device=device
    )
    weights[matches.tokens, 0] = 1.0
    values[matches.tokens, 0] = memory.rows.values[matches.rows]
    return _Contributions(
        "fact", fact_ids, weights, weights > 0, values, values.norm(dim=-1), dict(labels)
    )


def _strongest_activations(
    contributions: list[_Contributions],
    model: PreTrainedModel,
    tokenizer: Any,
    layer: int,
    top_reads: int,
    count: int,
) -> list[list[Activation]]:
    """The reads of each token in `layer` that say most, the longest contribution first."""
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
            int(contribution.numbers[token, column]),
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


def to_json(traces: list[TokenTrace]) -> list[dict[str, Any]]:
    """The same as lists, dictionaries, numbers and words alone."""
    return json.loads(json.dumps([asdict(trace) for trace in traces]))


def format_table(traces: list[TokenTrace]) -> Table:
    """`reads` for a person: a row for each token and layer; tokens in quotes, so that spaces and line ends are seen."""
    rich_table = Table("token", "next", "layer", "reads")
    for trace in traces:
        cells: dict[int, list[str]] = {}
        for activation in trace.activations:
            tag, top_tokens = (
                f" [{activation.tag}]" if activation.tag else "",
                ", ".join(map(_quote, activation.top_tokens)),
            )
            cells.setdefault(activation.layer, []).append(
                f"{activation.kind} {activation.index} {activation.weight:+.2f} ({activation.share:.0%}){tag} → {top_tokens}"
            )
        for row_index, (layer, cell_lines) in enumerate(cells.items() or [("", [])]):
            leading_cells = (
                ["", ""]
                if row_index
                else [
                    _quote(trace.token),
                    f"{_quote(trace.next_tokens[0][0])} {trace.next_tokens[0][1]:.2f}",
                ]
            )
            rich_table.add_row(
                *map(Text, [*leading_cells, str(layer), "\n".join(cell_lines)])
            )  # as text: a token may look like markup
        rich_table.add_section()
    return rich_table


def _quote(token: str) -> str:
    return json.dumps(token, ensure_ascii=False)
