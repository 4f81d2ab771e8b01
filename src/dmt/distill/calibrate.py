"""Before any gradient: measure what dropped slots would have said on average, and keep it in the biases."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dmt.distill.losses import Scales
from dmt.distill.outliers import longest, ordinary
from dmt.distill.sensitivity import measure_sensitivity, root
from dmt.distill.signals import Signals, observe, observe_teacher
from dmt.memory import FeaturalMemory
from dmt.memory.budget import first_threshold, hold, sharing, watch
from dmt.models.surgery import associative_of, featural_of

BUDGET_PASSES = 3
"""Passes through the calibration text in which the shared threshold is moved to where the budget is met."""


@torch.no_grad()
def measure_scales(teacher: PreTrainedModel, windows: Tensor) -> Scales:
    """Variances of the teacher's block outputs and last hidden states over token ids `(windows, time)`, outliers left out."""
    signals = observe_teacher(teacher, windows, blocks=True)
    outputs = signals.block_outputs
    return Scales(
        torch.stack([_variance(x) for x in outputs]), _variance(signals.hidden), torch.stack([longest(x) for x in outputs])
    )


@torch.no_grad()
def calibrate(student: PreTrainedModel, teacher: PreTrainedModel, windows: Tensor) -> None:
    """Set slot means and output biases so that each memory's output has the teacher's mean, lowest layer first.

    First the metric that ranks slots and the threshold that memories share, from the teacher's own inputs. Then passes
    through the student: each memory is set when its input arrives, so the layers above already see its corrected output.

    Source: the bias correction of data-free quantisation (Nagel et al. 2019, arXiv 1906.04721, section 4.2), here for
        slots that are not read; ranking by deviation from the mean is ours (EXPERIMENTS.md).
    """
    wanted: Signals = observe_teacher(teacher, windows, blocks=True)
    memories = featural_of(student)
    if any(memory.metric is not None for memory in memories.values()):
        for layer, metric in enumerate(measure_sensitivity(teacher, windows)):
            if layer in memories and memories[layer].metric is not None:
                memories[layer].metric.copy_(root(metric))
    given = [wanted.block_inputs[layer][ordinary(wanted.block_outputs[layer])] for layer in memories]
    for memory, hidden in zip(memories.values(), given, strict=True):
        memory.calibrate_means(hidden)
    for layer, associative in associative_of(student).items():
        associative.centre(wanted.block_inputs[layer][ordinary(wanted.block_outputs[layer])])
    first_threshold(memories.values(), given)
    _settle(student, wanted, windows)
    if sharing(memories.values()):
        watch(memories.values())
        for _ in range(BUDGET_PASSES):
            student.train()
            observe(student, windows)
            student.eval()
            hold(memories.values(), rate=0.5)
        _settle(student, wanted, windows)


def _settle(student: PreTrainedModel, wanted: Signals, windows: Tensor) -> None:
    hooks = []
    for layer, memory in featural_of(student).items():

        def settle(memory: nn.Module, given: tuple[Tensor, ...], layer: int = layer) -> None:
            assert isinstance(memory, FeaturalMemory), "hooked below"
            kept = ordinary(wanted.block_outputs[layer])
            hidden, answer = given[0][kept], wanted.block_outputs[layer][kept]
            memory.calibrate_means(hidden)
            memory.compensate(hidden, answer - memory.forward(hidden))

        hooks.append(memory.register_forward_pre_hook(settle))
    try:
        observe(student, windows)
    finally:
        for hook in hooks:
            hook.remove()


def _variance(states: Tensor) -> Tensor:
    return states[ordinary(states)].float().var(0, correction=0).sum()
