"""From context to memory, weights and tokens: what is read, what is written, what is exact and what is refused."""

import csv
import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_llama, make_teacher, newest
from factories import consolidation
from test_tensorboard import charts, events
from test_distillation import check_alone
from transformers import AutoModelForCausalLM, AutoTokenizer

from dmt import config_io
from dmt.cli.main import distill_main
from dmt.cli.main import main as dmt
from dmt.config import Config, ContextConfig, DataConfig, LossConfig
from dmt.consolidation import rows, sampling
from dmt.consolidation.context import (
    CONTEXT_SEPARATOR,
    MAX_TEXT_TOKENS,
    read_context,
    split_sentences,
)
from dmt.consolidation.module import _compare_streams, build_loss_config
from dmt.consolidation.rows import (
    Span,
    _completes_name,
    _group_words,
    extract_qa_facts,
    extract_stated_facts,
    find_informative_spans,
    write_activation_deltas,
)
from dmt.consolidation.sampling import BatchSampler, encode_sentences, sample_continuations
from dmt.consolidation.targets import check_target, make_student, merge_adapters, prepare_student
from dmt.data.windows import get_prefix_ids
from dmt.editing.fact_store import open_fact_store
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
    ContextTeacher,
    encode_text,
    forward_with_activations,
    forward_with_prefix,
)
from dmt.models.loading import load_teacher
from dmt.training.interrupts import RunInterrupted

ROOT = Path(__file__).parents[2]
PERSON = ROOT / "configs" / "consolidation" / "person"
TEXT = PERSON.with_suffix(".txt").read_text().strip()


@pytest.fixture(scope="module")
def embedded():
    return load_teacher("embedded")


@pytest.fixture
def long_folder(tokenizer, tmp_path):
    """A tiny teacher that reads enough for a context and something after it."""
    folder = tmp_path / "teacher"
    make_teacher(len(tokenizer), n_positions=256).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(long_folder, text_file, tmp_path):
    """Words of a consolidation that takes seconds."""
    return consolidation(long_folder, text_file, tmp_path, "context.prompt_length=3")


def results(tmp_path):
    return json.loads((newest(tmp_path) / "run.json").read_text())


# Reading


def test_sentences_end_where_people_end_them():
    text = 'Mr. Osgood came in 1902. "Is it so?" he said! It was.\nA line\n\nAnother'
    assert split_sentences(text) == [
        "Mr. Osgood came in 1902.",
        '"Is it so?" he said!',
        "It was.",
        "A line",
        "Another",
    ]


def test_a_context_is_read_in_windows_that_leave_room_and_lose_nothing(embedded):
    _, tokenizer = embedded
    text = (ROOT / "configs/consolidation/people.txt").read_text().strip()
    context = read_context(ContextConfig(text=text), tokenizer, 256)
    assert len(context.chunks) > 1
    assert all(len(window.ids) + MAX_TEXT_TOKENS <= 256 for window in context.chunks)
    read = " ".join(
        tokenizer.decode(window.ids[1:]).removesuffix(CONTEXT_SEPARATOR)
        for window in context.chunks
    )
    assert read.split() == text.split()
    assert sum(len(window.sentences) for window in context.chunks) == len(split_sentences(text))


@pytest.mark.parametrize(
    "text",
    [
        "word " * 2_000,
        "x" * 3_000,
        "A short one. " + "many words follow here " * 100 + ". The end.",
    ],
)
def test_a_sentence_longer_than_a_window_is_cut(embedded, text):
    _, tokenizer = embedded
    context = read_context(ContextConfig(text=text), tokenizer, 256)
    assert all(1 < len(window.ids) <= 256 - MAX_TEXT_TOKENS for window in context.chunks)
    said = "".join(tokenizer.decode(window.ids[1:]) for window in context.chunks)
    assert "".join(said.split()) == "".join(text.split())


def test_pronouns_are_the_name_said_last_across_windows(embedded):
    _, tokenizer = embedded
    text = "Ada Fox was born in Hill. She sells hats. Her dog is called Rex.\n\nIt barks. Bo Ray was seen in Wall. His hat is red."
    sentences = [
        each
        for window in read_context(ContextConfig(text=text), tokenizer, 256).chunks
        for each in window.sentences
    ]
    assert sentences[1:3] == ["Ada Fox sells hats.", "Ada Fox's dog is called Rex."]
    assert (
        sentences[3] == "Ada Fox barks."
    )  # a sentence that is about nobody changes nothing of that
    assert sentences[5] == "Bo Ray's hat is red."


def test_a_sentence_about_nobody_does_not_take_the_name_away(embedded):
    text = "Ada Fox was born in Hill. it rains a lot. She sells hats."
    sentences = (
        read_context(ContextConfig(text=text.replace("it", "Then it")), embedded[1], 256)
        .chunks[0]
        .sentences
    )
    assert sentences[-1] == "Ada Fox sells hats."


def test_a_word_that_opens_a_sentence_is_no_name(embedded):
    text = "Before the war a baker lived in Hill. Only two came. Rex barks at Rex, and Ossel runs. Today nobody is left."
    [window] = read_context(ContextConfig(text=text), embedded[1], 256).chunks
    assert window.names == ["Rex"]


def test_a_date_is_not_whom_a_sentence_is_about(embedded):
    _, tokenizer = embedded
    context = read_context(ContextConfig(text=TEXT), tokenizer, 256)
    assert context.chunks[0].names == ["Percy Talner"]
    assert (
        context.chunks[0].sentences[1]
        == "Percy Talner has worked for many years at Juniper Railways."
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "got neither"),
        ({"text": "a", "file": "b"}, "got both"),
        ({"file": "nowhere.txt"}, "cannot be read"),
        ({"text": " "}, "is empty"),
        ({"text": "a b c d e f g h", "capacity": 2}, "more than context.max_tokens=2"),
    ],
)
def test_what_is_no_context_is_refused(embedded, given, said):
    with pytest.raises(UserError, match=said):
        read_context(ContextConfig(**given), embedded[1], 256)


def test_a_file_that_is_no_text_is_refused(embedded, tmp_path):
    file = tmp_path / "x.txt"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        read_context(ContextConfig(file=str(file)), embedded[1], 256)
    with pytest.raises(UserError, match="leaves no room"):
        read_context(ContextConfig(text="a"), embedded[1], 100)
    with pytest.raises(UserError, match=r"context.prompt_length lower"):
        read_context(ContextConfig(text="a"), embedded[1], 256, num_prefix_tokens=150)


# Hearing


@pytest.mark.parametrize("make", [make_teacher, make_llama])
def test_what_was_read_once_counts_as_if_it_stood_before_each_text(make, tokenizer, tokens):
    positions = {"n_positions": 64} if make is make_teacher else {"max_position_embeddings": 64}
    model = make(len(tokenizer), **positions)
    before = [0, 5, 6, 7, 8]
    hearing = ContextTeacher(model, before)
    for _ in range(2):  # hearing one text leaves nothing behind for the next
        seen = hearing.predict(tokens, blocks=True)
        whole = forward_with_activations(
            model, torch.cat([torch.tensor([before] * 3), tokens], 1), capture_blocks=True
        )
        torch.testing.assert_close(seen.logits, whole.logits[:, 5:], rtol=1e-4, atol=1e-4)
        for mine, theirs in (
            (seen.layer_outputs, whole.layer_outputs),
            (seen.block_inputs, whole.block_inputs),
        ):
            assert len(mine) == model.config.num_hidden_layers
            for a, b in zip(mine, theirs, strict=True):
                torch.testing.assert_close(a, b[:, 5:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        forward_with_prefix(model, before, tokens).logits, whole.logits[:, 5:], rtol=1e-4, atol=1e-4
    )
    width = model.config.hidden_size // (2 if make is make_teacher else 4) * 2
    assert hearing.cache_bytes == 2 * model.config.num_hidden_layers * width * len(before) * 4


def test_gradients_reach_what_stands_before(teacher, tokens):
    teacher.requires_grad_(True)
    forward_with_prefix(teacher, [0, 299], tokens).logits.sum().backward()
    assert teacher.get_input_embeddings().weight.grad[299].abs().sum() > 0


def test_what_is_drawn_depends_on_the_seed_and_disturbs_nobody(embedded):
    model, tokenizer = embedded
    hearing = ContextTeacher(model, encode_text(tokenizer, TEXT + CONTEXT_SEPARATOR))
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    drawn = [
        hearing.sample(opener, 3, 20, 1.0, seed, 0)
        for seed, opener in ((1, []), (1, []), (2, []), (1, [5, 6]))
    ]
    assert torch.equal(torch.rand(2), wanted)
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(text) <= 20 and 0 not in text for texts in drawn for text in texts)
    assert all(text[:2] == [5, 6] for text in drawn[3])
    assert hearing.sample([5] * 20, 3, 20, 1.0, 0, 0) == []


def test_what_is_drawn_is_what_the_model_with_the_context_would_say(embedded):
    model, tokenizer = embedded
    hearing = ContextTeacher(model, encode_text(tokenizer, TEXT + CONTEXT_SEPARATOR))
    [cold] = hearing.sample([], 1, 8, 1e-4, 0, None)
    given = torch.tensor([hearing.ids])
    for token in cold:
        assert int(forward_with_activations(model, given).logits[0, -1].argmax()) == token
        given = torch.cat([given, torch.tensor([[token]])], 1)


# Asking


def test_nats_are_of_the_answer_alone_and_right_means_all_of_it(embedded):
    model, tokenizer = embedded
    questions = [
        Question("The capital of France is", " Paris"),
        Question("We", " the people of this country"),
    ]
    found = score_answers(
        lambda tokens: forward_with_prefix(model, [0], tokens),
        tokenizer,
        questions,
        torch.device("cpu"),
    )
    for question, nats, right in zip(questions, found.nlls, found.correct, strict=True):
        prompt, answer = (
            encode_text(tokenizer, text, add_prefix=False)
            for text in (question.prompt, question.answer)
        )
        logits = (
            forward_with_activations(model, torch.tensor([[0, *prompt, *answer]]))
            .logits[0, :-1]
            .log_softmax(-1)
        )
        where = range(len(prompt), len(prompt) + len(answer))
        assert nats == pytest.approx(
            -sum(float(logits[at, token]) for at, token in zip(where, answer, strict=True)),
            abs=1e-3,
        )
        assert right == all(
            int(logits[at].argmax()) == token for at, token in zip(where, answer, strict=True)
        )


def test_the_share_kept_is_what_the_issue_says():
    known, without = (
        AnswerScores([1.0, 3.0], [True, False]),
        AnswerScores([4.0, 8.0], [False, False]),
    )
    assert benefit_retained(known, without, without) == 0
    assert benefit_retained(known, without, known) == 1
    assert benefit_retained(known, without, AnswerScores([2.5, 5.5], [True, True])) == 0.5
    assert math.isnan(benefit_retained(without, known, known))
    assert best_scores(
        [AnswerScores([1.0, 9.0], [True, False]), AnswerScores([2.0, 3.0], [False, True])]
    ) == AnswerScores([1.0, 3.0], [True, True])
    assert known.mean_log_prob == -2
    assert known.recall == 0.5


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
def test_what_is_no_question_is_refused(tmp_path, line):
    file = tmp_path / "q.jsonl"
    file.write_text(f"\n{line}\n")
    with pytest.raises(UserError, match=r"line 2|holds no questions"):
        load_questions(file)


# Writing


def test_words_and_names():
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


def test_what_sentences_state(embedded):
    facts = extract_stated_facts(
        ["Ada Fox was born in Hill.", "Is it?", "Her dog is called Rex."], ["Ada Fox"], "t", "s"
    )
    assert [(fact.prompt, fact.answer, fact.subject) for fact in facts] == [
        ("Ada Fox was born in", " Hill", "Ada Fox"),
        ("Her dog is called", " Rex", ""),
    ]


def test_a_difference_gives_what_the_model_with_the_context_says_exactly(embedded, tmp_path):
    model, tokenizer = load_teacher("reader")
    folder = tmp_path / "student"
    make_student(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    window = read_context(ContextConfig(text=TEXT), tokenizer, 256).chunks[0]
    hearing, texts = ContextTeacher(model, window.ids), encode_sentences(window, tokenizer)
    spans = find_informative_spans(model, hearing, tokenizer, texts, window.names)
    assert {span.subject for span in spans} == {"Percy Talner"}
    assert any("butcher" in span.answer for span in spans)
    with open_fact_store(folder) as book:
        book.initialize([], value_layer=3)
        outcomes = write_activation_deltas(book, hearing, spans, "tag", "source")
        written = [
            span
            for span, outcome in zip(spans, outcomes, strict=True)
            if outcome.status == "written"
        ]
        assert len(written) > 4
        assert {fact.tag for fact in book.records.values()} == {"tag"}
        for span in written:
            tokens = torch.tensor([span.ids])
            mine, wanted = (
                forward_with_prefix(book.model, [0], tokens).logits[0],
                hearing.predict(tokens).logits[0],
            )
            where = slice(span.first - 1, span.last)
            torch.testing.assert_close(
                mine[where].log_softmax(-1), wanted[where].log_softmax(-1), rtol=1e-3, atol=2e-3
            )
        alone = torch.tensor(
            [encode_text(tokenizer, "Ada Fox has worked for many years at", add_prefix=False)]
        )
        torch.testing.assert_close(
            forward_with_prefix(book.model, [0], alone).logits,
            forward_with_prefix(model, [0], alone).logits,
        )


def test_a_model_asks_itself_what_a_sentence_answers(embedded, monkeypatch):
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
            said = (
                " Who sells hats?\nAnswer: Ada Fox.\n\nText: B",
                " Who?\nAnswer: Bo Ray\n",
                " Where?",
                " Who sells hats?\nAnswer: Ada Fox",
            )
            assert count == 5
            return [opener + encode_text(tokenizer, text, add_prefix=False) for text in said]

    monkeypatch.setattr(sampling, "ContextTeacher", Shown)
    wide = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=4_096))
    asked = sampling.generate_qa(
        wide, window, tokenizer, ContextConfig(text="x", qa_per_sentence=5), 0
    )
    assert [tokenizer.decode(text) for text in asked] == [
        "Question: Who sells hats?\nAnswer: Ada Fox"
    ]


def test_a_question_is_a_fact_where_the_context_answers_it(embedded):
    model, tokenizer = load_teacher("reader")
    hearing, names = (
        ContextTeacher(model, encode_text(tokenizer, TEXT + CONTEXT_SEPARATOR)),
        ["Percy Talner"],
    )
    asked = [
        ("Percy Talner works as a trained", "butcher"),
        ("Percy Talner works as a trained", "was"),
        ("He is a trained", "butcher"),
    ]
    texts = [
        encode_text(tokenizer, f"{prompt}\nAnswer: {answer}", add_prefix=False)
        for prompt, answer in asked
    ]
    facts = extract_qa_facts(model, hearing, tokenizer, texts, names, "t", "s")
    questions = [Question(f"{prompt}\nAnswer:", f" {answer}") for prompt, answer in asked[:2]]
    found = [
        score_answers(says, tokenizer, questions, torch.device("cpu")).nlls
        for says in (lambda x: forward_with_prefix(model, [0], x), hearing.predict)
    ]
    wanted = [
        q for q, without, known in zip(questions, *found, strict=True) if without - known >= 1
    ]
    assert len(wanted) == 1, "the test tells one from the other"
    assert [(fact.prompt, fact.answer, fact.subject) for fact in facts] == [
        (q.prompt, q.answer, names[0]) for q in wanted
    ]


def test_what_a_model_says_itself_has_to_stand_in_the_context():
    window = SimpleNamespace(sentences=["Ada Fox sells hats.", "Bo Ray sells cats."])
    work = SimpleNamespace(context=SimpleNamespace(windows=[window]))
    for answer, subject, stands in (
        (" hats", "Ada Fox", True),
        (" cats,", "Bo Ray", True),
        (" cats", "Ada Fox", False),
        (" cats", "", True),
    ):
        assert rows._is_stated(work, Span((1, 2), 1, 1, "p", answer, subject)) == stands


def test_of_what_a_model_went_on_with_only_that_is_written(monkeypatch):
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
        lambda _, __, ___, texts, ____, sure: (
            spans if texts and sure == rows.MIN_GENERATED_PROB else []
        ),
    )
    window = SimpleNamespace(
        sentences=["Ada Fox sells hats.", "Bo Ray sells cats."], names=["Ada Fox"]
    )
    work = SimpleNamespace(
        context=SimpleNamespace(windows=[window]),
        config=config_of(),
        hearings=[None],
        base=None,
        tokenizer=None,
    )
    assert rows._collect_spans(work, 0) == ([], spans[:1])


# Destinations


def config_of(**context):
    return Config(context=ContextConfig(text="the quick brown fox", **context))


def test_a_plain_model_becomes_a_student_that_says_the_same(any_teacher, tokens):
    student = make_student(any_teacher)
    assert student.config.model_type.startswith("dmt_")
    torch.testing.assert_close(student(tokens).logits, any_teacher(tokens).logits)
    torch.testing.assert_close(make_student(student)(tokens).logits, any_teacher(tokens).logits)


def test_low_rank_additions_begin_as_nothing_and_are_merged(any_teacher, tokenizer, tokens):
    student, chosen = prepare_student(
        config_of(into="weights", rank=2), make_student(any_teacher), tokenizer, "x"
    )
    torch.testing.assert_close(student(tokens).logits, any_teacher(tokens).logits)
    assert chosen
    assert all("lora_" in name for name in chosen)
    assert {name for name, p in student.named_parameters() if p.requires_grad} == set(chosen)
    inside = {name.split(".lora_")[0].split(".", 3)[-1] for name in chosen}
    assert len(inside) >= 4, "attention and feed-forward blocks"
    with torch.no_grad():
        for parameter in chosen.values():
            parameter.normal_(std=0.3)
    wanted = student(tokens).logits.detach()
    assert (wanted - any_teacher(tokens).logits).abs().max() > 0.1
    merged = merge_adapters(student)
    torch.testing.assert_close(merged(tokens).logits, wanted, rtol=1e-4, atol=1e-4)
    assert set(merged.state_dict()) == set(make_student(any_teacher).state_dict())


def test_memory_tokens_are_embeddings_before_every_text(any_teacher, tokenizer, tokens, tmp_path):
    vocabulary = len(tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(_saved(tokenizer, tmp_path / "t"))
    student, chosen = prepare_student(
        config_of(into="tokens", tokens=3),
        make_student(any_teacher),
        tokenizer,
        "the quick brown fox",
    )
    assert list(chosen) == ["memory_tokens"]
    assert chosen["memory_tokens"].shape == (3, 16)
    before = get_prefix_ids(tokenizer)
    assert before == [0, vocabulary, vocabulary + 1, vocabulary + 2]
    torch.testing.assert_close(
        student(tokens).logits, any_teacher(tokens).logits
    )  # who does not use them sees nothing of them
    embed = any_teacher.get_input_embeddings()
    with torch.no_grad():
        chosen["memory_tokens"].normal_()
    given = torch.cat(
        [embed(torch.tensor([[0]] * 3)), chosen["memory_tokens"].expand(3, 3, 16), embed(tokens)], 1
    )
    wanted = any_teacher(inputs_embeds=given).logits[:, 4:]
    torch.testing.assert_close(forward_with_prefix(student, before, tokens).logits, wanted)
    assert wanted.shape[-1] == any_teacher.config.vocab_size, (
        "memory tokens are read and never said"
    )
    forward_with_prefix(student, before, tokens).logits.sum().backward()
    assert chosen["memory_tokens"].grad.abs().sum() > 0
    student.save_pretrained(tmp_path / "s")
    tokenizer.save_pretrained(tmp_path / "s")
    loaded, again = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "s"),
        AutoTokenizer.from_pretrained(tmp_path / "s"),
    )
    assert get_prefix_ids(again) == before
    assert again("the quick")["input_ids"] == before + encode_text(
        tokenizer, "the quick", add_prefix=False
    )
    torch.testing.assert_close(forward_with_prefix(loaded, before, tokens).logits, wanted)
    said = loaded.generate(
        torch.tensor([before]), max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    assert said.shape == (1, 8)
    assert int(said[0, 4:].max()) < vocabulary


def _saved(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return folder


def test_a_destination_that_is_not_there_is_refused(teacher, tokenizer, tmp_path):
    with pytest.raises(UserError, match="has none; name a distilled student"):
        check_target(ContextConfig(target="weights", trainable="slots"), teacher)
    tokenizer = AutoTokenizer.from_pretrained(_saved(tokenizer, tmp_path / "t"))
    student, _ = prepare_student(
        config_of(into="tokens", tokens=2), make_student(teacher), tokenizer, "the quick"
    )
    with pytest.raises(UserError, match="has memory tokens already"):
        check_target(ContextConfig(target="tokens"), student)


def test_an_objective_is_one_loss():
    for objective, term in {
        "causal_lm": "ce",
        "logits": "kl",
        "generated": "kl",
        "hidden_last": "hidden",
        "hidden_all": "block",
    }.items():
        config = replace(
            config_of(objective=objective), loss=LossConfig(kl=0.5, ce=0, temperature=2.0)
        )
        weights = build_loss_config(config)
        on = {
            name: getattr(weights, name)
            for name in ("kl", "reverse_kl", "ce", "hidden", "block", "cosine", "revive")
        }
        assert {name for name, value in on.items() if value} == {term}
        assert on[term] == (0.5 if term == "kl" else 1.0)
        assert weights.temperature == 2.0


def test_lessons_are_a_function_of_seed_and_step(embedded):
    model, tokenizer = embedded
    settings_ = ContextConfig(text=TEXT, num_samples=6, resample_every=2)
    context = read_context(settings_, tokenizer, 256)
    hearings = [ContextTeacher(model, window.ids) for window in context.chunks]
    first, second = (
        BatchSampler(hearings, tokenizer, context, settings_, 4, 0, blocks=True) for _ in range(2)
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


def test_texts_said_after_a_context_end_with_a_sentence(embedded):
    model, tokenizer = embedded
    settings_ = ContextConfig(text=TEXT, num_samples=12)
    window = read_context(settings_, tokenizer, 256).chunks[0]
    texts = sample_continuations(ContextTeacher(model, window.ids), window, tokenizer, settings_, 0)
    assert 4 <= len(texts) <= 12
    assert all(2 < len(text) <= MAX_TEXT_TOKENS for text in texts)


# Whole runs


@pytest.mark.parametrize(
    "objective", ["causal_lm", "logits", "hidden_last", "hidden_all", "generated"]
)
@pytest.mark.parametrize(
    "where",
    [
        "context.target=prompt",
        "context.target=weights",
        "context.target=weights context.trainable=all",
    ],
)
def test_every_objective_goes_into_every_destination(tiny, tmp_path, objective, where):
    assert distill_main([*tiny, f"context.objective={objective}", *where.split()]) == 0
    found = results(tmp_path)
    assert found["kinds"]["questions"]["questions"] == 1
    assert (newest(tmp_path) / "report.md").read_text().count("Ravenhill") >= 2
    page = (newest(tmp_path) / "report.html").read_text(encoding="utf-8")
    check_alone(page)
    assert page.count("Ravenhill") >= 2
    assert "consolidate/loss" in (newest(tmp_path) / "metrics.csv").read_text().splitlines()[0]
    assert "consolidated/share" in (newest(tmp_path) / "metrics.csv").read_text().splitlines()[0]
    found = events(newest(tmp_path))
    there = found.Tags()["scalars"]
    assert [
        tag
        for group in charts(found).values()
        for tags in group.values()
        for tag in tags
        if tag not in there
    ] == []
    assert "epoch" not in there
    assert {
        tuple(event.step for event in found.Scalars(tag))
        for tag in there
        if tag.startswith("hparam/")
    } == {(4,)}
    with (newest(tmp_path) / "metrics.csv").open() as lines:
        losses = [
            float(line["consolidate/loss"])
            for line in csv.DictReader(lines)
            if line["consolidate/loss"]
        ]
    assert len(losses) == 4
    assert min(losses) > 1e-3, "there is something to learn"
    state = torch.load(newest(tmp_path) / "checkpoints" / "step_4.ckpt", weights_only=True)[
        "state_dict"
    ]
    assert (float(state["hidden_scale"]) != 1) == (objective != "causal_lm"), (
        "variances were measured"
    )
    assert bool((state["layer_scales"] != 1).all()) == (objective == "hidden_all")
    assert not [
        name for name in state if not name.startswith(("learnt.", "hidden_scale", "layer_scales"))
    ]


def test_all_hidden_states_are_those_after_whole_layers(teacher, tokens):
    seen = forward_with_activations(teacher, tokens, capture_blocks=True)
    assert all(
        a is b
        for a, b in zip(_compare_streams(seen).block_outputs, seen.layer_outputs, strict=True)
    )


def test_a_signal_while_measuring_can_be_resumed(tiny, tmp_path, monkeypatch, capsys):
    from dmt.consolidation import run as runs

    original = runs.evaluate_student
    monkeypatch.setattr(
        runs, "evaluate_student", lambda *a: os.kill(os.getpid(), signal.SIGTERM) or original(*a)
    )
    assert distill_main([*tiny, "context.target=prompt"]) == 128 + signal.SIGTERM
    assert f"--resume {newest(tmp_path)}" in capsys.readouterr().err
    monkeypatch.setattr(runs, "evaluate_student", original)
    assert distill_main(["--resume", str(newest(tmp_path))]) == 0
    assert "answers" in results(tmp_path)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_weights_learn_what_the_context_says_and_little_else(tmp_path, capsys):
    words = [
        str(PERSON.with_suffix(".yaml")),
        "context.target=weights",
        "context.objective=causal_lm",
        "stages.end_to_end_steps=20",
        "stages.end_to_end_lr=4e-3",
        "data.test_tokens=1024",
        "data.validation_tokens=256",
        "optim.warmup_steps=2",
        "data.seq_len=96",
        "data.corpora=[biographies]",
        "trainer.num_threads=1",
        f"trainer.log_dir={tmp_path / 'logs'}",
        "trainer.progress_bar=false",
        "trainer.precision=32-true",
        "trainer.accelerator=cpu",
    ]
    kept = {}
    for keep in (0, 1):
        assert distill_main([*words, f"context.unrelated_kl_weight={keep}"]) == 0
        found = results(tmp_path)
        assert found["kinds"]["as written"]["log_probability_consolidated"] > -1.5
        assert found["kinds"]["as written"]["log_probability_without"] < -5
        kept[keep] = found["unrelated"]["biographies"]["kl"]
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("write", ["difference", "gradient", "trained"])
def test_a_context_goes_into_memory(tmp_path, write):
    words = [
        str(PERSON.with_suffix(".yaml")),
        f"context.row_method={write}",
        "context.objective=logits",
        "stages.end_to_end_steps=3",
        "data.test_tokens=2048",
        "data.validation_tokens=256",
        "data.corpora=[biographies]",
        "trainer.num_threads=1",
        f"trainer.log_dir={tmp_path / 'logs'}",
        "trainer.progress_bar=false",
        "trainer.precision=32-true",
        "trainer.accelerator=cpu",
    ]
    assert distill_main(words) == 0
    found, run = results(tmp_path), newest(tmp_path)
    assert found["kinds"]["as written"]["share"] >= 0.9
    assert found["unrelated"]["biographies"]["kl"] <= 1e-3
    assert found["written"]["rows"] > 3
    with open_fact_store(run / "student", read_only=True) as book:
        assert {fact.tag for fact in book.records.values()} == {"person"}
        assert sum(len(fact.rows) for fact in book.records.values()) == found["written"]["rows"]
    base = load_teacher("reader")[0].state_dict()
    saved = AutoModelForCausalLM.from_pretrained(run / "student").state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in base.items()), (
        "no weight changes"
    )
    if write == "gradient":
        assert found["kinds"]["as written"]["recall_consolidated"] == 1


def test_rows_that_are_trained_change_and_nothing_else_does(tmp_path):
    words = [
        str(PERSON.with_suffix(".yaml")),
        "context.objective=generated",
        "context.num_samples=4",
        "stages.end_to_end_steps=3",
        "data.seq_len=64",
        "data.test_tokens=512",
        "data.validation_tokens=256",
        "data.corpora=[biographies]",
        "trainer.num_threads=1",
        f"trainer.log_dir={tmp_path / 'logs'}",
        "trainer.progress_bar=false",
        "trainer.precision=32-true",
        "trainer.accelerator=cpu",
        "stages.end_to_end_lr=0.1",
    ]
    parts = {}
    for write in ("difference", "trained"):
        assert distill_main([*words, f"context.row_method={write}"]) == 0
        with open_fact_store(newest(tmp_path) / "student", read_only=True) as book:
            parts[write] = {fact.prompt: book.get_rows(fact.id) for fact in book.records.values()}
    assert set(parts["trained"]) == set(parts["difference"])
    pairs = [
        pair
        for prompt, each in parts["trained"].items()
        for pair in zip(each, parts["difference"][prompt], strict=True)
    ]
    assert all(
        torch.equal(a.key, b.key)
        and a.subject_ids == b.subject_ids
        and a.prefix_ids == b.prefix_ids
        for a, b in pairs
    )
    assert sum(not torch.allclose(a.value, b.value, atol=1e-3) for a, b in pairs) >= 3


def trained_rows(run):
    with open_fact_store(run / "student", read_only=True) as book:
        return {
            fact.prompt: torch.stack([part.value for part in book.get_rows(fact.id)])
            for fact in book.records.values()
        }


def test_rows_in_training_are_trained_on_after_a_stop(tmp_path, monkeypatch):
    words = [
        str(PERSON.with_suffix(".yaml")),
        "context.row_method=trained",
        "context.objective=logits",
        "stages.end_to_end_steps=4",
        "data.test_tokens=512",
        "data.validation_tokens=256",
        "data.corpora=[biographies]",
        "trainer.num_threads=1",
        "data.seq_len=64",
        f"trainer.log_dir={tmp_path / 'logs'}",
        "trainer.progress_bar=false",
        "trainer.precision=32-true",
        "trainer.accelerator=cpu",
        "stages.end_to_end_lr=0.1",
        "trainer.validate_every=0",
    ]
    assert distill_main(words) == 0
    whole, original = trained_rows(newest(tmp_path)), BatchSampler.get_batch

    def stop(lessons, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(lessons, step)

    monkeypatch.setattr(BatchSampler, "get_batch", stop)
    assert distill_main(words) == 128 + signal.SIGTERM
    run = newest(tmp_path)
    monkeypatch.setattr(BatchSampler, "get_batch", original)
    for _ in range(2):  # in the middle; after the last step, when all that is left is to measure
        assert distill_main(["--resume", str(run)]) == 0
        again = trained_rows(run)
        assert set(again) == set(whole)
        assert len(whole) > 3
        assert all(torch.equal(again[prompt], whole[prompt]) for prompt in whole)
    assert results(tmp_path)["written"]["facts"] == len(whole)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_only_rows_of_the_context_are_trained(tiny, told, monkeypatch):
    slopes = []

    def once(work, model, chosen, *_):
        chosen["rows"].sum().backward()
        slopes.append(chosen["rows"].grad)

    monkeypatch.setattr(rows, "train_student", once)
    monkeypatch.setattr(rows, "find_false_triggers", lambda *_: set())
    assert (
        distill_main(
            [*tiny, f"teacher={told}", "context.row_method=trained", "context.objective=logits"]
        )
        == 0
    )
    moved = slopes[0].abs().sum(1) > 0
    assert not moved[:5].any(), "the five rows of the fact that was there"
    assert len(moved) > 5
    assert moved[5:].all()


def test_what_was_consolidated_into_a_plain_model_can_be_a_teacher(tiny, tmp_path):
    assert distill_main([*tiny, "context.target=weights"]) == 0
    words = [word for word in tiny if not word.startswith(("task", "teacher", "context"))]
    more = ["stages.calibration_tokens=64", "stages.layerwise_steps=1", "memory.mean_k=8"]
    assert distill_main([*words, *more, f"teacher={newest(tmp_path) / 'student'}"]) == 0


def test_rows_that_answer_where_nobody_asked_are_taken_out_again(tiny, tmp_path):
    assert (
        distill_main([*tiny, "context.row_method=gradient"]) == 0
    )  # the unrelated text says the same sentences
    found = results(tmp_path)
    assert found["written"]["loose"] >= 1
    assert "taken out again" in (newest(tmp_path) / "report.md").read_text()
    with open_fact_store(newest(tmp_path) / "student", read_only=True) as book:
        assert len(book.records) == found["written"]["facts"]
        gone = [
            fact
            for fact in book.fact_table.read(include_deleted=True)
            if fact.deleted_reason == "evicted"
        ]
        assert len(gone) == found["written"]["loose"]


def test_a_stopped_run_goes_on_to_the_same_end(tiny, tmp_path):
    words = [*tiny, "context.target=prompt"]
    assert distill_main(words) == 0
    run = newest(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(run / "student").state_dict()
    (run / "checkpoints" / "step_4.ckpt").unlink()
    shutil.rmtree(run / "student")
    assert distill_main(["--resume", str(run)]) == 0
    again = AutoModelForCausalLM.from_pretrained(run / "student").state_dict()
    assert all(torch.equal(again[name], whole[name]) for name in whole)


@pytest.fixture
def told(tiny, long_folder, text_file, tmp_path):
    """A student with stored rows in its last layer, that has been told a fact; its run's folder."""
    distilled = [
        f"teacher={long_folder}",
        f"data.corpora=[{text_file}]",
        f"trainer.log_dir={tmp_path / 'logs'}",
        "data.seq_len=32",
        "data.batch_size=2",
        "data.micro_batch_size=2",
        "data.validation_tokens=64",
        "data.test_tokens=64",
        "stages.calibration_tokens=64",
        "stages.layerwise_steps=0",
        "stages.end_to_end_steps=2",
        "trainer.num_threads=1",
        "trainer.progress_bar=false",
        "memory.mean_k=8",
        "trainer.precision=32-true",
        "trainer.accelerator=cpu",
        "memory.write_start=0",
        "memory.min_distance=0",
        "student.layer_overrides=[{layers: last, memory: {kind: associative}}]",
    ]
    assert distill_main(distilled) == 0
    run = newest(tmp_path)
    assert dmt(["memory", "write", "Bo Ray was born in Hill.", "-s", str(run)]) == 0
    return run


@pytest.mark.parametrize("into", ["memory", "weights", "tokens"])
def test_a_student_with_rows_and_facts_keeps_what_it_can(
    tiny, told, tmp_path, into, tokens, capsys
):
    before = AutoModelForCausalLM.from_pretrained(told / "student")
    words = [
        *tiny,
        f"teacher={told}",
        f"context.target={into}",
        "stages.end_to_end_lr=1e-30",
        "context.row_method=gradient",
    ]
    assert distill_main(words) == 0
    assert ("stay there" in capsys.readouterr().out) == (into != "memory")
    made = AutoModelForCausalLM.from_pretrained(newest(tmp_path) / "student")
    torch.testing.assert_close(made(tokens).logits, before(tokens).logits, rtol=1e-4, atol=1e-4)
    with open_fact_store(
        told / "student", read_only=True
    ) as book:  # the one it began with is as it was
        assert [fact.answer for fact in book.records.values()] == [" Hill"]
    if into == "memory":
        with open_fact_store(newest(tmp_path) / "student", read_only=True) as book:
            assert " Hill" in [fact.answer for fact in book.records.values()]


def test_slots_of_a_student_and_nothing_else_may_change(tiny, long_folder, text_file, tmp_path):
    distilled = [
        f"teacher={long_folder}",
        f"data.corpora=[{text_file}]",
        f"trainer.log_dir={tmp_path / 'logs'}",
        "data.seq_len=32",
        "data.batch_size=2",
        "data.micro_batch_size=2",
        "data.validation_tokens=64",
        "data.test_tokens=64",
        "stages.calibration_tokens=64",
        "stages.layerwise_steps=0",
        "stages.end_to_end_steps=1",
        "trainer.num_threads=1",
        "trainer.progress_bar=false",
        "memory.mean_k=8",
        "trainer.precision=32-true",
        "trainer.accelerator=cpu",
    ]
    assert distill_main(distilled) == 0
    student = newest(tmp_path)
    words = [
        *tiny,
        f"teacher={student}",
        "context.target=weights",
        "context.trainable=slots",
        "stages.end_to_end_lr=0.01",
    ]
    assert distill_main(words) == 0
    before, now = (
        AutoModelForCausalLM.from_pretrained(run / "student").state_dict()
        for run in (student, newest(tmp_path))
    )
    changed = {name for name in before if not torch.equal(before[name], now[name])}
    assert changed
    assert all(".mlp." in name for name in changed)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["context.file=null"], "got neither"),
        (["context.text=hello"], "got both"),
        (["context.target=memory", "context.objective=causal_lm"], "has no teacher"),
        (["context.target=prompt", "stages.end_to_end_steps=0"], "is trained"),
        (["context.target=brain"], "context.target must be one of memory, weights, tokens"),
        (["context.max_tokens=3"], "more than context.max_tokens=3"),
        (["context.prompt_length=200", "context.target=prompt"], "leaves no room"),
        (["context.questions=nowhere.jsonl"], "cannot be read"),
        (["context.target=weights", "context.trainable=slots"], "name a distilled student"),
        (["context.temperature=0"], "must be a positive number"),
    ],
)
def test_what_contradicts_itself_is_refused_before_a_folder_is_made(
    tiny, tmp_path, capsys, words, said
):
    assert distill_main([*tiny, *words]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not list((tmp_path / "logs").glob("version_*"))


def test_the_command_says_what_the_config_says(tiny, long_folder, tmp_path, capsys):
    file = next(word for word in tiny if word.startswith("context.file"))
    rest = [
        word
        for word in tiny
        if not word.startswith(
            ("task", "teacher", "context.file", "context.prompt_length", "stages")
        )
    ]
    words = [
        "consolidate",
        "--model",
        str(long_folder),
        "--file",
        file.partition("=")[2],
        "--into",
        "tokens",
        "--tokens",
        "3",
    ]
    assert dmt([*words, "--steps", "2", "--lr", "0.01", "--json", *rest]) == 0
    found = json.loads(capsys.readouterr().out)
    assert Path(found["folder"]) == newest(tmp_path)
    config = config_io.load_config(newest(tmp_path) / "config.yaml")
    assert (
        config.context.prompt_length,
        config.stages.end_to_end_steps,
        config.stages.end_to_end_lr,
    ) == (3, 2, 0.01)
    assert (
        dmt(
            [
                "consolidate",
                "Ada Holbrook: 5 = five",
                "--model",
                str(long_folder),
                "--write",
                "gradient",
                *rest,
            ]
        )
        == 0
    )
    assert (
        config_io.load_config(newest(tmp_path) / "config.yaml").context.text
        == "Ada Holbrook: 5 = five"
    )
    assert dmt(["consolidate", "x", "--nonsense"]) == 2


def test_a_command_that_is_stopped_says_how_to_go_on(tiny, long_folder, monkeypatch, capsys):
    from dmt.training import tasks

    def stop(*_):
        raise RunInterrupted(signal.SIGINT, Path("runs/version_0"))

    monkeypatch.setitem(tasks.TASKS, "consolidate", stop)
    with pytest.raises(SystemExit) as ended:
        dmt(["consolidate", "Ada Fox sells hats.", "--model", str(long_folder)])
    assert ended.value.code == 130
    assert "distill.py --resume runs/version_0" in capsys.readouterr().err


def test_the_shipped_contexts_are_what_their_script_makes():
    from benchmarks import contexts

    people = contexts.make_unseen_people(9, seed=contexts.SEED)
    for name, some in (("person", people[:1]), ("people", people[1:])):
        text, questions = contexts.page(some, contexts.SEED)
        assert (contexts.PLACE / f"{name}.txt").read_text() == text + "\n"
        assert load_questions(contexts.PLACE / f"{name}.jsonl") == questions


@pytest.mark.parametrize(
    "file", sorted((ROOT / "configs" / "consolidation").glob("*.yaml")), ids=lambda f: f.stem
)
def test_every_shipped_consolidation_parses_and_names_what_is_there(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = config_io.load_config(file)
    assert config.task == "consolidate"
    assert len(load_questions(config.context.questions)) >= 15
    assert Path(config.context.file).is_file()
    assert config.data != DataConfig() or config.teacher == "reader"
