"""A finished student read with other budgets: how far from its teacher it is where tokens read fewer slots, or more.

How teacher and student go on from the same prompts, with what the one says and the other does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dmt.evaluation.metrics import FidelityMetrics, generate_greedy
from dmt.memory import FeaturalMemory
from dmt.memory.sparsity_budget import initialize_threshold, select_thresholded
from dmt.memory.usage import record_usage
from dmt.models.conversion import get_featural_memories
from dmt.models.forward import forward_with_activations

PROMPT_TOKENS = 24
SAMPLE_TOKENS = 40
SAMPLES_PER_CORPUS = 2

TextSpan = tuple[str, bool]  # some text, and whether only this model generates it here


@dataclass(frozen=True)
class SamplePair:
    """A prompt and the greedy continuations of teacher and student.

    Attributes:
        prompt: the prompt.
        teacher, student: the continuations as spans; joined they are the text.
        differing: number of the student's tokens that the teacher does not generate there.
        tokens: number of generated tokens.
    """

    prompt: str
    teacher: list[TextSpan]
    student: list[TextSpan]
    differing: int
    tokens: int


def paired_samples(
    student: PreTrainedModel, teacher: PreTrainedModel, tokenizer: Any, windows: Tensor
) -> list[SamplePair]:
    """Continue the first tokens of some windows with both models.

    Args:
        student, teacher: the models.
        tokenizer: the tokenizer of both.
        windows: token ids `(windows, time)`.
    """
    prompt_tokens = min(PROMPT_TOKENS, windows.shape[1] // 2)
    prompts = windows[:: max(1, len(windows) // SAMPLES_PER_CORPUS), :prompt_tokens][
        :SAMPLES_PER_CORPUS
    ]
    max_new_tokens = min(SAMPLE_TOKENS, student.config.max_position_embeddings - prompt_tokens)
    teacher_outputs, student_outputs = (
        generate_greedy(model, prompts, max_new_tokens).tolist() for model in (teacher, student)
    )
    samples = []
    for prompt, teacher_tokens, student_tokens in zip(
        prompts.tolist(), teacher_outputs, student_outputs, strict=True
    ):
        teacher_only, student_only = diff_tokens(teacher_tokens, student_tokens)
        spans = (
            _split_spans(tokenizer, teacher_tokens, teacher_only),
            _split_spans(tokenizer, student_tokens, student_only),
        )
        samples.append(
            SamplePair(
                tokenizer.decode(prompt, skip_special_tokens=True),
                *spans,
                sum(student_only),
                len(student_only),
            )
        )
    return samples


def diff_tokens(teacher: list[int], student: list[int]) -> tuple[list[bool], list[bool]]:
    """Return for each token of both sequences whether it is missing from the other.

    Tokens that both have in the same order match, even if shifted.
    """
    unmatched = [True] * len(teacher), [True] * len(student)
    for match in SequenceMatcher(None, teacher, student, autojunk=False).get_matching_blocks():
        unmatched[0][match.a : match.a + match.size] = [False] * match.size
        unmatched[1][match.b : match.b + match.size] = [False] * match.size
    return unmatched


def format_samples_table(samples: Sequence[SamplePair]) -> str:
    """Return a Markdown table of prompts and both continuations."""
    rows = ["| prompt | teacher | student |", "|---|---|---|"]
    for sample in samples:
        texts = (
            sample.prompt,
            *("".join(text for text, _ in spans) for spans in (sample.teacher, sample.student)),
        )
        rows.append(
            "| "
            + " | ".join(text.replace("|", "/").replace("\n", " ").strip() for text in texts)
            + " |"
        )
    return "\n".join(rows)


def _split_spans(tokenizer: Any, ids: list[int], differs: list[bool]) -> list[TextSpan]:
    """Return the text of `ids`, split where `differs` changes.

    The complete text is split by length, as some tokenizers decode a part differently alone.
    """
    text = tokenizer.decode(ids, skip_special_tokens=True)
    spans: list[TextSpan] = []
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or differs[end] != differs[end - 1]:
            stop = (
                len(text)
                if end == len(ids)
                else len(tokenizer.decode(ids[:end], skip_special_tokens=True))
            )
            if stop > start:
                spans.append((text[start:stop], differs[end - 1]))
                start = stop
    return spans


K_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Budgets that are tried, as multiples of the student's own."""
SWEEP_TOKENS = 4_096
"""Test tokens, of all corpora together, that each budget is tried on: enough for a curve, and soon done."""

KSetting = dict[int, tuple[int, Tensor | None]]
"""Of each layer, k and the shared threshold where there is one."""


@torch.no_grad()
def sparsity_sweep(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    corpora: Mapping[str, Tensor],
    calibration_windows: Tensor,
    batch_size: int = 8,
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
    memories = get_featural_memories(student)
    if not memories:
        return {}
    settings = _build_settings(student, calibration_windows)
    metrics_by_factor = {
        factor: {name: FidelityMetrics() for name in corpora} for factor in settings
    }
    num_reads = dict.fromkeys(settings, 0.0)
    for name, windows in _select_windows(corpora):
        for tokens in windows.split(batch_size):
            tokens = tokens.to(next(student.parameters()).device)
            teacher_logits = forward_with_activations(teacher, tokens).logits
            for factor, setting in settings.items():
                with ExitStack() as stack:
                    for layer, (k, threshold) in setting.items():
                        stack.enter_context(memories[layer].temporary_k(k, threshold))
                    usage = stack.enter_context(record_usage(memories))
                    student_logits = forward_with_activations(student, tokens).logits
                metrics_by_factor[factor][name].update(student_logits, teacher_logits, tokens)
                num_reads[factor] += sum(float(counts.reads.sum()) for counts in usage.values())
    num_predicted = sum(
        metrics.tokens for metrics in next(iter(metrics_by_factor.values())).values()
    )
    num_inputs = sum(windows.numel() for _, windows in _select_windows(corpora)) * len(memories)
    points = []
    for factor, setting in settings.items():
        point: dict[str, Any] = {
            "factor": factor,
            "k": sum(k for k, _ in setting.values()) / len(setting),
        }
        by_corpus = {
            name: {
                metric_name: getattr(metrics, metric_name)
                for metric_name in ("kl", "ppl_ratio", "top1_agreement")
            }
            for name, metrics in metrics_by_factor[factor].items()
        }
        points.append(point | {"read": num_reads[factor] / num_inputs, "corpora": by_corpus})
    return {"tokens": num_predicted, "points": points}


def _select_windows(corpora: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Of each corpus its first windows, about `TOKENS` tokens together, one window at least."""
    return [
        (name, windows[: max(1, SWEEP_TOKENS // len(corpora) // windows.shape[1])])
        for name, windows in corpora.items()
    ]


def _build_settings(student: PreTrainedModel, calibration_windows: Tensor) -> dict[float, KSetting]:
    """What the memories are to be set to, by factor; factors that ask for the same slots as the one before are left out."""
    memories = get_featural_memories(student)
    device = next(student.parameters()).device
    shares_threshold = bool(select_thresholded(memories.values()))
    block_inputs = (
        forward_with_activations(
            student, calibration_windows.to(device), capture_blocks=True
        ).block_inputs
        if shares_threshold
        else ()
    )
    base = _get_setting(memories)
    settings: dict[float, KSetting] = {}
    seen_ks: list[list[int]] = []
    for factor in K_FACTORS:
        layer_ks = [_scale_k(memory, base[layer][0], factor) for layer, memory in memories.items()]
        if layer_ks in seen_ks or (factor != 1 and layer_ks == [k for k, _ in base.values()]):
            continue
        seen_ks.append(layer_ks)
        if factor == 1:
            settings[factor] = base
            continue
        with ExitStack() as stack:
            for memory, k in zip(memories.values(), layer_ks, strict=True):
                stack.enter_context(memory.temporary_k(k))
            if shares_threshold:
                initialize_threshold(
                    memories.values(), [block_inputs[layer].flatten(0, -2) for layer in memories]
                )
            settings[factor] = _get_setting(memories)
    return settings


def _scale_k(memory: FeaturalMemory, k: int, factor: float) -> int:
    """`factor` times `k` as a number that the memory can read: whole for each head, from 1 to all of its slots."""
    unit = 1 if memory.threshold is not None else memory.heads
    return min(memory.num_slots, max(unit, round(k * factor / unit) * unit))


def _get_setting(memories: Mapping[int, FeaturalMemory]) -> KSetting:
    return {
        layer: (memory.k, None if memory.threshold is None else memory.threshold.clone())
        for layer, memory in memories.items()
    }
