"""What is reported, by definition."""

import math

import pytest
import torch
from conftest import make_teacher

from dmt.data.synthetic import Probe
from dmt.evaluation.metrics import (
    FidelityMetrics,
    generate_greedy,
    measure_fidelity,
    measure_recall,
)
from dmt.evaluation.samples import format_samples_table, paired_samples
from dmt.training.callbacks import compute_slot_usage


@pytest.fixture
def student():
    return make_teacher(initializer_range=0.35)


@torch.no_grad()
def test_compare_by_definition(student, teacher, tokens):
    windows = tokens.repeat(3, 1)[:7]
    tally = measure_fidelity(student, teacher, windows, batch_size=3)
    mine, theirs = (
        student(windows).logits[:, :-1].log_softmax(-1),
        teacher(windows).logits[:, :-1].log_softmax(-1),
    )
    assert tally.tokens == 7 * 19
    assert tally.teacher_perplexity == pytest.approx(
        math.exp(teacher(windows, labels=windows).loss), rel=1e-4
    )
    assert tally.student_perplexity == pytest.approx(
        math.exp(student(windows, labels=windows).loss), rel=1e-4
    )
    assert tally.ppl_ratio == pytest.approx(tally.student_perplexity / tally.teacher_perplexity)
    assert tally.kl == pytest.approx(
        float((theirs.exp() * (theirs - mine)).sum(-1).mean()), rel=1e-4
    )
    assert tally.top1_agreement == pytest.approx(
        float((mine.argmax(-1) == theirs.argmax(-1)).float().mean())
    )
    assert 0 < tally.top1_agreement < 1


def test_a_model_agrees_with_itself(teacher, tokens):
    tally = measure_fidelity(teacher, teacher, tokens)
    assert (tally.ppl_ratio, tally.top1_agreement) == (1.0, 1.0)
    assert tally.kl == pytest.approx(0, abs=1e-6)


@torch.no_grad()
def test_recall_counts_answers_that_greedy_decoding_gives(teacher, tokenizer):
    prompts = ["the quick", "a memory is", "Ada Holbrook was born in the", "every row"]
    probes = []
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(prompt).input_ids]])
        said = generate_greedy(teacher, ids, 3)[0]
        if number == 2:
            said[-1] = (said[-1] + 1) % 300  # right but for the last token, which is wrong
        if number == 1:
            wrong = (said[:1] + 1) % 300  # and then as the model would go on from there
            said = torch.cat(
                [wrong, generate_greedy(teacher, torch.cat([ids[0], wrong])[None], 2)[0]]
            )
        probes.append(Probe(prompt, _Exact(said.tolist()), "", "", 0))
    assert measure_recall(teacher, _Reads(tokenizer), probes, batch_size=3) == pytest.approx(2 / 4)


class _Exact(str):
    """An answer that stands for token ids; random ids need not survive decoding and encoding."""

    __slots__ = ("ids",)

    def __new__(cls, ids):
        made = super().__new__(cls, ids)
        made.ids = ids
        return made


class _Reads:
    def __init__(self, tokenizer):
        self.tokenizer, self.eos_token_id = tokenizer, tokenizer.eos_token_id

    def __call__(self, text, **how):
        return {"input_ids": text.ids} if isinstance(text, _Exact) else self.tokenizer(text, **how)


def test_usage_of_slots():
    assert compute_slot_usage(torch.tensor([5, 5, 5, 5])) == {
        "used": 1.0,
        "dead": 0.0,
        "entropy": pytest.approx(1.0),
    }
    half = compute_slot_usage(torch.tensor([7, 7, 0, 0]))
    assert half == {"used": 0.5, "dead": 2.0, "entropy": pytest.approx(0.5)}


def test_samples_show_both_models(student, teacher, tokenizer, tokens):
    lines = format_samples_table(paired_samples(student, teacher, tokenizer, tokens)).splitlines()
    assert lines[0] == "| prompt | teacher | student |"
    assert len(lines) == 4
    assert all(line.count(" | ") == 2 for line in lines[2:])


def test_measuring_leaves_the_mode_alone(student, teacher, tokens, tokenizer):
    student.train()
    measure_fidelity(student, teacher, tokens)
    measure_recall(student, tokenizer, [Probe("a", " b", "", "", 0)])
    generate_greedy(student, tokens[:, :4], 2)
    assert student.training


def test_what_is_measured_is_the_model_without_dropout(teacher, tokens, tokenizer):
    student = make_teacher(resid_pdrop=0.5, embd_pdrop=0.5)
    prompts = torch.tensor(
        [[tokenizer.eos_token_id, *tokenizer(text).input_ids] for text in ("the quick", "a memory")]
    )
    said = generate_greedy(student, prompts, 3)
    probes = [
        Probe(text, _Exact(ids.tolist()), "", "", 0)
        for text, ids in zip(("the quick", "a memory"), said, strict=True)
    ]
    before = measure_fidelity(student, teacher, tokens)
    student.train()
    assert measure_fidelity(student, teacher, tokens) == before
    assert measure_recall(student, _Reads(tokenizer), probes) == 1
    assert torch.equal(generate_greedy(student, prompts, 3), said)


def test_a_hopeless_student_has_an_infinite_perplexity():
    tally = FidelityMetrics(tokens=2, teacher_nll=4, student_nll=2000)
    assert (tally.student_perplexity, tally.ppl_ratio) == (math.inf, math.inf)
    assert tally.teacher_perplexity == pytest.approx(math.e**2)
