"""The lines of the plan."""

import json
from dataclasses import asdict, replace

from conftest import SENTENCES

from dmt.data.corpora import Corpus, SourceStats
from dmt.data.windows import summarize_corpus
from dmt.training.plan import describe_corpus

CORPUS = Corpus("notes", SENTENCES, ["a"], ["b"])


def describe(num_tokens, **stats):
    corpus = replace(CORPUS, source=SourceStats(**stats))
    return describe_corpus(json.loads(json.dumps(asdict(summarize_corpus(corpus, num_tokens)))))


def test_a_corpus_is_told_in_one_line():
    num_chars = sum(map(len, SENTENCES)) + 2
    assert describe({}) == f"{len(SENTENCES) + 2} documents, {num_chars} characters"
    line = describe(
        {"train": 1_000, "validation": 20, "test": 30},
        files=3,
        skipped={"hidden": 2, ".pdf": 1},
        chats="4 chats joined without roles",
        unit="paragraphs",
        copies=5,
        near_duplicates=6,
    )
    assert line == (
        f"3 files, {len(SENTENCES) + 2} documents, {num_chars} characters, "
        "1,050 tokens (train 1,000, validation 20, test 30); split by paragraphs; "
        "4 chats joined without roles; skipped: 2 hidden, 1 .pdf; 5 copies removed; "
        "6 near duplicates, in the same split as what they are like"
    )


def test_overlap_between_splits_is_told():
    assert "test results are too good" in describe({}, near_duplicates=6, has_overlap=True)
    assert describe({}, shared=7).endswith("7 documents of validation and test are training text")
