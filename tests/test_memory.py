"""Featural memory against its obvious definition, in value and in gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import gelu_tanh, read

from dmt.memory import FeaturalMemory
from dmt.memory.featural import GATHER_TOKENS

WIDTH, SLOTS, K = 6, 12, 4
KINDS = [
    (weighting, ranking)
    for weighting in ("activation", "relu", "softmax", "distance")
    for ranking in ("score", "contribution", "centred")
    if ranking == "score" or weighting in ("activation", "relu")
]


def make(weighting="activation", ranking="score", heads=1, projections=False, k=K, gradient="selected", slots=SLOTS, width=WIDTH):
    memory = FeaturalMemory(width, slots, k, heads, weighting, "gelu_new", ranking, gradient, projections).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return memory


@pytest.mark.parametrize("tokens", [GATHER_TOKENS - 1, GATHER_TOKENS + 1], ids=["gather", "mask"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("projections", [False, True])
@pytest.mark.parametrize(("weighting", "ranking"), KINDS)
def test_equals_definition_in_value_and_gradient(weighting, ranking, projections, heads, tokens):
    memory = make(weighting, ranking, heads, projections)
    hidden = torch.randn(tokens, WIDTH, dtype=torch.double, requires_grad=True)
    wanted = torch.stack([read(memory, token) for token in hidden])
    said = memory(hidden)
    torch.testing.assert_close(said, wanted)
    direction = torch.randn_like(said)
    leaves = [hidden, *memory.parameters()]
    mine = torch.autograd.grad((said * direction).sum(), leaves, allow_unused=True, materialize_grads=True)
    theirs = torch.autograd.grad((wanted * direction).sum(), leaves, allow_unused=True, materialize_grads=True)
    for got, want in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("weighting", "ranking"), KINDS)
def test_gradcheck(weighting, ranking):
    memory = make(weighting, ranking, heads=2, projections=True)
    hidden = torch.randn(2, WIDTH, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(memory, (hidden,))


@pytest.mark.parametrize("ranking", ["score", "contribution", "centred"])
@pytest.mark.parametrize("heads", [1, 3])
def test_all_slots_are_the_feed_forward_block(ranking, heads):
    memory = make(ranking=ranking, heads=heads, k=SLOTS)
    hidden = torch.randn(20, WIDTH, dtype=torch.double)
    block = gelu_tanh(hidden @ memory.keys.T + memory.key_bias) @ memory.values + memory.output_bias
    torch.testing.assert_close(memory(hidden), block)


def test_straight_through_goes_forward_as_k_slots_and_backward_as_all():
    through, sparse, dense = (make(k=k, gradient=g) for k, g in ((K, "straight_through"), (K, "selected"), (SLOTS, "selected")))
    sparse.load_state_dict(through.state_dict())
    dense.load_state_dict(through.state_dict())
    hidden = torch.randn(20, WIDTH, dtype=torch.double, requires_grad=True)
    torch.testing.assert_close(through(hidden), sparse(hidden))
    direction = torch.randn(20, WIDTH, dtype=torch.double)
    gradients = [torch.autograd.grad((m(hidden) * direction).sum(), [hidden, m.keys, m.key_bias]) for m in (through, sparse, dense)]
    for got, selected, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want)
        assert not torch.allclose(got, selected)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 5), st.sampled_from(KINDS), st.integers(1, 5), st.integers(1, 9), st.booleans(), st.data())
def test_any_shape_equals_definition(batch, time, kind, heads, width, projections, data):
    per_head = data.draw(st.integers(1, 6))
    k = data.draw(st.integers(1, per_head))
    memory = make(*kind, heads, projections, k * heads, slots=per_head * heads, width=width)
    hidden = torch.randn(batch, time, width, dtype=torch.double)
    wanted = torch.stack([read(memory, token) for token in hidden.view(-1, width)]).view_as(hidden)
    torch.testing.assert_close(memory(hidden), wanted)


def test_reads_are_counted_once_per_token_and_slot():
    memory = make(ranking="centred")
    memory.count_reads()
    hidden = torch.randn(30, WIDTH, dtype=torch.double)
    memory(hidden)
    selected = memory.select(memory.scores(hidden))
    assert memory.reads.sum() == 2 * 30 * K  # once by the call, once by `select`
    assert torch.equal(memory.reads, 2 * selected.sum(0))


def test_calibration_keeps_the_mean_of_what_is_not_read():
    memory = make(ranking="centred", k=1)
    hidden = torch.randn(2000, WIDTH, dtype=torch.double)
    memory.calibrate_means(hidden)
    torch.testing.assert_close(memory.means.data, gelu_tanh(memory.scores(hidden)).mean(0).data)
    wanted = torch.randn(WIDTH, dtype=torch.double)
    memory.shift_output(wanted - memory(hidden).mean(0))
    torch.testing.assert_close(memory(hidden).mean(0).data, wanted)


def test_output_shift_goes_through_the_output_projection():
    memory = make(projections=True)
    hidden = torch.randn(40, WIDTH, dtype=torch.double)
    before, shift = memory(hidden).detach(), torch.randn(WIDTH, dtype=torch.double)
    memory.shift_output(shift)
    torch.testing.assert_close(memory(hidden).detach(), before + shift)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 13}, "k must be in"),
        ({"k": 0}, "k must be in"),
        ({"heads": 5}, "multiples of heads"),
        ({"weighting": "softmax", "ranking": "centred"}, "ranking=score"),
        ({"activation": "mish"}, "not supported"),
    ],
)
def test_impossible_memories_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FeaturalMemory(**({"width": WIDTH, "slots": SLOTS, "k": K} | arguments))
