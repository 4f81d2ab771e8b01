"""Learning rates of a stage."""

import pytest
import torch

from dmt.config import OptimConfig
from dmt.training.optimization import cosine_decay, lr_schedule


def test_the_cosine_falls_from_one_to_its_minimum():
    assert cosine_decay(0.0, 0.1) == pytest.approx(1.0)
    assert cosine_decay(0.5, 0.1) == pytest.approx(0.55)
    assert cosine_decay(1.0, 0.1) == pytest.approx(0.1)
    optim = OptimConfig(warmup_steps=2, min_lr_ratio=0.5)
    rates = torch.tensor([lr_schedule(step, 6, 2.0, optim) for step in range(6)])
    torch.testing.assert_close(rates, torch.tensor([1.0, 2.0, 2.0, 1.75, 1.25, 1.0]))


def test_the_learning_rate_warms_up_and_decays():
    optim = OptimConfig(warmup_steps=10, min_lr_ratio=0.1)
    rates = [lr_schedule(step, 100, 2.0, optim) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(0.2)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert lr_schedule(0, 1, 2.0, optim) == pytest.approx(2.0)
