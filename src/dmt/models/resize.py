"""Fewer or more slots than a feed-forward block has neurons, losing as little of the block as can be.

Parts are a memory's parameters by name, as `Architecture.read` gives them; `weights` are what the block's neurons answer
to calibration text, `(tokens, neurons)`. More slots give the same sum; fewer give it as far as the kept ones can.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

RIDGE = 1e-3
"""Ridge of `merge`, as a share of the mean variance of a weight."""
NOISE = 0.1
"""How far the copies of a split slot differ, as a share of the value's size; small values of new slots, of the mean one's."""
PER_SLOT = ("keys", "key_bias", "gains", "gain_bias", "values")

Parts = dict[str, Tensor]


def resized(parts: Mapping[str, Tensor], weights: Tensor, slots: int, fewer: str, more: str, seed: int = 0) -> Parts:
    """`parts` of a block with `slots` neurons: `fewer` is `drop` or `merge`, `more` is `split` or `new`."""
    generator = torch.Generator().manual_seed(seed)
    if slots < len(parts["keys"]):
        return _drop(parts, weights, slots, merge=fewer == "merge")
    if slots > len(parts["keys"]):
        return _split(parts, weights, slots, generator) if more == "split" else _new(parts, slots, generator)
    return dict(parts)


def importance(parts: Mapping[str, Tensor], weights: Tensor) -> Tensor:
    """Mean squared length of what each neuron adds to the answer beyond its mean, `(neurons,)`."""
    return weights.var(0, correction=0) * parts["values"].square().sum(-1)


def _rows(parts: Mapping[str, Tensor], chosen: Tensor) -> Parts:
    return {name: tensor[chosen] if name in PER_SLOT else tensor.clone() for name, tensor in parts.items()}


def _bias(parts: Mapping[str, Tensor]) -> Tensor:
    return parts["output_bias"] if "output_bias" in parts else parts["values"].new_zeros(parts["values"].shape[1])


def _drop(parts: Mapping[str, Tensor], weights: Tensor, slots: int, merge: bool) -> Parts:
    """The most important neurons; with `merge`, what they can foretell of the others is folded into their values."""
    order = importance(parts, weights).argsort(descending=True)
    kept, gone = order[:slots].sort().values, order[slots:]
    means, lost = weights.mean(0), parts["values"][gone]
    found = _rows(parts, kept)
    bias = _bias(parts) + means[gone] @ lost
    if merge:
        # On the CPU, for not every device has doubles. Least squares: each lost weight as a sum of kept ones.
        spread = (weights - means).cpu().double()
        square = spread[:, kept].t() @ spread[:, kept]
        ridge = RIDGE * square.diagonal().mean() * torch.eye(slots, dtype=torch.double)
        share = torch.linalg.solve(square + ridge, spread[:, kept].t() @ spread[:, gone]).to(lost)
        found["values"] = found["values"] + share @ lost
        bias = bias - means[kept] @ share @ lost
    return found | {"output_bias": bias}


def _split(parts: Mapping[str, Tensor], weights: Tensor, slots: int, generator: torch.Generator) -> Parts:
    """The most important neurons several times over, their values shared out unevenly, so that training tells them apart."""
    worth = importance(parts, weights)
    copies = torch.ones(len(worth), dtype=torch.long)
    for _ in range(slots - len(worth)):
        copies[(worth / copies.square()).argmax()] += 1  # the value of each copy shrinks with their number
    source = torch.repeat_interleave(torch.arange(len(worth)), copies)
    found = _rows(parts, source)
    values = found["values"] / copies[source].unsqueeze(-1)
    noise = torch.randn(values.shape, generator=generator).to(values) * values.norm(dim=-1, keepdim=True) / values.shape[1] ** 0.5
    mean = torch.zeros_like(parts["values"]).index_add_(0, source, noise) / copies.unsqueeze(-1)
    found["values"] = values + NOISE * (noise - mean[source]) * (copies[source] > 1).unsqueeze(-1)
    return found


def _new(parts: Mapping[str, Tensor], slots: int, generator: torch.Generator) -> Parts:
    """The block's neurons and pairs of random ones whose small values cancel out, until training moves them apart."""
    count = slots - len(parts["keys"])
    pairs = torch.arange(count) // 2
    found = dict(parts)
    for name in PER_SLOT:
        if name not in parts:
            continue
        old = parts[name]
        scale = old.std() * (NOISE if name == "values" else 1)
        drawn = (torch.randn((count + 1) // 2, *old.shape[1:], generator=generator).to(old) * scale)[pairs]
        if name == "values":
            signs = torch.tensor([1.0, -1.0]).repeat(count // 2 + 1)[:count].unsqueeze(-1).to(old)
            drawn = drawn * signs * (pairs.bincount()[pairs] == 2).unsqueeze(-1)  # an odd one out adds nothing
        found[name] = torch.cat([old, drawn])
    return found
