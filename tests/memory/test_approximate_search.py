"""Slots found by candidates: what is read is right, what is missed is said, and every path gives what the definition gives."""

import pytest
import torch
from conftest import make_llama, make_teacher
from reference import reference_output
from test_featural import BUDGETED, KINDS, SLOTS, WIDTH, K, make
from transformers import AutoModelForCausalLM

import dmt
from dmt import config_io
from dmt.config import FeaturalConfig
from dmt.errors import UserError
from dmt.memory import FeaturalMemory, featural
from dmt.memory.approximate_search import INDEX_BUILDERS, Int8Matrix, build_ivf_search
from dmt.memory.slot_table import TensorCache
from dmt.models.conversion import convert_blocks, get_featural_memories

assert dmt
WAYS = [(*kind, {}) for kind in KINDS if kind[1] != "centered"] + [
    ("block", "contribution", BUDGETED),
    ("relu", "contribution", {"metric": "fisher"}),
]


@pytest.fixture(params=[True, False], ids=["always", "by size"])
def always(request, monkeypatch):
    """Candidates wherever possible, gradients or not; or where sizes say so."""
    monkeypatch.setattr(featural, "CANDIDATES_PER_READ", {"int8": 1, "ivf": 16})
    assert K * 16 > SLOTS  # all slots of the small memories are candidates
    if request.param:
        monkeypatch.setattr(featural, "MAX_EXACT_SLOTS", 0)
    return request.param


@pytest.mark.parametrize("search", INDEX_BUILDERS)
@pytest.mark.parametrize("tokens", [1, 2, 17])
@pytest.mark.parametrize(
    ("projections", "linear_map"), [(False, False), (False, True), (True, True)]
)
@pytest.mark.parametrize(("weighting", "ranking", "changes"), WAYS)
def test_where_candidates_are_all_slots_the_answer_is_the_definition(
    always, weighting, ranking, changes, projections, linear_map, tokens, search
):
    memory = make(weighting, ranking, 1, projections, linear_map, search=search, **changes)
    hidden = torch.randn(tokens, WIDTH, dtype=torch.double, requires_grad=True)
    wanted = torch.stack([reference_output(memory, token) for token in hidden])
    said = memory(hidden)
    torch.testing.assert_close(said, wanted)
    with torch.no_grad():
        torch.testing.assert_close(memory(hidden), wanted)
    assert memory.measure_recall(hidden.detach()) == 1
    direction = torch.randn_like(said)
    leaves = [hidden, *memory.parameters()]
    mine = torch.autograd.grad(
        (said * direction).sum(), leaves, allow_unused=True, materialize_grads=True
    )
    theirs = torch.autograd.grad(
        (wanted * direction).sum(), leaves, allow_unused=True, materialize_grads=True
    )
    for leaf, one, other in zip(
        ["hidden", *dict(memory.named_parameters())], mine, theirs, strict=True
    ):
        torch.testing.assert_close(one, other, msg=lambda text, leaf=leaf: f"{leaf}: {text}")


FOUND = [
    (search, changes)
    for search in ("int8", "ivf")
    for changes in ({}, {"k_mode": "threshold"})
]
FOUND += [
    ("int8", {"gated": True}),
    ("int8", {"selection": "centered"}),
]  # an index knows one key, and weights that grow with it


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("search", "changes"), FOUND)
def test_what_is_found_is_weighed_exactly(always, search, changes, tokens, grad):
    memory = many(search, **changes)
    hidden = torch.randn(tokens, 32)
    with torch.set_grad_enabled(grad):
        said = memory(hidden)
        # with gradients it is the number of slots alone that decides
        chosen = (
            memory.select_slots(hidden)
            if memory._uses_candidates(tokens)
            else memory._select_mask(memory.compute_ranks(hidden))
        )
        weights = memory.compute_weights(hidden, memory.compute_scores(hidden))
        wanted = (weights * chosen) @ memory.values + memory.constant_output()
    torch.testing.assert_close(said, wanted, rtol=1e-4, atol=1e-4)
    assert chosen.any()
    if memory.k_mode == "top":
        assert (chosen.sum(-1) <= memory.k).all()


def many(search, slots=2048, width=32, k=16, **changes):
    memory = FeaturalMemory(
        width, slots, k, search=search, **({"skip_connection": False} | changes)
    ).eval()
    with torch.no_grad():
        memory.key_bias.normal_(std=0.1)
        memory.values.normal_()
        if memory.threshold is not None:
            memory.threshold.fill_(10.0)
    return memory


def test_eight_bits_miss_next_to_nothing():
    for changes in (
        {},
        {"k_mode": "threshold"},
        {"gated": True},
        {"selection": "centered"},
        {"activation": "softmax", "selection": "score"},
    ):
        memory = many("int8", **changes)
        hidden = torch.randn(64, 32)
        assert 0.97 < memory.measure_recall(hidden) <= 1
        assert memory.measure_recall(hidden) < 1 or memory.activation_fn is None


@pytest.mark.parametrize("kind", INDEX_BUILDERS)
def test_an_index_of_clusters_finds_most_and_looks_at_few(kind):
    centres = torch.randn(64, 32) * 2
    keys = centres.repeat_interleave(64, 0) + 0.3 * torch.randn(4096, 32)
    memory = many(kind, slots=4096, weighting="relu")
    with torch.no_grad():
        memory.keys.copy_(keys)
        memory.key_bias.zero_()
    hidden = centres[:20] + 0.3 * torch.randn(20, 32)
    assert memory.measure_recall(hidden) > 0.7
    ids, final = memory._find_candidates(hidden)
    assert not final
    assert ids.shape == (20, featural.CANDIDATES_PER_READ[kind] * memory.k)
    assert all(len(set(row.tolist()) - {-1}) == (row >= 0).sum() for row in ids)


def test_a_poor_search_is_told_from_a_good_one():
    memory, hidden = many("ivf"), torch.randn(50, 32)
    memory._tensor_cache(
        "index",
        lambda *_: lambda queries, count: torch.zeros(len(queries), count, dtype=torch.long) - 1,
        (memory.keys,),
    )
    assert (
        memory.measure_recall(hidden) < 0.8
    )  # of random keys; the search of the memory itself, made from all three sources
    exact = many("exact")
    assert exact.recall(hidden) == 1


def test_reads_are_counted_alike_on_every_path(always):
    for search in ("int8", "ivf"):
        for changes in ({}, {"k_mode": "threshold"}):
            memory = many(search, **changes)
            for tokens in (1, 5, 40):
                hidden = torch.randn(tokens, 32)
                memory.count_reads()
                with torch.no_grad():
                    memory(hidden)
                assert torch.equal(memory.read_counts, memory.select_slots(hidden).sum(0))
                assert memory.counted_tokens == tokens


@pytest.mark.parametrize("search", ["int8", "ivf"])
def test_few_tokens_at_once_say_what_many_do(monkeypatch, search):
    monkeypatch.setattr(featural, "MAX_EXACT_SLOTS", 0)
    memory, hidden = many(search), torch.randn(33, 32)
    with torch.no_grad():
        wanted = memory(hidden)
        parts, inner = [], memory._search_candidates
        monkeypatch.setattr(featural, "MAX_GATHERED_VALUES", 5_000)
        monkeypatch.setattr(memory, "_found", lambda part: parts.append(len(part)) or inner(part))
        torch.testing.assert_close(memory(hidden), wanted)
    assert sum(parts) == 33
    assert max(parts) <= 9
    if search == "int8":
        assert max(parts) == 2  # their scores of all 2,048 slots count


@pytest.mark.parametrize("kind", INDEX_BUILDERS)
def test_fewer_found_than_wanted_are_marked(kind):
    vectors = torch.randn(300, 8)
    find = INDEX_BUILDERS[kind](vectors.__getitem__, 300)
    ids = find(torch.randn(5, 8), 400)
    assert ids.shape == (5, 400)
    assert ((ids >= -1) & (ids < 300)).all()
    assert (ids == -1).any(1).all()
    assert all(len(set(row[row >= 0].tolist())) == (row >= 0).sum() for row in ids)


def test_more_cells_looked_into_find_more():
    vectors, queries = torch.randn(4096, 16), torch.randn(40, 16)
    best = (queries @ vectors.t()).topk(8).indices
    shares = []
    for probes in (1, 16, 256):
        found = build_ivf_search(vectors.__getitem__, 4096, probes)(queries, 8)
        shares.append((found.unsqueeze(-1) == best.unsqueeze(-2)).any(-1).float().mean().item())
    assert shares[0] < shares[1] < shares[2]
    assert shares[2] > 0.95  # all cells: what is left is the rounding to 8 bits


def test_a_search_leaves_the_number_of_threads_alone():
    # faiss and torch may share one OpenMP runtime: what one sets, the other computes with
    find = build_ivf_search(torch.randn(300, 16).__getitem__, 300)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for queries in (1, 50):
            find(torch.randn(queries, 16), 4)
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_codes_are_within_their_rounding():
    weight, hidden = torch.randn(100, 64), torch.randn(7, 64)
    hidden[3] = 0
    codes = Int8Matrix(weight)
    assert codes.rows.dtype == torch.int8
    exact = hidden @ weight.t()
    # half a step of either side, times the other
    bound = weight.abs().amax(-1) / 254 * hidden.abs().sum(-1, keepdim=True) + hidden.abs().amax(
        -1, keepdim=True
    ) / 254 * (weight.abs().sum(-1) + 64 * weight.abs().amax(-1) / 254)
    assert ((codes(hidden) - exact).abs() <= bound + 1e-5).all()
    assert (codes(hidden)[3] == 0).all()
    assert torch.equal(Int8Matrix(torch.zeros(3, 4))(torch.ones(1, 4)), torch.zeros(1, 3))


def test_an_index_is_kept_while_training_and_made_anew_after():
    memory = many("ivf").train()
    hidden = torch.randn(3, 32)
    with torch.no_grad():
        before = memory.select_slots(hidden)
        memory.keys.copy_(memory.keys.flip(0))
        made = []
        kept = dict(INDEX_BUILDERS)
        try:
            INDEX_BUILDERS["ivf"] = lambda *given: made.append(1) or kept["ivf"](*given)
            memory.select_slots(hidden)
            assert not made
            memory.eval()
            after = memory.select_slots(hidden)
            assert made == [1]
        finally:
            INDEX_BUILDERS.update(kept)
    assert not torch.equal(before, after)


def test_patience_counts_changes():
    derived, source, made = TensorCache(), torch.zeros(1), []
    for _ in range(7):
        derived("x", lambda *_: made.append(1), (source,), patience=3)
        source.add_(1)
    assert len(made) == 3  # at the first, the fourth and the seventh
    derived("x", lambda *_: made.append(1), (source,))
    assert len(made) == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"search": "ivf", "selection": "centered"},
        {"search": "ivf", "gated": True},
        {"search": "int8", "heads": 2},
        {"search": "hnsw"},
    ],
    ids=str,
)
def test_what_a_search_cannot_do_is_refused(changes):
    with pytest.raises(ValueError, match="search"):
        FeaturalMemory(8, 16, 4, **changes)


def test_gated_blocks_refuse_an_index_of_one_key():
    with pytest.raises(UserError, match="knows one key for each slot"):
        convert_blocks(make_llama(), [FeaturalConfig(search="ivf")] * 3)


@pytest.mark.parametrize("search", ["int8", "ivf"])
@pytest.mark.parametrize("k", ["auto", 8])
def test_a_saved_student_finds_what_it_found(tmp_path, search, k):
    student, _ = convert_blocks(make_teacher(), [FeaturalConfig(search=search, k=k)] * 3)
    with torch.no_grad():
        for memory in get_featural_memories(student).values():
            if memory.threshold is not None:
                memory.threshold.fill_(0.3)
    tokens = torch.randint(0, 300, (1, 12))
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert all(memory.search == search for memory in get_featural_memories(again).values())
    with torch.no_grad():
        assert torch.equal(student(tokens).logits, again(tokens).logits)
    said = [
        model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0)
        for model in (student, again)
    ]
    assert torch.equal(*said)


def test_k_of_all_slots_is_the_teacher_whatever_the_search():
    teacher = make_teacher()
    tokens = torch.randint(0, 300, (1, 12))
    for search in ("int8", "ivf"):
        student, _ = convert_blocks(teacher, [FeaturalConfig(search=search, k=64)] * 3)
        with torch.no_grad():
            torch.testing.assert_close(
                student(tokens).logits, teacher(tokens).logits, rtol=1e-4, atol=1e-4
            )
            torch.testing.assert_close(
                student(tokens[:, :1]).logits, teacher(tokens[:, :1]).logits, rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["memory.search=ivf", "memory.heads=2", "memory.k=32", "memory.projections=true"],
            "finds slots for one head",
        ),
        (
            ["memory.search=int8", "memory.gradient=straight_through"],
            "does not look at all of them",
        ),
        (
            ["memory.search=ivf", "memory.selection=centered"],
            "finds large weights, not unusual ones",
        ),
    ],
)
def test_a_search_that_could_not_serve_is_refused(words, said):
    with pytest.raises(UserError, match=said):
        config_io.load_config(None, words)
