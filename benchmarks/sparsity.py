"""Measure a finished student with other numbers of slots read than it was trained for.

python -m benchmarks.sparsity lightning_logs/version_0
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dmt.config_io import load_config
from dmt.data.windows import TextDataModule, select_first_windows
from dmt.evaluation.metrics import FidelityMetrics
from dmt.memory import FeaturalMemory
from dmt.memory.sparsity_budget import initialize_threshold, select_thresholded
from dmt.memory.usage import record_usage
from dmt.models.forward import forward_with_activations
from dmt.models.loading import load_model, load_teacher
from dmt.models.memories import get_featural_memories

K_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # budgets, as multiples of the student's own
SWEEP_TOKENS = 4_096  # test tokens per budget, of all corpora together

# k of each layer, and the shared threshold if there is one.
KSetting = dict[int, tuple[int, Tensor | None]]


@torch.no_grad()
def sparsity_sweep(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    corpora: Mapping[str, Tensor],
    calibration_windows: Tensor,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Measure the student with each budget on the first windows of each corpus.

    A shared threshold is measured again for each budget but the student's own. The student is
    unchanged afterwards.

    Args:
        student: the student.
        teacher: its teacher.
        corpora: test windows `(windows, time)` by name of corpus.
        calibration_windows: windows `(windows, time)` of other text, for thresholds.
        batch_size: windows in a forward pass.

    Returns:
        `tokens` predicted, and `points` by ascending budget: `factor`, `k` and `read` (configured
        and measured slots per token and layer), and by corpus `kl` in nats per token, `ppl_ratio`
        and `top1_agreement`. Empty for a student without slots.
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
    """Return the first windows of each corpus, about `SWEEP_TOKENS` tokens, at least one each."""
    return [
        (name, windows[: max(1, SWEEP_TOKENS // len(corpora) // windows.shape[1])])
        for name, windows in corpora.items()
    ]


def _build_settings(student: PreTrainedModel, calibration_windows: Tensor) -> dict[float, KSetting]:
    """Return the settings of the memories by factor, without factors that change nothing."""
    memories = get_featural_memories(student)
    device = next(student.parameters()).device
    shares_threshold = bool(select_thresholded(memories.values()))
    block_inputs: tuple[Tensor, ...] = ()
    if shares_threshold:
        with ExitStack() as stack:
            for memory in memories.values():
                stack.enter_context(memory.usage_paused())
            block_inputs = forward_with_activations(
                student, calibration_windows.to(device), capture_blocks=True
            ).block_inputs
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
    """Return `factor` times `k`, rounded to a multiple of the heads, from 1 to all slots."""
    unit = 1 if memory.threshold is not None else memory.heads
    return min(memory.num_slots, max(unit, round(k * factor / unit) * unit))


def _get_setting(memories: Mapping[int, FeaturalMemory]) -> KSetting:
    return {
        layer: (memory.k, None if memory.threshold is None else memory.threshold.clone())
        for layer, memory in memories.items()
    }


def measure_run(run_dir: Path) -> dict[str, Any]:
    """Sweep the student of a run on the test text of its corpora."""
    config = load_config(run_dir / "config.yaml")
    teacher, tokenizer = load_teacher(config.teacher)
    student, _ = load_model(str(run_dir / "student"), f"student={run_dir / 'student'}")
    data = TextDataModule(config, tokenizer, 1)
    data.setup()
    windows = {
        corpus.name: select_first_windows(corpus.test, config.data.test_tokens)
        for corpus in data.corpora
    }
    calibration_windows = data.calibration_windows(SWEEP_TOKENS)
    return sparsity_sweep(
        student.eval(), teacher, windows, calibration_windows, config.data.micro_batch_size
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, help="the folder of a finished distillation")
    print(json.dumps(measure_run(parser.parse_args().run_dir), indent=2))
