"""The lines of the plan."""

import json
from dataclasses import asdict, replace
from pathlib import Path

from conftest import LAYERS, SENTENCES

from dmt.config import Config, FeaturalConfig, LowRankConfig, NgramConfig, SumConfig
from dmt.data.corpora import Corpus, SourceStats
from dmt.data.windows import summarize_corpus
from dmt.evaluation.cost import MemoryCost
from dmt.models.conversion import convert_blocks
from dmt.training.plan import describe_corpus, format_costs, format_plan

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


def test_costs_are_means_over_layers_that_are_alike(teacher):
    slots, low_rank = FeaturalConfig(k=8), LowRankConfig(rank=2)
    student, _ = convert_blocks(teacher, [slots, low_rank, slots])
    dense = dict.fromkeys(range(LAYERS), MemoryCost(0, 0, 0, {"float32": 40_000.0}, None, 0.0))
    costs = {
        0: MemoryCost(0, 1_000_000, 0, {"float32": 10_000.0}, 7.0, 1_000.0),
        1: MemoryCost(0, 500_000, 0, {"float32": 4_000.0}, None, 900.0),
        2: MemoryCost(0, 2_000_000, 250_000, {"float32": 10_000.0, "int8": 10_000.0}, 9.0, 2_000.0),
    }
    assert format_costs(student, costs, dense).splitlines() == [
        "cost of 0, 2  reads 15.0 kB per token, 37.5% of dense, 8.0 rows, 1,500 multiply-adds, "
        "1.50 MB in RAM, 0.12 MB on disk",
        "cost of 1     reads 4.0 kB per token, 10.0% of dense, 900 multiply-adds, 0.50 MB in RAM",
    ]


def test_a_plan_names_each_part_of_a_sum(teacher):
    memory = SumConfig(parts=[FeaturalConfig(k=8), NgramConfig(order=2, num_rows=50)])
    student, report = convert_blocks(teacher, [memory] * LAYERS)
    plan = format_plan(Config(), Path("runs"), student, {}, report, [])
    assert (
        "block weights, contribution ranking + 2 rows read for each of the last 1 to 2 tokens"
        in plan
    )
