"""A block with fewer neurons, all of them read."""

import pytest
import torch
from conftest import LAYERS, SLOTS, make_teacher
from reference import assert_equal_gradients, gelu_tanh

import dmt
from dmt.config_io import check_config, load_config
from dmt.errors import UserError
from dmt.memory import PrunedMemory
from dmt.memory.usage import record_usage
from dmt.models.forward import forward_teacher
from dmt.models.memories import get_memories, get_slot_memories
from dmt.testing import check_memory


@pytest.mark.parametrize("num_slots", [None, 5])
def test_it_passes_every_check(num_slots):
    check_memory(PrunedMemory, dmt.PrunedConfig(num_slots=num_slots))


def test_with_every_neuron_it_is_the_block(any_teacher, tokens):
    student = dmt.convert(any_teacher, dmt.PrunedConfig(num_slots=SLOTS), calibration=tokens)
    with torch.no_grad():
        assert (student(tokens).logits - any_teacher(tokens).logits).abs().max() <= 2e-4


def test_value_and_gradient_are_those_of_its_definition():
    memory = PrunedMemory(6, 4, gated=True, activation_function="gelu_new").double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.normal_()
    hidden = torch.randn(3, 6, dtype=torch.double, requires_grad=True)
    expected = memory.output_bias + sum(
        (gelu_tanh(hidden @ key + key_bias) * (hidden @ gain + gain_bias)).unsqueeze(-1) * value
        for key, key_bias, gain, gain_bias, value in zip(
            memory.keys, memory.key_bias, memory.gains, memory.gain_bias, memory.values, strict=True
        )
    )
    output, tensors = memory(hidden), [hidden, *memory.parameters()]
    assert torch.allclose(output, expected)
    assert_equal_gradients(output, expected, tensors)


def test_neurons_that_vary_least_are_left_out_and_their_mean_stays(tokens):
    teacher = make_teacher()
    student = dmt.convert(teacher, dmt.PrunedConfig(num_slots=SLOTS // 4), calibration=tokens)
    outputs = forward_teacher(teacher, tokens, capture_blocks=True)
    hidden = outputs.block_inputs[0].flatten(0, 1)
    block = teacher.transformer.h[0].mlp
    weights = gelu_tanh(hidden @ block.c_fc.weight + block.c_fc.bias)
    variances = weights.var(0) * block.c_proj.weight.square().sum(-1)
    best = variances.topk(SLOTS // 4).indices.sort().values
    memory = get_memories(student)[0]
    assert torch.equal(memory.values, block.c_proj.weight[best])
    difference = memory(hidden).mean(0) - outputs.block_outputs[0].flatten(0, 1).mean(0)
    assert difference.abs().max() <= 1e-4


def test_every_slot_counts_as_read(tokens):
    student = dmt.convert(make_teacher(), dmt.PrunedConfig(num_slots=8), calibration=tokens)
    with record_usage(get_slot_memories(student)) as usage, torch.no_grad():
        student(tokens)
    assert sorted(usage) == list(range(LAYERS))
    assert usage[0].mean_reads == 8


def test_more_neurons_than_the_block_has_are_refused():
    with pytest.raises(UserError, match=r"^memory\.num_slots must be in \[1, 512\], the neurons"):
        check_config(load_config(None, ["memory.kind=pruned", "memory.num_slots=513"]))
    with pytest.raises(UserError, match="need calibration text"):
        dmt.convert(make_teacher(), dmt.PrunedConfig(num_slots=8))
