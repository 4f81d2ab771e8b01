"""What stored rows are taught: the teacher's block below, the teacher's state at the top."""

import itertools

import numpy as np
import pytest
import torch
from conftest import LAYERS

from dmt.config import AssociativeConfig, FeaturalConfig
from dmt.distillation.row_sync import propose_rows, set_row_targets
from dmt.memory.associative import NULL_LOGIT_CANDIDATES
from dmt.models.architectures import get_architecture
from dmt.models.conversion import convert_blocks, get_associative_memories
from dmt.models.forward import forward_teacher, forward_with_activations

ROWS = {"k": 8, "min_distance": 0.0, "merge_distance": 0.0}


def settled(student, step=1):
    given = itertools.count(1)
    for memory in get_associative_memories(student).values():
        memory.commit_step(
            step, 7.0, lambda count: np.array([next(given) for _ in range(count)], np.int64)
        )


def test_streams_are_the_states_between_layers(any_teacher, tokens):
    seen = forward_with_activations(any_teacher, tokens, capture_blocks=True)
    wanted = any_teacher(
        tokens, output_hidden_states=True
    ).hidden_states  # of the last layer, after the final norm
    for layer in range(LAYERS - 1):
        torch.testing.assert_close(seen.layer_outputs[layer], wanted[layer + 1])
    norm = any_teacher.get_submodule(get_architecture(any_teacher.config.model_type).backbone)
    norm = norm.ln_f if hasattr(norm, "ln_f") else norm.norm
    torch.testing.assert_close(norm(seen.layer_outputs[-1]), wanted[-1])


@torch.no_grad()
def test_a_row_says_what_the_student_lacks(any_teacher, tokens):
    """Below, of what the teacher's block says of the student's own input; at the top, of the teacher's state."""
    memories = [FeaturalConfig(k=8), AssociativeConfig(**ROWS), AssociativeConfig(**ROWS)]
    student, _ = convert_blocks(any_teacher, memories)
    seen, wanted = (
        forward_with_activations(student, tokens, capture_blocks=True),
        forward_teacher(any_teacher, tokens, capture_blocks=True),
    )
    propose_rows(student, any_teacher, tokens)
    settled(student)
    block = get_architecture(any_teacher.config.model_type).blocks(any_teacher)[1]
    lacks = {
        1: block(seen.block_inputs[1]) - seen.block_outputs[1],
        2: wanted.layer_outputs[2] - seen.layer_outputs[2],
    }
    for layer, memory in get_associative_memories(student).items():
        rows = memory.rows
        assert len(rows) == tokens.numel()
        torch.testing.assert_close(
            rows.values[rows.ids >= 0], lacks[layer].flatten(0, 1), atol=1e-5, rtol=1e-4
        )


@torch.no_grad()
def test_what_was_read_brings_the_student_nearer(any_teacher, tokens):
    student, _ = convert_blocks(
        any_teacher, [FeaturalConfig(k=8), FeaturalConfig(k=8), AssociativeConfig(**ROWS)]
    )
    wanted = forward_teacher(any_teacher, tokens).hidden
    before = (forward_with_activations(student, tokens).hidden - wanted).square().mean()
    (memory,) = get_associative_memories(student).values()
    trained = memory.null_logit.item()
    for step in (1, 2):
        propose_rows(student, any_teacher, tokens)
        settled(student, step)
    assert (
        memory.null_logit.item() == pytest.approx(min(NULL_LOGIT_CANDIDATES)) != trained
    )  # the second time every row is at hand
    assert (forward_with_activations(student, tokens).hidden - wanted).square().mean() < before / 4


def test_reading_leaves_no_gradient_and_ends_writing_whatever_happens(
    any_teacher, tokens, monkeypatch
):
    student, _ = convert_blocks(any_teacher, [AssociativeConfig(**ROWS)] * LAYERS)
    propose_rows(student, any_teacher, tokens)
    assert all(parameter.grad is None for parameter in student.parameters())
    assert not any(memory.is_writing for memory in get_associative_memories(student).values())
    settled(student)
    before = {
        layer: len(memory.rows) for layer, memory in get_associative_memories(student).items()
    }
    monkeypatch.setattr("dmt.distillation.row_sync.set_row_targets", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        propose_rows(student, any_teacher, tokens.flip(1))
    assert not any(memory.is_writing for memory in get_associative_memories(student).values())
    settled(student, 2)  # nothing of the text that failed
    assert before == {
        layer: len(memory.rows) for layer, memory in get_associative_memories(student).items()
    }


def test_who_does_not_write_is_taught_nothing(any_teacher, tokens):
    student, _ = convert_blocks(any_teacher, [AssociativeConfig(**ROWS)] * LAYERS)
    seen, wanted = (
        forward_with_activations(student, tokens, capture_blocks=True),
        forward_teacher(any_teacher, tokens, capture_blocks=True),
    )
    set_row_targets(student, any_teacher, seen, wanted)
    settled(student)
    assert not any(len(memory.rows) for memory in get_associative_memories(student).values())
