"""`benchmarks/facts_in_text.py` counts what it says, and prints its table."""

import random
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dmt.data.corpora import load_corpus
from dmt.models.forward import encode_text
from dmt.models.loading import load_teacher

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import facts_in_text
from fact_texts import Case, make_topics


def make_bench(model=None, tokenizer=None):
    return facts_in_text.Bench(
        "embedded", model, "original", tokenizer, None, random.Random(0), num_failures=1
    )


def test_a_wrong_answer_counts_where_the_facts_cause_it(monkeypatch, capsys):
    bench = make_bench()
    cases = [Case(f"Who is {name}?", " Rose", name, "shape") for name in ("Ada", "Bo", "Cy")]

    def answer(self, cases, model=None, has_start=True):
        names = ("Bo",) if model == "original" else ("Ada", "Bo")
        return [case.target_name in names for case in cases]

    monkeypatch.setattr(facts_in_text.Bench, "answer", answer)
    bench.print_wrong("subject", "wrong", cases)
    bench.print_recall("place", "right", cases, 0.5)
    assert capsys.readouterr().out.splitlines() == [
        "| subject |  | wrong | 1 / 3 | 0.3333 | <= 0.01 | no |",
        "| place |  | right | 2 / 3 | 0.6667 | >= 0.5 | yes |",
    ]
    assert "  'Who is Ada?' + ' Rose'" in bench.failures
    assert "  'Who is Cy?' + ' Rose'" in bench.failures


def test_answers_in_padded_batches_are_those_without_padding(monkeypatch):
    bench = make_bench(*load_teacher("embedded"))
    probes = load_corpus("biographies").probes[:10]
    cases = [Case(probe.prompt, probe.answer, probe.person, "") for probe in probes]
    cases[3] = replace(cases[3], answer=" nobody")
    generate, mask_lengths = bench.model.generate, []

    def record_mask(tokens, attention_mask, **kwargs):
        assert bool((attention_mask.diff(dim=1) >= 0).all()), "padding is on the left"
        mask_lengths.extend(attention_mask.sum(1).tolist())
        return generate(tokens, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(bench.model, "generate", record_mask)
    outcomes = facts_in_text.generate_padded(bench, cases)
    assert mask_lengths == [len(encode_text(bench.tokenizer, case.prompt)) for case in cases]
    assert len(set(mask_lengths)) > 1
    assert outcomes == bench.answer(cases)
    assert sum(outcomes) >= 8
    assert not outcomes[3]


@pytest.mark.parametrize("model", facts_in_text.TOPICS)
def test_facts_are_about_different_subjects_with_others_left_unknown(model):
    for topic in make_topics(facts_in_text.TOPICS[model], 30, seed=3):
        stated = {(fact.subject.name, fact.relation) for fact in topic.facts}
        assert len(stated) == len(topic.facts) == 30
        names, strangers = ({s.name for s in part} for part in (topic.subjects, topic.strangers))
        assert strangers
        assert not names & strangers
        assert {fact.subject.name for fact in topic.facts} == names
        for fact in topic.facts:
            assert fact.probe.prompt.startswith(fact.phrasing.split("{s}")[0])
            assert fact.subject.name in fact.probe.prompt
            assert len(fact.list_other_phrasings()) >= 2


def test_the_table_is_printed(monkeypatch, capsys):
    command = "facts_in_text.py --facts 4 --parts phrasings,conflicts,prose --prose-mb 0.002"
    monkeypatch.setattr(sys, "argv", command.split())
    runpy.run_path(facts_in_text.__file__, run_name="__main__")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0][-1] == "met"
    assert rows[2][2:5] == ["facts that can be written", "4 / 4", "1.0000"]
    assert {row[0] for row in rows[3:]} == {"phrasings", "conflicts", "prose"}
    for row in rows[2:]:
        numerator, denominator = (int(part.replace(",", "")) for part in row[3].split(" / "))
        assert 0 <= numerator <= denominator > 0
        assert row[-1] in ("yes", "no")
