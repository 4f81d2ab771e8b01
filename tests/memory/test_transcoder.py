"""Top-k latents with a linear decoder and an affine skip."""

import pytest
import torch
from conftest import SLOTS, make_llama, make_teacher
from reference import assert_equal_gradients

import dmt
from dmt.config_io import check_config, load_config
from dmt.errors import UserError
from dmt.memory import TranscoderMemory
from dmt.models.forward import forward_teacher
from dmt.models.memories import get_memories
from dmt.testing import check_memory

WIDTH, LATENTS = 6, 12


def reference_output(memory, hidden):
    """As the paper defines it: encode, keep the k largest, decode, add the skip."""
    outputs = []
    for token in hidden:
        latents = torch.relu(memory.keys @ token + memory.key_bias)
        largest = latents.argsort(descending=True)[: memory.k]
        output = memory.output_bias + sum(latents[i] * memory.values[i] for i in largest)
        if memory.skip_connection is not None:
            output = output + memory.skip_connection @ token
        outputs.append(output)
    return torch.stack(outputs)


@pytest.mark.parametrize("skip_connection", [False, True])
def test_it_passes_every_check(skip_connection):
    check_memory(TranscoderMemory, dmt.TranscoderConfig(k=4, skip_connection=skip_connection))


@pytest.mark.parametrize("k", [1, 4, 12])
@pytest.mark.parametrize("skip_connection", [False, True])
def test_value_and_gradient_are_those_of_its_definition(k, skip_connection):
    memory = TranscoderMemory(WIDTH, LATENTS, k, skip_connection=skip_connection).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.normal_()
    hidden = torch.randn(5, WIDTH, dtype=torch.double, requires_grad=True)
    output, expected = memory(hidden), reference_output(memory, hidden)
    assert torch.allclose(output, expected)
    tensors = [hidden, *memory.parameters()]
    assert_equal_gradients(output, expected, tensors)


def test_a_block_of_relu_neurons_is_exact_with_every_latent(tokens):
    teacher = make_teacher(activation_function="relu")
    student = dmt.convert(teacher, dmt.TranscoderConfig(k=SLOTS), calibration=tokens)
    with torch.no_grad():
        assert (student(tokens).logits - teacher(tokens).logits).abs().max() <= 2e-4


def test_a_gated_block_of_relu_neurons_is_not_taken_for_exact():
    teacher = make_llama(hidden_act="relu")
    memory = get_memories(dmt.convert(teacher, dmt.TranscoderConfig(k=SLOTS)))[0]
    assert memory.gains is None


def test_decoder_rows_begin_with_length_one_and_latents_are_contributions():
    teacher = make_teacher()
    memory = get_memories(dmt.convert(teacher, dmt.TranscoderConfig()))[0]
    block = teacher.transformer.h[0].mlp
    norms = block.c_proj.weight.norm(dim=-1)
    assert torch.allclose(memory.values.norm(dim=-1), torch.ones(SLOTS))
    hidden = torch.randn(7, memory.width)
    weights = torch.relu(hidden @ block.c_fc.weight + block.c_fc.bias)
    assert torch.allclose(memory.compute_scores(hidden).relu(), weights * norms, atol=1e-4)


@torch.no_grad()
def fvu(memory, outputs, layer):
    hidden, target = (
        states[layer].flatten(0, 1) for states in (outputs.block_inputs, outputs.block_outputs)
    )
    error = (memory(hidden) - target).square().sum()
    return float(error / (target - target.mean(0)).square().sum())


@pytest.mark.parametrize("make", [make_teacher, make_llama])
def test_calibration_fits_skip_and_decoder(make):
    teacher = make()
    texts = torch.randint(300, (2, 24, 32), generator=torch.Generator().manual_seed(1))
    outputs = forward_teacher(teacher, texts[1], capture_blocks=True)
    config = dmt.TranscoderConfig(k=8)
    fitted = get_memories(dmt.convert(teacher, config, calibration=texts[0]))[0]
    skip_alone = get_memories(dmt.convert(teacher, config))[0]
    inputs = forward_teacher(teacher, texts[0], capture_blocks=True)
    hidden, target = inputs.block_inputs[0].flatten(0, 1), inputs.block_outputs[0].flatten(0, 1)
    with torch.no_grad():
        skip_alone.compensate(hidden, target - skip_alone(hidden))
    assert fvu(fitted, outputs, 0) < 0.9 * fvu(skip_alone, outputs, 0)


def test_another_number_of_latents_than_neurons(tokens):
    teacher = make_teacher()
    for num_slots in (SLOTS // 2, 2 * SLOTS):
        config = dmt.TranscoderConfig(num_slots=num_slots)
        memory = get_memories(dmt.convert(teacher, config, calibration=tokens))[0]
        assert (memory.num_slots, memory.k) == (num_slots, num_slots // 16)


def test_more_latents_decoded_than_there_are_is_refused():
    with pytest.raises(UserError, match=r"^memory\.k must be in \[1, memory\.num_slots=512\]"):
        check_config(load_config(None, ["memory.kind=transcoder", "memory.k=513"]))
