"""Traces: weights are those of the forward pass, and promoted tokens those of the model."""

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
    trace,
)
from dmt.memory.slot_table import ACTIVATIONS
from dmt.models.architectures import get_architecture
from dmt.models.conversion import convert_blocks
from dmt.models.forward import forward_with_activations
from dmt.models.memories import get_associative_memories, get_featural_memories

ALL_READS = 10**6
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
    "teacher values": AssociativeConfig(
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


def make_student(teacher, tokens, memories):
    """Return a student without zeros and ones in its parameters, with rows where it takes some."""
    student, _ = convert_blocks(teacher, memories)
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
    row_ids = itertools.count(1_000)
    if get_associative_memories(student):
        write(student, teacher, tokens, "a novel")
        for memory in get_associative_memories(student).values():
            memory.commit_step(
                1, 7.0, lambda count: np.array([next(row_ids) for _ in range(count)], np.int64)
            )
            memory.null_logit.data.fill_(0.9)
            memory.log_sharpness.data.fill_(1.5)  # so that rows and base both count
    return student.eval()


@pytest.fixture(params=VARIANTS)
def student(request, any_teacher, tokens):
    memory = VARIANTS[request.param]
    if memory.activation in ("softmax", "distance") and any_teacher.config.model_type == "llama":
        memory = replace(memory, activation="relu")  # softmax and distance do not support gains
    return make_student(any_teacher, tokens, [memory, DenseConfig(), memory])


@pytest.fixture
def plain(any_teacher):
    """A student with eight active slots and a dense block in the middle."""
    student, _ = convert_blocks(
        any_teacher, [FeaturalConfig(k=8), DenseConfig(), FeaturalConfig(k=8)]
    )
    return student


def encode(tokenizer, text):
    return [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]


def by_layer(traces, layer, kind):
    """Return `(position, activation)` of all tokens."""
    return [
        (token.position, activation)
        for token in traces
        for activation in token.activations
        if (activation.layer, activation.kind) == (layer, kind)
    ]


def value_of(block, activation):
    """Return the value of an activation, as it is added to the residual stream."""
    if activation.kind == "row":
        return block.rows.values[block.rows.index_by_id[activation.index]] @ block.output.weight.t()
    slots = getattr(block, "base", block)
    return (
        slots.values[activation.index]
        if slots.output is None
        else slots.output @ slots.values[activation.index]
    )


def constant_of(slots, hidden):
    output = (
        slots.constant_output() if slots.output is None else slots.output @ slots.constant_output()
    )
    return output.expand_as(hidden) + hidden @ slots.skip_connection.t()


@torch.no_grad()
def test_contributions_add_up_to_the_output_of_the_layer(student, tokenizer):
    """For each layer and token, weights times values plus the constant part are the output."""
    outputs = forward_with_activations(
        student, torch.tensor([encode(tokenizer, TEXT)]), capture_blocks=True
    )
    traces = trace(student, tokenizer, TEXT, top_reads=ALL_READS, top_tokens=0)
    blocks = get_architecture(student.config.model_type).blocks(student)
    assert {activation.layer for token in traces for activation in token.activations} == {0, 2}
    for layer in (0, 2):
        hidden, block = outputs.block_inputs[layer][0], blocks[layer]
        output, row_weights = torch.zeros_like(hidden), torch.zeros(len(hidden), 1)
        for position, activation in [
            *by_layer(traces, layer, "slot"),
            *by_layer(traces, layer, "row"),
        ]:
            output[position] += activation.weight * value_of(block, activation)
            row_weights[position] += activation.weight if activation.kind == "row" else 0
        slots = get_featural_memories(student).get(layer)
        base_output = torch.zeros_like(hidden) if slots is None else constant_of(slots, hidden)
        if layer in get_associative_memories(student):
            assert row_weights[1:].min() > 0
            assert 0.1 < row_weights[1:].mean() < 0.95
            if block.value_target == "teacher":
                base_output = base_output * (1 - row_weights)
        torch.testing.assert_close(
            (output + base_output)[1:], outputs.block_outputs[layer][0, 1:], atol=2e-4, rtol=1e-4
        )


@torch.no_grad()
def test_slots_have_their_own_weights(student, tokenizer):
    """Compare with the definition, slot by slot, where no weight depends on another."""
    outputs = forward_with_activations(
        student, torch.tensor([encode(tokenizer, TEXT)]), capture_blocks=True
    )
    traces = trace(student, tokenizer, TEXT, top_reads=ALL_READS, top_tokens=0)
    for layer, slots in get_featural_memories(student).items():
        hidden = outputs.block_inputs[layer][0]
        block, row_weights = get_associative_memories(student).get(layer), [0.0] * len(hidden)
        if block is not None and block.value_target == "teacher":
            for position, activation in by_layer(traces, layer, "row"):
                row_weights[position] += activation.weight
        mask = slots.select_slots(hidden)
        activations = by_layer(traces, layer, "slot")
        assert [
            len([1 for at, _ in activations if at == position])
            for position in range(1, len(hidden))
        ] == mask[1:].sum(-1).tolist()
        assert all(mask[position, activation.index] for position, activation in activations)
        if slots.activation == "block":
            for position, activation in activations[:200]:
                query, slot = hidden[position], activation.index
                if slots.query is not None:
                    query = slots.query[slot * slots.heads // slots.num_slots] @ query
                activation_fn = ACTIVATIONS["silu" if slots.gains is not None else "gelu_new"]
                weight = activation_fn(query @ slots.keys[slot] + slots.key_bias[slot])
                if slots.gains is not None:
                    weight = weight * (hidden[position] @ slots.gains[slot] + slots.gain_bias[slot])
                weight = weight - (0 if slots.means is None else slots.means[slot])
                assert activation.weight == pytest.approx(
                    float(weight) * (1 - row_weights[position]), abs=1e-5, rel=1e-4
                )
            if slots.gains is not None or slots.means is not None:
                assert (
                    min(activation.weight for _, activation in activations)
                    < 0
                    < max(activation.weight for _, activation in activations)
                )
            if slots.k_mode == "threshold":
                assert len({int(row.sum()) for row in mask}) > 1


@torch.no_grad()
@pytest.mark.parametrize("family", [make_teacher, make_llama])
def test_rows_have_their_own_weights(family, tokens, tokenizer):
    """Weights are a softmax over the nearest rows and the base; rows add to the base's output."""
    student = make_student(
        family(len(tokenizer)), tokens, [FeaturalConfig(k=8), VARIANTS["rows"], VARIANTS["rows"]]
    )
    outputs = forward_with_activations(
        student, torch.tensor([encode(tokenizer, TEXT)]), capture_blocks=True
    )
    traces = trace(student, tokenizer, TEXT, top_reads=ALL_READS)
    assert not by_layer(traces, 0, "row")
    for layer, memory in get_associative_memories(student).items():
        hidden = outputs.block_inputs[layer][0]
        cosines = torch.nn.functional.normalize(memory.query(hidden), dim=-1) @ memory.rows.keys.t()
        nearest = cosines.masked_fill(memory.rows.ids < 0, -torch.inf).topk(5)
        logits = (
            torch.cat([nearest.values, memory.null_logit.expand(len(hidden), 1)], 1)
            * memory.log_sharpness.exp()
        )
        weights = logits.softmax(-1)[:, :-1]
        activations, added = (
            by_layer(traces, layer, "row"),
            outputs.block_outputs[layer][0] - memory.base(hidden),
        )
        for position in range(1, len(hidden)):
            weight_by_row = {
                activation.index: activation.weight
                for at, activation in activations
                if at == position
            }
            numbers = memory.rows.ids[nearest.indices[position]].tolist()
            assert weight_by_row == pytest.approx(
                dict(zip(numbers, weights[position].tolist(), strict=True)), rel=1e-3, abs=1e-6
            )
            assert min(weight_by_row) >= 1_000, "IDs of rows are not their indices"
            output = sum(
                weight * value_of(memory, Activation(0, "row", number, 0, 0, "", ()))
                for number, weight in weight_by_row.items()
            )
            torch.testing.assert_close(output, added[position], atol=1e-4, rtol=1e-3)
        assert {activation.tag for _, activation in activations} == {"a novel"}
        assert {activation.tag for _, activation in by_layer(traces, layer, "slot")} == {""}


def test_rows_have_their_own_tags(any_teacher, tokens, tokenizer):
    student = make_student(any_teacher, tokens, [VARIANTS["rows"]] * LAYERS)
    for memory in get_associative_memories(student).values():
        for number, index in memory.rows.index_by_id.items():
            memory.rows.stats.tags[index] = f"page {number}"
    traces = trace(student, tokenizer, TEXT, top_reads=ALL_READS, top_tokens=0)
    rows = [
        activation
        for token in traces
        for activation in token.activations
        if activation.kind == "row"
    ]
    assert len(rows) == LAYERS * 5 * (len(traces) - 1)
    assert all(activation.tag == f"page {activation.index}" for activation in rows)


def test_memories_without_rows_activate_slots_only(any_teacher, tokenizer):
    student, _ = convert_blocks(
        any_teacher, [VARIANTS["rows"], VARIANTS["rows alone"], VARIANTS["rows"]]
    )
    traces = trace(student, tokenizer, TEXT)
    assert {
        (activation.layer, activation.kind) for token in traces for activation in token.activations
    } == {
        (0, "slot"),
        (2, "slot"),
    }


@torch.no_grad()
def test_shares_are_of_all_contributions_in_descending_order(student, tokenizer):
    all_traces, traces = (
        trace(student, tokenizer, TEXT, top_reads=ALL_READS, top_tokens=0),
        trace(student, tokenizer, TEXT, top_reads=3, top_tokens=0),
    )
    blocks = get_architecture(student.config.model_type).blocks(student)
    mixed = set()
    for token, few in zip(all_traces[1:], traces[1:], strict=True):
        assert [activation.layer for activation in token.activations] == sorted(
            activation.layer for activation in token.activations
        )
        for layer in (0, 2):
            in_layer = [activation for activation in token.activations if activation.layer == layer]
            lengths = [
                abs(activation.weight) * float(value_of(blocks[layer], activation).norm())
                for activation in in_layer
            ]
            assert lengths == sorted(lengths, reverse=True)
            assert [activation.share for activation in in_layer] == pytest.approx(
                [length / sum(lengths) for length in lengths], abs=1e-5
            )
            assert [
                activation for activation in few.activations if activation.layer == layer
            ] == in_layer[:3]
            mixed.add(tuple(dict.fromkeys(activation.kind for activation in in_layer)))
    if get_associative_memories(student) and get_featural_memories(student):
        assert {"slot", "row"} == {kind for kinds in mixed for kind in kinds}


def test_traces_have_tokens_positions_and_predictions(plain, tokenizer):
    traces = trace(plain, tokenizer, TEXT, top_reads=5)
    ids = encode(tokenizer, TEXT)
    assert [token.position for token in traces] == list(range(len(ids)))
    assert [token.token for token in traces] == [tokenizer.decode([number]) for number in ids]
    assert any(token.token.startswith(" ") for token in traces)
    assert "".join(token.token for token in traces[1:]) == TEXT
    with torch.no_grad():
        topk = plain(torch.tensor([ids])).logits[0].softmax(-1).topk(5)
    for token, probs, token_ids in zip(
        traces, topk.values.tolist(), topk.indices.tolist(), strict=True
    ):
        assert [text for text, _ in token.next_tokens] == [
            tokenizer.decode([number]) for number in token_ids
        ]
        assert [prob for _, prob in token.next_tokens] == pytest.approx(probs, rel=1e-3)
    assert traces[0].activations == ()
    assert all(
        len(token.activations) == 10 for token in traces[1:]
    )  # five for each of two memories


def test_without_a_start_token_every_token_has_activations(plain, tokenizer):
    class NoStartTokenizer:
        eos_token_id, decode = None, tokenizer.decode

        def __len__(self):
            return len(tokenizer)

        def __call__(self, *arguments, **kwargs):
            return tokenizer(*arguments, **kwargs)

    traces = trace(plain, NoStartTokenizer(), TEXT, top_reads=5)
    assert [token.token for token in traces] == [
        token.token for token in trace(plain, tokenizer, TEXT)
    ][1:]
    assert (traces[0].position, len(traces[0].activations)) == (0, 10)


def test_only_selected_layers_with_memories_have_activations(plain, any_teacher, tokenizer):
    all_traces = trace(plain, tokenizer, TEXT)
    for layers in ([2], [1], [1, 0, 0], []):
        traces = trace(plain, tokenizer, TEXT, layers=layers)
        assert [token.next_tokens for token in traces] == [
            token.next_tokens for token in all_traces
        ]
        assert [token.activations for token in traces] == [
            tuple(activation for activation in token.activations if activation.layer in layers)
            for token in all_traces
        ]
    assert not any(token.activations for token in trace(any_teacher, tokenizer, TEXT))


def test_tracing_changes_nothing_and_ignores_training_mode(student, tokenizer):
    traces = trace(student, tokenizer, TEXT)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    for memory in get_featural_memories(student).values():
        memory.set_k_multiplier(3.0)
    student.train()
    assert trace(student, tokenizer, TEXT) == traces
    assert student.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert not any(block._forward_hooks for block in student.modules())
    assert all(parameter.grad is None for parameter in student.parameters())


@torch.no_grad()
def test_the_logit_lens_is_the_head_after_the_final_norm(any_teacher, tokenizer):
    """For a value with zero mean, scores are the model's logits times one positive number."""
    backbone = any_teacher.get_submodule(get_architecture(any_teacher.config.model_type).backbone)
    norm = backbone.ln_f if hasattr(backbone, "ln_f") else backbone.norm
    values = torch.randn(300, WIDTH)  # more than one chunk
    values -= values.mean(-1, keepdim=True)
    promoted = logit_lens(any_teacher, tokenizer, values, count=7)
    logits = any_teacher.get_output_embeddings()(norm(values) - norm(torch.zeros(WIDTH)))
    centered = logits - logits.mean(-1, keepdim=True)
    for pairs, row_logits in zip(promoted, centered, strict=True):
        best = row_logits.topk(7)
        assert [text for text, _ in pairs] == [
            tokenizer.decode([number]) for number in best.indices
        ]
        ratios = torch.tensor([score for _, score in pairs]) / best.values
        torch.testing.assert_close(ratios, ratios[0].expand(7), rtol=1e-3, atol=0)
    doubled, negated = (
        logit_lens(any_teacher, tokenizer, values[:1] * 2)[0],
        logit_lens(any_teacher, tokenizer, -values[:1])[0],
    )
    assert [score for _, score in doubled] == pytest.approx(
        [2 * score for _, score in promoted[0][:5]]
    )
    assert not {text for text, _ in negated} & {text for text, _ in promoted[0]} - {
        "\ufffd"
    }  # the text of many single bytes


@torch.no_grad()
def test_values_that_raise_all_logits_equally_promote_none(any_teacher, tokenizer):
    head = any_teacher.get_output_embeddings().weight
    head[:, 0], head[7, 3] = 2.0, 50.0
    any_teacher.get_submodule(
        get_architecture(any_teacher.config.model_type).final_norm
    ).weight.fill_(1.0)
    uniform, single = torch.eye(WIDTH)[[0, 3]]
    assert logit_lens(any_teacher, tokenizer, uniform[None]) == [[]]
    ((text, score), *_) = logit_lens(any_teacher, tokenizer, (single + uniform)[None])[0]
    assert text == tokenizer.decode([7])
    assert score == pytest.approx(50 - float(head[:, 3].mean()), rel=1e-4)
    assert logit_lens(any_teacher, tokenizer, single[None], count=0) == [[]]
    assert len(logit_lens(any_teacher, tokenizer, single[None], count=ALL_READS)[0]) < len(
        tokenizer
    )  # half of the scores are negative


@torch.no_grad()
def test_padding_rows_of_the_head_are_left_out(tokenizer):
    model = make_teacher(len(tokenizer) + 20)
    model.get_output_embeddings().weight[len(tokenizer) :] = 100.0
    expected = make_teacher(len(tokenizer) + 20)
    expected.get_output_embeddings().weight[len(tokenizer) :] = 0.0
    value = torch.randn(4, WIDTH)
    assert logit_lens(model, tokenizer, value) == logit_lens(expected, tokenizer, value)
    assert all(text for token in trace(model, tokenizer, TEXT) for text, _ in token.next_tokens)


@torch.no_grad()
def test_activations_promote_the_tokens_of_weight_times_value(student, tokenizer):
    """A negative weight negates the value."""
    blocks = get_architecture(student.config.model_type).blocks(student)
    reads = [
        activation
        for token in trace(student, tokenizer, TEXT, top_reads=4, top_tokens=3)
        for activation in token.activations
    ]
    assert len({activation.top_tokens for activation in reads}) > 3
    for activation in reads:
        value = activation.weight * value_of(blocks[activation.layer], activation)
        assert activation.top_tokens == tuple(
            text for text, _ in logit_lens(student, tokenizer, value[None], count=3)[0]
        )
        assert len(activation.top_tokens) == 3 or not activation.weight


def test_slots_with_zero_weight_promote_nothing(teacher, tokenizer):
    student, _ = convert_blocks(teacher, [FeaturalConfig(k=SLOTS, activation="relu")] * LAYERS)
    reads = [
        activation
        for token in trace(student, tokenizer, TEXT, top_reads=ALL_READS)
        for activation in token.activations
    ]
    silent = [activation for activation in reads if not activation.weight]
    assert silent
    assert all(activation.top_tokens == () and activation.share == 0 for activation in silent)
    assert all(
        activation.top_tokens and activation.share > 0 for activation in reads if activation.weight
    )


def test_tokens_below_the_threshold_have_no_activations(teacher, tokenizer):
    student, _ = convert_blocks(teacher, [FeaturalConfig()] * LAYERS)
    for memory in get_featural_memories(student).values():
        memory.threshold.fill_(1e6)
    assert not any(token.activations for token in trace(student, tokenizer, TEXT))


@pytest.mark.parametrize("text", ["", "a " * POSITIONS])
def test_empty_and_long_texts_are_reported_in_one_line(text, plain, tokenizer):
    with pytest.raises(UserError, match="text") as raised:
        trace(plain, tokenizer, text)
    assert "\n" not in str(raised.value)
    if text:
        assert f"at most {POSITIONS - 1} tokens" in str(raised.value)


def test_text_may_fill_the_context(plain, tokenizer):
    ids = tokenizer("a row a row a row a row a row " * 5, add_special_tokens=False)["input_ids"][
        : POSITIONS - 1
    ]
    assert len(trace(plain, tokenizer, tokenizer.decode(ids))) == POSITIONS


@pytest.mark.parametrize(
    "kwargs", [{"layers": [0, LAYERS]}, {"layers": [-1]}, {"top_reads": 0}, {"top_tokens": -1}]
)
def test_errors_name_the_wrong_argument(kwargs, plain, tokenizer):
    with pytest.raises(UserError, match=next(iter(kwargs))):
        trace(plain, tokenizer, TEXT, **kwargs)


def render(traces):
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(format_table(traces))
    console.file.close()
    return console.export_text()


TRACES = [
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


def test_the_table_shows_every_activation():
    lines = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in render(TRACES).splitlines()
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
    traces = trace(student, tokenizer, TEXT)
    lines = render(traces).splitlines()
    assert max(map(len, lines)) <= 140
    assert len([line for line in lines if "→" in line]) == sum(
        len(token.activations) for token in traces
    )


def test_traces_become_dictionaries_for_json():
    payload = to_json(TRACES)
    assert json.loads(json.dumps(payload)) == payload
    assert payload == [token.to_dict() for token in TRACES]
    assert payload[1]["activations"][0] == {
        "layer": 0,
        "kind": "slot",
        "index": 17,
        "weight": 0.834,
        "share": 0.42,
        "tag": "",
        "top_tokens": [" town", " city"],
    }
    assert payload[1]["next_tokens"] == [[" town", 0.904], ["x", 0.1]]
    assert [token["position"] for token in payload] == [0, 1, 2]


def test_the_public_function_traces_models_in_memory(plain, any_teacher, tokenizer):
    import dmt

    traces = dmt.trace(plain, tokenizer, TEXT, layers=[0], top_reads=2)
    assert all(isinstance(token, dmt.TokenTrace) for token in traces)
    assert {activation.layer for token in traces for activation in token.activations} == {0}
    assert max(len(token.activations) for token in traces) == 2
    assert traces.to_dict() == to_json(traces)
    assert "slot" in str(traces)
    assert "slot" in traces._repr_html_()
    assert not any(token.activations for token in dmt.trace(any_teacher, tokenizer, TEXT))
