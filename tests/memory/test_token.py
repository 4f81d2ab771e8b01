"""A table with a row for each token of the vocabulary."""

import pytest
import torch
from conftest import WIDTH, make_teacher
from reference import assert_equal_gradients

import dmt
from dmt.memory import TokenMemory
from dmt.memory.token import PRIOR_COUNT
from dmt.memory.token_context import use_contexts
from dmt.models.architectures import get_architecture
from dmt.models.forward import forward_teacher
from dmt.models.memories import get_memories
from dmt.testing import check_memory

VOCAB_SIZE = 11


def make():
    torch.manual_seed(0)
    memory = TokenMemory(WIDTH, VOCAB_SIZE).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.normal_()
    return memory


def test_it_passes_every_check():
    check_memory(TokenMemory)


def test_value_and_gradient_are_those_of_a_one_hot_product():
    memory, ids = make(), torch.tensor([[3, 0, 10], [3, -1, 12]])
    hidden = torch.randn(2, 3, WIDTH, dtype=torch.double)
    one_hot = torch.zeros(2, 3, VOCAB_SIZE, dtype=torch.double)
    for row, column in ((0, 0), (0, 1), (0, 2), (1, 0)):  # -1 is unknown, 12 beyond the vocabulary
        one_hot[row, column, ids[row, column]] = 1
    expected = one_hot @ memory.table.rows + memory.output_bias
    with use_contexts(ids.unsqueeze(-1)):
        output = memory(hidden)
    assert torch.allclose(output, expected)
    assert_equal_gradients(output, expected, list(memory.parameters()))


def test_a_conversion_begins_as_the_block_does_for_each_token(tokens):
    """Tokens that the text lacks keep what the block computes for them after the start token."""
    teacher = make_teacher()
    start = teacher.config.bos_token_id
    student = dmt.convert(teacher, dmt.TokenConfig(), calibration=tokens)
    memory = get_memories(student)[0]
    absent = next(token for token in range(teacher.config.vocab_size) if token not in tokens)
    outputs = forward_teacher(teacher, torch.tensor([[start, absent]]), capture_blocks=True)
    row = memory.table.rows[absent] + memory.output_bias
    torch.testing.assert_close(row, outputs.block_outputs[0][0, 1])


def test_calibration_moves_a_row_to_the_mean_of_its_token():
    memory = make()
    prior = (memory.table.rows + memory.output_bias).detach().clone()
    ids, target = torch.tensor([3, 3, 3, 5, -1]), torch.randn(5, WIDTH).double()
    with use_contexts(ids.unsqueeze(-1)):
        memory.calibrate(torch.zeros_like(target), target)
    rows = memory.table.rows + memory.output_bias
    expected = (PRIOR_COUNT * prior[3] + target[:3].sum(0)) / (PRIOR_COUNT + 3)
    torch.testing.assert_close(rows[3], expected)
    torch.testing.assert_close(rows[7], prior[7])


def test_called_without_tokens_it_says_what_is_missing():
    with pytest.raises(RuntimeError, match="called without their ids"):
        make()(torch.zeros(1, 1, WIDTH))
    with (
        pytest.raises(RuntimeError, match=r"tokens of shape \(1, 2\)"),
        use_contexts(torch.zeros(1, 3, 1, dtype=torch.long)),
    ):
        make()(torch.zeros(1, 2, WIDTH))


def test_it_replaces_a_block_that_depends_on_the_token_alone(tokens):
    """The first block without attention computes a function of the token."""
    teacher = make_teacher()
    first = get_architecture(teacher.config.model_type).transformer_blocks(teacher)[0]
    teacher.transformer.wpe.weight.data.zero_()
    first.attn.c_proj.weight.data.zero_()
    first.attn.c_proj.bias.data.zero_()
    student = dmt.convert(teacher, dmt.TokenConfig(), layers=[0], calibration=tokens).eval()
    with torch.no_grad():
        torch.testing.assert_close(student(tokens).logits, teacher(tokens).logits)
