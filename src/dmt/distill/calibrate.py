"""Before any gradient: measure what dropped slots would have said on average, and keep it in the biases."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dmt.distill.losses import Scales
from dmt.distill.signals import Signals, observe, observe_teacher
from dmt.memory import FeaturalMemory
from dmt.models.surgery import memories_of


@torch.no_grad()
def measure_scales(teacher: PreTrainedModel, windows: Tensor) -> Scales:
    """Variances of the teacher's block outputs and last hidden states over token ids `(windows, time)`."""
    signals = observe_teacher(teacher, windows, blocks=True)
    return Scales(torch.stack([_variance(x) for x in signals.block_outputs]), _variance(signals.hidden))


@torch.no_grad()
def calibrate(student: PreTrainedModel, teacher: PreTrainedModel, windows: Tensor) -> None:
    """Set slot means and output biases so that each memory's output has the teacher's mean, lowest layer first.

    One pass: each memory is set when its input arrives, so the layers above already see its corrected output.

    Source: the bias correction of data-free quantisation (Nagel et al. 2019, arXiv 1906.04721, section 4.2), here for
        slots that are not read; ranking by deviation from the mean is ours (EXPERIMENTS.md).
    """
    wanted: Signals = observe_teacher(teacher, windows, blocks=True)
    hooks = []
    for layer, memory in memories_of(student).items():

        def settle(memory: nn.Module, given: tuple[Tensor, ...], layer: int = layer) -> None:
            assert isinstance(memory, FeaturalMemory), "hooked below"
            memory.calibrate_means(given[0].flatten(0, -2))
            said = memory.forward(given[0])
            memory.compensate(given[0].flatten(0, -2), (wanted.block_outputs[layer] - said).flatten(0, -2))

        hooks.append(memory.register_forward_pre_hook(settle))
    try:
        observe(student, windows)
    finally:
        for hook in hooks:
            hook.remove()


def _variance(states: Tensor) -> Tensor:
    return states.float().flatten(0, -2).var(0, correction=0).sum()
