"""Memories that add up."""

import pytest
import torch
from conftest import LAYERS, POSITIONS, SENTENCES, WIDTH, make_teacher

import dmt
from dmt.config_io import build_config, load_config
from dmt.data.tokenizer import train_tokenizer
from dmt.errors import UserError
from dmt.memory import FeaturalMemory, NgramMemory, SumMemory
from dmt.memory.token_context import use_contexts
from dmt.memory.usage import record_usage
from dmt.models.conversion import convert_blocks
from dmt.models.forward import forward_teacher
from dmt.models.memories import get_memories, get_slot_memories, list_student_contexts
from dmt.testing import check_memory

PARTS = "memory.parts=[{kind: featural, k: 8}, {kind: ngram, num_rows: 64}]"


@pytest.mark.parametrize(
    "parts",
    [
        [dmt.FeaturalConfig(k=8), dmt.NgramConfig(num_rows=50)],
        [dmt.TokenConfig(), dmt.PrunedConfig(num_slots=8)],  # MemoryLLM's flexible variant
        [dmt.LowRankConfig(rank=2), dmt.TranscoderConfig(k=4), dmt.NoMemoryConfig()],
    ],
    ids=lambda parts: "+".join(part.kind for part in parts),
)
def test_it_passes_every_check(parts):
    check_memory(SumMemory, dmt.SumConfig(parts=parts))


def test_a_trace_shows_what_each_part_reads():
    parts = [dmt.FeaturalConfig(k=8), dmt.NgramConfig(order=2, num_rows=64), dmt.TokenConfig()]
    student = dmt.convert(make_teacher(), dmt.SumConfig(parts=parts))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tokenizer = train_tokenizer(SENTENCES * 3, 300, POSITIONS)
    last = dmt.trace(student.eval(), tokenizer, SENTENCES[0][:12], top_reads=100)[-1]
    for layer in range(LAYERS):
        kinds = [activation.kind for activation in last.activations if activation.layer == layer]
        assert {kind: kinds.count(kind) for kind in set(kinds)} == {
            "slot": 8,
            "ngram": 4,  # two for the last token, two for the last two
            "token": 1,
        }


def test_the_output_is_the_sum_of_those_of_the_parts(tokens):
    config = dmt.SumConfig(parts=[dmt.FeaturalConfig(k=8), dmt.NgramConfig(num_rows=64)])
    student = dmt.convert(make_teacher(), config, calibration=tokens).eval()
    memory, hidden = get_memories(student)[0], torch.randn(*tokens.shape, WIDTH)
    featural, ngram = memory.list_parts()
    assert isinstance(featural, FeaturalMemory)
    assert isinstance(ngram, NgramMemory)
    with use_contexts(list_student_contexts(student, tokens)):
        assert torch.equal(memory(hidden), featural(hidden) + ngram(hidden))
    assert get_slot_memories(student)[0] is featural


def test_with_all_slots_it_is_the_block_before_calibration(tokens):
    teacher = make_teacher()
    num_slots = teacher.transformer.h[0].mlp.c_fc.weight.shape[1]
    parts = [dmt.NgramConfig(num_rows=64), dmt.FeaturalConfig(k=num_slots)]
    num_layers = teacher.config.n_layer
    student, report = convert_blocks(teacher, [dmt.SumConfig(parts=parts)] * num_layers)
    with torch.no_grad():
        torch.testing.assert_close(student(tokens).logits, teacher(tokens).logits)
    targets = {row.target for row in report.transfers if row.status == "memory"}
    assert "transformer.h.0.mlp.parts.1.keys" in targets


def test_neurons_are_chosen_from_text_for_the_part_that_begins_as_the_block(tmp_path, text_file):
    teacher, tokenizer = make_teacher(), train_tokenizer(SENTENCES * 3, 300, POSITIONS)
    small = dmt.PrunedConfig(num_slots=8)
    config = dmt.SumConfig(parts=[dmt.TokenConfig(), small])
    settings = {"seq_len": 16, "batch_size": 2, "layerwise_steps": 0, "end_to_end_steps": 1}
    settings |= {"test_tokens": 32, "validation_tokens": 32, "calibration_tokens": 32}
    settings |= {"num_threads": 1, "accelerator": "cpu", "precision": "32-true"}
    result = dmt.distill(
        (teacher, tokenizer), text_file, config, output=tmp_path / "run", **settings
    )
    assert result.metrics["test/text/kl"] > 0
    assert not dmt.SumConfig(parts=[dmt.FeaturalConfig(k=8), small]).resizes_block


def test_each_part_is_calibrated_to_what_those_before_it_lack(tokens):
    """A lookup beside slots is set to their error, and makes it less on the text itself."""
    teacher = make_teacher()
    inputs = forward_teacher(teacher, tokens, capture_blocks=True)
    errors = {}
    for name, parts in (
        ("alone", [dmt.FeaturalConfig(k=2)]),
        ("with rows", [dmt.FeaturalConfig(k=2), dmt.NgramConfig(num_rows=4_096)]),
    ):
        student = dmt.convert(teacher, dmt.SumConfig(parts=parts), calibration=tokens).eval()
        with use_contexts(list_student_contexts(student, tokens)), torch.no_grad():
            output = get_memories(student)[0](inputs.block_inputs[0])
        errors[name] = float((output - inputs.block_outputs[0]).square().sum())
    assert errors["with rows"] < 0.8 * errors["alone"]


def test_a_config_file_and_a_saved_run_state_parts_as_settings_of_a_memory():
    config = load_config(None, ["memory.kind=sum", PARTS])
    assert config.memory == dmt.SumConfig(
        parts=[dmt.FeaturalConfig(k=8), dmt.NgramConfig(num_rows=64)]
    )
    from dataclasses import asdict

    assert build_config(asdict(config)) == config


def test_a_setting_of_a_part_changes_the_first_part_that_has_it():
    parts = load_config(None, ["memory.k=8", "memory.order=2", "memory.kind=sum"]).memory.parts
    assert parts == [dmt.FeaturalConfig(k=8), dmt.NgramConfig(order=2)]
    with pytest.raises(UserError, match=r"memory.expert_size is not a setting of memory.kind=sum"):
        load_config(None, ["memory.kind=sum", "memory.expert_size=8"])
    with pytest.raises(UserError, match=r"memory.parts\[0\].k must be"):
        load_config(None, ["memory.kind=sum", "memory.k=0"])


def test_a_setting_of_a_part_counts_wherever_it_stands():
    parts = "memory.parts=[{num_slots: 64}, {kind: ngram}]"  # featural where no kind is stated
    config = load_config(None, ["memory.k=8", parts, "memory.kind=sum"])
    assert config.memory.parts == [dmt.FeaturalConfig(num_slots=64, k=8), dmt.NgramConfig()]
    rules = "student.layer_overrides=[{layers: last, memory: {kind: %s}}]"
    (rule,) = load_config(None, ["memory.order=2", rules % "sum"]).student.layer_overrides
    assert rule["memory"]["parts"] == [{"kind": "featural"}, {"kind": "ngram", "order": 2}]
    config = load_config(None, ["memory.kind=sum", rules % "featural", "memory.k=8"])
    assert config.memory.parts[0] == dmt.FeaturalConfig(k=8)


@pytest.mark.parametrize("parts", ["3", "", "abc", "[{kind: [featural]}]"])
def test_a_setting_beside_parts_that_are_none_is_no_crash(parts):
    with pytest.raises(UserError, match=r"memory.k is not a setting of memory.kind=sum"):
        load_config(None, ["memory.kind=sum", f"memory.parts={parts}", "memory.k=8"])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ("[]", r"memory.parts is empty; name at least one"),
        ("[{kind: associative}]", r"memory.parts\[0\] must be of another kind than associative"),
        ("[3]", r"memory.parts\[0\] must be settings of a memory such as \{kind: ngram\}, got 3"),
        ("[{kind: ngram, k: 8}]", r"memory.parts\[0\].k is not a setting of memory.parts\[0\].ki"),
        ("[{kind: ngram, order: 0}]", r"memory.parts\[0\].order must be in \[1, 8\], got 0"),
        ("[{kind: engram}]", r"memory.parts\[0\].kind must be one of"),
        ("[{kind: featural}, {kind: featural}]", r"parts\[1\] must be of another kind than feat"),
        ("[{kind: ngram, heads: 2}]", r"memory.parts\[0\].heads is not a setting"),
        ("{kind: ngram}", r"memory.parts must be a list"),
    ],
)
def test_bad_parts_are_named(parts, message):
    with pytest.raises(UserError, match=message):
        load_config(None, ["memory.kind=sum", f"memory.parts={parts}"])


def test_a_featural_part_after_other_slots_is_calibrated(tokens):
    parts = [dmt.ProductKeyConfig(), dmt.FeaturalConfig(mean_k=8)]
    student = dmt.convert(make_teacher(), dmt.SumConfig(parts=parts), calibration=tokens).eval()
    memories = get_slot_memories(student)
    assert all(isinstance(memory, FeaturalMemory) for memory in memories.values())
    with record_usage(memories) as usage, torch.no_grad():
        student(tokens)
    mean_reads = sum(counts.mean_reads for counts in usage.values()) / len(usage)
    assert mean_reads == pytest.approx(8, rel=0.3), "the threshold that layers share is set"


def test_a_part_that_does_not_fit_the_block_is_named():
    with pytest.raises(UserError, match=r"parts\[1\].k must be in"):
        dmt.convert(
            make_teacher(),
            dmt.SumConfig(parts=[dmt.TokenConfig(), dmt.TranscoderConfig(k=9_999)]),
        )
