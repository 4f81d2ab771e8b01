"""Featural memory against its obvious definition, in value and in gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import gelu_tanh, read

from dmt.memory import FeaturalMemory
from dmt.memory.slot_table import fit_ridge_map
from dmt.memory.sparsity_budget import initialize_threshold, reset_counts, update_threshold

WIDTH, SLOTS, K = 6, 12, 4
KINDS = [
    (weighting, ranking)
    for weighting in ("block", "relu", "softmax", "distance")
    for ranking in ("score", "contribution", "centered")
    if ranking == "score" or weighting in ("block", "relu")
]


BUDGETED = {"k_mode": "threshold", "metric": "fisher"}
WAYS = [(*kind, {}) for kind in KINDS] + [
    (weighting, ranking, changes)
    for weighting, ranking in KINDS
    if ranking != "score"  # the others rank by score alone and weigh by score alone
    for changes in ({"gated": True}, {"metric": "fisher"}, {"gated": True, **BUDGETED})
]


def make(
    activation="block",
    selection="score",
    heads=1,
    projections=False,
    skip_connection=False,
    **changes,
):
    shape = {"width": WIDTH, "num_slots": SLOTS, "k": K} | changes
    how = {
        "activation": activation,
        "activation_function": "gelu_new",
        "selection": selection,
        "projections": projections,
        "skip_connection": skip_connection,
    }
    memory = FeaturalMemory(**shape, heads=heads, **how).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.copy_(torch.randn_like(parameter))
        if memory.metric is not None:
            memory.metric.copy_(torch.randn_like(memory.metric))
        if memory.threshold is not None:
            memory.threshold.fill_(8.0)
    return memory


@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(("projections", "linear"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize(("weighting", "ranking", "changes"), WAYS)
def test_equals_definition_in_value_and_gradient(
    weighting, ranking, projections, linear, heads, tokens, changes
):
    memory = make(weighting, ranking, heads, projections, linear, **changes)
    hidden = torch.randn(tokens, WIDTH, dtype=torch.double, requires_grad=True)
    wanted = torch.stack([read(memory, token) for token in hidden])
    said = memory(hidden)
    torch.testing.assert_close(said, wanted)
    with torch.no_grad():  # takes another path: values are gathered
        torch.testing.assert_close(memory(hidden), wanted)
    direction = torch.randn_like(said)
    leaves = [hidden, *memory.parameters()]
    mine = torch.autograd.grad(
        (said * direction).sum(), leaves, allow_unused=True, materialize_grads=True
    )
    theirs = torch.autograd.grad(
        (wanted * direction).sum(), leaves, allow_unused=True, materialize_grads=True
    )
    for got, want in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("weighting", "ranking"), KINDS)
def test_gradcheck(weighting, ranking):
    memory = make(weighting, ranking, heads=2, projections=True, skip_connection=True)
    hidden = torch.randn(2, WIDTH, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(memory, (hidden,))


@pytest.mark.parametrize("ranking", ["score", "contribution", "centered"])
@pytest.mark.parametrize("heads", [1, 3])
def test_all_slots_are_the_feed_forward_block(ranking, heads):
    memory = make(selection=ranking, heads=heads, k=SLOTS)
    hidden = torch.randn(20, WIDTH, dtype=torch.double)
    block = gelu_tanh(hidden @ memory.keys.T + memory.key_bias) @ memory.values + memory.output_bias
    torch.testing.assert_close(memory(hidden), block)


def test_straight_through_goes_forward_as_k_slots_and_backward_as_all():
    through, sparse, dense = (
        make(k=k, gradient=g)
        for k, g in ((K, "straight_through"), (K, "selected"), (SLOTS, "selected"))
    )
    sparse.load_state_dict(through.state_dict())
    dense.load_state_dict(through.state_dict())
    hidden = torch.randn(20, WIDTH, dtype=torch.double, requires_grad=True)
    torch.testing.assert_close(through(hidden), sparse(hidden))
    direction = torch.randn(20, WIDTH, dtype=torch.double)
    gradients = [
        torch.autograd.grad((m(hidden) * direction).sum(), [hidden, m.keys, m.key_bias])
        for m in (through, sparse, dense)
    ]
    for got, selected, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want)
        assert not torch.allclose(got, selected)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.sampled_from(KINDS),
    st.integers(1, 5),
    st.integers(1, 9),
    st.booleans(),
    st.data(),
)
def test_any_shape_equals_definition(batch, time, kind, heads, width, projections, data):
    per_head = data.draw(st.integers(1, 6))
    k = data.draw(st.integers(1, per_head))
    memory = make(*kind, heads, projections, k=k * heads, num_slots=per_head * heads, width=width)
    hidden = torch.randn(batch, time, width, dtype=torch.double)
    wanted = torch.stack([read(memory, token) for token in hidden.view(-1, width)]).view_as(hidden)
    torch.testing.assert_close(memory(hidden), wanted)


def test_reads_are_counted_once_per_token_and_slot():
    memory = make(selection="centered")
    memory.count_reads()
    hidden = torch.randn(30, WIDTH, dtype=torch.double)
    memory(hidden)
    assert memory.read_counts.sum() == 30 * K
    assert memory.counted_tokens == 30
    assert torch.equal(memory.read_counts, memory.select_slots(hidden).sum(0))


def test_means_are_average_weights():
    memory = make(selection="centered", k=1)
    hidden = torch.randn(2000, WIDTH, dtype=torch.double)
    memory.calibrate_means(hidden)
    torch.testing.assert_close(
        memory.means.data, gelu_tanh(memory.compute_scores(hidden)).mean(0).data
    )


@pytest.mark.parametrize("projections", [False, True])
def test_compensation_gives_the_answer_the_mean_it_lacks(projections):
    memory = make(projections=projections)
    hidden = torch.randn(40, WIDTH, dtype=torch.double)
    before, missing = memory(hidden).detach(), torch.randn(40, WIDTH, dtype=torch.double)
    memory.compensate(hidden, missing)
    torch.testing.assert_close(memory(hidden).detach(), before + missing.mean(0))


@pytest.mark.parametrize("projections", [False, True])
def test_linear_compensation_is_the_least_squares_one(projections):
    memory = make(projections=projections, skip_connection=True)
    hidden = torch.randn(500, WIDTH, dtype=torch.double) * 3 + 1
    truth = torch.randn(WIDTH, WIDTH, dtype=torch.double)
    missing = hidden @ truth + 0.1 * torch.randn(500, WIDTH, dtype=torch.double)
    before = memory(hidden).detach()
    memory.compensate(hidden, missing)
    inputs = torch.cat([hidden, torch.ones(500, 1, dtype=torch.double)], dim=1)
    foreseen = inputs @ torch.linalg.lstsq(inputs, missing).solution
    torch.testing.assert_close(memory(hidden).detach(), before + foreseen, rtol=0.01, atol=0.05)
    memory.compensate(hidden, torch.zeros_like(missing))
    torch.testing.assert_close(memory(hidden).detach(), before + foreseen, rtol=0.01, atol=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 13}, "k must be in"),
        ({"k": 0}, "k must be in"),
        ({"heads": 5}, "multiples of heads"),
        ({"activation": "softmax", "selection": "centered"}, "ranking=score"),
        ({"activation_function": "mish"}, "not supported"),
        ({"search": "guess"}, "search must be one of exact"),
        ({"k_mode": "threshold", "selection": "score"}, "ranks that compare"),
    ],
)
def test_impossible_memories_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FeaturalMemory(**({"width": WIDTH, "num_slots": SLOTS, "k": K} | arguments))


@pytest.mark.parametrize("gated", [False, True])
def test_a_threshold_of_zero_reads_every_slot(gated):
    memory = make(selection="centered", gated=gated, **BUDGETED)
    memory.threshold.zero_()
    hidden = torch.randn(20, WIDTH, dtype=torch.double)
    gains = hidden @ memory.gains.T + memory.gain_bias if gated else 1
    block = (
        gelu_tanh(hidden @ memory.keys.T + memory.key_bias) * gains
    ) @ memory.values + memory.output_bias
    for grad in (torch.no_grad, torch.enable_grad):
        with grad():
            torch.testing.assert_close(memory(hidden), block)


def test_a_slot_whose_rank_is_the_threshold_is_read():
    memory = make(selection="centered", **BUDGETED)
    hidden = torch.randn(20, WIDTH, dtype=torch.double)
    rank = memory.compute_ranks(hidden)
    memory.threshold.copy_(rank.max())
    assert torch.equal(memory.select_slots(hidden), rank == rank.max())


def test_a_threshold_nothing_reaches_reads_nothing():
    memory = make(selection="centered", **BUDGETED)
    memory.threshold.fill_(float("inf"))
    hidden = torch.randn(20, WIDTH, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(
            memory(hidden), (memory.output_bias + memory.means @ memory.values).expand(20, -1)
        )


def test_lengths_follow_the_values():
    memory = make(selection="centered").eval()
    assert torch.equal(memory.value_norms(), memory.values.norm(dim=-1))
    kept = memory.value_norms()
    assert memory.value_norms() is kept, "computed once while nothing changes"
    with torch.no_grad():
        memory.values.mul_(2)
    assert torch.equal(memory.value_norms(), 2 * kept)
    memory.load_state_dict(make(selection="centered").state_dict())
    assert torch.equal(memory.value_norms(), memory.values.norm(dim=-1))
    memory.values.data = torch.randn_like(memory.values)
    assert torch.equal(memory.value_norms(), memory.values.norm(dim=-1))


def test_what_is_kept_is_the_same_whoever_asked_first():
    memory = make(selection="centered", metric="fisher").float().eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        memory(torch.randn(3, WIDTH))
        lengths, always = memory.value_norms(), memory.constant_output()
    torch.testing.assert_close(
        lengths, (memory.values @ memory.metric).norm(dim=-1), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        always, memory.output_bias + memory.means @ memory.values, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("changed", ["output_bias", "means", "values"])
def test_what_is_always_said_follows_all_it_depends_on(changed):
    memory = make(selection="centered").eval()
    with torch.no_grad():
        kept = memory.constant_output()
        assert memory.constant_output() is kept
        getattr(memory, changed).mul_(2)
        torch.testing.assert_close(
            memory.constant_output(), memory.output_bias + memory.means @ memory.values
        )
    assert memory.constant_output().requires_grad


def test_gains_need_a_weight_per_slot():
    with pytest.raises(ValueError, match="softmax knows no gains"):
        make("softmax", gated=True)


@pytest.mark.parametrize("changed", ["values", "metric", "output"])
def test_lengths_follow_all_they_depend_on(changed):
    memory = make(selection="centered", projections=True, metric="fisher").eval()
    memory.value_norms()
    with torch.no_grad():
        getattr(memory, changed).mul_(2)
    torch.testing.assert_close(
        memory.value_norms(), (memory.values @ memory.output.t() @ memory.metric).norm(dim=-1)
    )


def test_the_first_threshold_spends_the_budget_over_all_memories():
    memories = [make(selection="centered", **BUDGETED) for _ in range(3)]
    with torch.no_grad():
        memories[0].values.mul_(5)  # what it says weighs more, so it is given more
    hidden = [torch.randn(200, WIDTH, dtype=torch.double) for _ in memories]
    initialize_threshold(memories, hidden)
    reads = [
        float(memory.select_slots(states).sum()) / 200
        for memory, states in zip(memories, hidden, strict=True)
    ]
    assert sum(reads) == pytest.approx(3 * K, abs=0.01)
    assert reads[0] > reads[1] + 2


def test_a_threshold_of_zero_never_comes_to_be():
    # Half of the slots say nothing to this token: a threshold of zero would read them all for ever.
    memory = make(activation="relu", selection="contribution", k=SLOTS - 2, **BUDGETED).float()
    hidden = torch.randn(200, WIDTH)
    initialize_threshold([memory], [hidden])
    assert memory.threshold > 0
    assert memory.select_slots(hidden).sum() == (memory.compute_ranks(hidden) > 0).sum()
    everything = make(selection="centered", k=SLOTS, **BUDGETED).float()
    initialize_threshold([everything], [hidden])
    assert everything.select(hidden).all()


def test_holding_moves_the_shared_threshold_to_the_budget():
    memories = [make(selection="centered", **BUDGETED).train() for _ in range(3)]
    for memory in memories:
        memory.threshold.fill_(1e-3)
        memory(torch.randn(9, WIDTH, dtype=torch.double))
    assert not any(memory.budget_counts for memory in memories), "nobody asked for it"
    reset_counts(memories)
    hidden = torch.randn(400, WIDTH, dtype=torch.double)
    for _ in range(60):
        for memory in memories:
            memory(hidden[:100]), memory(hidden[100:])
        update_threshold(memories, rate=0.5)
    assert len({float(memory.threshold) for memory in memories}) == 1
    assert sum(
        float(memory.select_slots(hidden).sum()) for memory in memories
    ) / 400 == pytest.approx(3 * K, rel=0.02)


def test_nothing_is_held_where_nothing_is_shared_or_nothing_was_read():
    top, idle = make(selection="centered").train(), make(selection="centered", **BUDGETED).train()
    top(torch.randn(5, WIDTH, dtype=torch.double))
    update_threshold([top, idle], rate=0.5)
    reset_counts([idle])
    idle.eval()(torch.randn(5, WIDTH, dtype=torch.double))
    update_threshold([top, idle], rate=0.5)
    assert float(idle.threshold) == 8.0


def test_the_first_threshold_of_many_tokens_is_found_on_some_from_all_over(monkeypatch):
    monkeypatch.setattr("dmt.memory.sparsity_budget.MAX_RANKS", 100 * 2 * SLOTS)
    memories = [make(selection="centered", **BUDGETED) for _ in range(2)]
    later_says_more = torch.linspace(0.1, 3, 1000, dtype=torch.double).unsqueeze(-1)
    hidden = [torch.randn(1000, WIDTH, dtype=torch.double) * later_says_more for _ in memories]
    initialize_threshold(memories, hidden)
    reads = [
        float(memory.select_slots(states).sum()) / 1000
        for memory, states in zip(memories, hidden, strict=True)
    ]
    assert sum(reads) == pytest.approx(2 * K, rel=0.1)


def test_where_no_slot_says_anything_none_is_read():
    memory, hidden = make("relu", "contribution", **BUDGETED).float(), torch.randn(20, WIDTH)
    with torch.no_grad():
        memory.key_bias.fill_(-1e3)
    initialize_threshold([memory], [hidden])
    assert memory.threshold > 0
    assert not memory.select_slots(hidden).any()


@pytest.mark.parametrize(
    ("k", "widened", "read", "factor"),
    [
        (K, 1, K, 1),
        (K, 1, 2 * K, 2),
        (K, 1, K / 4, 1 / 4),
        (K, 2, 2 * K, 1),
        (K, 9, SLOTS, 1),
        (1, 1, SLOTS, 10),
        (K, 1, 0, 0.1),
    ],
)
def test_a_threshold_is_moved_by_a_root_of_what_was_read_too_much_but_never_far(
    k, widened, read, factor
):
    memories = [make(selection="centered", k=k, **BUDGETED) for _ in range(2)]
    reset_counts(memories)
    for memory in memories:
        memory.k_multiplier = widened
        memory.budget_counts.copy_(torch.tensor([read * 100, 100]))
    update_threshold(memories, rate=0.5)
    assert [float(memory.threshold) for memory in memories] == [pytest.approx(8 * factor**0.5)] * 2
    update_threshold(memories, rate=0.5)
    assert float(memories[0].threshold) == pytest.approx(8 * factor**0.5), (
        "what was read is forgotten"
    )


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("weighting", "ranking", "changes"), WAYS)
def test_reads_are_counted_on_every_path_and_anew_when_asked(weighting, ranking, changes, grad):
    memory, hidden = make(weighting, ranking, **changes), torch.randn(30, WIDTH, dtype=torch.double)
    with torch.no_grad():
        memory.values[-1].zero_()  # where values are ranked the last slot is never read
    for _ in range(2):
        memory.count_reads()
        with torch.set_grad_enabled(grad):
            memory(hidden)
        assert torch.equal(memory.read_counts, memory.select_slots(hidden).sum(0))
        assert memory.counted_tokens == 30


@torch.no_grad()
def test_what_is_kept_is_made_anew_while_training():
    memory = make(selection="centered").train()
    memory.constant_output(), memory.value_norms()
    memory.values.data.mul_(2)  # which no version counter notices
    torch.testing.assert_close(memory.value_norms(), memory.values.norm(dim=-1))
    torch.testing.assert_close(
        memory.constant_output(), memory.output_bias + memory.means @ memory.values
    )


def test_inference_mode_reads_what_is_there_now():
    with torch.inference_mode():
        memory, hidden = (
            make(selection="centered").eval(),
            torch.randn(9, WIDTH, dtype=torch.double),
        )
        for _ in range(2):
            torch.testing.assert_close(
                memory(hidden), torch.stack([read(memory, token) for token in hidden])
            )
            memory.values.mul_(2)


@pytest.mark.parametrize("heads", [1, 2])
def test_no_more_than_all_slots_are_read_however_wide(heads):
    memory, dense = (
        make(selection="centered", heads=heads).train(),
        make(selection="centered", heads=heads, k=SLOTS),
    )
    dense.load_state_dict(memory.state_dict())
    memory.k_multiplier = 10.0
    hidden = torch.randn(9, WIDTH, dtype=torch.double)
    torch.testing.assert_close(memory(hidden), dense(hidden))


def test_heads_need_not_divide_a_budget():
    memory, hidden = (
        make(selection="centered", heads=2, projections=True, k=5, **BUDGETED),
        torch.randn(9, WIDTH, dtype=torch.double),
    )
    torch.testing.assert_close(
        memory(hidden), torch.stack([read(memory, token) for token in hidden])
    )


def test_a_block_taken_over_leaves_nothing_of_what_was_there():
    memory = make(selection="centered", skip_connection=True, projections=True, k=SLOTS, gated=True)
    parts = {
        name: torch.randn(SLOTS, WIDTH, dtype=torch.double) for name in ("keys", "gains", "values")
    }
    memory.load_feedforward(parts)
    hidden = torch.randn(9, WIDTH, dtype=torch.double)
    weights = gelu_tanh(hidden @ parts["keys"].T) * (hidden @ parts["gains"].T)
    torch.testing.assert_close(memory(hidden), weights @ parts["values"])


def test_a_forecast_is_about_the_means_and_knows_no_units():
    hidden, truth = (
        torch.randn(400, WIDTH, dtype=torch.double) + 3,
        torch.randn(WIDTH, WIDTH, dtype=torch.double),
    )
    found = fit_ridge_map(hidden, hidden @ truth.T + 7)
    torch.testing.assert_close(found, truth, rtol=0.01, atol=0.01)
    torch.testing.assert_close(fit_ridge_map(hidden / 1e3, hidden @ truth.T + 7), 1e3 * found)
