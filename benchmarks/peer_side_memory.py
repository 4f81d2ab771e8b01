"""Write facts into copies of a feed-forward matrix that a router chooses: WISE.

Written from the formulas of the paper; `edit_protocols.py` measures the method. Deviations: the
router decides token by token, as generation with a cache needs, by the distance where an answer is
predicted; margins are relative to the norm of the matrix's outputs, since models differ in scale;
side memories are chosen by distance and not merged.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peer_editing import Edited, Example, upper_layers_only
from peer_weights import encode_in_contexts, get_second_matrix, sample_contexts
from torch import Tensor, nn
from transformers import PreTrainedModel

from dmt.data.corpora import load_corpus
from dmt.data.synthetic import Probe
from dmt.models.architectures import get_architecture
from dmt.models.forward import encode_text, forward_with_activations, pad_token_ids

MASK_RATIO = 0.2  # share of a side memory's weights that may change
SHARD = 500  # facts of one side memory
MAX_STEPS, LEARNING_RATE, ENOUGH = 70, 1.0, 0.02  # ENOUGH is the loss that ends a fact
MAX_CHANGE = 1.0  # of a weight
# Margins of the distance between the outputs of side memory and matrix, in mean norms of the
# outputs: at most ALPHA for other text, at least BETA for facts, and at least GAMMA between them.
# The paper's are 5, 20 and 10 for Llama.
ALPHA, BETA, GAMMA = 0.25, 1.0, 0.5
THRESHOLD_RATIO = 0.88  # threshold of the router, as a share of the smallest distance of a fact
OTHER_TOKENS = 16  # of other text per fact


class SideMemory(nn.Module):
    """A matrix, and copies of it that answer where their outputs differ enough from its own.

    Args:
        matrix: the module that is replaced.
    """

    def __init__(self, matrix: nn.Module) -> None:
        super().__init__()
        self.matrix = matrix
        self.sides = nn.ModuleList()
        self.thresholds: list[float] = []
        self.is_editing = False
        self.distances = torch.empty(0)  # of the newest side memory, `(batch, time)`

    def add_side(self) -> nn.Module:
        """Add a copy of the matrix, which no distance chooses yet, and return it."""
        self.sides.append(copy.deepcopy(self.matrix))
        self.thresholds.append(float("inf"))
        return self.sides[-1]

    def forward(self, keys: Tensor) -> Tensor:
        """Map `(batch, time, slots)` to `(batch, time, width)`."""
        output = self.matrix(keys)
        chosen, largest = output, torch.zeros_like(output[..., 0])
        for side, threshold in zip(self.sides, self.thresholds, strict=True):
            side_output = side(keys)
            distances = (side_output - output).norm(dim=-1)
            is_chosen = (distances >= threshold) & (distances > largest)
            chosen = torch.where(is_chosen[..., None], side_output, chosen)
            largest = torch.where(is_chosen, distances, largest)
        if self.is_editing:
            self.distances = distances
            return side_output
        return chosen


def write_wise(model: PreTrainedModel, tokenizer: Any, facts: list[Probe]) -> Edited:
    """Train a copy of the last block's second matrix on one fact after the other.

    Source: Wang et al. 2024, arXiv 2405.14768; side memories are retrieved, not merged.
    """
    edited = copy.deepcopy(model).requires_grad_(False)
    arch, contexts = get_architecture(model.config.model_type), sample_contexts(model, tokenizer)
    layer = model.config.num_hidden_layers - 1
    matrix = get_second_matrix(edited, layer)
    memory = SideMemory(matrix)
    matrix_name = arch.tensor_names["values"].rsplit(".", 1)[0]
    setattr(arch.blocks(edited)[layer], matrix_name, memory)
    other_ids = encode_text(tokenizer, "\n".join(load_corpus("speeches").train)[:200_000])
    generator, rng = torch.Generator().manual_seed(0), random.Random(0)
    start = time.perf_counter()
    for number, fact in enumerate(facts):
        if number % SHARD == 0:
            weight: Any = memory.add_side().weight
            mask = torch.rand(weight.shape, generator=generator) < MASK_RATIO
        examples = [
            Example(
                torch.tensor(row.before + row.after),
                torch.arange(-len(row.answer), 0) + len(row.before + row.after),
                torch.tensor(row.answer),
            )
            for row in encode_in_contexts(tokenizer, fact, contexts)
        ]
        first = rng.randrange(len(other_ids) - OTHER_TOKENS)
        other = other_ids[first : first + OTHER_TOKENS]
        distance = _train_side(edited, layer, memory, weight, mask, examples, other)
        memory.thresholds[-1] = min(memory.thresholds[-1], THRESHOLD_RATIO * distance)
    return Edited(edited, time.perf_counter() - start)


def _train_side(
    edited: PreTrainedModel,
    layer: int,
    memory: SideMemory,
    weight: nn.Parameter,
    mask: Tensor,
    examples: list[Example],
    other: list[int],
) -> float:
    """Train the newest side memory on one fact; return its smallest distance for the fact.

    Args:
        edited: the model.
        layer: layer of the side memory.
        memory: the side memory and its matrix.
        weight: weight of the side memory.
        mask: which of its entries may change.
        examples: the fact alone and after contexts.
        other: tokens of other text, at which the side memory should not be chosen.
    """
    tokens = pad_token_ids([*(example.tokens.tolist() for example in examples), other])
    with torch.no_grad():
        outputs = forward_with_activations(edited, tokens, capture_blocks=True)
    below = outputs.layer_outputs[layer - 1]
    scale = float(outputs.block_outputs[layer][-1, : len(other)].norm(dim=-1).mean())
    rows = torch.cat(
        [torch.full_like(example.positions, row) for row, example in enumerate(examples)]
    )
    positions = torch.cat([example.positions for example in examples])
    answers = torch.cat([example.answer for example in examples])
    original = memory.matrix.weight
    weight.requires_grad_(True)
    memory.is_editing = True
    with upper_layers_only(edited, layer, below):
        for step in range(MAX_STEPS):
            outputs = forward_with_activations(edited, tokens)
            answer_loss = F.cross_entropy(outputs.head(outputs.hidden[rows, positions]), answers)
            edit_distances = memory.distances[rows, positions] / scale
            prose_distance = memory.distances[-1, : len(other)].mean() / scale
            margin_loss = scale * (
                F.relu(prose_distance - ALPHA)
                + F.relu(BETA - edit_distances.mean())
                + F.relu(GAMMA - edit_distances.mean() + prose_distance)
            )
            loss = answer_loss + margin_loss
            if loss.item() <= ENOUGH or step == MAX_STEPS - 1:
                break
            (gradient,) = torch.autograd.grad(loss, [weight])
            with torch.no_grad():
                weight -= LEARNING_RATE * gradient * mask
                weight.clamp_(original - MAX_CHANGE, original + MAX_CHANGE)
    memory.is_editing = False
    weight.requires_grad_(False)
    return edit_distances.min().item() * scale


METHODS: dict[str, Callable[[PreTrainedModel, Any, list[Probe]], Edited]] = {"WISE": write_wise}
