"""Tables of rows for the last tokens of a text."""

import math

import pytest
import torch
from conftest import LAYERS, WIDTH, make_teacher
from reference import assert_equal_gradients
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import dmt
from dmt.errors import UserError
from dmt.memory import NgramMemory, ngram
from dmt.memory.ngram import SHRINKAGE, hash_contexts
from dmt.memory.token_context import list_contexts, use_contexts
from dmt.memory.usage import record_usage
from dmt.models.calibration import set_lookup_rows
from dmt.models.forward import forward_teacher
from dmt.models.memories import get_memories, get_slot_memories
from dmt.testing import check_memory

VOCAB_SIZE = 11


def make(order=3, num_rows=13, hash_heads=2, context_gate=True):
    torch.manual_seed(0)
    memory = NgramMemory(
        WIDTH,
        VOCAB_SIZE,
        order=order,
        num_rows=num_rows,
        hash_heads=hash_heads,
        context_gate=context_gate,
        learn_rows=True,
    ).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.normal_()
    return memory


@pytest.mark.parametrize(("order", "num_rows", "heads"), [(1, 64, 1), (2, 97, 2), (3, 40, 4)])
def test_it_passes_every_check(order, num_rows, heads):
    check_memory(
        NgramMemory,
        dmt.NgramConfig(order=order, num_rows=num_rows, hash_heads=heads, context_gate=heads > 1),
    )


def read_slowly(memory, hidden, texts):
    """Compute the output token by token."""
    outputs, part = [], WIDTH // memory.hash_heads
    for states, text in zip(hidden, texts.tolist(), strict=True):
        for position, state in enumerate(states):
            output = memory.output_bias.clone()
            for length in range(1, memory.order + 1):
                ngram = text[max(0, position - length + 1) : position + 1]
                if len(ngram) < length or not all(0 <= token < VOCAB_SIZE for token in ngram):
                    continue
                table = memory.get_table(length).rows.view(memory.hash_heads, -1, part)
                if length == 1 and table.shape[1] == VOCAB_SIZE:
                    ids = ngram * memory.hash_heads
                else:
                    factors = memory.get_factors(length)
                    ids = hash_contexts(torch.tensor(ngram), factors, table.shape[1]).tolist()
                row = torch.cat([table[head, index] for head, index in enumerate(ids)])
                gate = 1.0
                if memory.gate_weight is not None:
                    unit_state = state / (state.square().mean() + 1e-6).sqrt()
                    unit_row = row / (row.square().mean() + 1e-6).sqrt()
                    score = (unit_state * unit_row) @ memory.gate_weight[length - 1]
                    score = score / math.sqrt(WIDTH) + memory.gate_bias[length - 1]
                    gate = 2 / (1 + (-score).exp())
                output = output + gate * row
            outputs.append(output)
    return torch.stack(outputs).view_as(hidden)


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("num_rows", [13, 5])  # with a row for each token, and without
def test_value_and_gradient_are_those_of_one_read_after_the_other(gate, num_rows):
    memory = make(num_rows=num_rows, context_gate=gate)
    texts = torch.tensor([[3, 0, 10, 3, 0, 10], [3, -1, 12, 4, 4, 4]])
    hidden = torch.randn(2, 6, WIDTH, dtype=torch.double, requires_grad=True)
    with use_contexts(list_contexts(texts, 3)):
        output = memory(hidden)
    expected = read_slowly(memory, hidden, texts)
    assert torch.allclose(output, expected)
    tensors = [*memory.parameters(), *([hidden] if gate else [])]
    assert_equal_gradients(output, expected, tensors)


def test_what_a_trace_shows_adds_up_to_the_output():
    memory = make()
    contexts = list_contexts(torch.tensor([[3, 0, 10, 3]]), 3)
    hidden = torch.randn(4, WIDTH, dtype=torch.double)
    with use_contexts(contexts[0]):
        ids, weights, values = memory.select(hidden)
        output = memory(hidden)
    total = (weights.unsqueeze(-1) * values).sum(1) + memory.output_bias
    assert torch.allclose(total, output)
    assert len(ids[3].unique()) == 6, "each length and head has ids of its own"
    assert (weights[0, 2:] == 0).all(), "the first token has no longer n-grams"


def test_calibration_explains_text_by_its_ngrams_the_shortest_first():
    memory = make(order=2, num_rows=1009, hash_heads=1)
    texts = torch.randint(VOCAB_SIZE, (4, 500))
    contexts = list_contexts(texts, 2).flatten(0, 1)
    by_token = torch.randn(VOCAB_SIZE, WIDTH).double()
    by_pair = torch.randn(VOCAB_SIZE + 1, VOCAB_SIZE, WIDTH).double()
    target = by_token[contexts[:, 1]] + by_pair[contexts[:, 0], contexts[:, 1]]
    with use_contexts(contexts), torch.no_grad():
        memory.calibrate(torch.zeros_like(target), target)
        error = target - memory(torch.zeros_like(target))
    mean = target.mean(0)
    is_token = contexts[:, 1] == 4
    expected = (target - mean)[is_token].sum(0) / (int(is_token.sum()) + SHRINKAGE)
    torch.testing.assert_close(memory.get_table(1).rows[4], expected)
    assert float(error.var() / target.var()) < 0.1, "about sixteen tokens of each pair"


def test_a_long_text_sets_the_rows_that_calibration_would(tokens):
    """In one pass over batches of any size, from the inputs of the teacher's blocks."""
    teacher, config = make_teacher(), dmt.NgramConfig(num_rows=64)
    expected = dmt.convert(teacher, config, layers=[0], calibration=tokens)
    for batch_size in (1, 2, 3):
        student = dmt.convert(teacher, config, layers=[0], calibration=tokens)
        memory = get_memories(student)[0]
        for table in memory.tables:
            table.rows.data.zero_()
        set_lookup_rows(student, teacher, tokens, batch_size)
        for table, expected_table in zip(
            memory.tables, get_memories(expected)[0].tables, strict=True
        ):
            torch.testing.assert_close(table.rows, expected_table.rows, rtol=1e-4, atol=1e-5)


def test_a_long_text_is_read_beside_what_stands_before(tokens):
    """Rows of a sum are set to what its slots lack, and their reads are not counted."""
    teacher = make_teacher()
    parts = [dmt.FeaturalConfig(k=2), dmt.NgramConfig(num_rows=4_096)]
    student = dmt.convert(teacher, dmt.SumConfig(parts=parts), calibration=tokens)
    text = torch.randint(1, 300, (30, 20))
    outputs = forward_teacher(teacher, text, capture_blocks=True)

    def measure_error():
        with use_contexts(list_contexts(text, 3)), torch.no_grad():
            output = get_memories(student)[0](outputs.block_inputs[0])
        return float((output - outputs.block_outputs[0]).square().sum())

    before = measure_error()
    with record_usage(get_slot_memories(student)) as usage:
        set_lookup_rows(student, teacher, text)
    assert not any(counts.tokens for counts in usage.values())
    assert measure_error() < 0.9 * before


def test_rows_have_a_gradient_only_where_they_learn():
    learning = make()
    assert all(table.rows.requires_grad for table in learning.tables)
    config = dmt.NgramConfig(num_rows=64, learn_rows=False, context_gate=True)
    fixed = get_memories(dmt.convert(make_teacher(), config))[0]
    assert not any(table.rows.requires_grad for table in fixed.tables)
    assert fixed.gate_weight.requires_grad


def test_addresses_are_the_same_in_every_process():
    """Saved tables would be worthless if an address moved."""
    memory = make(num_rows=10_007)
    ids = hash_contexts(torch.tensor([[1, 2, 3], [3, 2, 1]]), memory.get_factors(3), 10_007)
    assert ids.tolist() == [[5181, 2527], [774, 87]]


def test_addresses_are_even_and_heads_differ():
    memory = make(order=2, num_rows=1_000)
    pairs = torch.cartesian_prod(torch.arange(200), torch.arange(200))
    ids = hash_contexts(pairs, memory.get_factors(2), 1_000)
    for head in range(2):
        counts = ids[:, head].bincount(minlength=1_000)
        assert abs(float(counts.double().var()) / 40 - 1) < 0.2, "as by chance: a Poisson variance"
    share_first = ids[:, 0] == ids[0, 0]
    assert float((ids[share_first, 1] == ids[0, 1]).float().mean()) < 0.2


def test_addresses_are_computed_once_for_all_layers(tokens, monkeypatch):
    student = dmt.convert(make_teacher(), dmt.NgramConfig(num_rows=64), calibration=tokens).eval()
    calls = []

    def count(contexts, factors, num_rows):
        calls.append(contexts.shape)
        return hash_contexts(contexts, factors, num_rows)

    monkeypatch.setattr(ngram, "hash_contexts", count)
    student(tokens)
    assert len(calls) == 3, "one for each length"
    student(tokens.flip(1))
    assert len(calls) == 6, "another text has other addresses"


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=f"hash_heads must divide {WIDTH}, the width"):
        dmt.convert(make_teacher(), dmt.NgramConfig(hash_heads=WIDTH - 1))
    with pytest.raises(UserError, match="hash_heads must divide"):
        make(hash_heads=WIDTH - 1)


def test_what_is_read_follows_the_text_through_a_cache(tokens):
    student = dmt.convert(make_teacher(), dmt.NgramConfig(num_rows=64), calibration=tokens).eval()
    assert get_memories(student)[0].context_length == 3
    with torch.no_grad():
        expected = student(tokens).logits
        first = student(tokens[:, :5], use_cache=True)
        rest = student(tokens[:, 5:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], 1), expected)


@pytest.mark.parametrize("learn_rows", [False, True])
@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_a_loaded_student_learns_rows_only_if_it_did(tokens, tmp_path, auto_class, learn_rows):
    config = dmt.NgramConfig(num_rows=16, learn_rows=learn_rows)
    dmt.convert(make_teacher(), config, calibration=tokens).save_pretrained(tmp_path)
    student = auto_class.from_pretrained(tmp_path)
    frozen = [name for name, value in student.named_parameters() if not value.requires_grad]
    assert all("tables" in name for name in frozen)
    assert len(frozen) == (0 if learn_rows else LAYERS * config.order)
