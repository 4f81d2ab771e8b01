"""Contexts in chunks: sentences, pronouns, names and length limits."""

import pytest
from factories import PERSON, PERSON_TEXT

from dmt.config import ContextConfig
from dmt.consolidation.context import (
    CONTEXT_SEPARATOR,
    MAX_TEXT_TOKENS,
    read_context,
    split_sentences,
)
from dmt.errors import UserError


def test_split_sentences_respects_titles_quotes_and_newlines():
    text = 'Mr. Osgood came in 1902. "Is it so?" he said! It was.\nA line\n\nAnother'
    assert split_sentences(text) == [
        "Mr. Osgood came in 1902.",
        '"Is it so?" he said!',
        "It was.",
        "A line",
        "Another",
    ]


def test_chunks_cover_the_context_and_leave_room_for_text(embedded):
    _, tokenizer = embedded
    text = PERSON.with_name("people.txt").read_text().strip()
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
def test_a_sentence_longer_than_a_chunk_is_split(embedded, text):
    _, tokenizer = embedded
    context = read_context(ContextConfig(text=text), tokenizer, 256)
    assert all(1 < len(window.ids) <= 256 - MAX_TEXT_TOKENS for window in context.chunks)
    message = "".join(tokenizer.decode(window.ids[1:]) for window in context.chunks)
    assert "".join(message.split()) == "".join(text.split())


def test_pronouns_are_replaced_by_the_last_name_across_chunks(embedded):
    _, tokenizer = embedded
    text = (
        "Ada Fox was born in Hill. She sells hats. Her dog is called Rex.\n\n"
        "It barks. Bo Ray was seen in Wall. His hat is red."
    )
    sentences = [
        item
        for window in read_context(ContextConfig(text=text), tokenizer, 256).chunks
        for item in window.sentences
    ]
    assert sentences[1:3] == ["Ada Fox sells hats.", "Ada Fox's dog is called Rex."]
    assert sentences[3] == "Ada Fox barks."  # without a new name the last one stays
    assert sentences[5] == "Bo Ray's hat is red."


def test_a_sentence_without_a_subject_keeps_the_current_name(embedded):
    text = "Ada Fox was born in Hill. it rains a lot. She sells hats."
    sentences = (
        read_context(ContextConfig(text=text.replace("it", "Then it")), embedded[1], 256)
        .chunks[0]
        .sentences
    )
    assert sentences[-1] == "Ada Fox sells hats."


def test_a_capitalized_first_word_is_not_a_name(embedded):
    text = (
        "Before the war a baker lived in Hill. Only two came. Rex barks at Rex, and Ossel runs. "
        "Today nobody is left."
    )
    [window] = read_context(ContextConfig(text=text), embedded[1], 256).chunks
    assert window.names == ["Rex"]


def test_a_date_is_not_a_subject(embedded):
    _, tokenizer = embedded
    context = read_context(ContextConfig(text=PERSON_TEXT), tokenizer, 256)
    assert context.chunks[0].names == ["Percy Talner"]
    assert (
        context.chunks[0].sentences[1]
        == "Percy Talner has worked for many years at Juniper Railways."
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "got neither"),
        ({"text": "a", "file": "b"}, "got both"),
        ({"file": "nowhere.txt"}, "cannot be read"),
        ({"text": " "}, "text must be text or empty"),
        ({"text": "a b c d e f g h", "max_tokens": 2}, "more than context.max_tokens=2"),
    ],
)
def test_invalid_contexts_are_rejected(embedded, settings, message):
    with pytest.raises(UserError, match=message):
        read_context(ContextConfig(**settings), embedded[1], 256)


def test_binary_files_and_short_models_are_rejected(embedded, tmp_path):
    file = tmp_path / "x.txt"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        read_context(ContextConfig(file=str(file)), embedded[1], 256)
    with pytest.raises(UserError, match="leaves no room"):
        read_context(ContextConfig(text="a"), embedded[1], 100)
    with pytest.raises(UserError, match=r"context.prompt_length lower"):
        read_context(ContextConfig(text="a"), embedded[1], 256, num_prefix_tokens=150)
