"""A block's neurons, found by product keys, against scoring every pair of sub-keys."""

import pytest
import torch
from conftest import SLOTS, make_llama, make_teacher
from reference import assert_equal_gradients, gelu_tanh

import dmt
from dmt.config_io import check_config, load_config
from dmt.errors import UserError
from dmt.memory import PeerMemory
from dmt.models.forward import forward_teacher
from dmt.models.memories import get_memories
from dmt.testing import check_memory

WIDTH, NEURONS = 6, 16


def make(k=6, heads=2, gated=True, dtype=torch.double):
    memory = PeerMemory(
        WIDTH, NEURONS, k, heads=heads, key_width=4, gated=gated, activation_function="gelu_new"
    ).to(dtype)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.normal_()
    return memory


def reference_output(memory, hidden):
    """Score all pairs; a neuron has the mean gate of the heads that find it."""
    router, outputs = memory.router, []
    for token in hidden:
        queries = (router.weight @ token + router.bias).view(memory.num_heads, 2, -1)
        gates = [[] for _ in range(NEURONS)]
        for head, (first, second) in enumerate(router.sub_keys):
            scores = torch.stack(
                [a @ queries[head, 0] + b @ queries[head, 1] for a in first for b in second]
            )
            best = scores.argsort(descending=True)[: memory.k // memory.num_heads]
            weights = torch.softmax(memory.gate_scale[head] * scores[best], dim=0) * len(best)
            for weight, i in zip(weights, best.tolist(), strict=True):
                gates[i].append(weight)
        output = memory.output_bias
        for i, of_neuron in enumerate(gates):
            if of_neuron:
                weight = gelu_tanh(memory.keys[i] @ token + memory.key_bias[i])
                if memory.gains is not None:
                    weight = weight * (memory.gains[i] @ token + memory.gain_bias[i])
                output = output + torch.stack(of_neuron).mean() * weight * memory.values[i]
        outputs.append(output)
    return torch.stack(outputs)


@pytest.mark.parametrize("heads", [1, 4])
def test_it_passes_every_check(heads):
    check_memory(PeerMemory, dmt.PeerConfig(k=8, heads=heads, key_width=6))


@pytest.mark.parametrize(("k", "heads"), [(5, 1), (6, 2), (24, 2), (32, 2)])
@pytest.mark.parametrize("gated", [False, True])
def test_value_and_gradient_are_those_of_scoring_every_pair(k, heads, gated):
    memory = make(k, heads, gated)
    hidden = torch.randn(4, WIDTH, dtype=torch.double, requires_grad=True)
    output, expected = memory(hidden), reference_output(memory, hidden)
    assert torch.allclose(output, expected)
    tensors = [hidden, *memory.parameters()]
    assert_equal_gradients(output, expected, tensors)
    with torch.no_grad():  # only the rows that are read are touched
        assert torch.allclose(memory(hidden), expected)


def test_a_large_table_is_read_row_by_row_with_the_same_gradient(monkeypatch):
    memory = make()
    hidden = torch.randn(20, WIDTH, dtype=torch.double, requires_grad=True)
    results = []
    for limit in (NEURONS, NEURONS - 1):
        monkeypatch.setattr("dmt.memory.neuron_table.MAX_EXACT_SLOTS", limit)
        output = memory(hidden)
        tensors = [hidden, *memory.parameters()]
        results.append([output, *torch.autograd.grad(output.sin().sum(), tensors)])
    for dense, gathered in zip(*results, strict=True):
        assert torch.allclose(dense, gathered)


@pytest.mark.parametrize(("k", "heads"), [(81, 1), (162, 2), (64, 1)])
def test_with_every_expert_read_it_is_the_block(any_teacher, tokens, k, heads):
    """Also with 81 experts, more than the block has neurons."""
    config = dmt.PeerConfig(num_slots=k // heads, k=k, heads=heads)
    student = dmt.convert(any_teacher, config, calibration=tokens)
    assert k // heads >= SLOTS
    with torch.no_grad():
        assert (student(tokens).logits - any_teacher(tokens).logits).abs().max() <= 2e-4


def test_more_experts_than_neurons_need_no_text():
    teacher = make_llama(intermediate_size=60)
    memory = get_memories(dmt.convert(teacher, dmt.PeerConfig()))[0]
    assert memory.num_slots == 64


def test_gates_begin_at_one_and_are_learned():
    memory = make()
    hidden = torch.randn(5, WIDTH, dtype=torch.double)
    with torch.no_grad():
        memory.gate_scale.zero_()
    ids, gates = memory.find_slots(hidden)
    total = torch.zeros(5, NEURONS).double().scatter_add(1, ids, gates)
    assert torch.allclose(total[total > 0], torch.ones(1, dtype=torch.double))
    memory(hidden).square().sum().backward()
    assert memory.gate_scale.grad.abs().max() > 0
    assert memory.router.weight.grad.abs().max() == 0
    with torch.no_grad():
        memory.gate_scale.fill_(0.1)
    memory(hidden).square().sum().backward()
    assert memory.router.weight.grad.abs().max() > 0


def test_calibration_finds_neurons_that_contribute(tokens):
    """More of what the best neurons contribute than random neurons have, and no neuron twice."""
    teacher = make_teacher()
    student = dmt.convert(teacher, dmt.PeerConfig(k=8, heads=4), calibration=tokens)
    inputs = forward_teacher(teacher, tokens, capture_blocks=True).block_inputs
    for layer, memory in get_memories(student).items():
        hidden = inputs[layer].flatten(0, 1)
        weights = memory.compute_weights(hidden, memory.compute_scores(hidden))
        contributions = weights.abs() * memory.values.norm(dim=-1)
        ids, _ = memory.find_slots(hidden)
        assert max(len(row) - len(set(row)) for row in ids.tolist()) <= 1
        total_read = contributions.gather(1, ids).sum(-1).mean()
        assert total_read > 2 * 8 * contributions.mean()


def test_scores_of_a_single_head_predict_contributions(tokens):
    """As well as the best pair of a row and a column that are linear in the state."""
    teacher = make_teacher()
    config = dmt.PeerConfig(k=8, heads=1, key_width=16)
    memory = get_memories(dmt.convert(teacher, config, calibration=tokens))[0]
    hidden = forward_teacher(teacher, tokens, capture_blocks=True).block_inputs[0].flatten(0, 1)
    weights = memory.compute_weights(hidden, memory.compute_scores(hidden))
    contributions = weights.abs() * memory.values.norm(dim=-1)
    inputs = torch.cat([hidden, torch.ones(len(hidden), 1)], dim=1)
    linear = (inputs @ torch.linalg.lstsq(inputs, contributions).solution).view(-1, 8, 8)
    overall = linear.mean((1, 2), keepdim=True)
    best = linear.mean(2, keepdim=True) + linear.mean(1, keepdim=True) - overall
    first, second = memory.router.compute_scores(hidden)[:, 0].unbind(1)
    scores = first.unsqueeze(2) + second.unsqueeze(1)
    assert (scores - best).square().mean() < 0.02 * best.square().mean()


def test_settings_that_do_not_fit_are_refused():
    for overrides, message in (
        (["memory.num_slots=500"], r"memory\.num_slots must be a square number.* 484 and 529"),
        (["memory.k=9"], r"memory\.k=9 must be a multiple of memory\.heads=8"),
    ):
        with pytest.raises(UserError, match=rf"^{message}"):
            check_config(load_config(None, ["memory.kind=peer", *overrides]))
    with pytest.raises(UserError, match="need calibration text"):
        dmt.convert(make_teacher(), dmt.PeerConfig(num_slots=36, k=8))
