"""Online writes: what reading a text once and twice changes, without a teacher or a training step.

    python benchmarks/remembering.py --student RUN [--texts 20] [--threads 1]

The student is of `configs/associative.yaml`. A text is a window of held-out speeches, or the
biography of an unseen person. Columns: nats per token of the texts before, after one and after two
readings; of another speech before and after all readings; and the share of questions about the
people, in the six phrasings of the teacher's training text, that are answered.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from dmt.data.corpora import load_corpus
from dmt.data.synthetic import (
    RELATIONS,
    TRAINED_PHRASINGS,
    make_biography,
    make_probe,
    make_unseen_people,
)
from dmt.editing.fact_store import FactStore
from dmt.editing.online import write_online
from dmt.evaluation.metrics import measure_recall
from dmt.models.forward import encode_text
from dmt.paths import resolve_student_folder
from dmt.training.trainer import silence_libraries

WINDOW = 200  # tokens of a speech
COLUMNS = (
    "text",
    "texts",
    "before",
    "read once",
    "twice",
    "another speech, before and after all",
    "answers",
    "ms a text",
)


@torch.no_grad()
def measure_nats(model: PreTrainedModel, ids: list[int]) -> float:
    """Return the nats per token of a text."""
    tokens = torch.tensor([ids])
    return float(F.cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:]))


def encode_speech(tokenizer: Any, speech: str, start: int) -> list[int]:
    """Return the tokens of a window of a speech."""
    return encode_text(tokenizer, speech[start:][:3_000])[:WINDOW]


def measure(fact_store: FactStore, kind: str, num_texts: int) -> list[str]:
    """Let a student read texts twice; return the cells of its row."""
    model, tokenizer, store = fact_store.model, fact_store.tokenizer, fact_store.db
    assert store is not None
    speeches, people = load_corpus("speeches").test, make_unseen_people(num_texts)
    if kind == "speeches":
        texts = [
            encode_speech(tokenizer, speeches[1 + index % 20], 5_000 + index // 20 * 2_000)
            for index in range(num_texts)
        ]
    else:
        texts = [
            encode_text(tokenizer, make_biography(person, random.Random(index)))
            for index, person in enumerate(people)
        ]
    other = encode_speech(tokenizer, speeches[0], 5_000)
    other_before, seconds = measure_nats(model, other), 0.0
    nats = [[measure_nats(model, ids) for ids in texts]]
    for _ in range(2):
        for index, ids in enumerate(texts):
            start = time.perf_counter()
            write_online(model, store, torch.tensor(ids), f"text {index}")
            seconds += time.perf_counter() - start
        nats.append([measure_nats(model, ids) for ids in texts])
    answers = ""
    if kind == "biographies":
        probes = [
            make_probe(person, relation, phrasing)
            for person in people
            for relation in RELATIONS
            for phrasing in range(TRAINED_PHRASINGS)
        ]
        answers = f"{measure_recall(model, tokenizer, probes):.3f}"
    return [
        kind,
        str(num_texts),
        *(f"{sum(values) / len(values):.2f}" for values in nats),
        f"{other_before:.3f}, {measure_nats(model, other):.3f}",
        answers,
        f"{1_000 * seconds / 2 / num_texts:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", default=None)
    parser.add_argument("--texts", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    silence_libraries()
    torch.set_num_threads(args.threads)
    student = resolve_student_folder(args.student)
    print(f"| {' | '.join(COLUMNS)} |\n|---|{'---:|' * (len(COLUMNS) - 1)}")
    for kind in ("speeches", "biographies"):
        with tempfile.TemporaryDirectory() as folder:
            copy = shutil.copytree(student, Path(folder) / "student")
            with FactStore.open(copy) as fact_store:
                print(f"| {' | '.join(measure(fact_store, kind, args.texts))} |", flush=True)


if __name__ == "__main__":
    main()
