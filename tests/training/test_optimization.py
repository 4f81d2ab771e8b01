"""Learning rates of a stage, and the optimizer."""

import copy

import pytest
import torch

from dmt.config import OptimConfig
from dmt.training.optimization import build_adamw, cosine_decay, lr_schedule


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


def test_tables_are_updated_as_other_parameters_and_resume():
    torch.manual_seed(0)
    start = [torch.randn(6, 5), torch.randn(4), torch.randn(300, 8)]
    gradients = [[torch.randn_like(tensor) for tensor in start] for _ in range(4)]

    def train(has_tables, is_resumed):
        parameters = [torch.nn.Parameter(tensor.clone()) for tensor in start]
        table_ids = {id(parameters[2])} if has_tables else set()
        settings = (OptimConfig(weight_decay=0.1), (), table_ids)
        optimizer = build_adamw(parameters, *settings)
        for step, step_gradients in enumerate(gradients):
            if is_resumed and step == 2:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = build_adamw(parameters, *settings)
                optimizer.load_state_dict(state)
            for group in optimizer.param_groups:
                group["lr"] = 0.1
            for parameter, gradient in zip(parameters, step_gradients, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
        return parameters, optimizer

    plain, optimizer = train(False, False)
    assert not any(group.get("fused") for group in optimizer.param_groups)
    with_tables, optimizer = train(True, False)
    assert [group["params"] for group in optimizer.param_groups if group.get("fused")] == [
        [with_tables[2]]
    ]
    assert all(map(torch.equal, plain[:2], with_tables[:2]))
    torch.testing.assert_close(with_tables[2], plain[2])
    assert all(map(torch.equal, train(True, True)[0], with_tables))
