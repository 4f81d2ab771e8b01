"""Greedy continuations of teacher and student, side by side."""

import pytest
from conftest import make_teacher

from dmt.evaluation.samples import (
    _split_spans,
    diff_tokens,
    format_samples_table,
    paired_samples,
)


@pytest.fixture
def other_model():
    return make_teacher(initializer_range=0.35)


def test_tokens_of_only_one_side_are_marked(other_model, teacher, tokenizer, tokens):
    assert diff_tokens([1, 2, 3, 4], [1, 9, 2, 3]) == (
        [False, False, False, True],
        [False, True, False, False],
    )
    assert diff_tokens([1, 2], [1, 2]) == ([False, False], [False, False])
    for sample in paired_samples(other_model, teacher, tokenizer, tokens):
        assert (
            bool(sample.differing)
            == any(is_unique for _, is_unique in sample.student)
            == (sample.teacher != sample.student)
        )
        assert all(
            first[1] != second[1]
            for first, second in zip(sample.student, sample.student[1:], strict=False)
        )
    for sample in paired_samples(teacher, teacher, tokenizer, tokens):
        assert sample.differing == 0
        assert sample.teacher == sample.student
        assert not any(is_unique for _, is_unique in sample.student)


def test_joined_spans_are_the_text(tokenizer):
    ids = tokenizer("häuser – 東京 and ☃")["input_ids"]
    differs = [number % 2 == 0 for number in range(len(ids))]
    spans = _split_spans(tokenizer, ids, differs)
    assert (
        "".join(text for text, _ in spans)
        == tokenizer.decode(ids, skip_special_tokens=True)
        == "häuser – 東京 and ☃"
    )


def test_the_samples_table_has_both_models(other_model, teacher, tokenizer, tokens):
    samples = paired_samples(other_model, teacher, tokenizer, tokens)
    lines = format_samples_table(samples).splitlines()
    assert lines[0] == "| prompt | teacher | student |"
    assert len(lines) == 4
    assert all(line.count(" | ") == 2 for line in lines[2:])
