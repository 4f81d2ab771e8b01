"""One gradient a fact: what a row has to add to a block's answer so that the model says the fact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from dmt.distill.signals import observe
from dmt.facts.sentences import Fact
from dmt.facts.states import batches, check_length, encoded, padded
from dmt.memory.derived import Derived
from dmt.models.architectures import architecture_of

SCALES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Lengths of a value that are tried, as multiples of the mean length of states there."""
EVEN = 1.0
"""Added to every direction's variance among the head's rows, as a share of the mean; .001 to 1 do as well (EXPERIMENTS.md)."""
SURE = 0.99
"""The smallest scale is taken with which the answer is as likely as this; without one, that which makes it likeliest."""


_EVENED: WeakKeyDictionary[Any, Derived] = WeakKeyDictionary()
"""Of each head what is made of it once: with a large vocabulary it costs as much as a pass through a small model."""


@dataclass(frozen=True)
class Draft:
    """One token of a fact's answer, not yet a row.

    Attributes:
        fact: number of the fact among those drafted.
        lead: token ids of the answer before it.
        key: `(width,)` the state in which it is to be said.
        value: `(width,)` what makes the model say it.
        likely: probability of the token with that value.
        before: probability without.
        scale: which of `SCALES` it is.
    """

    fact: int
    lead: tuple[int, ...]
    key: Tensor
    value: Tensor
    likely: float
    before: float
    scale: float


def draft(model: PreTrainedModel, tokenizer: Any, facts: Sequence[Fact], listens: int, answers: int) -> list[Draft]:
    """Rows for `facts`, heard in layer `listens` and said in `answers`: one gradient, and a forward pass for each scale.

    Raises:
        UserError: a fact is longer than the model reads.
    """
    prompts = [encoded(tokenizer, fact.prompt) for fact in facts]
    said = [encoded(tokenizer, fact.answer + fact.closing, start=False) for fact in facts]
    for fact, prompt, answer in zip(facts, prompts, said, strict=True):
        check_length(model, [*prompt, *answer], f"the fact {fact.prompt[:40]!r}")
    drafts: list[Draft] = []
    for group in batches([len(p) + len(a) for p, a in zip(prompts, said, strict=True)]):
        drafts += _drafted(model, [prompts[i] for i in group], [said[i] for i in group], group, listens, answers)
    return sorted(drafts, key=lambda each: (each.fact, len(each.lead)))


def best_answerer(
    model: PreTrainedModel, tokenizer: Any, facts: Sequence[Fact], listens: int, layers: Sequence[int], tried: int = 8
) -> tuple[int, dict[int, float]]:
    """Of `layers` not below `listens`, the one in which one gradient does most for the first facts; share that it makes sure.

    Of equally good ones the highest: what is added there goes through least and costs least.
    """
    shares = {}
    for layer in sorted((layer for layer in layers if layer >= listens), reverse=True):
        drafts = draft(model, tokenizer, facts[:tried], listens, layer)
        shares[layer] = sum(each.likely >= SURE for each in drafts) / max(1, len(drafts))
    return max(shares, key=lambda layer: shares[layer]), shares


def _drafted(
    model: PreTrainedModel, prompts: list[list[int]], answers: list[list[int]], numbers: list[int], listens: int, layer: int
) -> list[Draft]:
    device = next(model.parameters()).device
    tokens = padded([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]).to(device)
    places = [(at, len(prompt) - 1 + step) for at, prompt in enumerate(prompts) for step in range(len(answers[at]))]
    rows, columns = (torch.tensor(each, device=device) for each in zip(*places, strict=True))
    targets = torch.tensor([token for answer in answers for token in answer], device=device)
    steps = steer(model, tokens, rows, columns, targets, layer, listens)
    found = []
    for at, (row, column) in enumerate(places):
        lead = tuple(answers[row][: column - len(prompts[row]) + 1])
        numbers_there = (float(part[at]) for part in (steps.likely, steps.before, steps.scales))
        found.append(Draft(numbers[row], lead, steps.keys[at].cpu(), steps.values[at].cpu(), *numbers_there))
    return found


@dataclass(frozen=True)
class Steps:
    """What makes a model say what it should at some places, arrays over the same `n` places.

    Attributes:
        keys: `(n, width)` states in which it should be said.
        values: `(n, width)` what has to be added to a block's answer.
        likely, before: probability of the token with and without it.
        scales: `(n,)` which of `SCALES` it is.
    """

    keys: Tensor
    values: Tensor
    likely: Tensor
    before: Tensor
    scales: Tensor


def steer(
    model: PreTrainedModel, tokens: Tensor, rows: Tensor, columns: Tensor, targets: Tensor, layer: int, listens: int
) -> Steps:
    """What to add at `layer` so that token ids `(batch, time)` go on with `targets` `(n,)` after the places (row, column).

    One gradient of the nats of all targets, with respect to what the block says there, in the metric of the head; its
    length at each place is the smallest of `SCALES` that makes the target sure, tried by a forward pass each.

    Source: the gradient is DESIGN 5's. Its metric is ours: in a vocabulary of 49,152 the plain gradient never reaches 77 % of
        SmolLM2's facts, however long it is made, since a word much like the target overtakes it; so all are (EXPERIMENTS.md).
    """
    with torch.no_grad():
        seen = observe(model, tokens, blocks=True)
        keys = seen.block_inputs[listens][rows, columns].float()
        stream = seen.streams[layer][rows, columns].float()
    last = layer == len(seen.streams) - 1
    after = _after_last(model, stream) if last else _after(model, tokens, rows, columns, layer)
    added = torch.zeros_like(keys, requires_grad=True)
    with torch.enable_grad():
        nats = F.cross_entropy(after(added), targets, reduction="none")
        (slope,) = torch.autograd.grad(nats.sum(), added)
    direction = -F.normalize(_apart(model, slope), dim=-1) * stream.norm(dim=-1, keepdim=True)
    tried = []
    with torch.no_grad():
        for scale in SCALES:
            tried.append(-F.cross_entropy(after(scale * direction), targets, reduction="none"))
    likely = torch.stack(tried).exp()  # (scales, n)
    sure = likely >= SURE
    chosen = torch.where(sure.any(0), sure.long().argmax(0), likely.argmax(0))
    scales = torch.tensor(SCALES, device=tokens.device)[chosen]
    best = likely.gather(0, chosen.unsqueeze(0))[0]
    return Steps(keys, scales.unsqueeze(-1) * direction, best, (-nats.detach()).exp(), scales)


def _apart(model: PreTrainedModel, slopes: Tensor) -> Tensor:
    """Slopes `(n, width)` in the metric in which the head's rows vary alike in all directions, as far as `EVEN` allows.

    What tells a token from those that are written much like it weighs more then, what all have in common less.
    """
    norm: Any = model.get_submodule(architecture_of(model.config.model_type).norm)
    head: Any = model.get_output_embeddings()
    kept, weights = _EVENED.setdefault(head, Derived()), (head.weight, norm.weight)
    return torch.linalg.solve(kept("evened", _evened, weights), slopes.t()).t()


def _evened(head: Tensor, scale: Tensor) -> Tensor:
    """Covariance of the head's rows, as the norm before it scales them, and `EVEN` of it in all directions."""
    covariance = torch.cov((head.detach().float() * scale.detach().float()).t(), correction=0)
    return covariance + EVEN * covariance.trace() / len(covariance) * torch.eye(len(covariance), device=head.device)


def _after_last(model: PreTrainedModel, stream: Tensor) -> Any:
    """Logits `(n, vocabulary)` when so much is added to each of the states `(n, width)` after the last layer."""
    norm = model.get_submodule(architecture_of(model.config.model_type).norm)
    head = model.get_output_embeddings()
    return lambda added: head(norm((stream + added).to(next(head.parameters()).dtype))).float()


def _after(model: PreTrainedModel, tokens: Tensor, rows: Tensor, columns: Tensor, layer: int) -> Any:
    """The same for a layer below: the whole model runs, and each place hears what is added before it too."""
    block = architecture_of(model.config.model_type).blocks(model)[layer]

    def logits(added: Tensor) -> Tensor:
        def add(_: Any, __: Any, said: Tensor) -> Tensor:
            return said.index_put((rows, columns), added.to(said.dtype), accumulate=True)

        hook = block.register_forward_hook(add)
        try:
            return observe(model, tokens).logits[rows, columns].float()
        finally:
            hook.remove()

    return logits
