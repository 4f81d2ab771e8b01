"""Two packs that contradict each other: one is loaded, replaced by the other, and unloaded.

    python benchmarks/packs.py [--facts 1000] [--threads 1]

Facts about people that the embedded teacher never saw, asked as written and in two other phrasings.
Seconds of `load` are for reading and checking a file; of the other rows for applying loaded packs.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from editing import make_people_task, predict_next

from dmt.data.synthetic import Probe
from dmt.editing.fact import Fact
from dmt.editing.fact_store import FactStore
from dmt.editing.packs import (
    diff_facts,
    load_fact_pack,
    load_packs,
    make_fact_pack,
    merge_packs,
)
from dmt.evaluation.metrics import measure_recall
from dmt.models.fingerprint import hash_model
from dmt.models.loading import load_teacher
from dmt.store import RowStore
from dmt.training.trainer import silence_libraries


def draw_other_answers(facts: list[Probe]) -> dict[tuple[str, str], str]:
    """Draw for each fact the answer of another person to the same question."""
    rng, other_answers = random.Random(1), {}
    for relation in {fact.relation for fact in facts}:
        facts_of_relation = [fact for fact in facts if fact.relation == relation]
        answers = [fact.answer for fact in facts_of_relation]
        for fact in facts_of_relation:
            other_answers[fact.person, relation] = rng.choice(
                [answer for answer in answers if answer != fact.answer]
            )
    return other_answers


def replace_answers(probes: list[Probe], other_answers: dict[tuple[str, str], str]) -> list[Probe]:
    """Return probes with the answers of other people."""
    return [replace(probe, answer=other_answers[probe.person, probe.relation]) for probe in probes]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--facts", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    silence_libraries()
    torch.set_num_threads(args.threads)
    task = make_people_task(args.facts)
    facts, paraphrases = task.facts, task.paraphrases["paraphrase"]
    other_answers = draw_other_answers(facts)
    # By pack: its facts as written, and in two other phrasings.
    probes = {
        "A": (facts, paraphrases),
        "B": (
            replace_answers(facts, other_answers),
            replace_answers(paraphrases, other_answers),
        ),
    }
    prompts = [fact.prompt for fact in facts]
    columns = (
        "",
        "A as written",
        "A paraphrase",
        "B as written",
        "B paraphrase",
        "seconds",
        "logits",
    )
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    with tempfile.TemporaryDirectory() as folder:
        packs = {}
        for name, (pack_facts, _) in probes.items():
            model, tokenizer = load_teacher("embedded")
            model_hash = hash_model(model)
            with FactStore(
                model, tokenizer, RowStore(f"{folder}/{name}.db", model_hash)
            ) as fact_store:
                fact_store.write_many(
                    [Fact(fact.prompt, fact.answer, fact.person, tag=name) for fact in pack_facts]
                )
                records = list(fact_store.records.values())
                pack = make_fact_pack(fact_store, records, name, "CC0-1.0", model_hash)
            path = Path(folder) / f"{name}.safetensors"
            pack.save(path)
            start = time.perf_counter()
            packs[name] = load_fact_pack(path)
            seconds = time.perf_counter() - start
            size = path.stat().st_size / 2**20
            print(f"| load {name}, {size:.1f} MiB | | | | | {seconds:.2f} | |")
        model, tokenizer = load_teacher("embedded")
        model_hash = hash_model(model)
        fact_store = FactStore(model, tokenizer, None)
        logits_before = predict_next(model, tokenizer, prompts)
        for name, pack_names in (("A", ["A"]), ("B instead of A", ["B"]), ("none", [])):
            start = time.perf_counter()
            load_packs(fact_store, [packs[pack_name] for pack_name in pack_names], model_hash)
            seconds = time.perf_counter() - start
            cells = [
                f"{measure_recall(model, tokenizer, questions):.3f}"
                for both in probes.values()
                for questions in both
            ]
            is_equal = torch.equal(logits_before, predict_next(model, tokenizer, prompts))
            cells += [f"{seconds:.3f}", "exactly as before" if is_equal else "changed"]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
        difference = diff_facts(packs["A"].facts, packs["B"].facts)
        _, conflicts = merge_packs(list(packs.values()), "both")
        print(
            f"\ndiff: {difference.num_same} equal, {len(difference.different)} different; "
            f"merge: {len(conflicts)} contradictions reported"
        )


if __name__ == "__main__":
    main()
