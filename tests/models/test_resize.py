"""Fewer and more slots than neurons: nothing changes where nothing must, and folding loses less than leaving out."""

import pytest
import torch
from conftest import LAYERS, SLOTS, make_llama, make_teacher
from reference import gelu_tanh

from dmt.config import MemoryConfig
from dmt.models.architectures import get_architecture
from dmt.models.conversion import convert, get_memories, neuron_importance, resize_neurons
from dmt.models.forward import forward_teacher

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


def answer(parts, hidden):
    return weights_of(parts, hidden) @ parts["values"] + parts.get("output_bias", 0)


@pytest.fixture
def hidden():
    return torch.randn(400, WIDTH, dtype=torch.double)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("slots", [NEURONS, NEURONS + 1, NEURONS + 7, 3 * NEURONS + 2])
@pytest.mark.parametrize("more", ["split", "new"])
def test_more_slots_say_the_same(hidden, more, slots, gated):
    parts = block(gated)
    grown = resize_neurons(parts, weights_of(parts, hidden), slots, "merge", more)
    assert len(grown["keys"]) == len(grown["values"]) == slots
    torch.testing.assert_close(answer(grown, hidden), answer(parts, hidden))


def test_copies_of_a_split_slot_can_be_told_apart_and_the_most_used_are_split(hidden):
    parts = block()
    weights = weights_of(parts, hidden)
    grown = resize_neurons(parts, weights, NEURONS + 1, "merge", "split")
    best = int(neuron_importance(parts, weights).argmax())
    assert torch.equal(grown["keys"][best], grown["keys"][best + 1])
    assert torch.equal(grown["keys"][best], parts["keys"][best])
    assert not torch.allclose(grown["values"][best], grown["values"][best + 1])
    torch.testing.assert_close(
        grown["values"][best] + grown["values"][best + 1], parts["values"][best]
    )


@pytest.mark.parametrize("gated", [False, True])
def test_what_can_be_foretold_is_folded_without_loss(hidden, gated):
    parts = block(gated)
    twice = {
        name: torch.cat([tensor, tensor]) if name != "output_bias" else tensor
        for name, tensor in parts.items()
    }
    twice["values"] = twice["values"] / 2
    wanted, errors = answer(parts, hidden), {}
    for fewer in ("merge", "drop"):
        less = resize_neurons(
            twice, weights_of(twice, hidden), 2 * NEURONS - 1, fewer, "split"
        )  # the twin of what is gone is there
        errors[fewer] = float((answer(less, hidden) - wanted).norm())
    assert errors["merge"] < 0.02 * errors["drop"]


def test_folding_loses_less_than_leaving_out_and_both_keep_the_mean(hidden):
    parts = block()
    weights, wanted = weights_of(parts, hidden), answer(parts, hidden)
    errors = {}
    for fewer in ("merge", "drop"):
        shrunk = resize_neurons(parts, weights, 12, fewer, "split")
        assert len(shrunk["keys"]) == 12
        missing = wanted - answer(shrunk, hidden)
        torch.testing.assert_close(
            missing.mean(0), torch.zeros(WIDTH, dtype=torch.double), atol=1e-9, rtol=0
        )
        errors[fewer] = float(missing.square().sum())
    kept = set(neuron_importance(parts, weights).topk(12).indices.tolist())
    assert {int((parts["keys"] == key).all(-1).nonzero()) for key in shrunk["keys"]} == kept
    assert errors["merge"] < 0.8 * errors["drop"]


@pytest.mark.parametrize("family", [make_teacher, make_llama])
@pytest.mark.parametrize(
    "memory",
    [
        MemoryConfig(num_slots=96, k=96),
        MemoryConfig(num_slots=96, k=96, more="new"),
        MemoryConfig(num_slots=160),
    ],
    ids=str,
)
def test_a_student_with_more_slots_equals_its_teacher(tokens, family, memory):
    teacher = family()
    inputs = forward_teacher(teacher, tokens, capture_blocks=True).block_inputs
    student, _ = convert(teacher, [memory] * LAYERS, inputs)
    assert get_memories(student)[0].num_slots == memory.num_slots
    with torch.no_grad():
        assert (student(tokens).logits - teacher(tokens).logits).abs().max() <= 2e-4


def test_a_student_with_fewer_slots_is_made_from_the_best(tokens):
    teacher = make_teacher()
    inputs = forward_teacher(teacher, tokens, capture_blocks=True).block_inputs
    students = [
        convert(teacher, [MemoryConfig(num_slots=s, k=s)] * LAYERS, inputs)[0]
        for s in (SLOTS // 4, SLOTS * 7 // 8)
    ]
    with torch.no_grad():
        errors = [
            float((s(tokens).logits - teacher(tokens).logits).square().mean()) for s in students
        ]
    assert errors[1] < errors[0]
    with pytest.raises(ValueError, match="need block_inputs"):
        convert(teacher, [MemoryConfig(num_slots=32)] * LAYERS)


def test_slots_are_made_of_what_their_own_block_is_given(tokens):
    teacher = make_teacher()
    inputs = forward_teacher(teacher, tokens, capture_blocks=True).block_inputs
    student, _ = convert(teacher, [MemoryConfig(num_slots=SLOTS // 4, k=1)] * LAYERS, inputs)
    for layer, memory in get_memories(student).items():
        parts = get_architecture("gpt2").read_tensors(teacher.transformer.h[layer].mlp)
        weights = gelu_tanh(inputs[layer].flatten(0, 1) @ parts["keys"].T + parts["key_bias"])
        wanted = resize_neurons(parts, weights, SLOTS // 4, MemoryConfig().fewer, "split")
        for name in ("keys", "values", "output_bias"):
            torch.testing.assert_close(
                getattr(memory, name).detach(), wanted[name].detach(), rtol=1e-3, atol=1e-4
            )


def test_importance_is_how_much_a_neuron_moves_the_answer_from_its_mean(hidden):
    parts = block()
    weights = weights_of(parts, hidden) + 5
    moves = (weights - weights.mean(0)).unsqueeze(-1) * parts["values"]
    torch.testing.assert_close(neuron_importance(parts, weights), moves.square().sum(-1).mean(0))


def test_a_copy_is_worth_less_the_more_of_them_there_are():
    parts = {"keys": torch.eye(2), "values": torch.diag(torch.tensor([5.0**0.5, 1.0]))}
    grown = resize_neurons(parts, torch.tensor([[1.0, 1.0], [-1.0, -1.0]]), 5, "merge", "split")
    assert grown["keys"].sum(0).tolist() == [3, 2]  # worth 5, 5/4, 1, 5/9


def test_neurons_that_never_fire_can_be_merged(hidden):
    parts = block()
    weights = weights_of(parts, hidden)
    weights[:, :15] = 0
    shrunk = resize_neurons(parts, weights, 12, "merge", "split")
    assert all(tensor.isfinite().all() for tensor in shrunk.values())
    torch.testing.assert_close(shrunk["output_bias"], parts["output_bias"])


@pytest.mark.parametrize("more", ["split", "new"])
def test_new_slots_are_the_seeds_and_leave_other_randomness_alone(hidden, more):
    parts = block()
    before = torch.get_rng_state()
    grown, again, other = (
        resize_neurons(parts, weights_of(parts, hidden), 30, "merge", more, seed)
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(grown["values"], again["values"])
    assert not torch.equal(grown["values"], other["values"])


def test_new_slots_look_like_the_old_ones_and_say_little(hidden):
    parts = block()
    grown = resize_neurons(parts, weights_of(parts, hidden), 9 * NEURONS, "merge", "new")
    spreads = [
        float(grown[name][NEURONS:].std() / parts[name].std())
        for name in ("keys", "key_bias", "values")
    ]
    assert spreads == [
        pytest.approx(1, rel=0.3),
        pytest.approx(1, rel=0.3),
        pytest.approx(0.1, rel=0.3),
    ]


def test_copies_differ_by_a_tenth_of_their_value(hidden):
    parts = block()
    grown = resize_neurons(parts, weights_of(parts, hidden), 3 * NEURONS, "merge", "split")
    for key, value in zip(parts["keys"], parts["values"], strict=True):
        copies = grown["values"][(grown["keys"] == key).all(-1)]
        assert (
            (copies - value / len(copies)).norm(dim=-1) < 0.3 * value.norm() / len(copies)
        ).all()


def test_layers_are_given_different_new_slots(tokens):
    teacher = make_teacher()
    inputs = forward_teacher(teacher, tokens, capture_blocks=True).block_inputs
    student, _ = convert(teacher, [MemoryConfig(num_slots=96, k=96, more="new")] * LAYERS, inputs)
    first, second = (
        memory.keys[SLOTS:] / memory.keys[SLOTS:].norm()
        for memory in list(get_memories(student).values())[:2]
    )
    assert (first * second).sum() < 0.9
