"""A finished student read with other budgets: how far from its teacher it is where tokens read fewer slots, or more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dmt.distill.signals import observe
from dmt.evaluate import Tally
from dmt.memory import FeaturalMemory
from dmt.memory.budget import first_threshold, sharing
from dmt.models.surgery import featural_of

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Budgets that are tried, as multiples of the student's own."""
TOKENS = 4_096
"""Test tokens, of all corpora together, that each budget is tried on: enough for a curve, and soon done."""

Setting = dict[int, tuple[int, Tensor | None]]
"""Of each layer, k and the shared threshold where there is one."""


@torch.no_grad()
def kl_by_budget(
    student: PreTrainedModel, teacher: PreTrainedModel, corpora: Mapping[str, Tensor], text: Tensor, batch: int = 8
) -> dict[str, Any]:
    """Both models on the first windows of each corpus, the student with each budget; nothing where it has no slots.

    Where memories share a threshold it is found anew for each budget but the student's own. What the student reads, its
    threshold, and what counts its reads are afterwards as before.

    Args:
        corpora: test windows `(windows, time)` by name of corpus.
        text: windows `(windows, time)` of other text, on which thresholds are found.

    Returns:
        `tokens` predicted, and in `points`, by ascending budget, `factor`, `k` and `read` (slots per token and layer: asked
        for and counted) and by corpus `kl` in nats per token, `ratio` and `agreement`.
    """
    memories = featural_of(student)
    if not memories:
        return {}
    with _as_before(memories):
        tried = _settings(student, text)
        tallies = {factor: {name: Tally() for name in corpora} for factor in tried}
        reads = dict.fromkeys(tried, 0.0)
        for name, windows in _some(corpora):
            for tokens in windows.split(batch):
                tokens = tokens.to(next(student.parameters()).device)
                wanted = observe(teacher, tokens).logits
                for factor, setting in tried.items():
                    _set(memories, setting)
                    for memory in memories.values():
                        memory.count_reads()
                    tallies[factor][name].add(observe(student, tokens).logits, wanted, tokens)
                    reads[factor] += sum(float(m.reads.sum()) for m in memories.values() if m.reads is not None)
    predicted = sum(tally.tokens for tally in next(iter(tallies.values())).values())
    seen = sum(windows.numel() for _, windows in _some(corpora)) * len(memories)
    points = []
    for factor, setting in tried.items():
        point: dict[str, Any] = {"factor": factor, "k": sum(k for k, _ in setting.values()) / len(setting)}
        by_corpus = {
            name: {measure: getattr(tally, measure) for measure in ("kl", "ratio", "agreement")}
            for name, tally in tallies[factor].items()
        }
        points.append(point | {"read": reads[factor] / seen, "corpora": by_corpus})
    return {"tokens": predicted, "points": points}


def _some(corpora: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Of each corpus its first windows, about `TOKENS` tokens together, one window at least."""
    return [(name, windows[: max(1, TOKENS // len(corpora) // windows.shape[1])]) for name, windows in corpora.items()]


def _settings(student: PreTrainedModel, text: Tensor) -> dict[float, Setting]:
    """What the memories are to be set to, by factor; factors that ask for the same slots as the one before are left out."""
    memories = featural_of(student)
    device = next(student.parameters()).device
    shared = bool(sharing(memories.values()))
    given = observe(student, text.to(device), blocks=True).block_inputs if shared else ()
    own = _setting(memories)
    found: dict[float, Setting] = {}
    asked: list[list[int]] = []
    for factor in FACTORS:
        wanted = [_times(memory, own[layer][0], factor) for layer, memory in memories.items()]
        if wanted in asked or (factor != 1 and wanted == [k for k, _ in own.values()]):
            continue
        asked.append(wanted)
        if factor == 1:
            found[factor] = own
            continue
        for memory, k in zip(memories.values(), wanted, strict=True):
            memory.k = k
        if shared:
            first_threshold(memories.values(), [given[layer].flatten(0, -2) for layer in memories])
        found[factor] = _setting(memories)
    return found


def _times(memory: FeaturalMemory, k: int, factor: float) -> int:
    """`factor` times `k` as a number that the memory can read: whole for each head, from 1 to all of its slots."""
    unit = 1 if memory.threshold is not None else memory.heads
    return min(memory.slots, max(unit, round(k * factor / unit) * unit))


def _setting(memories: Mapping[int, FeaturalMemory]) -> Setting:
    return {layer: (m.k, None if m.threshold is None else m.threshold.clone()) for layer, m in memories.items()}


def _set(memories: Mapping[int, FeaturalMemory], setting: Setting) -> None:
    for layer, (k, threshold) in setting.items():
        memories[layer].k = k
        if threshold is not None:
            memories[layer].threshold.copy_(threshold)  # type: ignore[union-attr]


@contextmanager
def _as_before(memories: Mapping[int, FeaturalMemory]) -> Iterator[None]:
    """Put back k, thresholds and counted reads when it ends, however it ends."""
    own = _setting(memories)
    counted = {layer: (memory.reads, memory.reads_tokens) for layer, memory in memories.items()}
    for memory in memories.values():
        memory.reads = None  # what is counted goes on afterwards
    try:
        yield
    finally:
        _set(memories, own)
        for layer, (reads, tokens) in counted.items():
            memories[layer].reads, memories[layer].reads_tokens = reads, tokens
