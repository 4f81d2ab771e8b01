"""Approximate search: weights are exact, recall is measured, all code paths agree."""

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
from dmt.models.conversion import convert_blocks
from dmt.models.memories import get_featural_memories

assert dmt
VARIANTS = [(*kind, {}) for kind in KINDS if kind[1] != "centered"] + [
    ("block", "contribution", BUDGETED),
    ("relu", "contribution", {"metric": "fisher"}),
]


@pytest.fixture(params=[True, False], ids=["always", "by size"])
def candidates(request, monkeypatch):
    """Search for candidates always, or only where it is faster."""
    monkeypatch.setattr(featural, "CANDIDATES_PER_READ", {"int8": 1, "ivf": 16})
    assert K * 16 > SLOTS  # all slots of the small memories are candidates
    if request.param:
        monkeypatch.setattr(featural, "MAX_EXACT_SLOTS", 0)
    return request.param


@pytest.mark.parametrize("search", INDEX_BUILDERS)
@pytest.mark.parametrize("tokens", [1, 2, 17])
@pytest.mark.parametrize(
    ("projections", "skip_connection"), [(False, False), (False, True), (True, True)]
)
@pytest.mark.parametrize(("activation", "selection", "changes"), VARIANTS)
def test_all_slots_as_candidates_equal_the_definition(
    candidates, activation, selection, changes, projections, skip_connection, tokens, search
):
    memory = make(activation, selection, 1, projections, skip_connection, search=search, **changes)
    hidden = torch.randn(tokens, WIDTH, dtype=torch.double, requires_grad=True)
    expected = torch.stack([reference_output(memory, token) for token in hidden])
    output = memory(hidden)
    torch.testing.assert_close(output, expected)
    with torch.no_grad():
        torch.testing.assert_close(memory(hidden), expected)
    assert memory.measure_recall(hidden.detach()) == 1
    direction = torch.randn_like(output)
    leaves = {"hidden": hidden, **dict(memory.named_parameters())}
    grads, expected_grads = (
        torch.autograd.grad(
            (values * direction).sum(),
            list(leaves.values()),
            allow_unused=True,
            materialize_grads=True,
        )
        for values in (output, expected)
    )
    for name, grad, expected_grad in zip(leaves, grads, expected_grads, strict=True):
        torch.testing.assert_close(
            grad, expected_grad, msg=lambda text, name=name: f"{name}: {text}"
        )


SEARCHES = [
    (search, changes) for search in ("int8", "ivf") for changes in ({}, {"k_mode": "threshold"})
]
# An index has one key per slot and needs weights that grow with its score.
SEARCHES += [("int8", {"gated": True}), ("int8", {"selection": "centered"})]


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("search", "changes"), SEARCHES)
def test_weights_of_candidates_are_exact(candidates, search, changes, tokens, grad):
    memory = make_large(search, **changes)
    hidden = torch.randn(tokens, 32)
    with torch.set_grad_enabled(grad):
        output = memory(hidden)
        mask = memory.select_slots(hidden)
        weights = memory.compute_weights(hidden, memory.compute_scores(hidden))
        expected = (weights * mask) @ memory.values + memory.constant_output()
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    assert mask.any()
    if memory.k_mode == "top":
        assert (mask.sum(-1) <= memory.k).all()


@pytest.mark.parametrize(("search", "changes"), SEARCHES)
def test_a_token_reads_the_same_slots_alone_as_in_its_text(search, changes):
    memory, hidden = make_large(search, **changes), torch.randn(40, 32)
    mask = memory.select_slots(hidden)
    with torch.no_grad():
        single_masks = torch.cat([memory.select_slots(token) for token in hidden.split(1)])
        outputs = torch.cat([memory(token) for token in hidden.split(1)])
    assert torch.equal(mask, single_masks)
    torch.testing.assert_close(outputs, memory(hidden), rtol=1e-4, atol=1e-4)
    # An exact search would differ, so this is about the search.
    assert memory.measure_recall(hidden) < 1


def test_training_selects_by_exact_ranks():
    memory, hidden = make_large("int8").train(), torch.randn(40, 32)
    assert torch.equal(
        memory.select_slots(hidden), memory._select_mask(memory.compute_ranks(hidden))
    )


def make_large(search, num_slots=2048, **changes):
    memory = FeaturalMemory(32, num_slots, 16, search=search, **changes).eval()
    with torch.no_grad():
        memory.key_bias.normal_(std=0.1)
        memory.values.normal_()
        if memory.threshold is not None:
            memory.threshold.fill_(10.0)
    return memory


def test_8_bit_search_has_a_recall_near_one():
    for changes in (
        {},
        {"k_mode": "threshold"},
        {"gated": True},
        {"selection": "centered"},
        {"activation": "softmax", "selection": "score"},
    ):
        memory = make_large("int8", **changes)
        hidden = torch.randn(64, 32)
        assert 0.97 < memory.measure_recall(hidden) <= 1
        assert memory.measure_recall(hidden) < 1 or memory.activation_fn is None


@pytest.mark.parametrize("kind", INDEX_BUILDERS)
def test_an_index_of_clusters_finds_most_slots_among_few_candidates(kind):
    centers = torch.randn(64, 32) * 2
    memory = make_large(kind, num_slots=4096, activation="relu")
    with torch.no_grad():
        memory.keys.copy_(centers.repeat_interleave(64, 0) + 0.3 * torch.randn(4096, 32))
        memory.key_bias.zero_()
    hidden = centers[:20] + 0.3 * torch.randn(20, 32)
    assert memory.measure_recall(hidden) > 0.7
    ids, is_final = memory._find_candidates(hidden)
    assert not is_final
    assert ids.shape == (20, featural.CANDIDATES_PER_READ[kind] * memory.k)
    assert all(len(set(row.tolist()) - {-1}) == (row >= 0).sum() for row in ids)


def test_recall_is_measured():
    memory, hidden = make_large("ivf"), torch.randn(50, 32)
    assert memory.measure_recall(hidden) > 0.5
    memory._tensor_cache._entries["index"] = (
        memory._tensor_cache._entries["index"][0],
        lambda queries, count: torch.zeros(len(queries), count, dtype=torch.long) - 1,
    )
    assert memory.measure_recall(hidden) == 0
    assert make_large("exact").measure_recall(hidden) == 1


def test_reads_are_counted_equally_on_every_path(candidates):
    for search in ("int8", "ivf"):
        for changes in ({}, {"k_mode": "threshold"}):
            memory = make_large(search, **changes)
            for tokens in (1, 5, 40):
                hidden = torch.randn(tokens, 32)
                with memory.recording_usage() as usage, torch.no_grad():
                    memory(hidden)
                assert torch.equal(usage.reads, memory.select_slots(hidden).sum(0))
                assert usage.tokens == tokens


@pytest.mark.parametrize("search", ["int8", "ivf"])
def test_reading_in_chunks_changes_nothing(monkeypatch, search):
    monkeypatch.setattr(featural, "MAX_EXACT_SLOTS", 0)
    memory, hidden = make_large(search), torch.randn(33, 32)
    with torch.no_grad():
        expected = memory(hidden)
        chunk_sizes, search_candidates = [], memory._search_candidates
        monkeypatch.setattr(featural, "MAX_GATHERED_VALUES", 5_000)
        monkeypatch.setattr(
            memory,
            "_search_candidates",
            lambda chunk: chunk_sizes.append(len(chunk)) or search_candidates(chunk),
        )
        torch.testing.assert_close(memory(hidden), expected)
    assert sum(chunk_sizes) == 33
    assert max(chunk_sizes) <= 9
    if search == "int8":
        assert max(chunk_sizes) == 2  # their scores of all 2,048 slots count


@pytest.mark.parametrize("kind", INDEX_BUILDERS)
def test_missing_candidates_are_marked(kind):
    vectors = torch.randn(300, 8)
    search = INDEX_BUILDERS[kind](vectors.__getitem__, 300)
    ids = search(torch.randn(5, 8), 400)
    assert ids.shape == (5, 400)
    assert ((ids >= -1) & (ids < 300)).all()
    assert (ids == -1).any(1).all()
    assert all(len(set(row[row >= 0].tolist())) == (row >= 0).sum() for row in ids)


def test_searching_more_cells_raises_recall():
    vectors, queries = torch.randn(4096, 16), torch.randn(40, 16)
    best = (queries @ vectors.t()).topk(8).indices
    recalls = []
    for num_probes in (1, 16, 256):
        ids = build_ivf_search(vectors.__getitem__, 4096, num_probes)(queries, 8)
        recalls.append((ids.unsqueeze(-1) == best.unsqueeze(-2)).any(-1).float().mean().item())
    assert recalls[0] < recalls[1] < recalls[2]
    assert recalls[2] > 0.95  # all cells: only the rounding to 8 bits is left


def test_a_search_does_not_change_the_number_of_threads():
    # faiss and torch may share one OpenMP runtime, and with it this number.
    search = build_ivf_search(torch.randn(300, 16).__getitem__, 300)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for queries in (1, 50):
            search(torch.randn(queries, 16), 4)
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_8_bit_products_are_within_their_rounding():
    weight, hidden = torch.randn(100, 64), torch.randn(7, 64)
    hidden[3] = 0
    codes = Int8Matrix(weight)
    assert codes.rows.dtype == torch.int8
    exact = hidden @ weight.t()
    # Half a step of either side, times the other.
    bound = weight.abs().amax(-1) / 254 * hidden.abs().sum(-1, keepdim=True) + hidden.abs().amax(
        -1, keepdim=True
    ) / 254 * (weight.abs().sum(-1) + 64 * weight.abs().amax(-1) / 254)
    assert ((codes(hidden) - exact).abs() <= bound + 1e-5).all()
    assert (codes(hidden)[3] == 0).all()
    assert torch.equal(Int8Matrix(torch.zeros(3, 4))(torch.ones(1, 4)), torch.zeros(1, 3))


def test_an_index_is_reused_while_training_and_rebuilt_after(monkeypatch):
    memory = make_large("ivf").train()
    hidden, build, builds = torch.randn(3, 32), INDEX_BUILDERS["ivf"], []
    with torch.no_grad():
        before = memory.select_slots(hidden)
        memory.keys.copy_(memory.keys.flip(0))
        monkeypatch.setitem(INDEX_BUILDERS, "ivf", lambda *args: builds.append(1) or build(*args))
        memory.select_slots(hidden)
        assert not builds
        memory.eval()
        after = memory.select_slots(hidden)
        assert builds == [1]
    assert not torch.equal(before, after)


def test_a_cache_rebuilds_only_every_few_changes_with_patience():
    cache, source, builds = TensorCache(), torch.zeros(1), []
    for _ in range(7):
        cache("x", lambda *_: builds.append(1), (source,), patience=3)
        source.add_(1)
    assert len(builds) == 3  # at the first, fourth and seventh call
    cache("x", lambda *_: builds.append(1), (source,))
    assert len(builds) == 4


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
def test_unsupported_searches_are_rejected(changes):
    with pytest.raises(ValueError, match="search"):
        FeaturalMemory(8, 16, 4, **changes)


def test_gated_blocks_reject_an_index_with_one_key_per_slot():
    with pytest.raises(UserError, match="searches one key per slot"):
        convert_blocks(make_llama(), [FeaturalConfig(search="ivf")] * 3)


@pytest.mark.parametrize("search", ["int8", "ivf"])
@pytest.mark.parametrize("k", ["auto", 8])
def test_a_saved_student_searches_the_same(tmp_path, search, k):
    student, _ = convert_blocks(make_teacher(), [FeaturalConfig(search=search, k=k)] * 3)
    with torch.no_grad():
        for memory in get_featural_memories(student).values():
            if memory.threshold is not None:
                memory.threshold.fill_(0.3)
    tokens = torch.randint(0, 300, (1, 12))
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert all(memory.search == search for memory in get_featural_memories(loaded).values())
    with torch.no_grad():
        assert torch.equal(student(tokens).logits, loaded(tokens).logits)
    generated = [
        model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0)
        for model in (student, loaded)
    ]
    assert torch.equal(*generated)


def test_all_slots_equal_the_teacher_with_any_search():
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
    ("overrides", "message"),
    [
        (
            ["memory.search=ivf", "memory.heads=2", "memory.k=32", "memory.projections=true"],
            "searches for one head",
        ),
        (
            ["memory.search=int8", "memory.gradient=straight_through"],
            "does not score all of them",
        ),
        (
            ["memory.search=ivf", "memory.selection=centered"],
            "finds large weights, not unusual ones",
        ),
    ],
)
def test_searches_that_contradict_other_settings_are_rejected(overrides, message):
    with pytest.raises(UserError, match=message):
        config_io.load_config(None, overrides)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_int8_products_are_as_close_in_half_precision(dtype):
    hidden, weight = torch.randn(200, 128).to(dtype), torch.randn(64, 128)
    expected = hidden.float() @ weight.t()
    error = Int8Matrix(weight)(hidden).float() - expected
    assert error.norm() < 0.012 * expected.norm()
