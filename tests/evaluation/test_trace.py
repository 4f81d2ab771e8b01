"""Opened memories: what is told of a read is what the forward pass did, and a value pushes what the model makes of it."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import LAYERS, POSITIONS, SENTENCES, SLOTS, WIDTH, make_llama, make_teacher
from rich.console import Console

from dmt.config import AssociativeConfig, DenseConfig, FeaturalConfig
from dmt.distillation.row_sync import propose_rows as write
from dmt.errors import UserError
from dmt.evaluation.trace import (
    Activation,
    TokenTrace,
    format_table,
    logit_lens,
    to_json,
    trace_activations,
)
from dmt.memory.slot_table import ACTIVATIONS
from dmt.models.architectures import get_architecture
from dmt.models.conversion import convert, get_associative_memories, get_featural_memories
from dmt.models.forward import forward_with_activations

EVERYTHING = 10**6
VARIANTS = {
    "number": FeaturalConfig(k=8),
    "auto": FeaturalConfig(),
    "centered": FeaturalConfig(selection="centered"),
    "relu": FeaturalConfig(k=8, activation="relu", selection="score"),
    "softmax": FeaturalConfig(k=8, activation="softmax", selection="score"),
    "distance": FeaturalConfig(
        k=8, activation="distance", selection="score", heads=2, projections=True
    ),
    "projections": FeaturalConfig(k=8, heads=2, projections=True, selection="centered"),
    "rows": AssociativeConfig(k=8, min_distance=0.0, merge_distance=0.0, knn_k=5),
    "rows and projections": AssociativeConfig(
        projections=True, min_distance=0.0, merge_distance=0.0
    ),
    "whole answers": AssociativeConfig(
        k=8, value_target="teacher", min_distance=0.0, merge_distance=0.0
    ),
    "rows alone": AssociativeConfig(
        base="none",
        value_target="teacher",
        min_distance=0.0,
        merge_distance=0.0,
    ),
}
TEXT = SENTENCES[0][:30]


def stirred(teacher, tokens, memories):
    """A student with nothing left at zero or one, and rows where it has room for some."""
    student, _ = convert(teacher, memories)
    with torch.no_grad():
        for layer, memory in get_featural_memories(student).items():
            for parameter in memory.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            if memory.threshold is not None:
                memory.threshold.fill_(0.2 + 0.1 * layer)
            if memory.means is not None:
                memory.means.copy_(torch.randn_like(memory.means))
            if memory.metric is not None:
                memory.metric.add_(torch.randn_like(memory.metric))
        for memory in get_associative_memories(student).values():
            memory.output.weight.add_(0.3 * torch.randn_like(memory.output.weight))
            memory.query.weight.add_(0.1 * torch.randn_like(memory.query.weight))
    for memory in get_associative_memories(student).values():
        memory.tag = "a book"
    given = itertools.count(1_000)
    if get_associative_memories(student):
        write(student, teacher, tokens)
        for memory in get_associative_memories(student).values():
            memory.commit_step(
                1, 7.0, lambda count: np.array([next(given) for _ in range(count)], np.int64)
            )
            memory.null_logit.data.fill_(0.9)
            memory.log_sharpness.data.fill_(1.5)  # so that rows and base are heard alike
    return student.eval()


@pytest.fixture(params=VARIANTS)
def student(request, any_teacher, tokens):
    memory = VARIANTS[request.param]
    if memory.activation in ("softmax", "distance") and any_teacher.config.model_type == "llama":
        memory = replace(memory, activation="relu")  # those know no gains
    return stirred(any_teacher, tokens, [memory, DenseConfig(), memory])


@pytest.fixture
def plain(any_teacher):
    """A student of eight slots a token and a dense block in the middle."""
    student, _ = convert(any_teacher, [FeaturalConfig(k=8), DenseConfig(), FeaturalConfig(k=8)])
    return student


def as_ids(tokenizer, text):
    return [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]


def by_layer(told, layer, kind):
    """`(position, read)` of all tokens."""
    return [
        (each.position, one)
        for each in told
        for one in each.reads
        if (one.layer, one.kind) == (layer, kind)
    ]


def value_of(block, one):
    """The value a read names, as it reaches the stream."""
    if one.kind == "row":
        return block.rows.values[block.rows.index_by_id[one.number]] @ block.output.weight.t()
    slots = getattr(block, "base", block)
    return (
        slots.values[one.number]
        if slots.output is None
        else slots.output @ slots.values[one.number]
    )


def always_of(slots, hidden):
    said = (
        slots.constant_output() if slots.output is None else slots.output @ slots.constant_output()
    )
    return said.expand_as(hidden) + hidden @ slots.skip_connection.t()


@torch.no_grad()
def test_what_is_told_adds_up_to_what_the_layer_said(student, tokenizer):
    """Of each layer and token: all weights times all values, and what is said whatever is read, are the block's output."""
    seen = forward_with_activations(
        student, torch.tensor([as_ids(tokenizer, TEXT)]), capture_blocks=True
    )
    told = trace_activations(student, tokenizer, TEXT, top_reads=EVERYTHING, top_tokens=0)
    blocks = get_architecture(student.config.model_type).blocks(student)
    assert {one.layer for each in told for one in each.activations} == {0, 2}
    for layer in (0, 2):
        hidden, block = seen.block_inputs[layer][0], blocks[layer]
        said, of_rows = torch.zeros_like(hidden), torch.zeros(len(hidden), 1)
        for position, one in [*by_layer(told, layer, "slot"), *by_layer(told, layer, "row")]:
            said[position] += one.weight * value_of(block, one)
            of_rows[position] += one.weight if one.kind == "row" else 0
        slots = get_featural_memories(student).get(layer)
        beside = torch.zeros_like(hidden) if slots is None else always_of(slots, hidden)
        if layer in get_associative_memories(student):
            assert of_rows[1:].min() > 0
            assert 0.1 < of_rows[1:].mean() < 0.95
            if block.value_target == "teacher":
                beside = beside * (1 - of_rows)
        torch.testing.assert_close(
            (said + beside)[1:], seen.block_outputs[layer][0, 1:], atol=2e-4, rtol=1e-4
        )


@torch.no_grad()
def test_each_slot_is_told_with_its_own_weight(student, tokenizer):
    """By definition, slot by slot, where no weight depends on another."""
    seen = forward_with_activations(
        student, torch.tensor([as_ids(tokenizer, TEXT)]), capture_blocks=True
    )
    told = trace_activations(student, tokenizer, TEXT, top_reads=EVERYTHING, top_tokens=0)
    for layer, slots in get_featural_memories(student).items():
        hidden = seen.block_inputs[layer][0]
        block, of_rows = get_associative_memories(student).get(layer), [0.0] * len(hidden)
        if block is not None and block.value_target == "teacher":
            for position, one in by_layer(told, layer, "row"):
                of_rows[position] += one.weight
        mask = slots.select_slots(hidden)
        found = by_layer(told, layer, "slot")
        assert [
            len([1 for at, _ in found if at == position]) for position in range(1, len(hidden))
        ] == mask[1:].sum(-1).tolist()
        assert all(mask[position, one.number] for position, one in found)
        if slots.activation == "block":
            for position, one in found[:200]:
                query, slot = hidden[position], one.number
                if slots.query is not None:
                    query = slots.query[slot * slots.heads // slots.num_slots] @ query
                activation = ACTIVATIONS["silu" if slots.gains is not None else "gelu_new"]
                weight = activation(query @ slots.keys[slot] + slots.key_bias[slot])
                if slots.gains is not None:
                    weight = weight * (hidden[position] @ slots.gains[slot] + slots.gain_bias[slot])
                weight = weight - (0 if slots.means is None else slots.means[slot])
                assert one.weight == pytest.approx(
                    float(weight) * (1 - of_rows[position]), abs=1e-5, rel=1e-4
                )
            if slots.gains is not None or slots.means is not None:
                assert min(one.weight for _, one in found) < 0 < max(one.weight for _, one in found)
            if slots.k_mode == "threshold":
                assert len({int(row.sum()) for row in mask}) > 1


@torch.no_grad()
@pytest.mark.parametrize("family", [make_teacher, make_llama])
def test_each_row_is_told_with_its_own_weight(family, tokens, tokenizer):
    """A softmax over the nearest rows and the base; what they say is what the memory adds to its base."""
    student = stirred(
        family(len(tokenizer)), tokens, [FeaturalConfig(k=8), VARIANTS["rows"], VARIANTS["rows"]]
    )
    seen = forward_with_activations(
        student, torch.tensor([as_ids(tokenizer, TEXT)]), capture_blocks=True
    )
    told = trace_activations(student, tokenizer, TEXT, top_reads=EVERYTHING)
    assert not by_layer(told, 0, "row")
    for layer, memory in get_associative_memories(student).items():
        hidden = seen.block_inputs[layer][0]
        cosines = torch.nn.functional.normalize(memory.query(hidden), dim=-1) @ memory.rows.keys.t()
        nearest = cosines.masked_fill(memory.rows.ids < 0, -torch.inf).topk(5)
        beside = (
            torch.cat([nearest.values, memory.null_logit.expand(len(hidden), 1)], 1)
            * memory.log_sharpness.exp()
        )
        weights = beside.softmax(-1)[:, :-1]
        found, added = (
            by_layer(told, layer, "row"),
            seen.block_outputs[layer][0] - memory.base(hidden),
        )
        for position in range(1, len(hidden)):
            mine = {one.number: one.weight for at, one in found if at == position}
            numbers = memory.rows.ids[nearest.indices[position]].tolist()
            assert mine == pytest.approx(
                dict(zip(numbers, weights[position].tolist(), strict=True)), rel=1e-3, abs=1e-6
            )
            assert min(mine) >= 1_000, "the number of a row is not its place"
            said = sum(
                weight * value_of(memory, Activation(0, "row", number, 0, 0, "", ()))
                for number, weight in mine.items()
            )
            torch.testing.assert_close(said, added[position], atol=1e-4, rtol=1e-3)
        assert {one.tag for _, one in found} == {"a book"}
        assert {one.tag for _, one in by_layer(told, layer, "slot")} == {""}


def test_a_row_brings_the_tag_of_its_own(any_teacher, tokens, tokenizer):
    student = stirred(any_teacher, tokens, [VARIANTS["rows"]] * LAYERS)
    for memory in get_associative_memories(student).values():
        for number, place in memory.rows.index_by_id.items():
            memory.rows.stats.tags[place] = f"page {number}"
    told = trace_activations(student, tokenizer, TEXT, top_reads=EVERYTHING, top_tokens=0)
    rows = [one for each in told for one in each.activations if one.kind == "row"]
    assert len(rows) == LAYERS * 5 * (len(told) - 1)
    assert all(one.tag == f"page {one.index}" for one in rows)


def test_a_memory_without_rows_reads_slots_alone(any_teacher, tokenizer):
    student, _ = convert(any_teacher, [VARIANTS["rows"], VARIANTS["rows alone"], VARIANTS["rows"]])
    told = trace_activations(student, tokenizer, TEXT)
    assert {(one.layer, one.kind) for each in told for one in each.activations} == {
        (0, "slot"),
        (2, "slot"),
    }


@torch.no_grad()
def test_shares_are_of_everything_and_the_longest_contribution_comes_first(student, tokenizer):
    whole, told = (
        trace_activations(student, tokenizer, TEXT, top_reads=EVERYTHING, top_tokens=0),
        trace_activations(student, tokenizer, TEXT, top_reads=3, top_tokens=0),
    )
    blocks = get_architecture(student.config.model_type).blocks(student)
    mixed = set()
    for each, few in zip(whole[1:], told[1:], strict=True):
        assert [one.layer for one in each.activations] == sorted(
            one.layer for one in each.activations
        )
        for layer in (0, 2):
            mine = [one for one in each.activations if one.layer == layer]
            lengths = [abs(one.weight) * float(value_of(blocks[layer], one).norm()) for one in mine]
            assert lengths == sorted(lengths, reverse=True)
            assert [one.share for one in mine] == pytest.approx(
                [length / sum(lengths) for length in lengths], abs=1e-5
            )
            assert [one for one in few.activations if one.layer == layer] == mine[:3]
            mixed.add(tuple(dict.fromkeys(one.kind for one in mine)))
    if get_associative_memories(student) and get_featural_memories(student):
        assert {"slot", "row"} == {kind for kinds in mixed for kind in kinds}


def test_tokens_positions_and_what_comes_next(plain, tokenizer):
    told = trace_activations(plain, tokenizer, TEXT)
    ids = as_ids(tokenizer, TEXT)
    assert [each.position for each in told] == list(range(len(ids)))
    assert [each.token for each in told] == [tokenizer.decode([number]) for number in ids]
    assert any(each.token.startswith(" ") for each in told)
    assert "".join(each.token for each in told[1:]) == TEXT
    with torch.no_grad():
        chances = plain(torch.tensor([ids])).logits[0].softmax(-1).topk(5)
    for each, wanted, which in zip(
        told, chances.values.tolist(), chances.indices.tolist(), strict=True
    ):
        assert [word for word, _ in each.next_tokens] == [
            tokenizer.decode([number]) for number in which
        ]
        assert [chance for _, chance in each.next_tokens] == pytest.approx(wanted, rel=1e-3)
    assert told[0].activations == ()
    assert all(len(each.activations) == 10 for each in told[1:])  # five of each of two memories


def test_who_has_no_start_token_leaves_nothing_out(plain, tokenizer):
    class Startless:
        eos_token_id, decode = None, tokenizer.decode

        def __len__(self):
            return len(tokenizer)

        def __call__(self, *given, **how):
            return tokenizer(*given, **how)

    told = trace_activations(plain, Startless(), TEXT)
    assert [each.token for each in told] == [
        each.token for each in trace_activations(plain, tokenizer, TEXT)
    ][1:]
    assert (told[0].position, len(told[0].activations)) == (0, 10)


def test_only_the_layers_asked_for_and_none_where_the_block_is_dense(plain, any_teacher, tokenizer):
    whole = trace_activations(plain, tokenizer, TEXT)
    for layers in ([2], [1], [1, 0, 0], []):
        told = trace_activations(plain, tokenizer, TEXT, layers=layers)
        assert [each.next_tokens for each in told] == [each.next_tokens for each in whole]
        assert [each.activations for each in told] == [
            tuple(one for one in each.activations if one.layer in layers) for each in whole
        ]
    assert not any(each.activations for each in trace_activations(any_teacher, tokenizer, TEXT))


def test_looking_changes_nothing_and_sees_no_training(student, tokenizer):
    told = trace_activations(student, tokenizer, TEXT)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    for memory in get_featural_memories(student).values():
        memory.k_multiplier = 3.0
    student.train()
    assert trace_activations(student, tokenizer, TEXT) == told
    assert student.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert not any(block._forward_hooks for block in student.modules())
    assert all(parameter.grad is None for parameter in student.parameters())


@torch.no_grad()
def test_a_value_pushes_what_the_model_makes_of_it(any_teacher, tokenizer):
    """A value without a mean, alone in the stream, comes out of norm and head as its lens, times one positive number."""
    backbone = any_teacher.get_submodule(get_architecture(any_teacher.config.model_type).backbone)
    norm = backbone.ln_f if hasattr(backbone, "ln_f") else backbone.norm
    values = torch.randn(300, WIDTH)  # more than one chunk
    values -= values.mean(-1, keepdim=True)
    told = logit_lens(any_teacher, tokenizer, values, count=7)
    logits = any_teacher.get_output_embeddings()(norm(values) - norm(torch.zeros(WIDTH)))
    made = logits - logits.mean(-1, keepdim=True)
    for pairs, wanted in zip(told, made, strict=True):
        best = wanted.topk(7)
        assert [word for word, _ in pairs] == [
            tokenizer.decode([number]) for number in best.indices
        ]
        ratios = torch.tensor([score for _, score in pairs]) / best.values
        torch.testing.assert_close(ratios, ratios[0].expand(7), rtol=1e-3, atol=0)
    doubled, turned = (
        logit_lens(any_teacher, tokenizer, values[:1] * 2)[0],
        logit_lens(any_teacher, tokenizer, -values[:1])[0],
    )
    assert [score for _, score in doubled] == pytest.approx([2 * score for _, score in told[0][:5]])
    assert not {word for word, _ in turned} & {word for word, _ in told[0]} - {
        "\ufffd"
    }  # which many bytes look like


@torch.no_grad()
def test_what_moves_all_tokens_alike_pushes_none(any_teacher, tokenizer):
    head = any_teacher.get_output_embeddings().weight
    head[:, 0], head[7, 3] = 2.0, 50.0
    any_teacher.get_submodule(get_architecture(any_teacher.config.model_type).norm).weight.fill_(
        1.0
    )
    alike, one = torch.eye(WIDTH)[[0, 3]]
    assert logit_lens(any_teacher, tokenizer, alike[None]) == [[]]
    ((word, score), *_) = logit_lens(any_teacher, tokenizer, (one + alike)[None])[0]
    assert word == tokenizer.decode([7])
    assert score == pytest.approx(50 - float(head[:, 3].mean()), rel=1e-4)
    assert logit_lens(any_teacher, tokenizer, one[None], count=0) == [[]]
    assert len(logit_lens(any_teacher, tokenizer, one[None], count=EVERYTHING)[0]) < len(
        tokenizer
    )  # half go down


@torch.no_grad()
def test_rows_of_the_head_that_no_token_has_are_left_out(tokenizer):
    model = make_teacher(len(tokenizer) + 20)
    model.get_output_embeddings().weight[len(tokenizer) :] = 100.0
    wanted = make_teacher(len(tokenizer) + 20)
    wanted.get_output_embeddings().weight[len(tokenizer) :] = 0.0
    value = torch.randn(4, WIDTH)
    assert logit_lens(model, tokenizer, value) == logit_lens(wanted, tokenizer, value)
    assert all(
        word for each in trace_activations(model, tokenizer, TEXT) for word, _ in each.next_tokens
    )


@torch.no_grad()
def test_a_read_pushes_what_weight_times_value_pushes(student, tokenizer):
    """Below zero a weight turns its value about."""
    blocks = get_architecture(student.config.model_type).blocks(student)
    reads = [
        one
        for each in trace_activations(student, tokenizer, TEXT, top_reads=4, top_tokens=3)
        for one in each.activations
    ]
    assert len({one.top_tokens for one in reads}) > 3
    for one in reads:
        value = one.weight * value_of(blocks[one.layer], one)
        assert one.top_tokens == tuple(
            word for word, _ in logit_lens(student, tokenizer, value[None], count=3)[0]
        )
        assert len(one.top_tokens) == 3 or not one.weight


def test_a_slot_that_says_nothing_pushes_nothing(teacher, tokenizer):
    student, _ = convert(teacher, [FeaturalConfig(k=SLOTS, activation="relu")] * LAYERS)
    reads = [
        one
        for each in trace_activations(student, tokenizer, TEXT, top_reads=EVERYTHING)
        for one in each.activations
    ]
    silent = [one for one in reads if not one.weight]
    assert silent
    assert all(one.top_tokens == () and one.share == 0 for one in silent)
    assert all(one.top_tokens and one.share > 0 for one in reads if one.weight)


def test_nobody_is_told_where_nothing_was_read(teacher, tokenizer):
    student, _ = convert(teacher, [FeaturalConfig()] * LAYERS)
    for memory in get_featural_memories(student).values():
        memory.threshold.fill_(1e6)
    assert not any(each.activations for each in trace_activations(student, tokenizer, TEXT))


@pytest.mark.parametrize("text", ["", "a " * POSITIONS])
def test_text_that_cannot_be_read_is_told_in_one_line(text, plain, tokenizer):
    with pytest.raises(UserError, match="text") as told:
        trace_activations(plain, tokenizer, text)
    assert "\n" not in str(told.value)
    if text:
        assert f"at most {POSITIONS - 1} tokens" in str(told.value)


def test_text_as_long_as_the_model_is_read(plain, tokenizer):
    ids = tokenizer("a row a row a row a row a row " * 5, add_special_tokens=False)["input_ids"][
        : POSITIONS - 1
    ]
    assert len(trace_activations(plain, tokenizer, tokenizer.decode(ids))) == POSITIONS


@pytest.mark.parametrize(
    "how", [{"layers": [0, LAYERS]}, {"layers": [-1]}, {"most": 0}, {"lens": -1}]
)
def test_what_is_not_there_is_told(how, plain, tokenizer):
    with pytest.raises(UserError, match=next(iter(how))):
        trace_activations(plain, tokenizer, TEXT, **how)


def shown(reads):
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(format_table(reads))
    console.file.close()
    return console.export_text()


READS = [
    TokenTrace(0, "<|end|>", (("The", 0.5),), ()),
    TokenTrace(
        1,
        " [b]",
        ((" town", 0.904), ("x", 0.1)),
        (
            Activation(0, "slot", 17, 0.834, 0.42, "", (" town", " city")),
            Activation(0, "row", 9, -0.25, 0.08, "a [book]", ('"',)),
            Activation(3, "fact", 5, 1.0, 1.0, "", ("\n",)),
        ),
    ),
    TokenTrace(2, "é", ((" ", 1.0),), (Activation(2, "slot", 1, 0.004, 0.004, "", ()),)),
]


def test_the_table_shows_every_read():
    lines = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in shown(READS).splitlines()
        if "│" in line
    ]
    assert lines == [
        ['"<|end|>"', '"The" 0.50', "", ""],
        ['" [b]"', '" town" 0.90', "0", 'slot 17 +0.83 (42%) → " town", " city"'],
        ["", "", "", 'row 9 -0.25 (8%) [a [book]] → "\\""'],
        ["", "", "3", 'fact 5 +1.00 (100%) → "\\n"'],
        ['"é"', '" " 1.00', "2", "slot 1 +0.00 (0%) →"],
    ]


def test_the_table_fits_a_terminal(student, tokenizer):
    told = trace_activations(student, tokenizer, TEXT)
    lines = shown(told).splitlines()
    assert max(map(len, lines)) <= 140
    assert len([line for line in lines if "→" in line]) == sum(len(each.reads) for each in told)


def test_json_holds_the_same():
    told = to_json(READS)
    assert json.loads(json.dumps(told)) == told
    assert told[1]["reads"][0] == {
        "layer": 0,
        "kind": "slot",
        "number": 17,
        "weight": 0.834,
        "share": 0.42,
        "tag": "",
        "pushes": [" town", " city"],
    }
    assert told[1]["nexts"] == [[" town", 0.904], ["x", 0.1]]
    assert [each["position"] for each in told] == [0, 1, 2]
