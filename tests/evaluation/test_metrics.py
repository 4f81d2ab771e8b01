"""Metrics against their definitions."""

import math

import pytest
import torch
from conftest import make_teacher, newest
from transformers import AutoModelForCausalLM

from dmt import config_io
from dmt.cli.main import distill_main
from dmt.data.corpora import Corpus
from dmt.data.synthetic import Probe
from dmt.data.windows import TextDataModule, select_first_windows
from dmt.errors import UserError
from dmt.evaluation.metrics import (
    FidelityMetrics,
    compute_slot_usage,
    evaluate,
    generate_greedy,
    measure_fidelity,
    measure_recall,
)
from dmt.models.loading import load_teacher
from dmt.training.run_dir import read_record


@pytest.fixture
def student():
    return make_teacher(initializer_range=0.35)


@torch.no_grad()
def test_fidelity_by_definition(student, teacher, tokens):
    windows = tokens.repeat(3, 1)[:7]
    metrics = measure_fidelity(student, teacher, windows, batch_size=3)
    student_log_probs, teacher_log_probs = (
        student(windows).logits[:, :-1].log_softmax(-1),
        teacher(windows).logits[:, :-1].log_softmax(-1),
    )
    assert metrics.tokens == 7 * 19
    assert metrics.teacher_perplexity == pytest.approx(
        math.exp(teacher(windows, labels=windows).loss), rel=1e-4
    )
    assert metrics.student_perplexity == pytest.approx(
        math.exp(student(windows, labels=windows).loss), rel=1e-4
    )
    assert metrics.ppl_ratio == pytest.approx(
        metrics.student_perplexity / metrics.teacher_perplexity
    )
    assert metrics.kl == pytest.approx(
        float((teacher_log_probs.exp() * (teacher_log_probs - student_log_probs)).sum(-1).mean()),
        rel=1e-4,
    )
    assert metrics.top1_agreement == pytest.approx(
        float((student_log_probs.argmax(-1) == teacher_log_probs.argmax(-1)).float().mean())
    )
    assert 0 < metrics.top1_agreement < 1


def test_a_model_agrees_with_itself(teacher, tokens):
    metrics = measure_fidelity(teacher, teacher, tokens)
    assert (metrics.ppl_ratio, metrics.top1_agreement) == (1.0, 1.0)
    assert metrics.kl == pytest.approx(0, abs=1e-6)


@torch.no_grad()
def test_recall_counts_answers_that_greedy_decoding_generates(teacher, tokenizer):
    prompts = ["the quick", "a memory is", "Ada Holbrook was born in the", "every row"]
    probes = []
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(prompt).input_ids]])
        answer_ids = generate_greedy(teacher, ids, 3)[0]
        if number == 2:
            answer_ids[-1] = (answer_ids[-1] + 1) % 300  # only the last token is wrong
        if number == 1:
            wrong = (answer_ids[:1] + 1) % 300  # then as the model continues
            answer_ids = torch.cat(
                [wrong, generate_greedy(teacher, torch.cat([ids[0], wrong])[None], 2)[0]]
            )
        probes.append(Probe(prompt, _ExactAnswer(answer_ids.tolist()), "", "", 0))
    recall = measure_recall(teacher, _ExactTokenizer(tokenizer), probes)
    assert recall == pytest.approx(2 / 4)


class _ExactAnswer(str):
    """An answer with its token ids: random ids do not survive decoding and encoding."""

    __slots__ = ("ids",)

    def __new__(cls, ids):
        answer = super().__new__(cls, ids)
        answer.ids = ids
        return answer


class _ExactTokenizer:
    def __init__(self, tokenizer):
        self.tokenizer, self.eos_token_id = tokenizer, tokenizer.eos_token_id

    def __call__(self, text, **kwargs):
        return (
            {"input_ids": text.ids}
            if isinstance(text, _ExactAnswer)
            else self.tokenizer(text, **kwargs)
        )


def test_slot_usage_by_definition():
    assert compute_slot_usage(torch.tensor([5, 5, 5, 5])) == {
        "used_fraction": 1.0,
        "dead": 0.0,
        "usage_entropy": pytest.approx(1.0),
    }
    assert compute_slot_usage(torch.tensor([7, 7, 0, 0])) == {
        "used_fraction": 0.5,
        "dead": 2.0,
        "usage_entropy": pytest.approx(0.5),
    }


def test_measuring_keeps_the_training_mode(student, teacher, tokens, tokenizer):
    student.train()
    measure_fidelity(student, teacher, tokens)
    measure_recall(student, tokenizer, [Probe("a", " b", "", "", 0)])
    generate_greedy(student, tokens[:, :4], 2)
    assert student.training


def test_models_are_measured_without_dropout(teacher, tokens, tokenizer):
    student = make_teacher(resid_pdrop=0.5, embd_pdrop=0.5)
    prompts = torch.tensor(
        [[tokenizer.eos_token_id, *tokenizer(text).input_ids] for text in ("the quick", "a memory")]
    )
    answer_ids = generate_greedy(student, prompts, 3)
    probes = [
        Probe(text, _ExactAnswer(ids.tolist()), "", "", 0)
        for text, ids in zip(("the quick", "a memory"), answer_ids, strict=True)
    ]
    before = measure_fidelity(student, teacher, tokens)
    student.train()
    assert measure_fidelity(student, teacher, tokens) == before
    assert measure_recall(student, _ExactTokenizer(tokenizer), probes) == 1
    assert torch.equal(generate_greedy(student, prompts, 3), answer_ids)


def test_an_overflowing_perplexity_is_infinite():
    metrics = FidelityMetrics(tokens=2, teacher_nll=4, student_nll=2000)
    assert (metrics.student_perplexity, metrics.ppl_ratio) == (math.inf, math.inf)
    assert metrics.teacher_perplexity == pytest.approx(math.e**2)


def test_metrics_have_a_readable_repr(teacher, tokens):
    metrics = measure_fidelity(teacher, teacher, tokens)
    assert repr(metrics).startswith("FidelityMetrics(ppl_ratio=1.0000, kl=")
    assert "tokens=57" in repr(metrics)
    assert repr(FidelityMetrics()) == "FidelityMetrics(tokens=0)"
    assert set(metrics.to_dict()) >= {"ppl_ratio", "kl", "top1_agreement"}


def test_evaluate_compares_plain_models_on_token_ids(student, teacher, tokens):
    metrics = evaluate(student, teacher, tokens, batch_size=2)
    expected = measure_fidelity(student, teacher, tokens)
    assert metrics.kl == pytest.approx(expected.kl, rel=1e-5)
    assert (metrics.tokens, metrics.top1_matches) == (expected.tokens, expected.top1_matches)
    assert evaluate(student.train(), teacher, tokens).kl == pytest.approx(metrics.kl, rel=1e-5)
    assert student.training


def test_evaluate_reads_the_test_text_of_files_and_corpora(student, teacher, tokenizer, text_file):
    options = {"tokenizer": tokenizer, "seq_len": 16, "max_tokens": 64}
    from_file = evaluate(student, teacher, text_file, **options)
    assert from_file.tokens == 4 * 15
    assert 0 < from_file.kl < math.inf
    corpus = Corpus("mine", [], [], ["the quick brown fox jumps over the lazy dog"] * 20)
    from_corpus = evaluate(student, teacher, corpus, **options)
    both = evaluate(student, teacher, [text_file, corpus], **options)
    assert both.tokens == from_file.tokens + from_corpus.tokens
    assert both.kl_sum == pytest.approx(from_file.kl_sum + from_corpus.kl_sum)


def test_evaluate_names_the_argument_that_is_wrong(student, teacher, tokenizer, tokens, text_file):
    for arguments, message in (
        ((student, teacher, text_file), "tokenizer is needed where data is text"),
        ((student, teacher, [], tokenizer), "data is empty"),
        ((student, teacher, tokens[0]), r"data must have token ids of shape \(windows, time\)"),
        ((student, teacher, tokens[:, :1]), "data must have token ids"),
        ((student, make_teacher(299), tokens), "must have the same vocabulary, got 300 and 299"),
        ((student, teacher, Corpus("mine", [], [], ["a"]), tokenizer), "fewer than seq_len=32"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            evaluate(*arguments)
        assert isinstance(raised.value, ValueError)
    with pytest.raises(UserError, match="batch_size must be at least 1, got 0"):
        evaluate(student, teacher, tokens, batch_size=0)
    with pytest.raises(UserError, match="seq_len must be at least 2, got 1"):
        evaluate(student, teacher, text_file, tokenizer, seq_len=1)


def test_saved_students_have_the_fidelity_of_their_record(distill_args, tmp_path):
    assert distill_main(distill_args) == 0
    run_dir = newest(tmp_path)
    student = AutoModelForCausalLM.from_pretrained(run_dir / "student").eval()
    config = config_io.load_config(run_dir / "config.yaml")
    teacher, tokenizer = load_teacher(config.teacher)
    data = TextDataModule(config, tokenizer, 1)
    data.setup()
    windows = select_first_windows(data.corpora[0].test, config.data.test_tokens)
    assert measure_fidelity(student, teacher, windows).kl == pytest.approx(
        read_record(run_dir)["fidelity"]["text"]["kl"], rel=1e-5
    )
