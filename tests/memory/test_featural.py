"""The featural memory against its definition, in value and in gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import gelu_tanh, reference_output

from dmt.memory import FeaturalMemory
from dmt.memory.slot_table import ACTIVATIONS, fit_ridge_map
from dmt.memory.sparsity_budget import initialize_threshold, reset_counts, update_threshold
from dmt.memory.usage import record_usage

WIDTH, SLOTS, K = 6, 12, 4
KINDS = [
    (activation, selection)
    for activation in ("block", "relu", "softmax", "distance")
    for selection in ("score", "contribution", "centered")
    if selection == "score" or activation in ("block", "relu")
]
BUDGETED = {"k_mode": "threshold", "metric": "fisher"}
VARIANTS = [(*kind, {}) for kind in KINDS] + [
    (activation, selection, changes)
    for activation, selection in KINDS
    if selection != "score"  # softmax and distance rank by score alone
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
    options = {
        "activation": activation,
        "activation_function": "gelu_new",
        "selection": selection,
        "projections": projections,
        "skip_connection": skip_connection,
    }
    memory = FeaturalMemory(**shape, heads=heads, **options).double()
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
@pytest.mark.parametrize(
    ("projections", "skip_connection"), [(False, False), (False, True), (True, True)]
)
@pytest.mark.parametrize(("activation", "selection", "changes"), VARIANTS)
def test_equals_definition_in_value_and_gradient(
    activation, selection, projections, skip_connection, heads, tokens, changes
):
    memory = make(activation, selection, heads, projections, skip_connection, **changes)
    hidden = torch.randn(tokens, WIDTH, dtype=torch.double, requires_grad=True)
    expected = torch.stack([reference_output(memory, token) for token in hidden])
    output = memory(hidden)
    torch.testing.assert_close(output, expected)
    with torch.no_grad():  # another code path: values are gathered
        torch.testing.assert_close(memory(hidden), expected)
    direction = torch.randn_like(output)
    leaves = [hidden, *memory.parameters()]
    grads, expected_grads = (
        torch.autograd.grad(
            (values * direction).sum(), leaves, allow_unused=True, materialize_grads=True
        )
        for values in (output, expected)
    )
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize(("activation", "selection"), KINDS)
def test_gradcheck(activation, selection):
    memory = make(activation, selection, heads=2, projections=True, skip_connection=True)
    hidden = torch.randn(2, WIDTH, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(memory, (hidden,))


@pytest.mark.parametrize("selection", ["score", "contribution", "centered"])
@pytest.mark.parametrize("heads", [1, 3])
def test_all_slots_equal_the_feed_forward_block(selection, heads):
    memory = make(selection=selection, heads=heads, k=SLOTS)
    hidden = torch.randn(20, WIDTH, dtype=torch.double)
    block = gelu_tanh(hidden @ memory.keys.T + memory.key_bias) @ memory.values + memory.output_bias
    torch.testing.assert_close(memory(hidden), block)


def test_straight_through_is_sparse_forward_and_dense_backward():
    straight, sparse, dense = (
        make(k=k, gradient=gradient)
        for k, gradient in ((K, "straight_through"), (K, "selected"), (SLOTS, "selected"))
    )
    sparse.load_state_dict(straight.state_dict())
    dense.load_state_dict(straight.state_dict())
    hidden = torch.randn(20, WIDTH, dtype=torch.double, requires_grad=True)
    torch.testing.assert_close(straight(hidden), sparse(hidden))
    direction = torch.randn(20, WIDTH, dtype=torch.double)
    grads = [
        torch.autograd.grad(
            (memory(hidden) * direction).sum(), [hidden, memory.keys, memory.key_bias]
        )
        for memory in (straight, sparse, dense)
    ]
    for straight_grad, sparse_grad, dense_grad in zip(*grads, strict=True):
        torch.testing.assert_close(straight_grad, dense_grad)
        assert not torch.allclose(straight_grad, sparse_grad)


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
    expected = [reference_output(memory, token) for token in hidden.view(-1, width)]
    torch.testing.assert_close(memory(hidden), torch.stack(expected).view_as(hidden))


def test_reads_are_counted_once_per_token_and_slot():
    memory = make(selection="centered")
    hidden = torch.randn(30, WIDTH, dtype=torch.double)
    with memory.recording_usage() as usage:
        memory(hidden)
    memory(hidden)  # is not counted
    assert usage.reads.sum() == 30 * K
    assert usage.tokens == 30
    assert usage.mean_reads == K
    assert torch.equal(usage.reads, memory.select_slots(hidden).sum(0))


def test_an_inner_recording_pauses_the_outer_and_errors_end_it():
    memory, hidden = make(), torch.randn(3, WIDTH, dtype=torch.double)
    with record_usage({1: memory, 2: make()}) as usage:
        memory(hidden)
        with memory.recording_usage() as inner:
            memory(hidden)
        with memory.usage_paused():
            memory(hidden)
        memory(hidden[:2])
    assert (usage[1].tokens, usage[2].tokens, inner.tokens) == (5, 0, 3)
    assert usage[2].mean_reads == 0
    assert usage[1].all_reduce().tokens == 5
    with pytest.raises(RuntimeError, match="stop"), memory.recording_usage() as usage:
        raise RuntimeError("stop")
    memory(hidden)
    assert usage.tokens == 0


def test_k_is_restored_after_a_temporary_one():
    memory = make(selection="centered", **BUDGETED)
    hidden = torch.randn(9, WIDTH, dtype=torch.double)
    before = memory(hidden)
    with memory.temporary_k(SLOTS, threshold=torch.zeros(())):
        assert memory.k == SLOTS
        assert memory.select_slots(hidden).all()
    assert (memory.k, float(memory.threshold)) == (K, 8.0)
    assert torch.equal(memory(hidden), before)
    with pytest.raises(ValueError, match="k must be in"), memory.temporary_k(SLOTS + 1):
        pass
    top = make(selection="centered")
    with top.temporary_k(1):
        assert (top.select_slots(hidden).sum(-1) == 1).all()
    assert (top.select_slots(hidden).sum(-1) == K).all()


def test_means_are_average_weights():
    memory = make(selection="centered", k=1)
    hidden = torch.randn(2000, WIDTH, dtype=torch.double)
    memory.calibrate_means(hidden)
    torch.testing.assert_close(
        memory.means.data, gelu_tanh(memory.compute_scores(hidden)).mean(0).data
    )


@pytest.mark.parametrize("projections", [False, True])
def test_compensation_adds_the_mean_of_the_residual(projections):
    memory = make(projections=projections)
    hidden = torch.randn(40, WIDTH, dtype=torch.double)
    before, residual = memory(hidden).detach(), torch.randn(40, WIDTH, dtype=torch.double)
    memory.compensate(hidden, residual)
    torch.testing.assert_close(memory(hidden).detach(), before + residual.mean(0))


@pytest.mark.parametrize("projections", [False, True])
def test_compensation_of_a_skip_connection_is_least_squares(projections):
    memory = make(projections=projections, skip_connection=True)
    hidden = torch.randn(500, WIDTH, dtype=torch.double) * 3 + 1
    true_map = torch.randn(WIDTH, WIDTH, dtype=torch.double)
    residual = hidden @ true_map + 0.1 * torch.randn(500, WIDTH, dtype=torch.double)
    before = memory(hidden).detach()
    memory.compensate(hidden, residual)
    inputs = torch.cat([hidden, torch.ones(500, 1, dtype=torch.double)], dim=1)
    predicted = inputs @ torch.linalg.lstsq(inputs, residual).solution
    torch.testing.assert_close(memory(hidden).detach(), before + predicted, rtol=0.01, atol=0.05)
    memory.compensate(hidden, torch.zeros_like(residual))
    torch.testing.assert_close(memory(hidden).detach(), before + predicted, rtol=0.01, atol=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 13}, r"k must be in \[1, num_slots=12\], got 13"),
        ({"k": 0}, "k must be in"),
        ({"width": 0}, "width must be at least 1"),
        ({"heads": 0}, "heads must be at least 1"),
        ({"heads": 5}, "multiples of heads"),
        ({"activation": "softmax", "selection": "centered"}, "needs selection=score"),
        ({"activation": "distance", "gradient": "straight_through"}, "needs selection=score"),
        ({"activation": "softmax", "gated": True}, "does not support gated"),
        ({"activation": "mish"}, "not supported"),
        ({"activation": "block"}, "needs activation_function"),
        ({"activation": "block", "activation_function": "mish"}, "not supported"),
        ({"selection": "rank"}, "selection must be one of"),
        ({"metric": "cosine"}, "metric must be one of"),
        ({"k_mode": "all"}, "k_mode must be one of"),
        ({"gradient": "none"}, "gradient must be one of"),
        ({"search": "guess"}, "search must be one of exact"),
        ({"k_mode": "threshold", "selection": "score"}, "comparable across layers"),
    ],
)
def test_invalid_arguments_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        FeaturalMemory(**({"width": WIDTH, "num_slots": SLOTS, "k": K} | arguments))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "softmax", "distance"])
def test_the_layer_works_alone(activation, gated):
    if gated and activation not in ACTIVATIONS:
        pytest.skip("rejected")
    memory = FeaturalMemory(WIDTH, SLOTS, K, activation=activation, gated=gated)
    hidden = torch.randn(2, 5, WIDTH, requires_grad=True)
    output = memory(hidden)
    assert output.shape == hidden.shape
    assert output.isfinite().all()
    assert 0 < output.std() < 1
    output.square().sum().backward()
    without_grad = {name for name, p in memory.named_parameters() if p.grad is None}
    assert without_grad == ({"key_bias"} if activation == "distance" else set())
    expected = [reference_output(memory, token) for token in hidden.view(-1, WIDTH)]
    torch.testing.assert_close(output, torch.stack(expected).view_as(hidden), rtol=1e-4, atol=1e-6)
    assert f"num_slots={SLOTS}, k={K}" in repr(memory)


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


def test_a_slot_whose_rank_equals_the_threshold_is_read():
    memory = make(selection="centered", **BUDGETED)
    hidden = torch.randn(20, WIDTH, dtype=torch.double)
    rank = memory.compute_ranks(hidden)
    memory.threshold.copy_(rank.max())
    assert torch.equal(memory.select_slots(hidden), rank == rank.max())


def test_an_unreachable_threshold_reads_nothing():
    memory = make(selection="centered", **BUDGETED)
    memory.threshold.fill_(float("inf"))
    hidden = torch.randn(20, WIDTH, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(
            memory(hidden), (memory.output_bias + memory.means @ memory.values).expand(20, -1)
        )


def test_value_norms_follow_the_values():
    memory = make(selection="centered").eval()
    assert torch.equal(memory.value_norms(), memory.values.norm(dim=-1))
    cached = memory.value_norms()
    assert memory.value_norms() is cached, "computed once while nothing changes"
    with torch.no_grad():
        memory.values.mul_(2)
    assert torch.equal(memory.value_norms(), 2 * cached)
    memory.load_state_dict(make(selection="centered").state_dict())
    assert torch.equal(memory.value_norms(), memory.values.norm(dim=-1))
    memory.values.data = torch.randn_like(memory.values)
    assert torch.equal(memory.value_norms(), memory.values.norm(dim=-1))


def test_cached_values_are_in_full_precision_under_autocast():
    memory = make(selection="centered", metric="fisher").float().eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        memory(torch.randn(3, WIDTH))
        norms, constant = memory.value_norms(), memory.constant_output()
    torch.testing.assert_close(
        norms, (memory.values @ memory.metric).norm(dim=-1), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        constant, memory.output_bias + memory.means @ memory.values, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("changed", ["output_bias", "means", "values"])
def test_the_constant_output_follows_all_its_sources(changed):
    memory = make(selection="centered").eval()
    with torch.no_grad():
        cached = memory.constant_output()
        assert memory.constant_output() is cached
        getattr(memory, changed).mul_(2)
        torch.testing.assert_close(
            memory.constant_output(), memory.output_bias + memory.means @ memory.values
        )
    assert memory.constant_output().requires_grad


@pytest.mark.parametrize("changed", ["values", "metric", "output"])
def test_value_norms_follow_all_their_sources(changed):
    memory = make(selection="centered", projections=True, metric="fisher").eval()
    memory.value_norms()
    with torch.no_grad():
        getattr(memory, changed).mul_(2)
    torch.testing.assert_close(
        memory.value_norms(), (memory.values @ memory.output.t() @ memory.metric).norm(dim=-1)
    )


def test_the_initial_threshold_spends_the_budget_over_all_memories():
    memories = [make(selection="centered", **BUDGETED) for _ in range(3)]
    with torch.no_grad():
        memories[0].values.mul_(5)  # its contributions are larger
    hidden = [torch.randn(200, WIDTH, dtype=torch.double) for _ in memories]
    initialize_threshold(memories, hidden)
    reads = [
        float(memory.select_slots(states).sum()) / 200
        for memory, states in zip(memories, hidden, strict=True)
    ]
    assert sum(reads) == pytest.approx(3 * K, abs=0.01)
    assert reads[0] > reads[1] + 2


def test_the_initial_threshold_is_never_zero():
    # Half of the slots contribute nothing: a threshold of zero would always read them all.
    memory = make(activation="relu", selection="contribution", k=SLOTS - 2, **BUDGETED).float()
    hidden = torch.randn(200, WIDTH)
    initialize_threshold([memory], [hidden])
    assert memory.threshold > 0
    assert memory.select_slots(hidden).sum() == (memory.compute_ranks(hidden) > 0).sum()
    full = make(selection="centered", k=SLOTS, **BUDGETED).float()
    initialize_threshold([full], [hidden])
    assert full.select_slots(hidden).all()


def test_updates_move_the_shared_threshold_to_the_budget():
    memories = [make(selection="centered", **BUDGETED).train() for _ in range(3)]
    for memory in memories:
        memory.threshold.fill_(1e-3)
        memory(torch.randn(9, WIDTH, dtype=torch.double))
    assert not any(memory.budget_tokens for memory in memories), "counted only after reset_counts"
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


def test_a_threshold_without_reads_is_not_moved():
    top, idle = make(selection="centered").train(), make(selection="centered", **BUDGETED).train()
    top(torch.randn(5, WIDTH, dtype=torch.double))
    update_threshold([top, idle], rate=0.5)
    reset_counts([idle])
    idle.eval()(torch.randn(5, WIDTH, dtype=torch.double))
    update_threshold([top, idle], rate=0.5)
    assert float(idle.threshold) == 8.0


def test_the_initial_threshold_of_many_tokens_is_measured_on_a_spread_sample(monkeypatch):
    monkeypatch.setattr("dmt.memory.sparsity_budget.MAX_RANKS", 100 * 2 * SLOTS)
    memories = [make(selection="centered", **BUDGETED) for _ in range(2)]
    scale = torch.linspace(0.1, 3, 1000, dtype=torch.double).unsqueeze(-1)
    hidden = [torch.randn(1000, WIDTH, dtype=torch.double) * scale for _ in memories]
    initialize_threshold(memories, hidden)
    reads = [
        float(memory.select_slots(states).sum()) / 1000
        for memory, states in zip(memories, hidden, strict=True)
    ]
    assert sum(reads) == pytest.approx(2 * K, rel=0.1)


def test_slots_that_contribute_nothing_are_not_read():
    memory, hidden = make("relu", "contribution", **BUDGETED).float(), torch.randn(20, WIDTH)
    with torch.no_grad():
        memory.key_bias.fill_(-1e3)
    initialize_threshold([memory], [hidden])
    assert memory.threshold > 0
    assert not memory.select_slots(hidden).any()


@pytest.mark.parametrize(
    ("k", "multiplier", "reads", "factor"),
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
def test_a_threshold_moves_by_a_bounded_power_of_the_excess(k, multiplier, reads, factor):
    memories = [make(selection="centered", k=k, **BUDGETED) for _ in range(2)]
    reset_counts(memories)
    for memory in memories:
        memory.set_k_multiplier(multiplier)
        memory.budget_reads.fill_(reads * 100)
        memory.budget_tokens = 100
    update_threshold(memories, rate=0.5)
    assert [float(memory.threshold) for memory in memories] == [pytest.approx(8 * factor**0.5)] * 2
    update_threshold(memories, rate=0.5)
    assert float(memories[0].threshold) == pytest.approx(8 * factor**0.5), "counts start again"


@pytest.mark.parametrize("changes", [{}, {"k_mode": "threshold"}])
@pytest.mark.parametrize("k", [2, 3, SLOTS])
@pytest.mark.parametrize("tokens", [1, 15, 40])
def test_gathered_and_multiplied_values_sum_to_the_same(changes, k, tokens, monkeypatch):
    memory, hidden = (
        make(selection="contribution", k=k, **changes).eval(),
        torch.randn(tokens, WIDTH, dtype=torch.double),
    )
    expected = memory(hidden)  # with gradients all values are multiplied
    gathered, sum_values = [], memory.sum_values
    monkeypatch.setattr(
        memory, "sum_values", lambda *arguments: gathered.append(1) or sum_values(*arguments)
    )
    with torch.no_grad():
        torch.testing.assert_close(memory(hidden), expected)
    many_of_many = tokens == 40 and k > 0.2 * SLOTS
    assert bool(gathered) == (tokens > 1 and not many_of_many)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("activation", "selection", "changes"), VARIANTS)
def test_reads_are_counted_on_every_code_path(activation, selection, changes, grad):
    memory = make(activation, selection, **changes)
    hidden = torch.randn(30, WIDTH, dtype=torch.double)
    with torch.no_grad():
        memory.values[-1].zero_()  # where values are ranked the last slot is never read
    for _ in range(2):
        with memory.recording_usage() as usage, torch.set_grad_enabled(grad):
            memory(hidden)
        assert torch.equal(usage.reads, memory.select_slots(hidden).sum(0))
        assert usage.tokens == 30


@torch.no_grad()
def test_nothing_is_cached_in_training_mode():
    memory = make(selection="centered").train()
    memory.constant_output(), memory.value_norms()
    memory.values.data.mul_(2)  # which no version counter notices
    torch.testing.assert_close(memory.value_norms(), memory.values.norm(dim=-1))
    torch.testing.assert_close(
        memory.constant_output(), memory.output_bias + memory.means @ memory.values
    )


def test_nothing_is_cached_in_inference_mode():
    with torch.inference_mode():
        memory, hidden = (
            make(selection="centered").eval(),
            torch.randn(9, WIDTH, dtype=torch.double),
        )
        for _ in range(2):
            torch.testing.assert_close(
                memory(hidden), torch.stack([reference_output(memory, token) for token in hidden])
            )
            memory.values.mul_(2)


@pytest.mark.parametrize("heads", [1, 2])
def test_a_multiple_of_k_reads_all_slots_at_most(heads):
    memory = make(selection="centered", heads=heads).train()
    dense = make(selection="centered", heads=heads, k=SLOTS)
    dense.load_state_dict(memory.state_dict())
    hidden = torch.randn(9, WIDTH, dtype=torch.double)
    before = memory(hidden)
    with memory.scaled_k(10.0):
        torch.testing.assert_close(memory(hidden), dense(hidden))
    assert torch.equal(memory(hidden), before)
    with pytest.raises(ValueError, match="factor must be positive"):
        memory.set_k_multiplier(0)


def test_heads_need_not_divide_a_shared_budget():
    memory = make(selection="centered", heads=2, projections=True, k=5, **BUDGETED)
    hidden = torch.randn(9, WIDTH, dtype=torch.double)
    expected = torch.stack([reference_output(memory, token) for token in hidden])
    torch.testing.assert_close(memory(hidden), expected)


def test_loading_a_block_replaces_all_parameters():
    memory = make(selection="centered", skip_connection=True, projections=True, k=SLOTS, gated=True)
    tensors = {
        name: torch.randn(SLOTS, WIDTH, dtype=torch.double) for name in ("keys", "gains", "values")
    }
    memory.load_feedforward(tensors)
    hidden = torch.randn(9, WIDTH, dtype=torch.double)
    weights = gelu_tanh(hidden @ tensors["keys"].T) * (hidden @ tensors["gains"].T)
    torch.testing.assert_close(memory(hidden), weights @ tensors["values"])


def test_a_ridge_map_is_fitted_about_the_means_in_any_unit():
    hidden = torch.randn(400, WIDTH, dtype=torch.double) + 3
    true_map = torch.randn(WIDTH, WIDTH, dtype=torch.double)
    targets = hidden @ true_map.T + 7
    fitted = fit_ridge_map(hidden, targets)
    torch.testing.assert_close(fitted, true_map, rtol=0.01, atol=0.01)
    torch.testing.assert_close(fit_ridge_map(hidden / 1e3, targets), 1e3 * fitted)


@torch.no_grad()
def test_parameters_that_were_read_can_be_swapped():
    memory = FeaturalMemory(WIDTH, SLOTS, K, selection="contribution")
    hidden = torch.randn(3, WIDTH)
    memory(hidden)
    new_values = torch.nn.Parameter(torch.randn_like(memory.values))
    torch.utils.swap_tensors(memory.values, new_values)
    output = memory(hidden)
    memory.values.add_(0)  # computes what is cached anew
    assert torch.equal(memory(hidden), output)
