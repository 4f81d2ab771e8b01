"""Groups of a block's neurons, of which a router chooses some."""

import pytest
import torch
from conftest import LAYERS, SLOTS, make_teacher
from reference import assert_equal_gradients, gelu_tanh

import dmt
from dmt.config_io import check_config, load_config
from dmt.errors import UserError
from dmt.memory import ExpertsMemory
from dmt.models.forward import forward_teacher
from dmt.models.memories import get_memories
from dmt.testing import check_memory

WIDTH, NEURONS, SIZE = 6, 12, 3


def make(k=6, gated=True):
    memory = ExpertsMemory(
        WIDTH, NEURONS, k, expert_size=SIZE, gated=gated, activation_function="gelu_new"
    ).double()
    with torch.no_grad():
        for tensor in (*memory.parameters(), *memory.buffers()):
            tensor.normal_()
    return memory


def reference_output(memory, hidden):
    """Read the experts one by one."""
    outputs = []
    for token in hidden:
        scores = memory.router @ token + memory.router_bias
        output = memory.output_bias
        for expert in scores.argsort(descending=True)[: memory.k // SIZE].tolist():
            for i in range(expert * SIZE, (expert + 1) * SIZE):
                weight = gelu_tanh(memory.keys[i] @ token + memory.key_bias[i])
                if memory.gains is not None:
                    weight = weight * (memory.gains[i] @ token + memory.gain_bias[i])
                output = output + weight * memory.values[i]
        outputs.append(output)
    return torch.stack(outputs)


def test_it_passes_every_check():
    check_memory(ExpertsMemory, dmt.ExpertsConfig(expert_size=4, k=8))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [1, 20])
def test_value_and_gradient_are_those_of_its_definition(tokens, gated):
    memory = make(gated=gated)
    hidden = torch.randn(tokens, WIDTH, dtype=torch.double, requires_grad=True)
    output, expected = memory(hidden), reference_output(memory, hidden)
    assert torch.allclose(output, expected)
    tensors = [hidden, *memory.parameters()]
    assert_equal_gradients(output, expected, tensors)
    with torch.no_grad():  # only the rows that are read are touched
        assert torch.allclose(memory(hidden[:3]), expected[:3])


@pytest.mark.parametrize("size", [4, 16])
def test_with_every_expert_read_it_is_the_block(any_teacher, tokens, size):
    config = dmt.ExpertsConfig(expert_size=size, k=SLOTS)
    student = dmt.convert(any_teacher, config, calibration=tokens)
    with torch.no_grad():
        assert (student(tokens).logits - any_teacher(tokens).logits).abs().max() <= 2e-4


def test_neurons_of_an_expert_have_similar_keys():
    teacher = make_teacher()
    student = dmt.convert(teacher, dmt.ExpertsConfig(expert_size=4))
    keys = get_memories(student)[0].keys.detach().view(-1, 4, keys_width(teacher))
    block_keys = teacher.transformer.h[0].mlp.c_fc.weight.T
    assert torch.equal(keys.flatten(0, 1).sort(0).values, block_keys.sort(0).values)
    spread = (keys - keys.mean(1, keepdim=True)).square().sum()
    unsorted = block_keys.view(-1, 4, keys_width(teacher))
    assert spread < 0.9 * (unsorted - unsorted.mean(1, keepdim=True)).square().sum()


def keys_width(teacher):
    return teacher.config.n_embd


def test_calibration_fits_the_router_to_the_length_of_what_experts_add(tokens):
    teacher = make_teacher()
    config = dmt.ExpertsConfig(expert_size=8, k=16)
    student = dmt.convert(teacher, config, calibration=tokens)
    outputs = forward_teacher(teacher, tokens, capture_blocks=True)
    for layer in range(LAYERS):
        memory, hidden = get_memories(student)[layer], outputs.block_inputs[layer].flatten(0, 1)
        lengths = memory.expert_lengths(hidden)
        scores = hidden @ memory.router.T + memory.router_bias
        inputs = torch.cat([hidden, torch.ones(len(hidden), 1)], dim=1)
        best = inputs @ torch.linalg.lstsq(inputs, lengths).solution
        least = (best - lengths).square().mean()
        assert (scores - lengths).square().mean() <= 1.1 * least
        chosen = lengths.gather(1, scores.topk(2).indices).sum()
        assert chosen > 1.05 * 2 * lengths.mean(-1).sum()


def test_the_length_of_what_an_expert_adds():
    memory, hidden = make(k=3, gated=False), torch.randn(2, WIDTH, dtype=torch.double)
    with torch.no_grad():
        memory.output_bias.zero_()
        for expert in range(NEURONS // SIZE):
            memory.router.zero_()
            memory.router_bias.zero_()[expert] = 1.0
            assert torch.allclose(
                memory.expert_lengths(hidden)[:, expert], memory(hidden).norm(dim=-1)
            )


def test_sizes_that_do_not_fit_are_refused():
    for overrides, message in (
        (["memory.expert_size=48"], r"memory\.expert_size must divide 512, the neurons"),
        (["memory.k=33"], r"memory\.k=33 must be a multiple of memory\.expert_size=32"),
        (["memory.k=544"], r"memory\.k must be in \[1, 512\], the neurons"),
    ):
        with pytest.raises(UserError, match=rf"^{message}"):
            check_config(load_config(None, ["memory.kind=experts", *overrides]))


def test_blocks_with_an_unknown_function_are_refused():
    teacher = make_teacher(activation_function="tanh")
    with pytest.raises(UserError, match="kind=experts computes the block's own neurons"):
        dmt.convert(teacher, dmt.ExpertsConfig(expert_size=4))
