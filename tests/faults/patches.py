"""Faults that a child process injects into the code before it starts, by name."""

import math

import torch

from dmt.consolidation import slot_training


def inject_at_step(step, inject):
    """Call `inject(module, hooks)` once, in step `step` of a distillation, counted from 1."""
    from dmt.distillation.module import DistillationModule

    original, hooks = DistillationModule.training_step, []

    def patched(self, *args):
        if self.global_step == step - 1 and not hooks:
            inject(self, hooks)
        return original(self, *args)

    DistillationModule.training_step = patched


def nan_in_the_output_of_layer_1():
    from dmt.models.memories import get_memories

    inject_at_step(
        6,
        lambda module, hooks: hooks.append(
            get_memories(module.student)[1].register_forward_hook(
                lambda _, args, output: output * math.nan
            )
        ),
    )


def inf_in_the_gradient_of_layer_2():
    from dmt.models.memories import get_memories

    def inject(module, hooks):
        values = next(
            p for name, p in get_memories(module.student)[2].named_parameters() if "values" in name
        )
        hooks.append(values.register_hook(lambda gradient: gradient * math.inf))

    inject_at_step(7, inject)


def nan_in_the_loss():
    from dmt.distillation import module

    original = module.sum_weighted_terms

    def inject(_, hooks):
        hooks.append(True)
        module.sum_weighted_terms = lambda *args: original(*args) * math.nan

    inject_at_step(7, inject)


def overflow_in_the_weights():
    """Make weights infinite by a step with finite gradients, just before a checkpoint."""
    from dmt.distillation.module import DistillationModule

    original = DistillationModule.training_step

    def patched(self, *args):
        original(self, *args)
        if self.global_step == 6:
            with torch.no_grad():
                next(p for n, p in self.student.named_parameters() if "h.1." in n).fill_(math.inf)

    DistillationModule.training_step = patched


def nan_in_the_replay_loss():
    original, calls = slot_training.ReplayLoss.compute_loss, []

    def loss(self, *args):
        calls.append(1)
        return original(self, *args) * (math.nan if len(calls) > 1 else 1.0)

    slot_training.ReplayLoss.compute_loss = loss
