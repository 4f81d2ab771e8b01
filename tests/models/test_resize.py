"""Slots unlike neurons in number: more change no output, fewer keep the most important."""

import pytest
import torch
from conftest import LAYERS, SLOTS, make_llama, make_teacher
from reference import gelu_tanh

from dmt.config import FeaturalConfig
from dmt.models.architectures import get_architecture
from dmt.models.conversion import convert_blocks, neuron_importance, resize_neurons
from dmt.models.forward import forward_teacher
from dmt.models.memories import get_memories

WIDTH, NEURONS = 6, 20


def block(gated=False):
    parts = {
        "keys": torch.randn(NEURONS, WIDTH),
        "key_bias": torch.randn(NEURONS),
        "values": torch.randn(NEURONS, WIDTH),
    }
    parts |= (
        {"gains": torch.randn(NEURONS, WIDTH)} if gated else {"output_bias": torch.randn(WIDTH)}
    )
    return {name: tensor.double() for name, tensor in parts.items()}


def weights_of(parts, hidden):
    weights = gelu_tanh(hidden @ parts["keys"].T + parts["key_bias"])
    return weights * (hidden @ parts["gains"].T) if "gains" in parts else weights


def output(parts, hidden):
    return weights_of(parts, hidden) @ parts["values"] + parts.get("output_bias", 0)


@pytest.fixture
def hidden():
    return torch.randn(400, WIDTH, dtype=torch.double)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("slots", [NEURONS, NEURONS + 1, NEURONS + 7, 3 * NEURONS + 2])
def test_a_block_with_more_slots_computes_the_same(hidden, slots, gated):
    parts = block(gated)
    grown = resize_neurons(parts, weights_of(parts, hidden), slots)
    assert len(grown["keys"]) == len(grown["values"]) == slots
    torch.testing.assert_close(output(grown, hidden), output(parts, hidden))


def test_the_most_important_neurons_and_the_mean_output_are_preserved(hidden):
    parts = block()
    weights = weights_of(parts, hidden)
    shrunk = resize_neurons(parts, weights, 12)
    assert len(shrunk["keys"]) == 12
    error = output(parts, hidden) - output(shrunk, hidden)
    torch.testing.assert_close(
        error.mean(0), torch.zeros(WIDTH, dtype=torch.double), atol=1e-9, rtol=0
    )
    important = set(neuron_importance(parts, weights).topk(12).indices.tolist())
    retained = {int((parts["keys"] == key).all(-1).nonzero()) for key in shrunk["keys"]}
    assert retained == important


@pytest.mark.parametrize("family", [make_teacher, make_llama])
@pytest.mark.parametrize(
    "memory",
    [
        FeaturalConfig(num_slots=96, k=96),
        FeaturalConfig(num_slots=160),
    ],
    ids=str,
)
def test_a_student_with_more_slots_equals_its_teacher(tokens, family, memory):
    teacher = family()
    inputs = forward_teacher(teacher, tokens, capture_blocks=True).block_inputs
    student, _ = convert_blocks(teacher, [memory] * LAYERS, inputs)
    assert get_memories(student)[0].num_slots == memory.num_slots
    with torch.no_grad():
        assert (student(tokens).logits - teacher(tokens).logits).abs().max() <= 2e-4


def test_a_student_with_fewer_slots_has_the_most_important_neurons(tokens):
    teacher = make_teacher()
    inputs = forward_teacher(teacher, tokens, capture_blocks=True).block_inputs
    students = [
        convert_blocks(teacher, [FeaturalConfig(num_slots=s, k=s)] * LAYERS, inputs)[0]
        for s in (SLOTS // 4, SLOTS * 7 // 8)
    ]
    with torch.no_grad():
        errors = [
            float((s(tokens).logits - teacher(tokens).logits).square().mean()) for s in students
        ]
    assert errors[1] < errors[0]
    with pytest.raises(ValueError, match="need calibration text"):
        convert_blocks(teacher, [FeaturalConfig(num_slots=32)] * LAYERS)


def test_neurons_are_ranked_by_the_inputs_of_their_own_block(tokens):
    teacher = make_teacher()
    inputs = forward_teacher(teacher, tokens, capture_blocks=True).block_inputs
    student, _ = convert_blocks(
        teacher, [FeaturalConfig(num_slots=SLOTS // 4, k=1)] * LAYERS, inputs
    )
    for layer, memory in get_memories(student).items():
        parts = get_architecture("gpt2").read_tensors(teacher.transformer.h[layer].mlp)
        weights = gelu_tanh(inputs[layer].flatten(0, 1) @ parts["keys"].T + parts["key_bias"])
        expected = resize_neurons(parts, weights, SLOTS // 4)
        for name in ("keys", "values", "output_bias"):
            torch.testing.assert_close(
                getattr(memory, name).detach(), expected[name].detach(), rtol=1e-3, atol=1e-4
            )


def test_importance_is_the_mean_squared_deviation_of_a_neurons_contribution(hidden):
    parts = block()
    weights = weights_of(parts, hidden) + 5
    deviations = (weights - weights.mean(0)).unsqueeze(-1) * parts["values"]
    torch.testing.assert_close(
        neuron_importance(parts, weights), deviations.square().sum(-1).mean(0)
    )


def test_new_slots_depend_on_the_seed_and_leave_the_global_generator_alone(hidden):
    parts = block()
    before = torch.get_rng_state()
    grown, again, other_seed = (
        resize_neurons(parts, weights_of(parts, hidden), 30, seed) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(grown["values"], again["values"])
    assert not torch.equal(grown["values"], other_seed["values"])


def test_new_slots_have_the_spread_of_the_neurons_and_small_values(hidden):
    parts = block()
    grown = resize_neurons(parts, weights_of(parts, hidden), 9 * NEURONS)
    spreads = [
        float(grown[name][NEURONS:].std() / parts[name].std())
        for name in ("keys", "key_bias", "values")
    ]
    assert spreads == [
        pytest.approx(1, rel=0.3),
        pytest.approx(1, rel=0.3),
        pytest.approx(0.1, rel=0.3),
    ]


def test_layers_get_different_new_slots(tokens):
    teacher = make_teacher()
    inputs = forward_teacher(teacher, tokens, capture_blocks=True).block_inputs
    student, _ = convert_blocks(teacher, [FeaturalConfig(num_slots=96, k=96)] * LAYERS, inputs)
    first, second = (
        memory.keys[SLOTS:] / memory.keys[SLOTS:].norm()
        for memory in list(get_memories(student).values())[:2]
    )
    assert (first * second).sum() < 0.9
