"""Slots are moved where it costs least: in directions of which unrelated text, and what is known already, takes no notice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from dmt.distill.signals import observe
from dmt.memory import FeaturalMemory

DAMPING = 0.001
"""Added to every direction's share of what text notices, mean 1: none is taken to be free."""


@dataclass
class _Move:
    """One matrix of a memory, or two side by side, and the step from where it was: `start + left @ step @ right`."""

    parts: list[Tensor]
    start: Tensor
    step: Tensor
    left: Tensor
    right: Tensor

    def gradients(self) -> Tensor:
        return _joined([torch.zeros_like(part) if part.grad is None else part.grad for part in self.parts])


class Moves:
    """Steps that keys and values of `memories` take, measured so that a step of length 1 costs text the same in any direction.

    How much text would notice is the Fisher information of the model's answers, as a product of what enters a matrix and of
    what its answer changes.

    Args:
        memories: of `model`, by layer; nothing else of it changes.
        noticed: token ids `(batch, time)`, which of them count, and how much a batch does: text that should notice nothing.

    Source: Martens and Grosse 2015, arXiv 1503.05671 (the product); here as coordinates in which plain momentum descends.
    """

    def __init__(
        self, model: PreTrainedModel, memories: dict[int, FeaturalMemory], noticed: Iterable[tuple[Tensor, Tensor, float]]
    ) -> None:
        found = _noticed(model, memories, noticed)
        self._moves: list[_Move] = []
        for layer, memory in memories.items():
            means = found[layer]
            self._add([memory.values], means["reads"], means["slopes"])
            self._add([memory.keys, memory.key_bias], means.get("scores"), means.get("queries"))
            if memory.gains is not None and memory.gain_bias is not None:
                self._add([memory.gains, memory.gain_bias], None, means["inputs"])

    def _add(self, parts: list[Tensor], left: Tensor | None, right: Tensor | None) -> None:
        start = _joined([part.detach() for part in parts])
        sides = [
            torch.eye(size, device=start.device) if square is None else _root(square)
            for square, size in zip((left, right), start.shape, strict=True)
        ]
        self._moves.append(_Move(parts, start, torch.zeros_like(start, requires_grad=True), *sides))

    @property
    def learnt(self) -> list[Tensor]:
        """What of the model changes, which is what needs a gradient."""
        return [part for move in self._moves for part in move.parts]

    @property
    def steps(self) -> list[Tensor]:
        """What an optimiser is to change."""
        return [move.step for move in self._moves]

    def take_gradients(self) -> None:
        """Give the gradients of what changes in the model to the steps."""
        for move in self._moves:
            move.step.grad = move.left @ move.gradients() @ move.right
            for part in move.parts:
                part.grad = None

    @torch.no_grad()
    def move(self) -> None:
        """Put the model where the steps lead."""
        for move in self._moves:
            there = move.start + move.left @ move.step @ move.right
            if len(move.parts) == 1:
                move.parts[0].copy_(there)
            else:
                move.parts[0].copy_(there[:, :-1])
                move.parts[1].copy_(there[:, -1])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0].clone() if len(parts) == 1 else torch.cat([parts[0], parts[1].unsqueeze(1)], 1)


def _root(square: Tensor) -> Tensor:
    """The inverse root of a symmetric matrix whose diagonal's mean is made 1."""
    double = square.double().cpu()
    values, vectors = torch.linalg.eigh(double / double.diagonal().mean().clamp_min(1e-30))
    return (vectors * (values.clamp_min(0) + DAMPING).rsqrt() @ vectors.t()).to(square)


def _noticed(
    model: PreTrainedModel, memories: dict[int, FeaturalMemory], noticed: Iterable[tuple[Tensor, Tensor, float]]
) -> dict[int, dict[str, Tensor]]:
    """Mean squares, `(n, n)` each, of what matrices of each layer's memory are given and of slopes of the model's answers."""
    found: dict[int, dict[str, Tensor]] = {layer: {} for layer in memories}
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    for tokens, mask, weight in noticed:
        tokens, at = tokens.to(device), mask.to(device).flatten()
        states, slopes = _slopes(model, memories, tokens, at, generator)
        for layer, memory in memories.items():
            for name, rows in _sides(memory, states[layer].flatten(0, 1)[at], slopes[layer].flatten(0, 1)[at]).items():
                square = rows.t() @ rows * (weight / max(1, len(rows)))
                found[layer][name] = found[layer].get(name, 0) + square
    return found


def _slopes(
    model: PreTrainedModel, memories: dict[int, FeaturalMemory], tokens: Tensor, at: Tensor, generator: torch.Generator
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """What each memory is given, and how its answer changes the log-probability of a word the model might say."""
    states: dict[int, Tensor] = {}
    added: dict[int, Tensor] = {}
    hooks = []
    for layer, memory in memories.items():

        def add(_: nn.Module, given: tuple[Tensor, ...], said: Tensor, layer: int = layer) -> Tensor:
            states[layer] = given[0].detach()
            added[layer] = torch.zeros_like(said, requires_grad=True)
            return said + added[layer]

        hooks.append(memory.register_forward_hook(add))
    try:
        with torch.enable_grad():
            logits = observe(model, tokens).logits.float().flatten(0, 1)[at]
            words = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
            loss = F.cross_entropy(logits, words, reduction="sum")
            slopes = torch.autograd.grad(loss, [added[layer] for layer in memories])
    finally:
        for hook in hooks:
            hook.remove()
    return states, dict(zip(memories, slopes, strict=True))


@torch.no_grad()
def _sides(memory: FeaturalMemory, hidden: Tensor, slopes: Tensor) -> dict[str, Tensor]:
    """For tokens `(n, width)` what values, keys and gains are given, and slopes of what they answer."""
    slopes = slopes if memory.output is None else slopes @ memory.output
    mask, weights = memory.read_by(hidden)
    always = 0 if memory.means is None else memory.means
    inputs = F.pad(hidden, (0, 1), value=1.0)
    found = {"reads": weights + always, "slopes": slopes, "inputs": inputs}
    if memory.heads == 1:
        found["queries"] = F.pad(memory.queries(hidden)[:, 0], (0, 1), value=1.0)
    if memory.pointwise is not None:
        with torch.enable_grad():
            scores = memory.scores(hidden).detach().requires_grad_(True)
            (steep,) = torch.autograd.grad(memory.weights(hidden, scores).sum(), scores)
        found["scores"] = (slopes @ memory.values.t()) * steep * mask
    return found
