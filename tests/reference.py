"""The obvious definition of a featural memory: one token and one slot at a time, float64, nothing shared with the code."""

import math

import torch
from torch import Tensor


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def read(memory, token: Tensor) -> Tensor:
    """What `memory` should answer to one token `(width,)`."""
    per_head = memory.num_slots // memory.heads
    scores = []
    for slot in range(memory.num_slots):
        query = token if memory.query is None else memory.query[slot // per_head] @ token
        if memory.activation == "distance":
            scores.append(-((query - memory.keys[slot]) ** 2).sum() / math.sqrt(memory.width))
        elif memory.activation == "softmax":
            scores.append(
                (query @ memory.keys[slot] + memory.key_bias[slot]) / math.sqrt(memory.width)
            )
        else:
            scores.append(query @ memory.keys[slot] + memory.key_bias[slot])
    weights, means = scores, [torch.zeros((), dtype=token.dtype)] * memory.num_slots
    if memory.activation == "block":
        weights = [gelu_tanh(score) for score in scores]
    elif memory.activation == "relu":
        weights = [torch.clamp(score, min=0) for score in scores]
    if memory.gains is not None:
        weights = [
            weight * (token @ memory.gains[i] + memory.gain_bias[i])
            for i, weight in enumerate(weights)
        ]
    if memory.selection == "centered":
        means = list(memory.means)

    def length(slot):
        value = memory.values[slot]
        if memory.metric is None:
            return value.norm()
        if memory.output is not None:
            value = memory.output @ value
        return (value @ memory.metric @ memory.metric.T @ value).sqrt()

    rank = {
        "score": lambda i: scores[i],
        "contribution": lambda i: weights[i].abs() * length(i),
        "centered": lambda i: (weights[i] - means[i]).abs() * length(i),
    }[memory.selection]
    chosen = (
        [slot for slot in range(memory.num_slots) if rank(slot) >= memory.threshold]
        if memory.k_mode == "threshold"
        else []
    )
    for head in range(memory.heads if memory.k_mode == "top" else 0):
        mine = range(head * per_head, (head + 1) * per_head)
        chosen += sorted(mine, key=lambda i: -rank(i).item())[: memory.k // memory.heads]
    said = memory.output_bias
    for slot in range(memory.num_slots):
        said = said + means[slot] * memory.values[slot]
    if memory.activation in ("softmax", "distance"):
        total = sum(torch.exp(scores[i]) for i in chosen)
        said = said + sum(torch.exp(scores[i]) / total * memory.values[i] for i in chosen)
    else:
        said = said + sum((weights[i] - means[i]) * memory.values[i] for i in chosen)
    if memory.output is not None:
        said = memory.output @ said
    return said if memory.skip_connection is None else said + memory.skip_connection @ token
