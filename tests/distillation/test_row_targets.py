"""Targets of stored rows: the teacher's block in lower layers, its last state in the top layer."""

import itertools

import numpy as np
import pytest
import torch
from conftest import LAYERS

from dmt.config import AssociativeConfig, FeaturalConfig
from dmt.distillation.row_sync import propose_rows, set_row_targets
from dmt.memory.associative import NULL_LOGIT_CANDIDATES
from dmt.models.architectures import get_architecture
from dmt.models.conversion import convert_blocks
from dmt.models.forward import forward_teacher, forward_with_activations
from dmt.models.memories import get_associative_memories

ROWS = {"k": 8, "min_distance": 0.0, "merge_distance": 0.0}


def commit_rows(student, step=1):
    row_ids = itertools.count(1)
    for memory in get_associative_memories(student).values():
        memory.commit_step(
            step, 7.0, lambda count: np.array([next(row_ids) for _ in range(count)], np.int64)
        )


def test_layer_outputs_are_the_hidden_states(any_teacher, tokens):
    student_outputs = forward_with_activations(any_teacher, tokens, capture_blocks=True)
    hidden_states = any_teacher(
        tokens, output_hidden_states=True
    ).hidden_states  # the last one after the final norm
    for layer in range(LAYERS - 1):
        torch.testing.assert_close(student_outputs.layer_outputs[layer], hidden_states[layer + 1])
    norm = any_teacher.get_submodule(get_architecture(any_teacher.config.model_type).backbone)
    norm = norm.ln_f if hasattr(norm, "ln_f") else norm.norm
    torch.testing.assert_close(norm(student_outputs.layer_outputs[-1]), hidden_states[-1])


@torch.no_grad()
def test_row_values_are_the_difference_to_the_teacher(any_teacher, tokens):
    """Lower layers: the teacher's block of the student's input. Top layer: the teacher's state."""
    memories = [FeaturalConfig(k=8), AssociativeConfig(**ROWS), AssociativeConfig(**ROWS)]
    student, _ = convert_blocks(any_teacher, memories)
    student_outputs, teacher_outputs = (
        forward_with_activations(student, tokens, capture_blocks=True),
        forward_teacher(any_teacher, tokens, capture_blocks=True),
    )
    propose_rows(student, any_teacher, tokens)
    commit_rows(student)
    block = get_architecture(any_teacher.config.model_type).blocks(any_teacher)[1]
    missing = {
        1: block(student_outputs.block_inputs[1]) - student_outputs.block_outputs[1],
        2: teacher_outputs.layer_outputs[2] - student_outputs.layer_outputs[2],
    }
    for layer, memory in get_associative_memories(student).items():
        rows = memory.rows
        assert len(rows) == tokens.numel()
        torch.testing.assert_close(
            rows.values[rows.ids >= 0], missing[layer].flatten(0, 1), atol=1e-5, rtol=1e-4
        )


@torch.no_grad()
def test_written_rows_reduce_the_error_of_the_student(any_teacher, tokens):
    student, _ = convert_blocks(
        any_teacher, [FeaturalConfig(k=8), FeaturalConfig(k=8), AssociativeConfig(**ROWS)]
    )
    teacher_hidden = forward_teacher(any_teacher, tokens).hidden
    before = (forward_with_activations(student, tokens).hidden - teacher_hidden).square().mean()
    (memory,) = get_associative_memories(student).values()
    trained = memory.null_logit.item()
    for step in (1, 2):
        propose_rows(student, any_teacher, tokens)
        commit_rows(student, step)
    assert (
        memory.null_logit.item() == pytest.approx(min(NULL_LOGIT_CANDIDATES)) != trained
    )  # at the second step every row is stored
    assert (
        forward_with_activations(student, tokens).hidden - teacher_hidden
    ).square().mean() < before / 4


def test_proposing_rows_leaves_no_gradient_and_ends_writing_on_errors(
    any_teacher, tokens, monkeypatch
):
    student, _ = convert_blocks(any_teacher, [AssociativeConfig(**ROWS)] * LAYERS)
    propose_rows(student, any_teacher, tokens)
    assert all(parameter.grad is None for parameter in student.parameters())
    assert not any(memory.is_writing for memory in get_associative_memories(student).values())
    commit_rows(student)
    before = {
        layer: len(memory.rows) for layer, memory in get_associative_memories(student).items()
    }
    monkeypatch.setattr("dmt.distillation.row_sync.set_row_targets", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        propose_rows(student, any_teacher, tokens.flip(1))
    assert not any(memory.is_writing for memory in get_associative_memories(student).values())
    commit_rows(student, 2)  # nothing of the failed text is pending
    assert before == {
        layer: len(memory.rows) for layer, memory in get_associative_memories(student).items()
    }


def test_memories_that_are_not_writing_get_no_targets(any_teacher, tokens):
    student, _ = convert_blocks(any_teacher, [AssociativeConfig(**ROWS)] * LAYERS)
    student_outputs, teacher_outputs = (
        forward_with_activations(student, tokens, capture_blocks=True),
        forward_teacher(any_teacher, tokens, capture_blocks=True),
    )
    set_row_targets(student, any_teacher, student_outputs, teacher_outputs)
    commit_rows(student)
    assert not any(len(memory.rows) for memory in get_associative_memories(student).values())
