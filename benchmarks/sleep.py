"""Rounds of slot transfers: facts about new people are written and moved into slots in each round.

    python -m benchmarks.sleep [--model lightning_logs/version_0] [--rounds 10] [--facts 100]
                               [--steps N] [--lr X] [--threads 1]

A row is a round. `recall before`: share of the round's facts that the student predicts with rows;
`recall after`: by the new student, without. `paraphrases`: the same facts in two of the phrasings
they were not written in, before -> after. `first round`, `all rounds`: recall of the facts of the
first round, and of all so far, by the new student. `rows`: rows that remain. `KL round` and `KL
start`: on held-out speeches, nats per token, from the student before the round and before round 1.
`known people`: recall of facts of the teacher's training text. Seconds include the evaluation.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
from pathlib import Path

import torch

from dmt.config import SleepConfig
from dmt.consolidation.sleep import transfer_to_slots
from dmt.data.corpora import load_corpus
from dmt.data.synthetic import (
    RELATIONS,
    TRAINED_PHRASINGS,
    Person,
    Probe,
    make_probe,
    make_unseen_people,
)
from dmt.data.windows import pack_windows
from dmt.editing.fact import Fact
from dmt.editing.fact_store import FactStore
from dmt.evaluation.metrics import measure_fidelity, measure_recall
from dmt.models.loading import load
from dmt.paths import resolve_student_folder
from dmt.training.trainer import silence_libraries

CORPORA = ("speeches", "biographies")
COLUMNS = (
    "round",
    "recall before",
    "recall after",
    "paraphrases",
    "first round",
    "all rounds",
    "rows",
    "KL round",
    "KL start",
    "known people",
    "seconds",
)


def make_probes(people: list[Person], rng: random.Random) -> tuple[list[Probe], list[Probe]]:
    """Return facts about people in one phrasing each, and the same in two others."""
    probes, paraphrases = [], []
    for person in people:
        for relation in RELATIONS:
            phrasing = rng.randrange(TRAINED_PHRASINGS)
            probes.append(make_probe(person, relation, phrasing))
            others = [number for number in range(TRAINED_PHRASINGS) if number != phrasing]
            paraphrases += [
                make_probe(person, relation, number) for number in rng.sample(others, 2)
            ]
    return probes, paraphrases


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = SleepConfig()
    parser.add_argument("--model")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--lr", type=float, default=defaults.lr)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    silence_libraries()
    torch.set_num_threads(args.threads)
    source = resolve_student_folder(args.model)
    corpora = [load_corpus(name) for name in CORPORA]
    original, tokenizer = load(source)
    seq_len = defaults.max_window_tokens
    held_out = pack_windows(
        corpora[0].validation, tokenizer, seq_len, defaults.eval_tokens // seq_len
    )
    people_per_round = -(-args.facts // len(RELATIONS))
    people, rng = make_unseen_people(people_per_round * args.rounds), random.Random(0)
    probes_by_round: list[list[Probe]] = []
    print(f"| {' | '.join(COLUMNS)} |\n|{'---:|' * len(COLUMNS)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        student = Path(folder) / "round_0" / "student"
        shutil.copytree(source, student)
        for number in range(1, args.rounds + 1):
            first = people_per_round * (number - 1)
            probes, paraphrases = make_probes(people[first : first + people_per_round], rng)
            probes_by_round.append(probes)
            with FactStore.open(student) as fact_store:
                fact_store.write_many(
                    [
                        Fact(probe.prompt, probe.answer, probe.person, f"round {number}")
                        for probe in probes
                    ]
                )
                paraphrases_before = measure_recall(fact_store.model, tokenizer, paraphrases)
            result = transfer_to_slots(
                student,
                steps=args.steps,
                lr=args.lr,
                seed=number,
                replay_data=CORPORA,
                output=Path(folder) / f"round_{number}",
                trainer={"progress_bar": False, "num_threads": args.threads, "validate_every": 0},
            )
            shutil.rmtree(student.parent)
            student = Path(result.student)
            model = load(student)[0]
            all_probes = [probe for group in probes_by_round for probe in group]
            cells = [
                str(number),
                f"{result.recall_before:.3f}",
                f"{result.recall_after:.3f}",
                f"{paraphrases_before:.3f} -> {measure_recall(model, tokenizer, paraphrases):.3f}",
                f"{measure_recall(model, tokenizer, probes_by_round[0]):.3f}",
                f"{measure_recall(model, tokenizer, all_probes):.3f}",
                str(result.remaining_rows),
                f"{result.kl['speeches']:.1e}",
                f"{measure_fidelity(model, original, held_out).kl:.1e}",
                f"{measure_recall(model, tokenizer, corpora[1].probes):.3f}",
                f"{result.seconds:.0f}",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
