"""Product-key memory against scoring all n^2 keys, in value and in gradient."""

import pytest
import torch
import torch.nn.functional as F
from conftest import LAYERS, SLOTS, make_teacher
from reference import assert_equal_gradients

import dmt
from dmt.config import round_up_to_square
from dmt.config_io import check_config, load_config
from dmt.errors import UserError
from dmt.memory import ProductKeyMemory
from dmt.memory.usage import record_usage
from dmt.models.forward import forward_teacher
from dmt.models.memories import get_memories, get_slot_memories
from dmt.testing import check_memory

WIDTH, SLOTS_OF_LAYER = 6, 25


def make(k=6, heads=2, key_width=4, silu_gate=False):
    memory = ProductKeyMemory(
        WIDTH, SLOTS_OF_LAYER, k, heads=heads, key_width=key_width, silu_gate=silu_gate
    ).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.normal_()
    return memory


def all_scores(memory, hidden):
    """Score all n^2 keys of each head for one token: `(heads, n^2)`."""
    query, scores = memory.query, []
    for head, (first, second) in enumerate(query.sub_keys):
        rows = slice(head * query.key_width, (head + 1) * query.key_width)
        halves = (query.weight[rows] @ hidden + query.bias[rows]).chunk(2)
        keys = [
            torch.cat([F.normalize(a, dim=0), F.normalize(b, dim=0)]) for a in first for b in second
        ]
        full_query = torch.cat([F.normalize(half, dim=0) for half in halves])
        scores.append(query.scale[head] * torch.stack(keys) @ full_query)
    return torch.stack(scores)


def reference_output(memory, hidden):
    outputs = []
    for token in hidden:
        total = torch.zeros(WIDTH, dtype=torch.double)
        for scores in all_scores(memory, token):
            best = scores.argsort(descending=True)[: memory.k // memory.heads]
            weights = torch.softmax(scores[best], dim=0)
            total = total + sum(w * memory.values[i] for w, i in zip(weights, best, strict=True))
        if memory.gate is not None:
            total = memory.output @ (total * F.silu(memory.gate @ token + memory.gate_bias))
        outputs.append(total + memory.output_bias)
    return torch.stack(outputs)


@pytest.mark.parametrize("silu_gate", [False, True])
def test_it_passes_every_check(silu_gate):
    check_memory(ProductKeyMemory, dmt.ProductKeyConfig(k=8, heads=2, silu_gate=silu_gate))


@pytest.mark.parametrize(("k", "heads"), [(1, 1), (6, 2), (8, 1), (25, 1), (50, 2)])
@pytest.mark.parametrize("silu_gate", [False, True])
def test_value_and_gradient_are_those_of_scoring_every_key(k, heads, silu_gate):
    """Also with more slots than there are sub-keys in a table."""
    memory = make(k, heads, silu_gate=silu_gate)
    hidden = torch.randn(4, WIDTH, dtype=torch.double, requires_grad=True)
    output, expected = memory(hidden), reference_output(memory, hidden)
    assert torch.allclose(output, expected)
    tensors = [hidden, *memory.parameters()]
    assert_equal_gradients(output, expected, tensors)


def test_the_search_is_exact():
    memory = make()
    hidden = torch.randn(50, WIDTH, dtype=torch.double)
    ids, scores = memory.query.search(hidden, 7)
    expected = torch.stack([all_scores(memory, token) for token in hidden]).topk(7, dim=-1)
    assert torch.allclose(scores, expected.values)
    assert torch.equal(ids, expected.indices)


@torch.no_grad()
def fvu(memory, outputs, layer):
    hidden, target = (
        states[layer].flatten(0, 1) for states in (outputs.block_inputs, outputs.block_outputs)
    )
    error = (memory(hidden) - target).square().sum()
    return float(error / (target - target.mean(0)).square().sum())


@pytest.mark.parametrize("silu_gate", [False, True])
def test_it_begins_better_than_with_random_values(silu_gate):
    teacher = make_teacher()
    texts = torch.randint(300, (2, 24, 32), generator=torch.Generator().manual_seed(1))
    config = dmt.ProductKeyConfig(k=8, silu_gate=silu_gate)
    student = dmt.convert(teacher, config, calibration=texts[0])
    fresh = dmt.convert(teacher, config)
    outputs = forward_teacher(teacher, texts[1], capture_blocks=True)
    assert fvu(get_memories(student)[0], outputs, 0) < 0.8
    assert fvu(get_memories(fresh)[0], outputs, 0) > 0.99


def test_values_are_fitted_to_the_slots_that_are_read():
    memory = ProductKeyMemory(WIDTH, 9, 2, heads=1, key_width=4, silu_gate=True)
    hidden = torch.randn(200, WIDTH)
    memory.fit_selection(hidden, hidden)
    with torch.no_grad():
        memory.values.normal_()
        target = memory(hidden) + 3
        memory.calibrate(hidden, target)
        error = (memory(hidden) - target).square().mean()
    assert error < 0.02 * target.var(0).mean()


def test_sub_keys_are_directions_of_the_queries():
    memory = make(heads=2)
    hidden = torch.randn(300, WIDTH, dtype=torch.double)
    random_cosines = memory.query.compute_scores(hidden) / memory.query.scale.view(-1, 1, 1)
    memory.fit_selection(hidden, hidden)
    cosines = memory.query.compute_scores(hidden) / memory.query.scale.view(-1, 1, 1)
    assert cosines.max(-1).values.mean() > 0.9
    assert cosines.max(-1).values.mean() > random_cosines.max(-1).values.mean()


def test_the_gate_begins_open():
    torch.manual_seed(0)
    memory = ProductKeyMemory(WIDTH, 9, 2, heads=1, key_width=4, silu_gate=True)
    plain = ProductKeyMemory(WIDTH, 9, 2, heads=1, key_width=4, silu_gate=False)
    plain.load_state_dict(memory.state_dict(), strict=False)
    hidden = torch.randn(5, WIDTH)
    assert torch.allclose(memory(hidden), plain(hidden), atol=1e-6)


def test_reads_are_counted_and_traced(tokens):
    student = dmt.convert(make_teacher(), dmt.ProductKeyConfig(k=8), calibration=tokens)
    with record_usage(get_slot_memories(student)) as usage, torch.no_grad():
        student(tokens)
    assert sorted(usage) == list(range(LAYERS))
    assert usage[0].mean_reads == 8
    memory = make(silu_gate=True)
    hidden = torch.randn(3, WIDTH, dtype=torch.double)
    ids, weights, values = memory.select(hidden)
    assert ids.shape == weights.shape == (3, 6)
    total = (weights.unsqueeze(-1) * values).sum(1) + memory.output_bias
    assert torch.allclose(total, memory(hidden))


@pytest.mark.parametrize(
    ("count", "square"), [(1, 1), (2, 4), (9, 9), (10, 16), (512, 529), (10**12, 10**12)]
)
def test_the_next_square(count, square):
    assert round_up_to_square(count) == square


def test_sizes_follow_the_block():
    memory = get_memories(dmt.convert(make_teacher(), dmt.ProductKeyConfig()))[0]
    assert (memory.num_slots, memory.k, memory.query.key_width) == (SLOTS, 4, 16)


def test_settings_that_do_not_fit_are_refused():
    for overrides, message in (
        (["memory.num_slots=500"], r"memory\.num_slots must be a square number.* 484 and 529"),
        (["memory.k=6"], r"memory\.k=6 must be a multiple of memory\.heads=4"),
        (["memory.k=8000"], r"memory\.k must be at most 2116, memory\.num_slots for each"),
        (["memory.key_width=7"], r"memory\.key_width must be an even number, got 7"),
    ):
        with pytest.raises(UserError, match=rf"^{message}"):
            check_config(load_config(None, ["memory.kind=product_key", *overrides]))
