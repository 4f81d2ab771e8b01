"""How documents are divided into training, validation and test text."""

import random

import pytest

from dmt.data.corpora import Corpus, load_corpus
from dmt.data.duplicates import hash_text
from dmt.data.splits import SPLITS, split_documents
from dmt.data.windows import tokenize_corpus
from dmt.errors import UserError

SENTENCE = "{} The quick brown fox jumps over the lazy dog and runs away."


def make_words(count, seed):
    words = [f"{a}{b}" for a in "bdfgklmnprst" for b in ("an", "el", "ion", "ure", "ock", "ith")]
    return " ".join(random.Random(seed).choices(words, k=count))


def divide_as_before(documents, seed):
    """Return the splits of documents that have no duplicates, as they always were."""
    if len(documents) < 20:
        documents = [part for text in documents for part in text.split("\n\n") if part.strip()]
    order = list(range(len(documents)))
    random.Random(f"split-{seed}").shuffle(order)
    count = max(1, len(order) // 20)
    parts = order[2 * count :], order[:count], order[count : 2 * count]
    return [[documents[index] for index in sorted(part)] for part in parts]


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize(
    "documents",
    [
        [make_words(80, seed) for seed in range(20)],
        [make_words(80, seed) for seed in range(95)],
        ["\n\n".join(make_words(40, 50 * i + j) for j in range(30)) + "\n\n\n" for i in range(3)],
        ["\n\n".join(SENTENCE.format(i) for i in range(50))],
    ],
)
def test_documents_without_duplicates_are_split_as_ever(documents, seed):
    corpus = Corpus.from_documents("x", documents, seed)
    assert [corpus.train, corpus.validation, corpus.test] == divide_as_before(documents, seed)


def test_copies_are_removed_and_none_is_in_two_splits():
    documents = [SENTENCE.format(i) for i in range(40)] * 4
    split = split_documents([*documents, documents[0].replace(" ", "\n")], seed=0)
    assert split.num_copies == 121
    assert sorted(text for name in SPLITS for text in split.documents[name]) == sorted(
        documents[:40]
    )


@pytest.mark.parametrize("seed", range(5))
def test_near_duplicates_are_in_one_split(seed):
    texts = [make_words(100, number) for number in range(60)]
    documents = [f"{text} version {version}" for version in range(3) for text in texts]
    split = split_documents(documents, seed)
    assert (split.unit, split.num_near_duplicates, split.has_overlap) == ("documents", 120, False)
    owners = [{text.rpartition(" version")[0] for text in split.documents[n]} for n in SPLITS]
    assert [len(owner) for owner in owners] == [54, 3, 3]
    assert len(set.union(*owners)) == 60


def test_repeated_paragraphs_stay_and_are_in_one_split():
    paragraphs = [SENTENCE.format(i) for i in range(60)]
    split = split_documents(["\n\n".join(paragraphs), "\n\n".join([*paragraphs, "The end."])], 0)
    assert (split.unit, split.num_copies) == ("paragraphs", 0)
    hashes = [set(map(hash_text, split.documents[name])) for name in SPLITS]
    assert sum(map(len, hashes)) == len(set.union(*hashes)) == 61
    assert sum(len(split.documents[name]) for name in SPLITS) == 121


TEXTS = {
    "a line a paragraph": ["\n".join(make_words(12, i) for i in range(250))],
    "blank lines that hold spaces": ["\n  \n".join(make_words(12, i) for i in range(250))],
    "one long line": [make_words(3_000, 0)],
    "Chinese": ["".join(f"第{i}天，艾达在城里读书，然后回家。" for i in range(200))],
    "no spaces at all": ["".join(random.Random(0).choices("ACGT", k=9_000))],
    "three long documents": [make_words(30_000, i) for i in range(3)],
    "documents and a long one": [make_words(20, i) for i in range(30)] + [make_words(9_000, 99)],
    "all alike": ["The quick brown fox jumps over the lazy dog. " * 300],
}


@pytest.mark.parametrize("name", list(TEXTS))
def test_text_of_any_shape_is_split_and_none_is_lost(tokenizer, name):
    documents = TEXTS[name]

    def count_tokens(text):
        return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    split = split_documents(documents, 0, 256, count_tokens)
    windows = tokenize_corpus(Corpus("x", **split.documents), tokenizer, 256)
    assert min(len(windows.train), len(windows.validation), len(windows.test)) >= 1
    num_chars = {split_name: sum(map(len, split.documents[split_name])) for split_name in SPLITS}
    assert num_chars["train"] > 0.6 * sum(num_chars.values())
    pieces = "".join(text for split_name in SPLITS for text in split.documents[split_name])
    assert sorted("".join(pieces.split())) == sorted("".join("".join(documents).split()))
    assert split.has_overlap == (name == "all alike")


def test_stretches_end_with_lines_and_are_joined_again():
    lines = [make_words(12, number) for number in range(400)]
    split = split_documents(["\n".join(lines)], seed=0)
    assert split.unit == "stretches"
    assert {line for name in SPLITS for text in split.documents[name] for line in text.split("\n")}
    for name in SPLITS:
        for text in split.documents[name]:
            assert set(text.strip("\n").split("\n")) <= set(lines)
    assert len(split.documents["train"]) < 15
    assert 4 <= len(split.documents["validation"]) <= 5


def test_a_text_that_is_too_short_is_told_how_much_it_needs(tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(make_words(60, 0))
    with pytest.raises(UserError, match=r"a\.txt has (\d+) tokens.* about 768 together") as error:
        load_corpus(str(path), tokenizer=tokenizer, min_tokens=256)
    seq_len = int(str(error.value).rpartition("data.seq_len=")[2])
    corpus = load_corpus(str(path), tokenizer=tokenizer, min_tokens=seq_len)
    assert len(tokenize_corpus(corpus, tokenizer, seq_len).train) >= 1


def test_documents_of_splits_made_elsewhere_that_are_training_text_are_counted(monkeypatch):
    from dmt.data import corpora

    made = Corpus("made", ["a b", "c"], ["d", "a  b"], ["c", "e"])
    monkeypatch.setitem(corpora.CORPORA, "made", lambda: made)
    assert load_corpus("made").source.shared == 2
    assert load_corpus("biographies").source.shared == 0
