"""A block replaced by the best linear map of a rank."""

import pytest
import torch
from conftest import WIDTH, make_teacher
from reference import assert_equal_gradients

import dmt
from dmt.errors import UserError
from dmt.memory import LowRankMemory
from dmt.models.memories import get_memories
from dmt.testing import check_memory

TOKENS = 400


def make(rank, seed=0):
    torch.manual_seed(seed)
    memory = LowRankMemory(WIDTH, dmt.LowRankConfig(rank=rank)).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.normal_()
    return memory


def make_pairs():
    hidden = torch.randn(TOKENS, WIDTH, dtype=torch.double) @ torch.randn(WIDTH, WIDTH).double()
    return hidden, torch.tanh(hidden) @ torch.randn(WIDTH, WIDTH).double() + 3


def test_it_passes_every_check():
    check_memory(LowRankMemory, dmt.LowRankConfig(rank=3))


def test_value_and_gradient_are_those_of_one_matrix():
    memory = make(3)
    hidden = torch.randn(2, 5, WIDTH, dtype=torch.double, requires_grad=True)
    tensors = [hidden, *memory.parameters()]
    expected = hidden @ (memory.up @ memory.down).T + memory.output_bias
    output = memory(hidden)
    assert torch.allclose(output, expected)
    assert_equal_gradients(output, expected, tensors)


@pytest.mark.parametrize("rank", [1, 5, WIDTH])
def test_calibration_finds_the_best_map_of_its_rank(rank):
    """The least error is that of the best map plus the predictions' smallest singular values."""
    hidden, target = make_pairs()
    memory = make(rank)
    memory.calibrate(hidden, target)
    inputs, outputs = hidden - hidden.mean(0), target - target.mean(0)
    predictions = inputs @ torch.linalg.lstsq(inputs, outputs).solution
    tail = torch.linalg.svdvals(predictions)[rank:].square().sum()
    least = (outputs - predictions).square().sum() + tail
    error = (memory(hidden) - target).square().sum()
    assert least <= error <= 1.001 * least
    assert torch.allclose(memory(hidden).mean(0), target.mean(0))


def test_the_rank_is_a_sixteenth_of_the_width_or_at_most_the_width():
    student = dmt.convert(make_teacher(n_embd=32), dmt.LowRankConfig())
    assert get_memories(student)[0].down.shape == (2, 32)
    with pytest.raises(UserError, match=rf"^rank must be in \[1, {WIDTH}\], the width"):
        dmt.convert(make_teacher(), dmt.LowRankConfig(rank=WIDTH + 1))
