"""The comparison of all kinds of memory: sizes that meet a budget, its table and its picture."""

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from conftest import LAYERS, SLOTS, WIDTH, make_llama, make_teacher

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import catalogue  # noqa: E402

from dmt.config import (  # noqa: E402
    Config,
    ExpertsConfig,
    FeaturalConfig,
    LowRankConfig,
    PrunedConfig,
    SumConfig,
    TokenConfig,
)
from dmt.errors import UserError  # noqa: E402


def make_record(kind, budget, kl, seed=0, read_bytes=1_000.0, **changes):
    return {
        "name": f"{kind}-{budget}",
        "kind": kind,
        "budget": budget,
        "size": f"k={budget}",
        "seed": seed,
        "corpora": {
            "text": {"kl": kl, "ppl_ratio": 1 + kl, "recall": None},
            "facts": {"kl": kl, "ppl_ratio": 1 + kl, "recall": 0.5},
        },
        "train_seconds": 12.0,
        "tokens_per_second": 100.0,
        "speedup": 1.5,
        "read_bytes": read_bytes,
        "dense_bytes": 4_000.0,
        "multiply_adds": 10.0,
        "ram_bytes": 10,
        "abilities": ["read", "edit"],
    } | changes


def test_every_kind_has_a_config_that_a_comparison_begins_with():
    kinds = catalogue.list_kinds(Config())
    for kind in kinds:
        memory = catalogue.load_memory(kind, Config(), 512)
        kinds_of_parts = [part.kind for part in getattr(memory, "parts", [])]
        assert kind.removesuffix("_int8") in (memory.kind, *kinds_of_parts)
        if (size := catalogue.get_size(memory)) is not None:
            unit = size.get_unit(memory)
            assert size.apply(memory, 2 * unit) != size.apply(memory, unit)
    assert catalogue.load_memory("featural", Config(), 512).mean_k == 32
    assert set(kinds) >= set(catalogue.SIZES) | {"none", "token", "ngram", "sum"}


def test_a_sum_grows_by_its_first_part_that_can():
    parts = [TokenConfig(), FeaturalConfig(), PrunedConfig()]
    base = catalogue.fix_reads(SumConfig(parts=parts), 32)
    size = catalogue.get_size(base)
    assert (size.setting, size.get_unit(base)) == ("featural.num_slots", 8)
    grown = size.apply(base, 16)
    assert grown.parts == [parts[0], FeaturalConfig(num_slots=16, mean_k=16), parts[2]]
    assert catalogue.get_size(SumConfig(parts=[TokenConfig()])) is None


def test_slots_that_8_bit_keys_find_grow_by_what_is_read():
    base = catalogue.load_memory("sum_int8", Config(), 512)
    size = catalogue.get_size(base)
    assert size.setting == "featural.mean_k"
    grown = size.apply(base, 200)
    assert grown.parts[0] == FeaturalConfig(search="int8", mean_k=200)
    assert grown.parts[1:] == base.parts[1:]


def test_the_largest_size_that_fits():
    for limit in range(40):
        assert catalogue.find_largest(lambda size, limit=limit: size <= limit) == limit


@pytest.mark.parametrize("make", [make_teacher, make_llama])
def test_sizes_stay_within_the_budget_and_are_the_largest(make, capsys):
    probe = catalogue.CostProbe(make(), torch.randint(1, 300, (2, 20)))
    dense_floats = 2 * SLOTS * WIDTH + SLOTS + WIDTH if make is make_teacher else 3 * SLOTS * WIDTH
    assert probe.dense_bytes == 4 * dense_floats
    assert probe.num_neurons == SLOTS
    kinds = ["low_rank", "experts", "featural", "none"]
    variants = catalogue.choose_variants(kinds, [0.1, 0.4], Config(), probe)
    by_kind = {kind: [v for v in variants if v.kind == kind] for kind in kinds}
    for kind in ("low_rank", "experts"):
        size = catalogue.SIZES[kind]
        unit = size.get_unit(catalogue.load_memory(kind, Config(), SLOTS))
        for variant in by_kind[kind]:
            assert probe.measure_share(variant.memory) <= variant.budget
            number = int(variant.size.partition("=")[2])
            larger = size.apply(variant.memory, number + unit)
            if not (kind == "low_rank" and number == WIDTH):  # the map has no higher rank
                assert probe.measure_share(larger) > variant.budget
    assert isinstance(by_kind["experts"][-1].memory, ExpertsConfig)
    assert by_kind["low_rank"][0].memory == LowRankConfig(
        rank=int(by_kind["low_rank"][0].size.removeprefix("rank="))
    )
    [none] = by_kind["none"]
    assert (none.budget, none.name) == (None, "none")
    assert len(by_kind["featural"]) == 1, "the map beside the slots is more than a tenth"
    assert isinstance(by_kind["featural"][0].memory, FeaturalConfig)
    message = capsys.readouterr().err
    assert "featural reads" in message
    assert "more than 10%; left out" in message


def test_the_four_best_over_all_budgets():
    records = [
        make_record(kind, budget, kl * budget)
        for kind, kl in zip("abcdef", (5, 1, 4, 2, 3, 6), strict=True)
        for budget in (0.3, 0.6)
    ]
    assert catalogue.choose_best(records) == ["b", "d", "e", "c"]


def test_rows_are_means_over_seeds_best_first():
    records = [
        make_record("worse", 0.3, 0.2),
        make_record("better", 0.3, 0.1),
        make_record("better", 0.3, 0.3, seed=1, read_bytes=3_000.0),
        make_record("better", 0.6, 0.05),
    ]
    rows = catalogue.build_rows(records)
    assert [(row["kind"], row["size"], row["seeds"]) for row in rows] == [
        ("better", "k=0.6", 1),
        ("worse", "k=0.3", 1),
        ("better", "k=0.3", 2),
    ]
    row = rows[-1]
    assert row["text: KL"] == pytest.approx(0.2)
    assert row["of dense"] == "50.0%"
    assert row["facts: recall"] == "0.500"
    assert "text: recall" not in row
    assert row["possible"] == "read, edit"


def test_the_picture_is_a_file_of_its_own():
    records = [make_record("one", 0.3, 0.2), make_record("one", 0.6, 0.1, read_bytes=5_000.0)]
    picture = catalogue.draw_picture([*records, make_record("other <kind>", 0.3, 0.4)])
    root = ElementTree.fromstring(picture)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = [element.text for element in root.iter() if element.text]
    assert {"one", "other <kind>", "kB read per token"} <= set(texts)
    assert "one: 5 kB, 0.1000 nats" in texts
    style = next(text for text in texts if "--c1" in text)
    assert ".line { fill: none;" in style
    assert "figure" not in style


@pytest.fixture
def settings(teacher_folder, text_file):
    """Settings of tiny runs."""
    return [
        f"teacher={teacher_folder}",
        f"data.corpora=[{text_file}]",
        "data.seq_len=16",
        "data.batch_size=4",
        "data.micro_batch_size=2",
        "data.validation_tokens=64",
        "data.test_tokens=128",
        "stages.calibration_tokens=64",
        "stages.lookup_tokens=64",
        "optim.warmup_steps=1",
        "trainer.num_threads=1",
        "trainer.accelerator=cpu",
        "trainer.precision=32-true",
    ]


def test_a_comparison_runs_resumes_and_writes_its_results(settings, tmp_path, capsys, monkeypatch):
    out = tmp_path / "catalogue"
    arguments = ["--kinds", "low_rank,pruned", "--budgets", "0.3", "--steps", "2", "--seeds", "1"]
    arguments += ["--out", str(out), *settings]
    catalogue.main(arguments)
    output = capsys.readouterr()
    assert "| low_rank | rank=" in output.out
    assert "low_rank-0.3, seed 0: KL" in output.err
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [record["kind"] for record in records] == ["low_rank", "pruned"]
    dense_bytes = LAYERS * 4 * (2 * SLOTS * WIDTH + SLOTS + WIDTH)
    for record in records:
        assert record["dense_bytes"] == dense_bytes
        assert 0 < record["read_bytes"] <= 0.3 * dense_bytes
        assert record["corpora"]["text"]["kl"] > 0
        assert record["speedup"] > 0
    assert [record["abilities"] for record in records] == [[], ["read"]]
    assert (out / "table.md").read_text() == output.out
    assert (out / "kl_by_bytes.svg").read_text().startswith("<svg")

    with pytest.raises(SystemExit, match="2"):
        catalogue.main(arguments)
    assert "has results; add --resume" in capsys.readouterr().err
    lines = (out / "results.jsonl").read_text().splitlines(keepends=True)
    (out / "results.jsonl").write_text(lines[0])
    with pytest.raises(SystemExit, match="2"):
        catalogue.main([*arguments, "--resume", "seed=1"])
    assert "has results with settings=" in capsys.readouterr().err
    distill_variant = catalogue.distill_variant

    def fail(variant, *others):
        if variant.kind == "pruned":
            raise UserError("the loss is not finite")
        return distill_variant(variant, *others)

    kinds = arguments[1]
    with monkeypatch.context() as patch:
        patch.setattr(catalogue, "distill_variant", fail)
        with pytest.raises(SystemExit, match="runs that failed: 1"):
            catalogue.main(["--kinds", "pruned,none", *arguments[2:], "--resume"])
    message = capsys.readouterr().err
    assert "pruned-0.3, seed 0 failed: the loss is not finite" in message
    assert "none, seed 0: KL" in message
    catalogue.main(["--kinds", kinds, *arguments[2:], "--resume"])
    message = capsys.readouterr().err
    assert "low_rank" not in message
    assert "pruned-0.3, seed 0: KL" in message
    kinds = {record["kind"] for record in catalogue.read_records(out / "results.jsonl")}
    assert kinds == {"low_rank", "none", "pruned"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kinds", "pear"], "--kinds pear: there are featural, "),
        (["--budgets", "0"], "must be positive"),
        (["--config", "defautl"], "defautl"),
        (["memory.k=0"], "memory.k must be"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        catalogue.main(arguments)
    assert message in capsys.readouterr().err
