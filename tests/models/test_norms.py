"""Layer norms of training: torch's values and gradients, and the same bits with any number of threads."""

import copy

import pytest
import torch
from torch import nn

from dmt.config import Config, DataConfig
from dmt.config_io import resolve_layer_memories
from dmt.distillation.losses import Batch
from dmt.distillation.module import DistillationModule
from dmt.models.conversion import convert_blocks
from dmt.models.loading import load_teacher
from dmt.ops import DeterministicLayerNorm, set_layer_norms
from dmt.training.trainer import use_training_kernels

ROWS, WIDTH = (8, 128), 96


@pytest.fixture
def threads():
    """A call that sets the number of threads, which is set back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def norm(dtype=torch.float32, **how):
    made = nn.LayerNorm(WIDTH, dtype=dtype, **how)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


def gradients(module, given, wanted):
    given = given.clone().requires_grad_()
    normed = module(given)
    (normed * wanted).sum().backward()
    return [normed.detach(), given.grad, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("how", [{}, {"bias": False}, {"elementwise_affine": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [ROWS, (5,), ()], ids=str)
def test_values_and_gradients_equal_those_of_torch(how, dtype, rows):
    plain = norm(torch.float32 if dtype is torch.bfloat16 else dtype, **how)
    steady = nn.Sequential(copy.deepcopy(plain))
    set_layer_norms(steady, deterministic=True)
    assert type(steady[0]) is DeterministicLayerNorm
    given, wanted = torch.randn(2, *rows, WIDTH, dtype=torch.float64).to(dtype)
    if dtype is torch.bfloat16 and not how.get("elementwise_affine", True):
        pytest.skip("nothing is of another type there")
    exact = gradients(copy.deepcopy(plain).double(), given.double(), wanted.double())
    for mine, its, right in zip(
        gradients(steady, given, wanted), gradients(plain, given, wanted), exact, strict=True
    ):
        assert mine.dtype == its.dtype
        near = {torch.bfloat16: 2e-2, torch.float32: 1e-4, torch.float64: 1e-9}[mine.dtype]
        torch.testing.assert_close(mine.double(), right, rtol=near, atol=near)


def test_frozen_parameters_get_no_gradient():
    steady = nn.Sequential(norm())
    set_layer_norms(steady, deterministic=True)
    steady[0].weight.requires_grad_(False)
    steady(torch.randn(*ROWS, WIDTH)).sum().backward()
    assert steady[0].weight.grad is None
    assert steady[0].bias.grad.equal(torch.full((WIDTH,), float(ROWS[0] * ROWS[1])))


def test_gradients_do_not_depend_on_the_number_of_threads(threads):
    steady = nn.Sequential(norm())
    set_layer_norms(steady, deterministic=True)
    given, wanted = torch.randn(2, *ROWS, WIDTH)
    threads(1)
    alone = gradients(steady, given, wanted)
    for count in (2, 3, 4, 8):
        steady.zero_grad()
        threads(count)
        for mine, its in zip(gradients(steady, given, wanted), alone, strict=True):
            assert mine.equal(its), count


@pytest.mark.parametrize("half", [False, True])
def test_a_training_step_does_not_depend_on_the_number_of_threads(threads, half):
    """The default, whose products are of powers of two; how a library shares out others is its own matter."""
    config = Config(data=DataConfig(micro_batch_size=2))
    teacher, _ = load_teacher("embedded")
    student, _ = convert_blocks(teacher, resolve_layer_memories(config, 4), None)
    made = DistillationModule(config, student, teacher)
    windows = torch.randint(2_048, (8, 256))
    threads(1)
    made.calibrate(windows)
    student.train()
    found = []
    with use_training_kernels(config, student, teacher):
        assert not [m for m in (*student.modules(), *teacher.modules()) if type(m) is nn.LayerNorm]
        for count in (1, 2):
            threads(count)
            student.zero_grad()
            for tokens in windows[:4].split(2):
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    loss, _ = made.end_to_end_loss(
                        Batch(tokens, torch.ones_like(tokens, dtype=torch.bool), 1024.0, 1020.0)
                    )
                loss.backward()
            found.append(
                {
                    name: p.grad.clone()
                    for name, p in student.named_parameters()
                    if p.grad is not None
                }
            )
    assert not [
        m for m in (*student.modules(), *teacher.modules()) if type(m) is DeterministicLayerNorm
    ], "only while it trains"
    assert len(found[0]) > 50
    assert not [name for name in found[0] if not found[0][name].equal(found[1][name])]
