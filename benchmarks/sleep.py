"""Nights of sleep, one after the other: facts about new people are written each day and moved into slots each night.

    python benchmarks/sleep.py [--student lightning_logs/version_0] [--nights 10] [--facts 100] [--steps N] [--threads 1]

A row is a night. `evening`: share of the day's facts that are answered as written, with rows; `morning`: by the new student,
without. `other words`: the same facts asked in two of the phrasings they were not written in, evening -> morning. `first night`,
`all nights`: what was learnt in the first, and in all so far, as the new student answers it. `rows`: left. `KL`: on held-out
speeches (validation windows), in nats per token, from the student of the evening and from the one before the first day. `known
people`: facts of the teacher's own training text. Seconds are those of the night, with the measuring that `dmt sleep` does.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
from pathlib import Path

import torch

from dmt.consolidation.replay import pack_windows
from dmt.consolidation.sleep import (
    DEFAULT_LR,
    DEFAULT_STEPS,
    MAX_WINDOW_TOKENS,
    VALIDATION_TOKENS,
    plan_slot_transfer,
    transfer_rows,
)
from dmt.data.corpora import load_corpus
from dmt.data.synthetic import (
    RELATIONS,
    TRAINED_PHRASINGS,
    Person,
    Probe,
    make_probe,
    make_unseen_people,
)
from dmt.editing.fact import Fact
from dmt.editing.fact_store import FactStore
from dmt.evaluation.metrics import measure_fidelity, measure_recall
from dmt.models.loading import load, resolve_student_folder
from dmt.training.trainer import silence_libraries

COLUMNS = "night | evening | morning | other words | first night | all nights | rows | KL evening | KL first day | known people | seconds"


def day(people: list[Person], draw: random.Random) -> tuple[list[Probe], list[Probe]]:
    """Facts about people in a phrasing each, and the same in two others."""
    written, others = [], []
    for person in people:
        for relation in RELATIONS:
            way = draw.randrange(TRAINED_PHRASINGS)
            written.append(make_probe(person, relation, way))
            ways = draw.sample([each for each in range(TRAINED_PHRASINGS) if each != way], 2)
            others += [make_probe(person, relation, each) for each in ways]
    return written, others


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student")
    parser.add_argument("--nights", type=int, default=10)
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS)
    parser.add_argument("--lr", type=float, default=DEFAULT_LR)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    silence_libraries()
    torch.set_num_threads(options.threads)
    first = resolve_student_folder(options.student)
    corpora = [load_corpus(name) for name in ("speeches", "biographies")]
    original, tokenizer = load(first)
    held_out = pack_windows(
        corpora[0].validation, tokenizer, MAX_WINDOW_TOKENS, VALIDATION_TOKENS // MAX_WINDOW_TOKENS
    )
    each = -(-options.facts // len(RELATIONS))
    people, draw = make_unseen_people(each * options.nights), random.Random(0)
    days: list[list[Probe]] = []
    print(f"| {COLUMNS} |\n|{'---:|' * len(COLUMNS.split('|'))}", flush=True)
    with tempfile.TemporaryDirectory() as place:
        student = Path(place) / "night_0"
        shutil.copytree(first, student)
        for night in range(1, options.nights + 1):
            written, others = day(people[each * (night - 1) : each * night], draw)
            days.append(written)
            with FactStore.open(student) as book:
                book.write_many(
                    [
                        Fact(fact.prompt, fact.answer, fact.person, f"day {night}")
                        for fact in written
                    ]
                )
                at_evening = measure_recall(book.model, tokenizer, others)
            found = transfer_rows(
                plan_slot_transfer(student),
                corpora,
                Path(place) / f"night_{night}",
                options.steps,
                options.lr,
                night,
            )
            shutil.rmtree(student)
            student = Path(found.student)
            model = load(student)[0]
            cells = [f"{found.recall_before:.3f}", f"{found.recall_after:.3f}"]
            cells.append(f"{at_evening:.3f} -> {measure_recall(model, tokenizer, others):.3f}")
            cells += [
                f"{measure_recall(model, tokenizer, asked):.3f}"
                for asked in (days[0], [fact for each in days for fact in each])
            ]
            cells += [
                str(found.remaining_rows),
                f"{found.kl['speeches']:.1e}",
                f"{measure_fidelity(model, original, held_out).kl:.1e}",
            ]
            cells += [
                f"{measure_recall(model, tokenizer, corpora[1].probes):.3f}",
                f"{found.seconds:.0f}",
            ]
            print(f"| {night} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
