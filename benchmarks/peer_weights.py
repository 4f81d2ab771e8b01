"""Write facts into the weights of feed-forward blocks: ROME, MEMIT and AlphaEdit.

All three look a fact up at the last token of its subject: the input of the block's second matrix is
the key there, and an offset of the residual stream is trained until the model answers as the fact
says. They differ in how they change the matrix so that the key is answered with the offset.

Written from the formulas of the papers; `edit_protocols.py` measures the methods. Deviations, for
their cost: three texts before a fact instead of five to twenty, and an offset is trained until the
answer's own loss is small (of 25 steps at most), not also its divergence.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peer_editing import Edited, upper_layers_only
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from dmt.data.corpora import load_corpus
from dmt.data.synthetic import Probe
from dmt.data.tokenizer import get_prefix_ids
from dmt.models.architectures import get_architecture
from dmt.models.forward import batch_by_length, capture, encode_text, pad_token_ids

CONTEXT_STARTS = ("The", "Because", "I")  # of the texts before a fact
CONTEXT_TOKENS, TOP_K = 10, 5
STATISTICS_TOKENS, STATISTICS_WINDOW = 30_000, 256  # of prose, for the second moment of keys
MAX_STEPS, LEARNING_RATE, ENOUGH = (
    25,
    0.5,
    0.05,
)  # of the offset; ENOUGH is the answer's loss that ends it
KL_WEIGHT, DECAY = 0.0625, 1e-3
MAX_OFFSET = 4.0  # norm of the offset, as a multiple of the state's; AlphaEdit has its own
ALPHAEDIT_MAX_OFFSET = 0.75
# Layers as a share of the depth, after the papers' choice for Llama: 5, and 4 to 8, of 32.
ROME_LAYER, FIRST_LAYER, LAST_LAYER = 5 / 32, 4 / 32, 8 / 32
MOMENT_WEIGHT = 1.0  # MEMIT's lambda, per slot: the paper has 15,000 for 16,384 slots
NULL_EIGENVALUE = 2e-2  # AlphaEdit: directions of keys of prose whose mean square is below this
BATCH = 100  # facts that MEMIT and AlphaEdit write at a time
OFFSET_BATCH = 16  # facts whose offsets are trained together


class Lookup(NamedTuple):
    """A text in tokens, cut before the last token of its subject.

    Attributes:
        before: tokens before that token.
        after: that token and all that follow, without the last of the answer.
        answer: tokens of the answer, predicted at the last positions of `after`.
    """

    before: list[int]
    after: list[int]
    answer: list[int]


class States(NamedTuple):
    """States at the last token of the subject, in the order of the texts.

    Attributes:
        keys: inputs of the block's second matrix, `(texts, slots)`.
        outputs: residual stream after the layer, `(texts, width)`.
    """

    keys: Tensor
    outputs: Tensor


def encode_lookup(tokenizer: Any, text: str, subject: str, answer: str = "") -> Lookup:
    """Encode `text` with `answer`, cut at the last occurrence of `subject`."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    end = text.rindex(subject) + len(subject)
    index = max(i for i, (start, _) in enumerate(encoding["offset_mapping"]) if start < end)
    answer_ids = encode_text(tokenizer, answer, add_prefix=False) if answer else []
    ids = [*encoding["input_ids"], *answer_ids[:-1]]
    return Lookup(get_prefix_ids(tokenizer) + ids[:index], ids[index:], answer_ids)


def encode_in_contexts(tokenizer: Any, fact: Probe, contexts: Sequence[str]) -> list[Lookup]:
    """Encode a fact alone and after each context."""
    return [
        encode_lookup(tokenizer, f"{context}{fact.prompt}", fact.person, fact.answer)
        for context in ("", *contexts)
    ]


@contextmanager
def lower_layers_only(model: PreTrainedModel, count: int) -> Iterator[None]:
    """Leave out all transformer blocks after the first `count`."""
    arch = get_architecture(model.config.model_type)
    layers, (parent, name) = arch.transformer_blocks(model), arch.layers.rsplit(".", 1)
    setattr(model.get_submodule(parent), name, layers[:count])
    try:
        yield
    finally:
        setattr(model.get_submodule(parent), name, layers)


def get_second_matrix(model: PreTrainedModel, layer: int) -> nn.Module:
    """Return the module whose input is the key of a feed-forward block."""
    arch = get_architecture(model.config.model_type)
    name = arch.tensor_names["values"].rsplit(".", 1)[0]
    return arch.blocks(model)[layer].get_submodule(name)


def add_to_second_matrix(model: PreTrainedModel, layer: int, update: Tensor) -> None:
    """Add `update` `(slots, width)` to the matrix from keys to outputs."""
    arch = get_architecture(model.config.model_type)
    arch.read_tensors(arch.blocks(model)[layer])["values"].data += update.float()


@torch.no_grad()
def read_states(model: PreTrainedModel, lookups: Sequence[Lookup], layer: int) -> States:
    """Read the states of texts at the last token of their subject."""
    arch = get_architecture(model.config.model_type)
    modules = {"matrix": get_second_matrix(model, layer)}
    modules["layer"] = arch.transformer_blocks(model)[layer]
    sequences = [lookup.before + lookup.after[:1] for lookup in lookups]
    keys, outputs = {}, {}
    for batch in batch_by_length([len(sequence) for sequence in sequences]):
        with lower_layers_only(model, layer + 1), capture(modules) as activations:
            backbone = model.get_submodule(arch.backbone)
            backbone(pad_token_ids([sequences[i] for i in batch]), use_cache=False)
        for row, i in enumerate(batch):
            position = len(sequences[i]) - 1
            keys[i] = activations.inputs["matrix"][row, position]
            outputs[i] = activations.outputs["layer"][row, position]
    order = range(len(lookups))
    return States(torch.stack([keys[i] for i in order]), torch.stack([outputs[i] for i in order]))


def read_mean_keys(
    model: PreTrainedModel,
    tokenizer: Any,
    facts: Sequence[Probe],
    contexts: Sequence[str],
    layer: int,
) -> Tensor:
    """Return the mean of each fact's keys over contexts, `(facts, slots)`."""
    lookups = [row for fact in facts for row in encode_in_contexts(tokenizer, fact, contexts)]
    keys = read_states(model, lookups, layer).keys
    return keys.view(len(facts), 1 + len(contexts), -1).mean(1)


@functools.cache
@torch.no_grad()
def sample_contexts(model: Any, tokenizer: Any) -> tuple[str, ...]:
    """Let the model write the texts before a fact."""
    contexts = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for start in CONTEXT_STARTS:
            ids = torch.tensor([encode_text(tokenizer, start)])
            generated = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=CONTEXT_TOKENS,
                do_sample=True,
                top_k=TOP_K,
                pad_token_id=0,
            )
            contexts.append(tokenizer.decode(generated[0], skip_special_tokens=True) + ". ")
    return tuple(contexts)


@functools.cache
@torch.no_grad()
def measure_second_moment(model: PreTrainedModel, tokenizer: Any, layer: int) -> Tensor:
    """Return the mean outer product of the keys of prose with themselves, `(slots, slots)`."""
    arch = get_architecture(model.config.model_type)
    text = "\n\n".join(load_corpus("speeches").train)[: 8 * STATISTICS_TOKENS]
    ids = encode_text(tokenizer, text)[:STATISTICS_TOKENS]
    windows = torch.tensor(ids[: len(ids) // STATISTICS_WINDOW * STATISTICS_WINDOW])
    moment, count = torch.zeros(()).double(), 0
    with lower_layers_only(model, layer + 1):
        for batch in windows.view(-1, STATISTICS_WINDOW).split(8):
            with capture({"matrix": get_second_matrix(model, layer)}) as activations:
                model.get_submodule(arch.backbone)(batch, use_cache=False)
            keys = activations.inputs["matrix"].flatten(0, 1)
            moment, count = moment + (keys.T @ keys).double(), count + len(keys)
    return moment / count


def train_offsets(
    model: PreTrainedModel,
    tokenizer: Any,
    facts: Sequence[Probe],
    contexts: Sequence[str],
    layer: int,
    max_offset: float = MAX_OFFSET,
) -> Tensor:
    """Train an offset of the residual stream after `layer` for each fact.

    It is added at the last token of the subject. The loss is that of the answer, alone and after
    the contexts, with the divergence of what follows the subject itself. Only what an offset
    changes is computed again at each step: later tokens in later layers.

    Returns:
        Offsets `(facts, width)`.
    """
    # Facts whose subjects are as far from the end are trained together, so that little is padded.
    lengths = [len(encode_in_contexts(tokenizer, fact, ())[0].after) for fact in facts]
    order = sorted(range(len(facts)), key=lengths.__getitem__)
    offsets = torch.cat(
        [
            _train_offsets(
                model,
                tokenizer,
                [facts[i] for i in order[start : start + OFFSET_BATCH]],
                contexts,
                layer,
                max_offset,
            )
            for start in range(0, len(facts), OFFSET_BATCH)
        ]
    )
    return offsets[torch.tensor(order).argsort()]


def _train_offsets(
    model: PreTrainedModel,
    tokenizer: Any,
    facts: Sequence[Probe],
    contexts: Sequence[str],
    layer: int,
    max_offset: float,
) -> Tensor:
    arch = get_architecture(model.config.model_type)
    backbone, head = model.get_submodule(arch.backbone), model.get_output_embeddings()
    lookups = [row for fact in facts for row in encode_in_contexts(tokenizer, fact, contexts)]
    num_answered = len(lookups)
    lookups += [encode_lookup(tokenizer, fact.person, fact.person) for fact in facts]
    owners = torch.arange(len(facts)).repeat_interleave(1 + len(contexts))
    row_owners = torch.cat([owners, torch.arange(len(facts))])

    # Padded on the left, the last tokens of all subjects are in one column.
    num_before = max(len(lookup.before) for lookup in lookups)
    lengths = torch.tensor([len(lookup.before) for lookup in lookups])
    padding = [[0] * (num_before - len(lookup.before)) for lookup in lookups]
    before = torch.tensor([pad + row.before for pad, row in zip(padding, lookups, strict=True)])
    after = pad_token_ids([lookup.after for lookup in lookups])
    before_mask = (torch.arange(num_before) >= num_before - lengths[:, None]).long()
    mask = torch.cat([before_mask, torch.ones_like(after)], 1)
    before_positions = (before_mask.cumsum(1) - 1).clamp(min=0)
    after_positions = lengths[:, None] + torch.arange(after.shape[1])
    cache: Any = DynamicCache()

    def run_after() -> Tensor:
        grown: Any = DynamicCache()
        for index, cached in enumerate(cache.layers):
            grown.update(cached.keys, cached.values, index)
        return backbone(
            after,
            attention_mask=mask,
            position_ids=after_positions,
            past_key_values=grown,
            use_cache=True,
        ).last_hidden_state

    with torch.no_grad():
        backbone(
            before,
            attention_mask=before_mask,
            position_ids=before_positions,
            past_key_values=cache,
            use_cache=True,
        )
        with capture({0: arch.transformer_blocks(model)[layer]}) as activations:
            run_after()
    states = activations.outputs[0]
    norms = states[: num_answered : 1 + len(contexts), 0].norm(dim=-1)  # of the facts alone

    rows = torch.tensor([i for i, row in enumerate(lookups) for _ in row.answer])
    columns = torch.tensor(
        [len(row.after) - len(row.answer) + i for row in lookups for i in range(len(row.answer))]
    )
    answers = torch.tensor([token for row in lookups for token in row.answer])
    num_tokens = torch.tensor([len(row.answer) for row in lookups])[rows] * (1 + len(contexts))
    offsets = torch.zeros(len(facts), states.shape[-1], requires_grad=True)
    optimizer = torch.optim.Adam([offsets], lr=LEARNING_RATE)
    original_log_probs: Tensor | None = None
    for step in range(MAX_STEPS):
        shifted = states.clone()
        shifted[:, 0] += offsets[row_owners]
        with upper_layers_only(model, layer + 1, shifted):
            hidden = run_after()
        token_losses = F.cross_entropy(head(hidden[rows, columns]), answers, reduction="none")
        losses = torch.zeros(len(facts)).index_add(0, owners[rows], token_losses / num_tokens)
        unfinished = losses.detach() >= ENOUGH
        if not unfinished.any() or step == MAX_STEPS - 1:
            break
        log_probs = head(hidden[num_answered:, 0]).log_softmax(-1)
        if original_log_probs is None:  # at the first step the offsets are 0
            original_log_probs = log_probs.detach()
        divergence = (log_probs.exp() * (log_probs - original_log_probs)).sum(-1)
        losses = losses + KL_WEIGHT * divergence + DECAY * offsets.norm(dim=-1) / norms.square()
        losses.sum().backward()
        previous = offsets.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            scales = (max_offset * norms / offsets.norm(dim=-1).clamp(min=1e-9)).clamp(max=1)
            offsets.mul_(scales[:, None])
            # A fact that is answered well enough stays as it is, as if it had been trained alone.
            offsets.copy_(torch.where(unfinished[:, None], offsets, previous))
    return offsets.detach()


def write_rome(
    model: PreTrainedModel, tokenizer: Any, facts: list[Probe], layer: int | None = None
) -> Edited:
    """Change one matrix by a product of two vectors for each fact, one after the other.

    Source: Meng et al. 2022, arXiv 2202.05262.
    """
    edited = copy.deepcopy(model).requires_grad_(False)
    layer = round(ROME_LAYER * model.config.num_hidden_layers) if layer is None else layer
    contexts = sample_contexts(model, tokenizer)
    inverse = torch.linalg.inv(measure_second_moment(model, tokenizer, layer)).float()
    start = time.perf_counter()
    for fact in facts:
        [offset] = train_offsets(edited, tokenizer, [fact], contexts, layer)
        keys = read_states(edited, encode_in_contexts(tokenizer, fact, contexts), layer).keys
        direction = inverse @ keys.mean(0)
        # The key of the fact alone, `keys[0]`, is answered with exactly the offset.
        update = torch.outer(direction / (direction @ keys[0]), offset)
        add_to_second_matrix(edited, layer, update)
    return Edited(edited, time.perf_counter() - start)


def list_layers(model: PreTrainedModel) -> range:
    """Return the layers that MEMIT and AlphaEdit change."""
    depth = model.config.num_hidden_layers
    return range(round(FIRST_LAYER * depth), round(LAST_LAYER * depth) + 1)


def spread_over_layers(
    edited: PreTrainedModel,
    tokenizer: Any,
    facts: Sequence[Probe],
    contexts: Sequence[str],
    layers: range,
    max_offset: float,
    solve: Callable[[int, Tensor, Tensor], Tensor],
) -> None:
    """Change several matrices so that the last layer answers each key with its offset.

    Args:
        edited: the model.
        tokenizer: its tokenizer.
        facts: facts that are written together.
        contexts: texts before a fact.
        layers: layers whose matrices change.
        max_offset: norm of an offset, as a multiple of the state's.
        solve: maps a layer, keys `(facts, slots)` and what is still missing in this layer
            `(facts, width)` to the update `(slots, width)`.
    """
    last = layers[-1]
    alone = [encode_in_contexts(tokenizer, fact, ())[0] for fact in facts]
    offsets = train_offsets(edited, tokenizer, facts, contexts, last, max_offset)
    targets = read_states(edited, alone, last).outputs + offsets
    for layer in layers:
        keys = read_mean_keys(edited, tokenizer, facts, contexts, layer)
        missing = targets - read_states(edited, alone, last).outputs
        update = solve(layer, keys.double(), missing.double() / (last - layer + 1))
        add_to_second_matrix(edited, layer, update)


def solve_memit(moment: Tensor, keys: Tensor, missing: Tensor) -> Tensor:
    """Return the update that answers `keys` with `missing` and changes prose least.

    It minimizes `|keys @ update - missing|^2 + weight * tr(update' moment update)`, where the
    weight is `MOMENT_WEIGHT` times the number of slots.

    Args:
        moment: second moment of the keys of prose, `(slots, slots)`.
        keys: keys of facts, `(facts, slots)`.
        missing: outputs that the facts lack, `(facts, width)`.

    Returns:
        The update, `(slots, width)`.
    """
    weight = MOMENT_WEIGHT * len(moment)
    return torch.linalg.solve(weight * moment + keys.T @ keys, keys.T @ missing)


def write_memit(model: PreTrainedModel, tokenizer: Any, facts: list[Probe]) -> Edited:
    """Change five matrices by least squares, against the keys of prose, for a batch of facts.

    Source: Meng et al. 2022, arXiv 2210.07229.
    """
    edited, contexts = copy.deepcopy(model).requires_grad_(False), sample_contexts(model, tokenizer)
    layers = list_layers(model)
    moments = {layer: measure_second_moment(model, tokenizer, layer) for layer in layers}

    def solve(layer: int, keys: Tensor, missing: Tensor) -> Tensor:
        return solve_memit(moments[layer], keys, missing)

    start = time.perf_counter()
    for first in range(0, len(facts), BATCH):
        batch = facts[first : first + BATCH]
        spread_over_layers(edited, tokenizer, batch, contexts, layers, MAX_OFFSET, solve)
    return Edited(edited, time.perf_counter() - start)


def find_null_space(moment: Tensor) -> Tensor:
    """Return the projection `(slots, slots)` onto directions that keys of prose do not have."""
    eigenvalues, eigenvectors = torch.linalg.eigh(moment)
    null_space = eigenvectors[:, eigenvalues < NULL_EIGENVALUE]
    return null_space @ null_space.T


def solve_alphaedit(projection: Tensor, earlier: Tensor, keys: Tensor, missing: Tensor) -> Tensor:
    """Return the update within the null space of prose that answers `keys` with `missing`.

    Args:
        projection: projection onto the null space, `(slots, slots)`.
        earlier: sum of the outer products of the keys written before, `(slots, slots)`.
        keys: keys of facts, `(facts, slots)`.
        missing: outputs that the facts lack, `(facts, width)`.

    Returns:
        The update, `(slots, width)`.
    """
    identity = torch.eye(len(projection), dtype=projection.dtype)
    matrix = projection @ (keys.T @ keys + earlier) + identity
    return torch.linalg.solve(matrix, projection @ keys.T @ missing)


def write_alphaedit(model: PreTrainedModel, tokenizer: Any, facts: list[Probe]) -> Edited:
    """Change five matrices for a batch of facts in directions that keys of prose do not have.

    Source: Fang et al. 2024, arXiv 2410.02355.
    """
    edited, contexts = copy.deepcopy(model).requires_grad_(False), sample_contexts(model, tokenizer)
    layers = list_layers(model)
    moments = {layer: measure_second_moment(model, tokenizer, layer) for layer in layers}
    projections = {layer: find_null_space(moment) for layer, moment in moments.items()}
    earlier = {layer: torch.zeros_like(moment) for layer, moment in moments.items()}

    def solve(layer: int, keys: Tensor, missing: Tensor) -> Tensor:
        return solve_alphaedit(projections[layer], earlier[layer], keys, missing)

    start = time.perf_counter()
    for first in range(0, len(facts), BATCH):
        batch = facts[first : first + BATCH]
        spread_over_layers(edited, tokenizer, batch, contexts, layers, ALPHAEDIT_MAX_OFFSET, solve)
        for layer in layers:
            keys = read_mean_keys(edited, tokenizer, batch, contexts, layer).double()
            earlier[layer] = earlier[layer] + keys.T @ keys
    return Edited(edited, time.perf_counter() - start)


METHODS: dict[str, Callable[[PreTrainedModel, Any, list[Probe]], Edited]] = {
    "ROME": write_rome,
    "MEMIT": write_memit,
    "AlphaEdit": write_alphaedit,
}
