"""Texts sampled after a context, generated questions and the batches made of them."""

from types import SimpleNamespace

import torch
from factories import PERSON_TEXT

from dmt.config import ContextConfig
from dmt.consolidation import sampling
from dmt.consolidation.context import (
    MAX_TEXT_TOKENS,
    read_context,
)
from dmt.consolidation.sampling import BatchSampler, sample_continuations
from dmt.models.forward import (
    ContextTeacher,
    encode_text,
)


def test_generated_questions_are_answered_by_their_sentence(embedded, monkeypatch):
    model, tokenizer = embedded
    window = read_context(ContextConfig(text="Ada Fox sells hats in Hill."), tokenizer, 256).chunks[
        0
    ]
    assert sampling.generate_qa(model, window, tokenizer, ContextConfig(text="x"), 0) == [], (
        "no room for the examples"
    )

    class Shown:
        def __init__(self, _, ids):
            assert tokenizer.decode(ids[1:]) == sampling.FEW_SHOT_PROMPT

        def sample(self, opener, count, *_):
            assert tokenizer.decode(opener) == "Text: Ada Fox sells hats in Hill.\nQuestion:"
            message = (
                " Who sells hats?\nAnswer: Ada Fox.\n\nText: B",
                " Who?\nAnswer: Bo Ray\n",
                " Where?",
                " Who sells hats?\nAnswer: Ada Fox",
            )
            assert count == 5
            return [opener + encode_text(tokenizer, text, add_prefix=False) for text in message]

    monkeypatch.setattr(sampling, "ContextTeacher", Shown)
    wide = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=4_096))
    generated = sampling.generate_qa(
        wide, window, tokenizer, ContextConfig(text="x", qa_per_sentence=5), 0
    )
    assert [tokenizer.decode(text) for text in generated] == [
        "Question: Who sells hats?\nAnswer: Ada Fox"
    ]


def test_batches_are_a_function_of_seed_and_step(embedded):
    model, tokenizer = embedded
    settings_ = ContextConfig(text=PERSON_TEXT, num_samples=6, resample_every=2)
    context = read_context(settings_, tokenizer, 256)
    context_teachers = [ContextTeacher(model, window.ids) for window in context.chunks]
    first, second = (
        BatchSampler(context_teachers, tokenizer, context, settings_, 4, 0, blocks=True)
        for _ in range(2)
    )
    a, b = first.get_batch(3), second.get_batch(3)
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.mask, b.mask)
    assert a.teacher_signals is not None
    assert len(a.teacher_signals.layer_outputs) == 4
    torch.testing.assert_close(a.teacher_signals.logits, first.teachers[0].predict(a.tokens).logits)
    assert first.get_texts(0, 0) == second.get_texts(0, 1) != first.get_texts(0, 2)
    lengths = a.mask.sum(1)
    assert int(lengths.max()) == a.tokens.shape[1]
    assert all(a.mask[row, : int(n)].all() for row, n in enumerate(lengths))


def test_continuations_end_with_a_sentence(embedded):
    model, tokenizer = embedded
    settings_ = ContextConfig(text=PERSON_TEXT, num_samples=12)
    window = read_context(settings_, tokenizer, 256).chunks[0]
    texts = sample_continuations(ContextTeacher(model, window.ids), window, tokenizer, settings_, 0)
    assert 4 <= len(texts) <= 12
    assert all(2 < len(text) <= MAX_TEXT_TOKENS for text in texts)
