"""What a layer costs: measured from its operations, compared with counts by hand."""

import numpy as np
import pytest
import torch
from conftest import LAYERS, SLOTS, WIDTH, make_llama
from torch import nn
from transformers import AutoModelForCausalLM

import dmt
from dmt import ops
from dmt.config import (
    AssociativeConfig,
    ExpertsConfig,
    FeaturalConfig,
    LowRankConfig,
    NgramConfig,
    NoMemoryConfig,
    PeerConfig,
    ProductKeyConfig,
    PrunedConfig,
    SumConfig,
    TokenConfig,
    TranscoderConfig,
)
from dmt.evaluation.cost import MemoryCost, measure_cost, measure_costs, sum_costs
from dmt.memory import AssociativeMemory, FeaturalMemory, InsertPolicy
from dmt.memory.search_reads import observe_searches, search_index
from dmt.memory.sparsity_budget import initialize_threshold
from dmt.models.conversion import convert_blocks
from dmt.models.memories import get_featural_memories, get_memories

F32 = 4  # bytes
K = 8


def make_memory(teacher, config):
    block_inputs = [torch.randn(30, WIDTH)] * LAYERS
    student, _ = convert_blocks(teacher, [config] * LAYERS, block_inputs)
    return get_memories(student.eval())[0]


def check(cost, floats, rows, multiply_adds):
    """Compare with the numbers of floats, rows and products that were counted by hand."""
    assert dict(cost.read_bytes) == {"float32": floats * F32}
    assert cost.read_bytes_per_token == floats * F32
    assert cost.reads_per_token == rows
    assert cost.multiply_adds == multiply_adds


@pytest.fixture
def hidden():
    return torch.randn(2, 5, WIDTH)


BIASES_AND_SCORES = SLOTS * WIDTH + SLOTS  # keys and their biases


@pytest.mark.parametrize(
    ("config", "floats", "rows", "multiply_adds"),
    [
        (  # all keys; the norm of each value, by which slots are ranked; k values; a bias
            FeaturalConfig(k=K, skip_connection=False),
            BIASES_AND_SCORES + SLOTS + K * WIDTH + WIDTH,
            K,
            SLOTS * WIDTH + K * WIDTH,
        ),
        (  # beside them a mean for each slot; the bias has the sum of all means
            FeaturalConfig(k=K, skip_connection=False, selection="centered"),
            BIASES_AND_SCORES + 2 * SLOTS + K * WIDTH + WIDTH,
            K,
            SLOTS * WIDTH + K * WIDTH,
        ),
        (  # two projections and a skip connection; ranked by score
            FeaturalConfig(k=K, projections=True, activation="softmax", selection="score"),
            BIASES_AND_SCORES + 3 * WIDTH**2 + K * WIDTH + WIDTH,
            K,
            SLOTS * WIDTH + 3 * WIDTH**2 + K * WIDTH,
        ),
        (  # the encoder, and k rows of the decoder
            TranscoderConfig(k=K, skip_connection=False),
            BIASES_AND_SCORES + K * WIDTH + WIDTH,
            K,
            SLOTS * WIDTH + K * WIDTH,
        ),
        (  # a router of a row for each of 16 experts; keys, biases and values of those read
            ExpertsConfig(expert_size=4, k=K),
            SLOTS // 4 * (WIDTH + 1) + K * (2 * WIDTH + 1) + WIDTH,
            K,
            SLOTS // 4 * WIDTH + 2 * K * WIDTH,
        ),
        (  # a query of 6 numbers; two tables of 8 sub-keys; k neurons; a factor of the gates
            PeerConfig(k=K, heads=1, key_width=6),
            6 * (WIDTH + 1) + 2 * 8 * 3 + 1 + K * (2 * WIDTH + 1) + WIDTH,
            K,
            6 * WIDTH + 2 * 8 * 3 + 2 * K * WIDTH,
        ),
        (  # as in peer, with a factor of the cosines; k values, and the gate with its two matrices
            ProductKeyConfig(k=K, heads=1, key_width=6, silu_gate=True),
            6 * (WIDTH + 1) + 2 * 8 * 3 + 1 + K * WIDTH + 2 * WIDTH**2 + 2 * WIDTH,
            K,
            6 * WIDTH + 2 * 8 * 3 + K * WIDTH + 2 * WIDTH**2,
        ),
        (PrunedConfig(num_slots=K), K * (2 * WIDTH + 1) + WIDTH, None, 2 * K * WIDTH),
        (LowRankConfig(rank=3), 2 * 3 * WIDTH + WIDTH, None, 2 * 3 * WIDTH),
        (NoMemoryConfig(), WIDTH, None, 0),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_kinds_are_counted_by_hand(teacher, hidden, config, floats, rows, multiply_adds):
    memory = make_memory(teacher, config)
    cost = measure_cost(memory, hidden)
    check(cost, floats, rows, multiply_adds)
    numbers = [*memory.parameters(), *memory.buffers()]
    assert cost.parameters == sum(p.numel() for p in memory.parameters())
    derived = SLOTS * (config.kind == "featural" and config.selection != "score")
    derived += WIDTH * (config.kind == "featural" and config.selection == "centered")
    assert cost.ram_bytes == F32 * (sum(tensor.numel() for tensor in numbers) + derived)
    assert cost.disk_bytes == 0


@pytest.mark.parametrize(
    ("config", "floats", "rows", "multiply_adds"),
    [
        (TokenConfig(), 2 * WIDTH, 1, 0),  # a row and the bias
        (  # for one and for two tokens: two halves of a row; the bias
            NgramConfig(order=2, num_rows=50),
            2 * WIDTH + WIDTH,
            2,
            0,
        ),
        (  # and the weights and the bias of the gate
            NgramConfig(order=2, num_rows=50, context_gate=True),
            2 * (WIDTH + WIDTH + 1) + WIDTH,
            2,
            0,
        ),
        (
            SumConfig(parts=[TokenConfig(), PrunedConfig(num_slots=K)]),
            2 * WIDTH + K * (2 * WIDTH + 1) + WIDTH,
            1,
            2 * K * WIDTH,
        ),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_lookups_by_token_are_counted(teacher, tokens, config, floats, rows, multiply_adds):
    student, _ = convert_blocks(teacher, [config] * LAYERS, [torch.randn(30, WIDTH)] * LAYERS)
    for cost in measure_costs(student.eval(), tokens[0]).values():
        check(cost, floats, rows, multiply_adds)


class RowAttention(dmt.MemoryLayer):
    """A memory of one's own, which says nothing of its cost."""

    def __init__(self):
        super().__init__()
        self.keys = nn.Parameter(torch.randn(5, WIDTH))
        self.values = nn.Parameter(torch.randn(5, WIDTH))

    def forward(self, hidden):
        return (hidden @ self.keys.T).softmax(-1) @ self.values


def test_a_memory_of_your_own_is_counted(hidden):
    cost = measure_cost(RowAttention(), hidden)
    check(cost, 2 * 5 * WIDTH, None, 2 * 5 * WIDTH)
    assert (cost.parameters, cost.ram_bytes) == (2 * 5 * WIDTH, 2 * 5 * WIDTH * F32)


def test_gated_blocks_read_gains_too(hidden):
    memory = make_memory(make_llama(), ExpertsConfig(expert_size=4, k=K))
    check(
        measure_cost(memory, hidden),
        SLOTS // 4 * (WIDTH + 1) + K * (3 * WIDTH + 2) + WIDTH,
        K,
        SLOTS // 4 * WIDTH + 3 * K * WIDTH,
    )


def test_the_dense_block_is_measured_the_same_way(teacher, tokens):
    costs = measure_costs(teacher, tokens[0])
    assert list(costs) == list(range(LAYERS))
    for cost in costs.values():
        check(cost, 2 * SLOTS * WIDTH + SLOTS + WIDTH, None, 2 * SLOTS * WIDTH)
        assert cost.ram_bytes == cost.read_bytes_per_token


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="no oneDNN")
def test_onednn_multiplies_as_much_as_torch(teacher, hidden, monkeypatch):
    costs = []
    for library in ("torch", "onednn"):
        monkeypatch.setattr(ops, "gemm_library", library)
        monkeypatch.setattr(ops, "ONEDNN_MIN_OPERATIONS", 0)
        costs.append(measure_cost(make_memory(teacher, FeaturalConfig(k=K)), hidden))
    assert costs[0] == costs[1]


def test_codes_of_8_bits_are_what_a_search_reads(teacher, hidden):
    cost = measure_cost(
        make_memory(teacher, FeaturalConfig(k=K, search="int8", skip_connection=False)), hidden
    )
    # Of the keys themselves only those of the slots read.
    floats = SLOTS + K * WIDTH + SLOTS + SLOTS + K * WIDTH + WIDTH  # scales, keys, biases, norms
    assert dict(cost.read_bytes) == {"float32": floats * F32, "int8": SLOTS * WIDTH}
    assert cost.multiply_adds == SLOTS * WIDTH + 2 * K * WIDTH
    derived = F32 * 2 * SLOTS + SLOTS * WIDTH  # scales, norms and codes
    assert cost.ram_bytes == F32 * (cost.parameters + WIDTH**2) + derived  # and the metric


def test_reads_that_differ_between_tokens_are_averaged(teacher, tokens):
    config = FeaturalConfig(k="auto", mean_k=K, skip_connection=False)
    student, _ = convert_blocks(teacher, [config] * LAYERS)
    memories = get_featural_memories(student.eval())
    states = torch.randn(LAYERS, 20, WIDTH)
    initialize_threshold(memories.values(), states)
    for memory, hidden in zip(memories.values(), states, strict=True):
        reads = memory.select_slots(hidden).sum(-1).float()
        assert reads.std() > 0
        assert measure_cost(memory, hidden).reads_per_token == pytest.approx(float(reads.mean()))


def test_stored_rows_count_as_they_are_now(hidden):
    memory = AssociativeMemory(
        WIDTH, k=K, insert_policy=InsertPolicy(min_distance=0, merge_distance=0)
    ).eval()
    empty = measure_cost(memory, hidden)
    assert empty.reads_per_token is None
    with memory.writes_enabled(), torch.no_grad():
        memory(torch.randn(1, 40, WIDTH))
    memory.commit_step()
    cost, positions = measure_cost(memory, hidden), memory.rows.allocated_rows
    # The query, the output, the null logit and the sharpness; for each position a key and half its
    # squared norm; of the rows read, which are k, keys again and values.
    floats = WIDTH**2 + WIDTH + WIDTH**2 + 2 + positions * (WIDTH + 1) + K * WIDTH
    check(cost, floats, K, 2 * WIDTH**2 + positions * WIDTH + 2 * K * WIDTH)
    assert cost.ram_bytes - empty.ram_bytes == positions * (2 * WIDTH * F32 + 8 + F32)
    with memory.writes_enabled(), torch.no_grad():
        memory(torch.randn(1, 1_100, WIDTH))
    memory.commit_step()
    assert measure_cost(memory, hidden).read_bytes_per_token > cost.read_bytes_per_token


@pytest.mark.parametrize("kind", ["flat", "inverted", "8 bits"])
def test_a_search_by_faiss_says_what_it_reads(kind):
    import faiss

    vectors = np.random.default_rng(0).standard_normal((500, 16), dtype=np.float32)
    if kind == "flat":
        index = faiss.IndexIDMap2(faiss.IndexFlatL2(16))
        index.add_with_ids(vectors, np.arange(500))
        expected = {"float32": 500 * 16 * F32}
    else:
        quantizer = faiss.IndexFlatL2(16)
        index = (
            faiss.IndexIVFFlat(quantizer, 16, 10)
            if kind == "inverted"
            else faiss.IndexIVFScalarQuantizer(
                quantizer, 16, 10, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_L2
            )
        )
        index.train(vectors)
        index.add(vectors)
        index.nprobe = 3
        _, cells = quantizer.search(vectors[:1], 3)
        num_compared = sum(index.invlists.list_size(int(cell)) for cell in cells[0])
        assert 0 < num_compared < 500
        expected = {"float32": 10 * 16 * F32, "uint8": num_compared * 16}
        if kind == "inverted":
            expected = {"float32": (10 + num_compared) * 16 * F32}
    reads = []
    with observe_searches(reads.append):
        ids = search_index(index, vectors[:1], 4)
    assert ids.tolist() == index.search(vectors[:1], 4)[1].tolist()
    assert [search.read_bytes for search in reads] == [expected]
    assert reads[0].index_bytes > 0
    search_index(index, vectors[:1], 4)
    assert len(reads) == 1, "outside of the block nothing is counted"


def test_a_search_by_an_index_counts(hidden):
    memory = FeaturalMemory(WIDTH, 512, K, search="ivf").eval()
    cost = measure_cost(memory, hidden)
    assert 0 < cost.read_bytes["uint8"] < 512 * WIDTH
    exact = FeaturalMemory(WIDTH, 512, K).eval()
    exact.load_state_dict(memory.state_dict())
    assert cost.read_bytes_per_token < measure_cost(exact, hidden).read_bytes_per_token
    assert cost.ram_bytes > measure_cost(exact, hidden).ram_bytes


@pytest.mark.parametrize("offload", ["values", "slots"])
def test_what_stays_in_a_file_counts_as_disk(teacher, tokens, tmp_path, offload):
    search = "int8" if offload == "slots" else "exact"
    changes = {"k": K, "search": search, "skip_connection": False}
    student, _ = convert_blocks(teacher, [FeaturalConfig(offload=offload, **changes)] * LAYERS)
    in_ram = measure_costs(student.eval(), tokens[0])[0]
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    cost = measure_costs(loaded, tokens[0])[0]
    num_tables = 1 if offload == "values" else 2
    metric = F32 * WIDTH**2  # it stays in the file, and only the norms are read
    assert cost.disk_bytes == num_tables * F32 * SLOTS * WIDTH + metric
    assert cost.ram_bytes == in_ram.ram_bytes - cost.disk_bytes
    assert (cost.parameters, cost.read_bytes) == (in_ram.parameters, in_ram.read_bytes)


class Lookup(nn.Module):
    """Reads rows of a table in several ways."""

    def __init__(self, read):
        super().__init__()
        self.table = nn.Parameter(torch.randn(10, WIDTH))
        self.read = read

    def forward(self, hidden):
        return hidden + self.read(self.table).sum()


@pytest.mark.parametrize(
    ("read", "floats", "rows"),
    [
        (lambda table: table[torch.tensor([3, 5])], 2 * WIDTH, 2),
        (lambda table: table[torch.tensor([3, 5])] + table[torch.tensor([5, 3])], 2 * WIDTH, 2),
        (lambda table: table[torch.tensor([3, 3])] + table[torch.tensor([4, 5])], 3 * WIDTH, 3),
        (lambda table: table.index_select(1, torch.tensor([0])), 10, None),
        (lambda table: table.gather(0, torch.tensor([[1, 2]])), 2, 2),
        (lambda table: table[torch.arange(10) < 4], 4 * WIDTH, 4),
        (lambda table: nn.functional.embedding(torch.tensor([[7, 7]]), table), WIDTH, 1),
        (lambda table: table[2] + table[2:4].expand(3, 2, -1).sum(0), 2 * WIDTH, None),
        (lambda table: table[torch.tensor([3])] + table.sum(0), 10 * WIDTH, 1),
        (lambda table: torch.zeros_like(table) + table.new_ones(WIDTH), 0, None),
        (lambda table: torch.from_numpy(np.ones(4)) + torch.tensor([1.0]), 0, None),
    ],
)
def test_each_element_counts_once_for_a_token(hidden, read, floats, rows):
    cost = measure_cost(Lookup(read), hidden)
    assert cost.read_bytes_per_token == floats * F32
    assert cost.reads_per_token == rows


def test_nothing_changes_by_measuring(teacher, tokens):
    student, _ = convert_blocks(
        teacher, [FeaturalConfig(k=K), FeaturalConfig(k=K), AssociativeConfig(k=K)]
    )
    student.train()
    memories = get_memories(student)
    state = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    random_state = torch.get_rng_state()
    with memories[0].recording_usage() as usage, memories[2].writes_enabled():
        expected = measure_costs(student, tokens[0])
    assert usage.tokens == 0
    memories[2].commit_step()
    assert len(memories[2].rows) == 0
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(state[name], value) for name, value in student.state_dict().items())
    assert all(module.training for module in student.modules())
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in memories.values())
    assert measure_costs(student, tokens[0]) == expected


def test_a_text_of_two_tokens_is_enough(teacher, tokens):
    expected = measure_costs(teacher, tokens[0])
    assert measure_costs(teacher, tokens[0, :2]) == expected


def test_costs_add_up():
    first = MemoryCost(1, 2, 3, {"float32": 4.0, "int8": 1.0}, None, 5.0)
    second = MemoryCost(10, 20, 30, {"float32": 40.0}, 6.0, 50.0)
    total = sum_costs([first, second])
    assert total == MemoryCost(11, 22, 33, {"float32": 44.0, "int8": 1.0}, 6.0, 55.0)
    assert total.to_dict()["read_bytes_per_token"] == 45
    assert sum_costs([]).read_bytes_per_token == 0
