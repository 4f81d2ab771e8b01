"""Rows written from a context: spans, facts and activation differences."""

from types import SimpleNamespace

import torch
from factories import PERSON_TEXT

from dmt.config import Config, ContextConfig
from dmt.consolidation import rows
from dmt.consolidation.context import (
    CONTEXT_SEPARATOR,
    read_context,
)
from dmt.consolidation.rows import (
    Span,
    _completes_name,
    _group_words,
    extract_qa_facts,
    extract_stated_facts,
    find_informative_spans,
    write_activation_deltas,
)
from dmt.consolidation.sampling import encode_sentences
from dmt.consolidation.targets import make_student
from dmt.editing.fact_store import FactStore
from dmt.evaluation.questions import (
    Question,
    score_answers,
)
from dmt.models.forward import (
    ContextTeacher,
    encode_text,
    forward_with_prefix,
)
from dmt.models.loading import load_teacher


def test_tokens_are_grouped_into_words_and_names_are_completed():
    assert _group_words(["Ada", " Fo", "x", " sells", " hat", "s", ".", " She"]) == [
        [1, 2],
        [3],
        [4, 5],
        [7],
    ]
    assert _completes_name("Ada", " Fox", ["Ada Fox"])
    assert _completes_name("When was Ada", " Fox's", ["Ada Fox"])
    assert not _completes_name("Ada Fox sells", " hats", ["Ada Fox"])
    assert not _completes_name("The town of", " Ada", ["Ada Fox"])


def test_extract_stated_facts(embedded):
    facts = extract_stated_facts(
        ["Ada Fox was born in Hill.", "Is it?", "Her dog is called Rex."], ["Ada Fox"], "t", "s"
    )
    assert [(fact.prompt, fact.answer, fact.subject) for fact in facts] == [
        ("Ada Fox was born in", " Hill", "Ada Fox"),
        ("Her dog is called", " Rex", ""),
    ]


def test_activation_deltas_reproduce_the_predictions_with_context(embedded, tmp_path):
    model, tokenizer = load_teacher("reader")
    folder = tmp_path / "student"
    make_student(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    window = read_context(ContextConfig(text=PERSON_TEXT), tokenizer, 256).chunks[0]
    context_teacher, texts = ContextTeacher(model, window.ids), encode_sentences(window, tokenizer)
    spans = find_informative_spans(model, context_teacher, tokenizer, texts, window.names)
    assert {span.subject for span in spans} == {"Percy Talner"}
    assert any("butcher" in span.answer for span in spans)
    with FactStore.open(folder) as fact_store:
        fact_store.initialize([], value_layer=3)
        outcomes = write_activation_deltas(fact_store, context_teacher, spans, "tag", "source")
        written = [
            span
            for span, outcome in zip(spans, outcomes, strict=True)
            if outcome.status == "written"
        ]
        assert len(written) > 4
        assert {fact.tag for fact in fact_store.records.values()} == {"tag"}
        for span in written:
            tokens = torch.tensor([span.ids])
            predicted, expected = (
                forward_with_prefix(fact_store.model, [0], tokens).logits[0],
                context_teacher.predict(tokens).logits[0],
            )
            positions = slice(span.first - 1, span.last)
            torch.testing.assert_close(
                predicted[positions].log_softmax(-1),
                expected[positions].log_softmax(-1),
                rtol=1e-3,
                atol=2e-3,
            )
        alone = torch.tensor(
            [encode_text(tokenizer, "Ada Fox has worked for many years at", add_prefix=False)]
        )
        torch.testing.assert_close(
            forward_with_prefix(fact_store.model, [0], alone).logits,
            forward_with_prefix(model, [0], alone).logits,
        )


def test_questions_become_facts_where_the_context_answers_them(embedded):
    model, tokenizer = load_teacher("reader")
    context_teacher, names = (
        ContextTeacher(model, encode_text(tokenizer, PERSON_TEXT + CONTEXT_SEPARATOR)),
        ["Percy Talner"],
    )
    generated = [
        ("Percy Talner works as a trained", "butcher"),
        ("Percy Talner works as a trained", "was"),
        ("He is a trained", "butcher"),
    ]
    texts = [
        encode_text(tokenizer, f"{prompt}\nAnswer: {answer}", add_prefix=False)
        for prompt, answer in generated
    ]
    facts = extract_qa_facts(model, context_teacher, tokenizer, texts, names, "t", "s")
    questions = [Question(f"{prompt}\nAnswer:", f" {answer}") for prompt, answer in generated[:2]]
    record = [
        score_answers(predict, tokenizer, questions, torch.device("cpu")).nlls
        for predict in (lambda x: forward_with_prefix(model, [0], x), context_teacher.predict)
    ]
    expected = [
        q
        for q, without, with_context in zip(questions, *record, strict=True)
        if without - with_context >= 1
    ]
    assert len(expected) == 1, "one question is answered by the context, one is not"
    assert [(fact.prompt, fact.answer, fact.subject) for fact in facts] == [
        (q.prompt, q.answer, names[0]) for q in expected
    ]


def test_is_stated_looks_for_subject_and_answer_in_one_sentence():
    window = SimpleNamespace(sentences=["Ada Fox sells hats.", "Bo Ray sells cats."])
    run_state = SimpleNamespace(context=SimpleNamespace(chunks=[window]))
    for answer, subject, is_stated in (
        (" hats", "Ada Fox", True),
        (" cats,", "Bo Ray", True),
        (" cats", "Ada Fox", False),
        (" cats", "", True),
    ):
        assert rows._is_stated(run_state, Span((1, 2), 1, 1, "p", answer, subject)) == is_stated


def config_of(**context):
    return Config(context=ContextConfig(text="the quick brown fox", **context))


def test_only_stated_spans_of_continuations_are_collected(monkeypatch):
    spans = [
        Span((1, 2), 1, 1, "Ada Fox sells", " hats", "Ada Fox"),
        Span((1, 2), 1, 1, "Ada Fox sells", " cats", "Ada Fox"),
    ]
    monkeypatch.setattr(rows, "encode_sentences", lambda *_: [])
    monkeypatch.setattr(rows, "sample_continuations", lambda *_: [[1, 2]])
    monkeypatch.setattr(rows, "generate_qa", lambda *_: [])
    monkeypatch.setattr(rows, "is_subject_recent", lambda *_: True)
    monkeypatch.setattr(
        rows,
        "find_informative_spans",
        lambda _, __, ___, texts, ____, min_prob: (
            spans if texts and min_prob == rows.MIN_GENERATED_PROB else []
        ),
    )
    window = SimpleNamespace(
        sentences=["Ada Fox sells hats.", "Bo Ray sells cats."], names=["Ada Fox"]
    )
    run_state = SimpleNamespace(
        context=SimpleNamespace(chunks=[window]),
        config=config_of(),
        teachers=[None],
        base=None,
        tokenizer=None,
    )
    assert rows._collect_spans(run_state, 0) == ([], spans[:1])
