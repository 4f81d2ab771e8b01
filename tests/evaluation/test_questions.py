"""Scoring answers to questions, and reading question files."""

import math

import pytest
import torch

from dmt.errors import UserError
from dmt.evaluation.questions import (
    AnswerScores,
    Question,
    benefit_retained,
    best_scores,
    load_questions,
    score_answers,
)
from dmt.models.forward import (
    encode_text,
    forward_with_activations,
    forward_with_prefix,
)


def test_nll_covers_the_answer_alone_and_correct_means_every_token(embedded):
    model, tokenizer = embedded
    questions = [
        Question("The capital of France is", " Paris"),
        Question("We", " the people of this country"),
    ]
    record = score_answers(
        lambda tokens: forward_with_prefix(model, [0], tokens),
        tokenizer,
        questions,
        torch.device("cpu"),
    )
    for question, nll, is_correct in zip(questions, record.nlls, record.correct, strict=True):
        prompt, answer = (
            encode_text(tokenizer, text, add_prefix=False)
            for text in (question.prompt, question.answer)
        )
        logits = (
            forward_with_activations(model, torch.tensor([[0, *prompt, *answer]]))
            .logits[0, :-1]
            .log_softmax(-1)
        )
        positions = range(len(prompt), len(prompt) + len(answer))
        assert nll == pytest.approx(
            -sum(
                float(logits[position, token])
                for position, token in zip(positions, answer, strict=True)
            ),
            abs=1e-3,
        )
        assert is_correct == all(
            int(logits[position].argmax()) == token
            for position, token in zip(positions, answer, strict=True)
        )


def test_benefit_retained():
    with_context, without = (
        AnswerScores([1.0, 3.0], [True, False]),
        AnswerScores([4.0, 8.0], [False, False]),
    )
    assert benefit_retained(with_context, without, without) == 0
    assert benefit_retained(with_context, without, with_context) == 1
    assert benefit_retained(with_context, without, AnswerScores([2.5, 5.5], [True, True])) == 0.5
    assert math.isnan(benefit_retained(without, with_context, with_context))
    assert best_scores(
        [AnswerScores([1.0, 9.0], [True, False]), AnswerScores([2.0, 3.0], [False, True])]
    ) == AnswerScores([1.0, 3.0], [True, True])
    assert with_context.mean_log_prob == -2
    assert with_context.recall == 0.5


@pytest.mark.parametrize(
    "line",
    [
        "x",
        "[]",
        '{"prompt": "a"}',
        '{"prompt": "a", "answer": ""}',
        '{"prompt": 1, "answer": "b"}',
        '{"prompt": "a", "answer": "b", "c": "d"}',
        "",
    ],
)
def test_invalid_questions_are_rejected(tmp_path, line):
    file = tmp_path / "q.jsonl"
    file.write_text(f"\n{line}\n")
    with pytest.raises(UserError, match=r"line 2|holds no questions"):
        load_questions(file)


def test_a_question_may_hold_a_line_separator_of_unicode(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text('{"prompt": "a\u2028b", "answer": "c"}\n{"prompt": 1}', encoding="utf-8")
    with pytest.raises(UserError, match=r"line 2 is not a question \(its fields are prompt\)"):
        load_questions(file)
