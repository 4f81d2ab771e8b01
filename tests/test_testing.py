"""The checks of `dmt.testing` pass on correct memories and fail on deliberately wrong ones."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

import dmt
from dmt.config import MEMORY_CONFIGS, AssociativeConfig, FeaturalConfig
from dmt.errors import UserError
from dmt.memory import AssociativeMemory, FeaturalMemory, registry
from dmt.testing import MEMORY_CHECKS, MemoryUnderTest, check_memory


def store_rows(memory, hidden):
    """Store a row for each hidden state in an associative memory."""
    with memory.writes_enabled():
        memory(hidden)
        memory.set_targets(hidden.flip(0))
    memory.commit_step(1, 0.0, lambda count: np.arange(count))
    # Rows just written carry a straight-through gradient, which finite differences do not have.
    memory.set_recent_hidden(hidden[:0], torch.zeros(0, dtype=torch.long))


FEATURAL = {
    "top": FeaturalConfig(k=4),
    "threshold": FeaturalConfig(mean_k=8),
    "heads": FeaturalConfig(k=8, heads=2, projections=True),
    "fewer slots": FeaturalConfig(k=4, num_slots=16),
    "random": FeaturalConfig(k=4, init="random", num_slots=48),
}


@pytest.mark.parametrize("config", FEATURAL.values(), ids=FEATURAL)
def test_a_featural_memory_passes(config):
    check_memory(FeaturalMemory, config, families=("gpt2",))


def test_a_gated_featural_memory_passes():
    check_memory(FeaturalMemory, FeaturalConfig(k=4), families=("llama",))


@pytest.mark.parametrize(
    "config",
    [
        AssociativeConfig(k=4, min_distance=0.0, merge_distance=0.0),
        AssociativeConfig(base="none", value_target="teacher", min_distance=0.0),
    ],
    ids=["residual", "rows alone"],
)
def test_an_associative_memory_passes(config):
    check_memory(AssociativeMemory, config, prepare=store_rows, families=("gpt2",))


# --- wrong memories -----------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearConfig(dmt.MemoryConfig):
    """Settings of the memories below."""


class Linear(dmt.MemoryLayer):
    """A linear map: correct, and the base of the wrong memories."""

    def __init__(self, width, config):
        super().__init__()
        self.matrix = nn.Parameter(torch.empty(width, width))
        self.reset()

    @torch.no_grad()
    def reset(self):
        self.matrix.normal_(std=0.3)

    def forward(self, hidden):
        return hidden @ self.matrix


@pytest.fixture(scope="module", autouse=True)
def _registry():
    """Register the correct memory; restore the registry afterwards."""
    saved = [(table, dict(table)) for table in (MEMORY_CONFIGS, registry._MEMORY_CLASSES)]
    dmt.register_memory("test_linear", config=LinearConfig)(Linear)
    yield
    for table, items in saved:
        table.clear()
        table.update(items)


class LeaksTheFuture(Linear):
    def forward(self, hidden):
        if hidden.dim() < 3:
            return super().forward(hidden)
        return super().forward(hidden) + hidden.roll(-1, dims=1)


class DependsOnTheBatch(Linear):
    def forward(self, hidden):
        return super().forward(hidden) / hidden.std().clamp_min(1e-6)


class DependsOnThePast(Linear):
    def forward(self, hidden):
        if hidden.dim() < 3:
            return super().forward(hidden)
        return super().forward(hidden.cumsum(1))


class LosesAWeight(Linear):
    def __init__(self, width, config):
        super().__init__(width, config)
        self.lost = torch.randn(width)  # neither parameter nor buffer

    def forward(self, hidden):
        return super().forward(hidden) + self.lost.to(hidden)


class LosesAStatistic(Linear):
    """A statistic of training is in an attribute, which is not saved."""

    def __init__(self, width, config):
        super().__init__(width, config)
        self.mean = 0.0

    def forward(self, hidden):
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * hidden.detach().square().mean()
        return super().forward(hidden) * (1 + self.mean)


class ForgetsItsBuffer(Linear):
    """A buffer that is not saved, and that `reset` does not set."""

    def __init__(self, width, config):
        super().__init__(width, config)
        self.register_buffer("shift", torch.randn(width), persistent=False)

    def forward(self, hidden):
        return super().forward(hidden) + self.shift.to(hidden)


class HasTheWrongGradient(Linear):
    def forward(self, hidden):
        return super().forward(hidden) + (hidden - hidden.detach())


class HasTheWrongShape(Linear):
    def forward(self, hidden):
        return super().forward(hidden).reshape(-1, hidden.shape[-1])


class HasTheWrongType(Linear):
    def forward(self, hidden):
        return super().forward(hidden.to(self.matrix.dtype)).float()


class IsNotReset(Linear):
    def reset(self):
        pass


class HasArgumentsOutsideJson(Linear):
    @classmethod
    def make_arguments(cls, config, block):
        return {"shape": (1, 2)}

    @classmethod
    def from_arguments(cls, width, gated, arguments):
        return cls(width, LinearConfig())


WRONG = {
    LeaksTheFuture: "check_causality",
    DependsOnTheBatch: "check_causality|check_batch_invariance",
    DependsOnThePast: "check_batch_invariance",
    LosesAWeight: "check_save_and_load",
    LosesAStatistic: "check_save_and_load",
    ForgetsItsBuffer: "check_save_and_load",
    HasTheWrongGradient: "check_gradient",
    HasTheWrongShape: "check_shapes",
    HasTheWrongType: "check_dtypes",
    IsNotReset: "check_reset",
    HasArgumentsOutsideJson: "check_save_and_load",
}


def register(cls):
    @dataclass(frozen=True)
    class Config(dmt.MemoryConfig):
        pass

    return dmt.register_memory(f"test_{cls.__name__}", config=Config)(cls)


def test_a_correct_memory_passes():
    check_memory(Linear)


@pytest.mark.parametrize("cls", WRONG, ids=lambda cls: cls.__name__)
def test_a_wrong_memory_fails_its_check(cls):
    with pytest.raises(AssertionError, match=rf"^{cls.__name__}, ({WRONG[cls]}): "):
        check_memory(register(cls), families=("gpt2",))


@pytest.mark.parametrize("check", MEMORY_CHECKS, ids=lambda check: check.__name__)
def test_each_check_passes_alone_on_a_correct_memory(check):
    check(MemoryUnderTest(LinearConfig()))


def test_a_straight_through_gradient_is_compared_with_its_reference():
    class StraightThrough(Linear):
        def forward(self, hidden):
            output = super().forward(hidden)
            return output + (output.round() - output).detach()

    register(StraightThrough)
    config = StraightThrough.config_class()
    check = next(check for check in MEMORY_CHECKS if check.__name__ == "check_gradient")
    with pytest.raises(AssertionError, match="finite differences"):
        check(MemoryUnderTest(config))
    check(MemoryUnderTest(config, reference=lambda layer, hidden: hidden @ layer.matrix))


def test_an_unregistered_class_is_rejected():
    class Unregistered(dmt.MemoryLayer):
        pass

    with pytest.raises(UserError, match=r"put @dmt\.register_memory above it"):
        check_memory(Unregistered)
