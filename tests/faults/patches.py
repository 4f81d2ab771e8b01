"""What a child of the nursery changes before it begins, by name."""

import math

import torch

from dmt.consolidation import slot_training


def spoil(step, where):
    """Put what is not a number into the student of a distillation in its step number `step`, counted from 1."""
    from dmt.distillation.module import DistillationModule

    plain, hooks = DistillationModule.training_step, []

    def spoilt(self, *given):
        if self.global_step == step - 1 and not hooks:
            where(self, hooks)
        return plain(self, *given)

    DistillationModule.training_step = spoilt


def nan_in_the_output_of_layer_1():
    from dmt.models.conversion import get_memories

    spoil(
        6,
        lambda module, hooks: hooks.append(
            get_memories(module.student)[1].register_forward_hook(
                lambda _, given, said: said * math.nan
            )
        ),
    )


def inf_in_the_gradient_of_layer_2():
    from dmt.models.conversion import get_memories

    def where(module, hooks):
        values = next(
            p for name, p in get_memories(module.student)[2].named_parameters() if "values" in name
        )
        hooks.append(values.register_hook(lambda slope: slope * math.inf))

    spoil(7, where)


def nan_in_the_loss():
    from dmt.distillation import module

    plain = module.sum_weighted_terms

    def where(_, hooks):
        hooks.append(True)
        module.sum_weighted_terms = lambda terms, weights: plain(terms, weights) * math.nan

    spoil(7, where)


def overflow_in_the_weights():
    """A step whose gradient is finite and whose result is not, as with an absurd rate; a checkpoint follows at once."""
    from dmt.distillation.module import DistillationModule

    plain = DistillationModule.training_step

    def spoilt(self, *given):
        plain(self, *given)
        if self.global_step == 6:
            with torch.no_grad():
                next(p for n, p in self.student.named_parameters() if "h.1." in n).fill_(math.inf)

    DistillationModule.training_step = spoilt


def nan_in_the_replay_loss():
    plain, calls = slot_training.ReplayLoss.compute_loss, []

    def loss(self, *given):
        calls.append(1)
        return plain(self, *given) * (math.nan if len(calls) > 1 else 1.0)

    slot_training.ReplayLoss.compute_loss = loss
