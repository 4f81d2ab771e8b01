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

from dmt.data.encoding import start_of
from dmt.distill.signals import observe
from dmt.errors import UserError
from dmt.memory import AssociativeMemory, FeaturalMemory
from dmt.memory.facts import Answered, FactMemory
from dmt.models.architectures import architecture_of
from dmt.models.overlay import answers_of, overlay_of

NEXTS, CHUNK = 5, 256
"""Likely next tokens that are told of each token; states whose logits exist at once."""


@dataclass(frozen=True)
class Read:
    """One slot or row that one token read in one layer, and what it said there."""

    layer: int
    kind: str  # `slot`; `row` of an associative memory; or `fact`
    number: int  # of the slot in its memory, or the row's or the fact's own
    weight: float  # what its value was multiplied by
    share: float  # of |weight| x length of the value in that of all slots and rows this token read in this layer, told or not
    tag: str  # where a row comes from, as far as that is known
    pushes: tuple[str, ...]  # tokens of the vocabulary that weight x value pushes up most


@dataclass(frozen=True)
class TokenReads:
    """One token, what the model expects after it, and what it read: by layer, in each the longest contribution first."""

    position: int
    token: str
    nexts: tuple[tuple[str, float], ...]  # with probabilities
    reads: tuple[Read, ...]


@dataclass(frozen=True)
class _Said:
    # What slots, or rows, said to every token: all `(tokens, n)`, values `(tokens, n, width)` as they reach the stream.
    kind: str
    numbers: Tensor
    weights: Tensor
    there: Tensor  # whether it was read at all
    values: Tensor
    lengths: Tensor  # of values
    tags: dict[int, str] = field(default_factory=dict)


@torch.no_grad()
def read(
    model: PreTrainedModel,
    tokenizer: Any,
    text: str | Tensor,
    most: int = 5,
    lens: int = 5,
    layers: Sequence[int] | None = None,
    name: Callable[[int], tuple[int, str]] = lambda row: (row, ""),
) -> list[TokenReads]:
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
    start = start_of(tokenizer)
    if isinstance(text, Tensor):
        given = text.tolist()[len(start) :]
    else:
        given = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    room, blocks = model.config.max_position_embeddings - len(start), architecture_of(model.config.model_type).blocks(model)
    asked = range(len(blocks)) if layers is None else sorted(set(layers))
    if not given:
        raise UserError("text is empty; give at least one word, so that there is a token to look at")
    if len(given) > room:
        raise UserError(f"text must have at most {room:,} tokens for this model, got {len(given):,}; shorten it")
    if wrong := set(asked) - set(range(len(blocks))):
        raise UserError(f"layers must be in [0, {len(blocks) - 1}] for this model, got {min(wrong)}")
    if most < 1 or lens < 0:
        raise UserError(f"most must be at least 1 and lens at least 0, got {most} and {lens}")
    ids, was_training = start + given, model.training
    model.eval()
    tokens, overlay = torch.tensor([ids], device=next(model.parameters()).device), overlay_of(model)
    with answers_of(model) as answered:
        seen = observe(model, tokens, blocks=True)
    found: list[list[Read]] = [[] for _ in ids]
    for layer in asked:
        said = _said(blocks[layer], seen.block_inputs[layer].flatten(0, 1))
        if overlay is not None and layer == overlay.answers and answered:
            said.append(_of_facts(overlay.memory, answered[0], len(ids), name))
        if said:
            for reads, more in zip(found, _strongest(said, model, tokenizer, layer, most, lens), strict=True):
                reads += more
    model.train(was_training)
    nexts = map(tuple, _nexts(seen.hidden.flatten(0, 1), seen.head, tokenizer))
    found[: len(start)] = [[] for _ in start]
    told = zip(map(tokenizer.decode, ids), nexts, map(tuple, found), strict=True)
    return [TokenReads(position, *each) for position, each in enumerate(told)]


@torch.no_grad()
def lens(model: PreTrainedModel, tokenizer: Any, value: Tensor, count: int = 5) -> list[list[tuple[str, float]]]:
    """Which tokens each of `value` `(n, width)` pushes up most when it is added to the stream, and by how much.

    Logits through the scale of the final norm alone, less their mean over the vocabulary; a value that moves all alike
    pushes none. They are comparable among values: what the norm divides by depends on the token, and is left out.

    Source: nostalgebraist 2020, the logit lens; of single values, Geva et al. 2022, arXiv 2203.14680.
    """
    scale = getattr(model.get_submodule(architecture_of(model.config.model_type).norm), "weight", None)
    head = model.get_output_embeddings().weight[: len(tokenizer)].float()  # rows beyond are padding
    pushed: list[list[tuple[str, float]]] = []
    for part in value.float().split(CHUNK):
        logits = (part if scale is None else part * scale.float()) @ head.t()
        best = (logits - logits.mean(-1, keepdim=True)).topk(min(count, len(head)))
        pushed += [[(word, score) for word, score in each if score > 0] for each in _worded(best, tokenizer)]
    return pushed


def _said(block: nn.Module, hidden: Tensor) -> list[_Said]:
    """All that the memory `block` said to `hidden` `(tokens, width)` out of slots and rows."""
    if isinstance(block, FeaturalMemory):
        return [_of_slots(block, hidden)]
    if not isinstance(block, AssociativeMemory):
        return []
    slots = [_of_slots(block.base, hidden)] if isinstance(block.base, FeaturalMemory) else []
    if not len(block.rows):
        return slots
    rows = _of_rows(block, hidden)
    if block.writes == "teacher":  # whole answers: rows speak instead of the base, not beside it
        slots = [replace(each, weights=each.weights * (1 - rows.weights.sum(-1, keepdim=True))) for each in slots]
    return [*slots, rows]


def _of_slots(memory: FeaturalMemory, hidden: Tensor) -> _Said:
    there, weights = memory.read_by(hidden)
    ids = there.any(0).nonzero().flatten()
    there, weights = there[:, ids], weights[:, ids]
    values = memory.value_rows(ids) if memory.output is None else memory.value_rows(ids) @ memory.output.t()
    numbers, lengths = ids.expand_as(weights), values.norm(dim=-1).expand_as(weights)
    return _Said("slot", numbers, weights, there, values.expand(len(hidden), -1, -1), lengths)


def _of_rows(memory: AssociativeMemory, hidden: Tensor) -> _Said:
    places, weights = memory.select(hidden)
    numbers, values = memory.rows.ids[places], memory.output(memory.rows.values[places].to(weights.dtype))
    tags = {int(memory.rows.ids[place]): memory.rows.histories.tags[place] for place in places[weights > 0].unique().tolist()}
    return _Said("row", numbers, weights, weights > 0, values, values.norm(dim=-1), tags)


def _of_facts(memory: FactMemory, found: Answered, tokens: int, name: Callable[[int], tuple[int, str]]) -> _Said:
    """What facts said to each token: one row, or none."""
    named = [name(int(memory.rows.ids[row])) for row in found.rows]
    device = memory.mean.device
    numbers, weights = torch.full((tokens, 1), -1, device=device), torch.zeros(tokens, 1, device=device)
    values = torch.zeros(tokens, 1, memory.width, device=device)
    numbers[found.tokens, 0] = torch.tensor([number for number, _ in named], dtype=torch.long, device=device)
    weights[found.tokens, 0] = 1.0
    values[found.tokens, 0] = memory.rows.values[found.rows]
    return _Said("fact", numbers, weights, weights > 0, values, values.norm(dim=-1), dict(named))


def _strongest(said: list[_Said], model: PreTrainedModel, tokenizer: Any, layer: int, most: int, count: int) -> list[list[Read]]:
    """The reads of each token in `layer` that say most, the longest contribution first."""
    columns = [(each, at) for each in said for at in range(each.weights.shape[1])]
    shares = F.normalize(torch.cat([each.weights * each.lengths for each in said], 1).float().abs(), p=1)
    best = shares.masked_fill(~torch.cat([each.there for each in said], 1), -1).topk(min(most, len(columns)))  # sorted
    ranked = enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True))
    listed = [(token, share, *columns[at]) for token, both in ranked for share, at in zip(*both, strict=True) if share >= 0]
    spoken = [each.weights[token, at] * each.values[token, at] for token, _, each, at in listed]
    pushes = lens(model, tokenizer, torch.stack(spoken), count) if spoken else []
    reads: list[list[Read]] = [[] for _ in shares]
    for (token, share, each, at), pushed in zip(listed, pushes, strict=True):
        number, weight, words = int(each.numbers[token, at]), float(each.weights[token, at]), tuple(word for word, _ in pushed)
        reads[token].append(Read(layer, each.kind, number, weight, share, each.tags.get(number, ""), words))
    return reads


def _nexts(hidden: Tensor, head: nn.Module, tokenizer: Any) -> Iterable[list[tuple[str, float]]]:
    for part in hidden.split(CHUNK):
        yield from _worded(head(part).float().softmax(-1)[:, : len(tokenizer)].topk(min(NEXTS, len(tokenizer))), tokenizer)


def _worded(best: torch.return_types.topk, tokenizer: Any) -> Iterable[list[tuple[str, float]]]:
    for scores, ids in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        yield [(tokenizer.decode([number]), score) for number, score in zip(ids, scores, strict=True)]


def as_json(reads: list[TokenReads]) -> list[dict[str, Any]]:
    """The same as lists, dictionaries, numbers and words alone."""
    return json.loads(json.dumps([asdict(each) for each in reads]))


def table(reads: list[TokenReads]) -> Table:
    """`reads` for a person: a row for each token and layer; tokens in quotes, so that spaces and line ends are seen."""
    made = Table("token", "next", "layer", "reads")
    for each in reads:
        lines: dict[int, list[str]] = {}
        for one in each.reads:
            tag, pushes = f" [{one.tag}]" if one.tag else "", ", ".join(map(_quoted, one.pushes))
            lines.setdefault(one.layer, []).append(f"{one.kind} {one.number} {one.weight:+.2f} ({one.share:.0%}){tag} → {pushes}")
        for row, (layer, said) in enumerate(lines.items() or [("", [])]):
            first = ["", ""] if row else [_quoted(each.token), f"{_quoted(each.nexts[0][0])} {each.nexts[0][1]:.2f}"]
            made.add_row(*map(Text, [*first, str(layer), "\n".join(said)]))  # as text: a token may look like markup
        made.add_section()
    return made


def _quoted(token: str) -> str:
    return json.dumps(token, ensure_ascii=False)
