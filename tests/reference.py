"""The definition of a featural memory: one token and one slot at a time, without its code."""

import math

import torch
from torch import Tensor


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


FUNCTIONS = {
    "block": gelu_tanh,
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": lambda x: torch.clamp(x, min=0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


def reference_output(memory, token: Tensor) -> Tensor:
    """Return the output `(width,)` of `memory` for one token `(width,)`."""
    slots_per_head = memory.num_slots // memory.heads
    scores = []
    for slot in range(memory.num_slots):
        query = token if memory.query is None else memory.query[slot // slots_per_head] @ token
        if memory.activation == "distance":
            scores.append(-((query - memory.keys[slot]) ** 2).sum() / math.sqrt(memory.width))
        elif memory.activation == "softmax":
            scores.append(
                (query @ memory.keys[slot] + memory.key_bias[slot]) / math.sqrt(memory.width)
            )
        else:
            scores.append(query @ memory.keys[slot] + memory.key_bias[slot])
    weights, means = scores, [torch.zeros((), dtype=token.dtype)] * memory.num_slots
    if memory.activation in FUNCTIONS:
        weights = [FUNCTIONS[memory.activation](score) for score in scores]
    if memory.gains is not None:
        weights = [
            weight * (token @ memory.gains[i] + memory.gain_bias[i])
            for i, weight in enumerate(weights)
        ]
    if memory.selection == "centered":
        means = list(memory.means)

    def value_norm(slot):
        value = memory.values[slot]
        if memory.metric is None:
            return value.norm()
        if memory.output is not None:
            value = memory.output @ value
        return (value @ memory.metric @ memory.metric.T @ value).sqrt()

    rank = {
        "score": lambda i: scores[i],
        "contribution": lambda i: weights[i].abs() * value_norm(i),
        "centered": lambda i: (weights[i] - means[i]).abs() * value_norm(i),
    }[memory.selection]
    if memory.k_mode == "threshold":
        selected = [slot for slot in range(memory.num_slots) if rank(slot) >= memory.threshold]
    else:
        selected = []
        for head in range(memory.heads):
            head_slots = range(head * slots_per_head, (head + 1) * slots_per_head)
            ranked = sorted(head_slots, key=lambda i: -rank(i).item())
            selected += ranked[: memory.k // memory.heads]
    output = memory.output_bias
    for slot in range(memory.num_slots):
        output = output + means[slot] * memory.values[slot]
    if memory.activation in ("softmax", "distance"):
        total = sum(torch.exp(scores[i]) for i in selected)
        output = output + sum(torch.exp(scores[i]) / total * memory.values[i] for i in selected)
    else:
        output = output + sum((weights[i] - means[i]) * memory.values[i] for i in selected)
    if memory.output is not None:
        output = memory.output @ output
    if memory.skip_connection is not None:
        output = output + memory.skip_connection @ token
    return output


def assert_equal_gradients(output, expected, tensors):
    """Check that two outputs have equal gradients; those of unused tensors are zero."""
    gradients = torch.autograd.grad(output.sin().sum(), tensors)
    references = torch.autograd.grad(expected.sin().sum(), tensors, allow_unused=True)
    for gradient, reference in zip(gradients, references, strict=True):
        zeros = torch.zeros_like(gradient)
        torch.testing.assert_close(gradient, zeros if reference is None else reference)
