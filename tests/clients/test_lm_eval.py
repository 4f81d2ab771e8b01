"""lm-eval: perplexity of a student equals that of `dmt.evaluate` on the same windows."""

import math

import pytest
import torch
from conftest import SENTENCES

import dmt

huggingface = pytest.importorskip("lm_eval.models.huggingface")
api = pytest.importorskip("lm_eval.api.instance")


WINDOW = 16  # tokens that are predicted at once


@pytest.mark.parametrize("batch_size", [1, 4])
def test_perplexity_is_that_of_evaluate(student, long_teacher, student_tokenizer, batch_size):
    ids = student_tokenizer(" ".join(SENTENCES)).input_ids
    ids = ids[: len(ids) // WINDOW * WINDOW]
    text = student_tokenizer.decode(ids)
    assert student_tokenizer(text).input_ids == ids
    # lm-eval's windows share one token, so that every token is predicted once.
    stream = torch.tensor([student_tokenizer.eos_token_id, *ids])
    windows = stream.unfold(0, WINDOW + 1, WINDOW)
    expected = dmt.evaluate(student, long_teacher, windows)
    model = huggingface.HFLM(
        pretrained=student,
        tokenizer=student_tokenizer,
        batch_size=batch_size,
        max_length=WINDOW,
        device="cpu",
    )
    request = api.Instance("loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
    (log_likelihood,) = model.loglikelihood_rolling([request], disable_tqdm=True)
    assert expected.tokens == len(ids)
    perplexity = math.exp(-log_likelihood / len(ids))
    assert perplexity == pytest.approx(expected.student_perplexity, rel=1e-5)


def test_a_task_with_choices_reads_the_student(student, student_tokenizer):
    model = huggingface.HFLM(pretrained=student, tokenizer=student_tokenizer, device="cpu")
    context, choices = "Ada Holbrook was born in", (" the town of Ravenhill", " a table")
    requests = [
        api.Instance("loglikelihood", doc={}, arguments=(context, choice), idx=index)
        for index, choice in enumerate(choices)
    ]
    for choice, (log_likelihood, _) in zip(
        choices, model.loglikelihood(requests, disable_tqdm=True), strict=True
    ):
        ids = student_tokenizer(context + choice, return_tensors="pt").input_ids
        start = len(student_tokenizer(context).input_ids)
        with torch.no_grad():
            log_probs = student(ids).logits[0, start - 1 : -1].log_softmax(-1)
        expected = log_probs.gather(1, ids[0, start:, None]).sum()
        assert log_likelihood == pytest.approx(float(expected), rel=1e-5)


def test_generation_is_that_of_the_student(student, student_tokenizer):
    model = huggingface.HFLM(
        pretrained=student, tokenizer=student_tokenizer, batch_size=2, device="cpu"
    )
    options = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    prompts = [sentence[:20] for sentence in SENTENCES]
    requests = [
        api.Instance("generate_until", doc={}, arguments=(prompt, options), idx=index)
        for index, prompt in enumerate(prompts)
    ]
    expected = []
    for prompt in prompts:
        inputs = student_tokenizer(prompt, return_tensors="pt")
        ids = student.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
        text = student_tokenizer.decode(
            ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True
        )
        expected.append(text.split("\n")[0])
    assert model.generate_until(requests, disable_tqdm=True) == expected
