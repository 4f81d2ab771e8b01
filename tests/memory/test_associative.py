"""The associative memory: equals its base at first, reads only rows of earlier steps."""

import itertools

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from dmt.distributed import all_gather_strings
from dmt.memory import AssociativeMemory, FeaturalMemory, InsertPolicy, associative
from dmt.memory.associative import straight_through_rows

WIDTH = 8
INSERT_ALL = InsertPolicy(min_distance=0.0, merge_distance=0.0, capacity=1_000, decay=0.1)


def make_base():
    return FeaturalMemory(WIDTH, 16, 4)


def make_memory(value_target="residual", base=None, k=3, policy=INSERT_ALL, **changes):
    torch.manual_seed(0)
    if base is None and value_target == "residual":
        base = make_base()
    memory = AssociativeMemory(
        WIDTH, k, base=base, value_target=value_target, insert_policy=policy, **changes
    )
    ids = itertools.count(1)
    memory.allocate_ids = lambda count: np.array([next(ids) for _ in range(count)], np.int64)
    return memory


def run_step(memory, hidden, targets=None, step=1, tag=""):
    with memory.writes_enabled(tag):
        output = memory(hidden)
        if targets is not None:
            memory.set_targets(targets)
    return output, memory.commit_step(step, 7.0, memory.allocate_ids)


def reference_output(memory, hidden):
    """Dense definition: score every row, then mask all but the k nearest."""
    queries = F.normalize(memory.query(hidden), dim=-1)
    occupied = memory.rows.ids >= 0
    keys, values = memory.rows.keys[occupied], memory.rows.values[occupied]
    cosines = queries @ keys.t()
    last = min(memory.k, len(keys)) - 1
    radius = torch.cdist(queries, keys).sort(-1).values[:, last : last + 1]
    cosines = cosines.masked_fill(torch.cdist(queries, keys) > radius + 1e-6, -torch.inf)
    cosines = torch.cat([cosines, memory.null_logit.expand(len(hidden), 1)], 1)
    weights = (cosines * memory.log_sharpness.exp()).softmax(-1)
    output = weights[:, :-1] @ values @ memory.output.weight.t()
    if memory.base is None:
        return output
    share = weights[:, -1:] if memory.value_target == "teacher" else 1
    return output + memory.base(hidden) * share


@pytest.mark.parametrize("base", [None, make_base()])
@pytest.mark.parametrize("value_target", ["projection", "teacher", "residual"])
def test_output_equals_the_definition(value_target, base):
    memory = make_memory(value_target, base=base)
    run_step(memory, torch.randn(2, 9, WIDTH), torch.randn(2, 9, WIDTH))
    hidden = torch.randn(5, WIDTH)
    torch.testing.assert_close(memory(hidden), reference_output(memory, hidden))


def test_a_pass_with_gradients_retains_nothing_for_null_logit_calibration():
    memory = make_memory()
    run_step(memory, torch.randn(9, WIDTH), torch.randn(9, WIDTH))
    with memory.writes_enabled():
        memory(torch.randn(9, WIDTH))
        assert memory._last_retrieval is None
        with torch.no_grad():
            memory(torch.randn(9, WIDTH))
        assert memory._last_retrieval is not None


def test_fewer_rows_than_k_are_all_read():
    memory = make_memory(k=6)
    run_step(memory, torch.randn(2, WIDTH), torch.randn(2, WIDTH))
    hidden = torch.randn(5, WIDTH)
    torch.testing.assert_close(memory(hidden), reference_output(memory, hidden))


def test_without_rows_the_output_is_the_base():
    memory = make_memory()
    hidden = torch.randn(2, 5, WIDTH)
    assert torch.equal(memory(hidden), memory.base(hidden))
    assert not make_memory("teacher")(hidden).any()


def test_a_residual_is_the_target_minus_the_base():
    memory = make_memory()
    hidden, targets = torch.randn(4, WIDTH), torch.randn(4, WIDTH)
    _, changes = run_step(memory, hidden, targets)
    torch.testing.assert_close(
        torch.as_tensor(changes.inserts[0].values), targets - memory.base(hidden)
    )
    with torch.no_grad():
        memory.log_sharpness.fill_(8.0)
    # At a stored key the output is the target.
    torch.testing.assert_close(memory(hidden), targets, atol=1e-4, rtol=1e-4)


def test_rows_of_a_step_are_not_read_in_it():
    """Later tokens and other sequences do not change a token's output by a bit."""
    memory = make_memory()
    run_step(memory, torch.randn(2, 6, WIDTH), torch.randn(2, 6, WIDTH))
    hidden, targets = torch.randn(2, 6, WIDTH), torch.randn(2, 6, WIDTH)
    changed_hidden, changed_targets = hidden.clone(), targets.clone()
    changed_hidden[0, 4:], changed_targets[0, 4:] = torch.randn(2, WIDTH), torch.randn(2, WIDTH)
    outputs = []
    for states, state_targets in ((hidden, targets), (changed_hidden, changed_targets)):
        with memory.writes_enabled():
            outputs.append(memory(states))
            memory.set_targets(state_targets)
        memory.drop_pending()
    assert torch.equal(outputs[0][0, :4], outputs[1][0, :4])
    assert torch.equal(outputs[0][1], outputs[1][1])
    assert not torch.equal(outputs[0][0, 4:], outputs[1][0, 4:])


def test_rows_of_a_step_are_read_in_the_next():
    memory = make_memory("teacher")
    hidden = torch.randn(3, WIDTH)
    output, _ = run_step(memory, hidden, torch.randn(3, WIDTH))
    assert not output.any()
    assert memory(hidden).norm() > 0


def test_the_query_receives_the_gradient_of_the_returned_keys():
    memory = make_memory()
    run_step(memory, torch.randn(9, WIDTH), torch.randn(9, WIDTH))
    memory._recent_hidden = None
    hidden = torch.randn(1, WIDTH)
    queries = F.normalize(memory.query(hidden), dim=-1).detach().requires_grad_()
    matches = memory.rows.search(queries, memory.k)
    keys = memory.rows.keys[matches.indices].clone().requires_grad_()
    values = memory.rows.values[matches.indices]
    scores = torch.cat(
        [torch.einsum("nd,nkd->nk", queries, keys), memory.null_logit.expand(1, 1)], 1
    )
    weights = (scores * memory.log_sharpness.exp()).softmax(-1)[:, :-1]
    total = torch.einsum("nk,nkw->nw", weights, values).sum()
    query_grad, key_grad = torch.autograd.grad(total, (queries, keys))
    expected = torch.autograd.grad(
        F.normalize(memory.query(hidden), dim=-1), memory.query.weight, query_grad + key_grad.sum(1)
    )[0]
    (memory(hidden) - memory.base(hidden)).sum().backward()
    torch.testing.assert_close(memory.query.weight.grad, expected)


@pytest.mark.parametrize("value_target", ["projection", "teacher"])
def test_projections_learn_from_retrieved_rows(value_target):
    memory = make_memory(value_target)
    memory(torch.randn(3, WIDTH)).sum()
    run_step(memory, torch.randn(9, WIDTH), torch.randn(9, WIDTH))
    memory(torch.randn(4, WIDTH)).square().sum().backward()
    assert memory.key.weight.grad.abs().sum() > 0
    if value_target == "projection":
        assert memory.value.weight.grad.abs().sum() > 0
    else:
        assert memory.value is None
    memory.zero_grad()
    memory._recent_ids += 1_000  # now no stored row is a recent one
    memory(torch.randn(4, WIDTH)).square().sum().backward()
    assert not memory.key.weight.grad.any()


def test_retrieved_rows_are_attributed_to_their_hidden_states(monkeypatch):
    """While no weight has changed, projecting the recent states again gives the stored rows."""
    memory = make_memory("projection", k=4)
    for step in (1, 2):
        run_step(memory, torch.randn(9, WIDTH), step=step)
    calls = []
    monkeypatch.setattr(
        associative,
        "straight_through_rows",
        lambda *args: calls.append(args) or straight_through_rows(*args),
    )
    memory(torch.randn(6, WIDTH))
    _, recent_keys, recent_values, keys, values, origins = calls[0]
    assert (origins >= 0).all()
    torch.testing.assert_close(recent_keys[origins], keys)
    torch.testing.assert_close(recent_values[origins], values)


def test_far_from_all_rows_the_output_is_the_base():
    memory = make_memory()
    near = torch.randn(1, WIDTH)
    run_step(memory, near, torch.full((1, WIDTH), 9.0))
    with torch.no_grad():
        memory.log_sharpness.fill_(5.0)
    torch.testing.assert_close(memory(-near), memory.base(-near), atol=1e-5, rtol=1e-5)


def test_reading_without_writing_changes_nothing_and_counts_nothing():
    memory = make_memory()
    run_step(memory, torch.randn(9, WIDTH), torch.randn(9, WIDTH))
    before = {name: tensor.clone() for name, tensor in memory.state_dict().items()}
    memory(torch.randn(4, WIDTH))
    assert not memory.commit_step(2, 8.0, memory.allocate_ids).inserts
    assert all(torch.equal(before[name], tensor) for name, tensor in memory.state_dict().items())
    assert memory.rows.pop_usage() is None


def test_reads_while_writing_are_counted():
    memory = make_memory()
    run_step(memory, torch.randn(9, WIDTH), torch.randn(9, WIDTH))
    run_step(memory, torch.randn(5, WIDTH), torch.randn(5, WIDTH), step=2)
    assert memory.rows.pop_usage().reads.sum() == 5 * 3


def test_duplicates_are_not_inserted():
    memory = make_memory(policy=InsertPolicy(0.05, 0.0, 1_000, 0.1))
    hidden = torch.randn(5, WIDTH)
    run_step(memory, hidden, hidden)
    run_step(memory, hidden * 3, hidden, step=2)  # the same direction
    assert len(memory.rows) == 5


def test_a_saved_memory_is_the_same_when_loaded():
    memory = make_memory()
    run_step(memory, torch.randn(9, WIDTH), torch.randn(9, WIDTH))
    loaded = make_memory(allocated_rows=memory.rows.allocated_rows)
    loaded.load_state_dict(memory.state_dict())
    hidden = torch.randn(4, WIDTH)
    assert torch.equal(memory(hidden), loaded(hidden))
    assert len(loaded.rows) == 9


def test_centering_removes_the_common_mean():
    memory = make_memory()
    hidden = torch.randn(50, WIDTH) + 10
    memory.center(hidden)
    torch.testing.assert_close(memory.query(hidden).mean(0), torch.zeros(WIDTH), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"width": 0}, "width must be at least 1"),
        ({"value_target": "dreams"}, "value_target must be one of"),
        ({"value_target": "residual"}, "pass base="),
        ({"sharpness": 0.0}, "sharpness must be positive"),
        ({"index": "tree"}, "index must be one of"),
    ],
)
def test_invalid_arguments_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        AssociativeMemory(**{"width": WIDTH, "k": 1, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_distance": -1.0}, "min_distance must be at least 0"),
        ({"merge_distance": float("nan")}, "merge_distance must be at least 0"),
        ({"capacity": 0}, "capacity must be at least 1"),
        ({"decay": 1.5}, r"decay must be in \[0, 1\]"),
    ],
)
def test_invalid_policies_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        InsertPolicy(**arguments)


def test_the_layer_works_alone_with_its_defaults():
    """No store, no teacher, no arguments beyond the width: what a hidden state wrote comes back."""
    memory = AssociativeMemory(WIDTH, base=torch.nn.Linear(WIDTH, WIDTH))
    hidden = F.normalize(torch.randn(6, WIDTH), dim=-1)
    for step, states in enumerate((hidden, hidden[:2], torch.randn(4, WIDTH))):
        with torch.no_grad(), memory.writes_enabled(f"step {step}"):
            memory(states)
        memory.commit_step()
    assert memory.rows.stats.entries[list(memory.rows.index_by_id.values())].sum() == 10
    assert min(memory.rows.index_by_id) >= 1
    retrieved = memory(hidden) - memory.base(hidden)
    assert (F.cosine_similarity(retrieved, hidden) > 0.9).all()
    assert "rows=" in repr(memory)


@pytest.mark.parametrize("value_target", ["residual", "teacher"])
def test_calibration_weighs_rows_by_how_well_they_predict(value_target):
    memory = make_memory(value_target, base=make_base())
    hidden = F.normalize(torch.randn(40, WIDTH), dim=-1)
    residual_map = torch.randn(WIDTH, WIDTH)

    def calibrated_null_logit(states, targets):
        with memory.writes_enabled():
            with torch.no_grad():
                memory(states)
            memory.set_targets(targets)
            memory.calibrate_null_logit()
        memory.commit_step(1, 7.0, memory.allocate_ids)
        return memory.null_logit.item()

    # Nothing has been judged yet.
    assert calibrated_null_logit(hidden, memory.base(hidden) + hidden @ residual_map) > 1
    similar = hidden + 0.01 * torch.randn(40, WIDTH)
    assert calibrated_null_logit(similar, memory.base(similar) + similar @ residual_map) < 1
    for _ in range(20):
        noise = torch.randn(40, WIDTH)
        null_logit = calibrated_null_logit(noise, memory.base(noise) + 3 * torch.randn(40, WIDTH))
    assert null_logit == pytest.approx(max(associative.NULL_LOGIT_CANDIDATES))


def test_missing_targets_are_an_error():
    memory = make_memory()
    with memory.writes_enabled():
        memory(torch.randn(2, WIDTH))
    with pytest.raises(ValueError, match="call set_targets"):
        memory.commit_step(1, 7.0, memory.allocate_ids)
    with pytest.raises(ValueError, match="after a pass"):
        memory.set_targets(torch.randn(2, WIDTH))


def test_writes_end_with_their_block_and_an_error_drops_what_was_proposed():
    memory = make_memory("projection")
    with memory.writes_enabled("outer"):
        with memory.writes_enabled("inner"):
            memory(torch.randn(2, WIDTH))
        assert memory.is_writing
        memory(torch.randn(1, WIDTH))
    assert not memory.is_writing
    memory(torch.randn(5, WIDTH))
    memory.commit_step(1, 7.0, memory.allocate_ids)
    tags = [memory.rows.stats.tags[index] for index in memory.rows.index_by_id.values()]
    assert tags == ["inner", "inner", "outer"]
    with pytest.raises(RuntimeError), memory.writes_enabled():
        memory(torch.randn(2, WIDTH + 1))
    assert not memory.is_writing
    assert not memory.commit_step(2, 7.0, memory.allocate_ids).inserts


def test_retrieval_is_recorded_inside_the_block_only():
    memory = make_memory()
    with associative.record_retrieval({3: memory}) as stats:
        memory(torch.randn(4, WIDTH))
    assert (stats[3].num_tokens, stats[3].mean_null_weight) == (4, 1.0)
    run_step(memory, torch.randn(9, WIDTH), torch.randn(9, WIDTH))
    with memory.recording_retrieval() as outer:
        memory(torch.randn(2, WIDTH))
        with memory.recording_retrieval() as inner:
            memory(torch.randn(5, WIDTH))
        memory(torch.randn(1, WIDTH))
    memory(torch.randn(7, WIDTH))
    assert (inner.num_tokens, outer.num_tokens, stats[3].num_tokens) == (5, 3, 4)
    assert [len(distances) for distances in outer.nearest_distances] == [2, 1]
    assert 0 < outer.mean_null_weight < 1


def _run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    memory = make_memory("projection", policy=InsertPolicy(0.05, 0.2, 25, 0.1))
    for step in range(1, 4):
        torch.manual_seed(10 * step + rank)
        # The ranks propose different numbers of rows.
        run_step(memory, torch.randn(3 + 8 * rank, WIDTH), step=step, tag=f"rank {rank}")
    strings = all_gather_strings([[""], ["a", "b\nc"]][rank])
    assert strings == ["", "a", "b\nc"], strings
    stats = memory.rows.stats
    state = {
        "ids": memory.rows.ids,
        "keys": memory.rows.keys,
        "values": memory.rows.values,
        "recent_hidden": memory.recent_hidden()[0],
        "score": torch.tensor(stats.score),
        "tags": stats.tags,
    }
    torch.save(state, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_end_with_the_same_rows(tmp_path):
    torch.multiprocessing.spawn(_run_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["tags"] == second["tags"]
    assert {tag for tags in first["tags"] for tag in tags.split("\n")} == {"", "rank 0", "rank 1"}
    for name in ("ids", "keys", "values", "recent_hidden", "score"):
        assert torch.equal(first[name], second[name]), name
    assert int((first["ids"] >= 0).sum()) == 25


@pytest.mark.parametrize("value_target", ["projection", "teacher"])
def test_every_parameter_has_a_gradient_without_recent_rows(value_target):
    """Where several processes train, torch stops at a parameter that some pass did not use."""
    memory = make_memory(value_target)
    targets = torch.randn(12, WIDTH)
    run_step(memory, torch.randn(12, WIDTH), None if value_target == "projection" else targets)
    memory.set_recent_hidden(torch.zeros(0, WIDTH), torch.zeros(0, dtype=torch.long))
    memory(torch.randn(5, WIDTH)).square().sum().backward()
    assert [name for name, parameter in memory.named_parameters() if parameter.grad is None] == []
