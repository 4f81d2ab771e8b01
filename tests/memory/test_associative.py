"""The associative memory: begins as its base, reads what steps before wrote and nothing later, learns straight through."""

import itertools

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from dmt.distributed import all_gather_strings
from dmt.memory import AssociativeMemory, FeaturalMemory, associative
from dmt.memory.associative import straight_through_rows
from dmt.memory.insert_policy import InsertPolicy

WIDTH = 8
EVERYTHING = InsertPolicy(min_distance=0.0, merge_distance=0.0, capacity=1_000, decay=0.1)


def base():
    return FeaturalMemory(WIDTH, 16, 4)


def memory(writes="residual", on=None, k=3, policy=EVERYTHING, **more):
    torch.manual_seed(0)
    made = AssociativeMemory(
        WIDTH,
        k,
        (base() if writes == "residual" else None) if on is None else on,
        writes,
        policy,
        **more,
    )
    given = itertools.count(1)
    made.take = lambda count: np.array([next(given) for _ in range(count)], np.int64)
    return made


def step(layer, hidden, lesson=None, number=1):
    layer.writing = True
    said = layer(hidden)
    if lesson is not None:
        layer.set_targets(lesson)
    changes = layer.commit_step(number, 7.0, layer.take)
    layer.writing = False
    return said, changes


def by_definition(layer, hidden):
    """Dense, slow, obvious: every row, then all but the k nearest crossed out."""
    queries = F.normalize(layer.query(hidden), dim=-1)
    there = layer.rows.ids >= 0
    keys, values = layer.rows.keys[there], layer.rows.values[there]
    cosines = queries @ keys.t()
    furthest_read = (
        torch.cdist(queries, keys)
        .sort(-1)
        .values[:, min(layer.k, len(keys)) - 1 : min(layer.k, len(keys))]
    )
    cosines = cosines.masked_fill(torch.cdist(queries, keys) > furthest_read + 1e-6, -torch.inf)
    weights = (
        torch.cat([cosines, layer.null_logit.expand(len(hidden), 1)], 1) * layer.log_sharpness.exp()
    ).softmax(-1)
    said = weights[:, :-1] @ values @ layer.output.weight.t()
    if layer.base is None:
        return said
    return said + layer.base(hidden) * (weights[:, -1:] if layer.value_target == "teacher" else 1)


@pytest.mark.parametrize("on", [None, base()])
@pytest.mark.parametrize("writes", ["projection", "teacher", "residual"])
def test_it_says_what_the_definition_says(writes, on):
    layer = memory(writes, on=on)
    step(layer, torch.randn(2, 9, WIDTH), torch.randn(2, 9, WIDTH))
    hidden = torch.randn(5, WIDTH)
    torch.testing.assert_close(layer(hidden), by_definition(layer, hidden))


def test_a_pass_that_trains_keeps_nothing_that_only_weighing_needs():
    layer = memory()
    step(layer, torch.randn(9, WIDTH), torch.randn(9, WIDTH))
    layer.writing = True
    layer(torch.randn(9, WIDTH))
    assert layer._last_retrieval is None
    with torch.no_grad():
        layer(torch.randn(9, WIDTH))
    assert layer._last_retrieval is not None


def test_fewer_rows_than_k_are_read_as_they_are():
    layer = memory(k=6)
    step(layer, torch.randn(2, WIDTH), torch.randn(2, WIDTH))
    hidden = torch.randn(5, WIDTH)
    torch.testing.assert_close(layer(hidden), by_definition(layer, hidden))


def test_without_rows_it_is_its_base_exactly():
    layer = memory()
    hidden = torch.randn(2, 5, WIDTH)
    assert torch.equal(layer(hidden), layer.base(hidden))
    assert not memory("teacher")(hidden).any()


def test_a_residual_is_what_the_base_lacks():
    layer = memory()
    hidden, lesson = torch.randn(4, WIDTH), torch.randn(4, WIDTH)
    _, changes = step(layer, hidden, lesson)
    torch.testing.assert_close(
        torch.as_tensor(changes.inserts[0].values), lesson - layer.base(hidden)
    )
    with torch.no_grad():
        layer.log_sharpness.fill_(8.0)
    torch.testing.assert_close(
        layer(hidden), lesson, atol=1e-4, rtol=1e-4
    )  # at a stored key it says what was taught


def test_nothing_written_in_a_step_is_seen_in_it():
    """Token t + 1, and the other sequence, may be anything: what was said up to t is the same to the last bit."""
    layer = memory()
    step(layer, torch.randn(2, 6, WIDTH), torch.randn(2, 6, WIDTH))
    hidden, lesson = torch.randn(2, 6, WIDTH), torch.randn(2, 6, WIDTH)
    other, taught = hidden.clone(), lesson.clone()
    other[0, 4:], taught[0, 4:] = torch.randn(2, WIDTH), torch.randn(2, WIDTH)
    layer.writing = True
    said = []
    for states, answer in ((hidden, lesson), (other, taught)):
        said.append(layer(states))
        layer.set_targets(answer)
        layer._pending_writes, layer._pending_reads = [], []
    assert torch.equal(said[0][0, :4], said[1][0, :4])
    assert torch.equal(said[0][1], said[1][1])
    assert not torch.equal(said[0][0, 4:], said[1][0, 4:])


def test_rows_of_a_step_are_seen_in_the_next():
    layer = memory("teacher")
    hidden, lesson = torch.randn(3, WIDTH), torch.randn(3, WIDTH)
    said, _ = step(layer, hidden, lesson)
    assert not said.any()
    assert layer(hidden).norm() > 0


def test_the_query_receives_the_gradient_of_the_returned_keys():
    layer = memory()
    step(layer, torch.randn(9, WIDTH), torch.randn(9, WIDTH))
    layer._recent_hidden = None
    hidden = torch.randn(1, WIDTH)
    queries = F.normalize(layer.query(hidden), dim=-1).detach().requires_grad_()
    found = layer.rows.search(queries, layer.k)
    keys = layer.rows.keys[found.places].clone().requires_grad_()
    values = layer.rows.values[found.places]
    scores = torch.cat(
        [torch.einsum("nd,nkd->nk", queries, keys), layer.null_logit.expand(1, 1)], 1
    )
    wanted = torch.einsum(
        "nk,nkw->nw", (scores * layer.log_sharpness.exp()).softmax(-1)[:, :-1], values
    ).sum()
    of_query, of_keys = torch.autograd.grad(wanted, (queries, keys))
    expected = torch.autograd.grad(
        F.normalize(layer.query(hidden), dim=-1), layer.query.weight, of_query + of_keys.sum(1)
    )[0]
    (layer(hidden) - layer.base(hidden)).sum().backward()
    torch.testing.assert_close(layer.query.weight.grad, expected)


@pytest.mark.parametrize("writes", ["projection", "teacher"])
def test_an_inserted_key_and_value_learn_from_what_they_came_back_as(writes):
    layer = memory(writes)
    layer(torch.randn(3, WIDTH)).sum()
    step(layer, torch.randn(9, WIDTH), torch.randn(9, WIDTH))
    layer(torch.randn(4, WIDTH)).square().sum().backward()
    assert layer.key.weight.grad.abs().sum() > 0
    if writes == "projection":
        assert layer.value.weight.grad.abs().sum() > 0
    else:
        assert layer.value is None
    layer.zero_grad()
    layer._recent_ids += 1_000  # rows that are not on the tape
    layer(torch.randn(4, WIDTH)).square().sum().backward()
    assert not layer.key.weight.grad.any()


def test_what_comes_back_is_credited_to_what_it_was_made_from(monkeypatch):
    """As long as no weight has moved, what is made anew from the tape is what is stored, row by row."""
    layer = memory("projection", k=4)
    for number in (1, 2):
        step(layer, torch.randn(9, WIDTH), number=number)
    seen = []
    monkeypatch.setattr(
        associative,
        "straight_through_rows",
        lambda *given: seen.append(given) or straight_through_rows(*given),
    )
    layer(torch.randn(6, WIDTH))
    _, kept_keys, kept_values, keys, values, origin = seen[0]
    assert (origin >= 0).all()
    torch.testing.assert_close(kept_keys[origin], keys)
    torch.testing.assert_close(kept_values[origin], values)


def test_where_nothing_near_is_stored_the_base_is_heard():
    layer = memory()
    near = torch.randn(1, WIDTH)
    step(layer, near, torch.full((1, WIDTH), 9.0))
    with torch.no_grad():
        layer.log_sharpness.fill_(5.0)
    torch.testing.assert_close(layer(-near), layer.base(-near), atol=1e-5, rtol=1e-5)


def test_reading_alone_changes_nothing_and_counts_nothing():
    layer = memory()
    step(layer, torch.randn(9, WIDTH), torch.randn(9, WIDTH))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer(torch.randn(4, WIDTH))
    assert not layer.commit_step(2, 8.0, layer.take).inserts
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())
    assert layer.rows.pop_usage() is None


def test_reads_while_writing_are_counted():
    layer = memory()
    step(layer, torch.randn(9, WIDTH), torch.randn(9, WIDTH))
    step(layer, torch.randn(5, WIDTH), torch.randn(5, WIDTH), number=2)
    assert layer.rows.pop_usage().reads.sum() == 5 * 3


def test_novelty_keeps_out_what_is_known():
    layer = memory(policy=InsertPolicy(0.05, 0.0, 1_000, 0.1))
    hidden = torch.randn(5, WIDTH)
    step(layer, hidden, hidden)
    step(layer, hidden * 3, hidden, number=2)  # the same direction
    assert len(layer.rows) == 5


def test_a_saved_memory_with_as_many_places_is_the_same():
    layer = memory()
    step(layer, torch.randn(9, WIDTH), torch.randn(9, WIDTH))
    again = memory(places=layer.rows.allocated_rows)
    again.load_state_dict(layer.state_dict())
    hidden = torch.randn(4, WIDTH)
    assert torch.equal(layer(hidden), again(hidden))
    assert len(again.rows) == 9


def test_centring_takes_out_what_all_have_in_common():
    layer = memory()
    hidden = torch.randn(50, WIDTH) + 10
    layer.center(hidden)
    torch.testing.assert_close(layer.query(hidden).mean(0), torch.zeros(WIDTH), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"k": 0}, "at least 1"),
        ({"value_target": "dreams"}, "one of"),
        ({"value_target": "residual", "on": False}, "base"),
    ],
)
def test_it_refuses_what_makes_no_sense(arguments, word):
    arguments = {"k": 1, "value_target": "teacher", **arguments}
    with pytest.raises(ValueError, match=word):
        AssociativeMemory(WIDTH, arguments["k"], None, arguments["writes"], EVERYTHING)


@pytest.mark.parametrize("writes", ["residual", "teacher"])
def test_reading_weighs_rows_by_what_they_would_have_said(writes):
    """Rows that foresee what the next text lacks are heard; rows about something else are not."""
    layer = memory(writes, on=base())
    states = F.normalize(torch.randn(40, WIDTH), dim=-1)
    lacks = torch.randn(WIDTH, WIDTH)

    def taught(hidden, wanted):
        layer.writing = True
        with torch.no_grad():
            layer(hidden)
        layer.set_targets(wanted)
        layer.calibrate_null_logit()
        layer.commit_step(1, 7.0, layer.take)
        layer.writing = False
        return layer.null_logit.item()

    assert taught(states, layer.base(states) + states @ lacks) > 1  # nothing has been judged yet
    again = states + 0.01 * torch.randn(40, WIDTH)
    assert taught(again, layer.base(again) + again @ lacks) < 1
    for _ in range(20):
        noise = torch.randn(40, WIDTH)
        doubt = taught(noise, layer.base(noise) + 3 * torch.randn(40, WIDTH))
    assert doubt == pytest.approx(max(associative.NULL_LOGIT_CANDIDATES))


def test_a_lesson_is_asked_for():
    layer = memory()
    layer.writing = True
    layer(torch.randn(2, WIDTH))
    with pytest.raises(ValueError, match="call `teach`"):
        layer.commit_step(1, 7.0, layer.take)
    with pytest.raises(ValueError, match="after a pass"):
        layer.set_targets(torch.randn(2, WIDTH))


def _one_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    layer = memory("projection", policy=InsertPolicy(0.05, 0.2, 25, 0.1))
    for number in range(1, 4):
        torch.manual_seed(10 * number + rank)
        layer.tag = f"rank {rank}"
        step(layer, torch.randn(3 + 8 * rank, WIDTH), number=number)  # as many as the other has not
    known = layer.rows.stats
    words = all_gather_strings([[""], ["a", "b\nc"]][rank])
    assert words == ["", "a", "b\nc"], words
    found = {
        "ids": layer.rows.ids,
        "keys": layer.rows.keys,
        "values": layer.rows.values,
        "tape": layer.recent_hidden()[0],
    }
    torch.save(
        found | {"heat": torch.tensor(known.heat), "tags": known.tags}, f"{folder}/{rank}.pt"
    )
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_end_with_the_same_rows(tmp_path):
    torch.multiprocessing.spawn(_one_of_two, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["tags"] == second["tags"]
    assert {tag for tags in first["tags"] for tag in tags.split("\n")} == {"", "rank 0", "rank 1"}
    for name in ("ids", "keys", "values", "tape", "heat"):
        assert torch.equal(first[name], second[name]), name
    assert int((first["ids"] >= 0).sum()) == 25
