"""A block replaced by its mean output."""

import torch
from conftest import make_teacher

import dmt
from dmt.memory import NoMemory
from dmt.models.forward import forward_teacher
from dmt.models.memories import get_memories
from dmt.ops import inlier_mask
from dmt.testing import check_memory


def test_it_passes_every_check():
    check_memory(NoMemory)


def test_it_begins_as_the_mean_output_of_the_block(any_teacher, tokens):
    student = dmt.convert(any_teacher, dmt.NoMemoryConfig(), calibration=tokens)
    outputs = forward_teacher(any_teacher, tokens, capture_blocks=True).block_outputs
    for layer, memory in get_memories(student).items():
        inliers = outputs[layer][inlier_mask(outputs[layer])]
        assert torch.allclose(memory.output_bias, inliers.mean(0), atol=1e-5)
        hidden = torch.randn(2, 3, memory.output_bias.shape[0])
        assert torch.equal(memory(hidden), memory.output_bias.expand_as(hidden))


def test_without_text_it_is_the_output_bias():
    teacher = make_teacher()
    student = dmt.convert(teacher, dmt.NoMemoryConfig(), layers=1)
    bias = teacher.transformer.h[1].mlp.c_proj.bias
    assert torch.equal(get_memories(student)[1].output_bias, bias)
