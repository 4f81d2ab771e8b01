"""A student that remembers what it reads, without a teacher and without a gradient step: what a text costs it the next time.

    python benchmarks/remembering.py --student RUN [--texts 20] [--threads 1]

The student of `configs/associative.yaml`. Each text is a window of held-out speeches, or the biography of somebody new, read
once and then again. Nats per token of the text itself, before and after; of another speech, all along; and how many of the
questions about the person, in the six phrasings that the teacher knows, are answered.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

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
from dmt.models.loading import resolve_student_folder
from dmt.training.trainer import silence_libraries

WINDOW = 200
"""Tokens of a speech."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", default=None)
    parser.add_argument("--texts", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    silence_libraries()
    torch.set_num_threads(options.threads)
    speeches, people = load_corpus("speeches").test, make_unseen_people(options.texts)
    print(
        "| what is read | texts | before | read once | twice | another speech, before and after all | answers | ms a text |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for what in ("speeches", "biographies"):
        with tempfile.TemporaryDirectory() as scratch:
            folder = shutil.copytree(
                resolve_student_folder(options.student), Path(scratch) / "student"
            )
            with FactStore.open(folder) as book:
                model, tokenizer, store = book.model, book.tokenizer, book.db
                assert store is not None
                if what == "speeches":
                    texts = [
                        encode_text(
                            tokenizer, speeches[1 + n % 20][5_000 + n // 20 * 2_000 :][:3_000]
                        )[:WINDOW]
                        for n in range(options.texts)
                    ]
                else:
                    texts = [
                        encode_text(tokenizer, make_biography(person, random.Random(n)))
                        for n, person in enumerate(people)
                    ]
                other = encode_text(tokenizer, speeches[0][5_000:8_000])[:WINDOW]
                probes = [
                    make_probe(p, r, way)
                    for p in people
                    for r in RELATIONS
                    for way in range(TRAINED_PHRASINGS)
                ]

                @torch.no_grad()
                def nats(ids: list[int], model=model) -> float:  # type: ignore[no-untyped-def]
                    tokens = torch.tensor([ids])
                    return float(F.cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:]))

                elsewhere, before, after, spent = nats(other), [nats(ids) for ids in texts], [], 0.0
                for times in range(2):
                    for number, ids in enumerate(texts):
                        began = time.perf_counter()
                        write_online(model, store, torch.tensor(ids), f"text {number}")
                        spent += time.perf_counter() - began
                    after.append([nats(ids) for ids in texts])
                    del times
                means = [sum(each) / len(each) for each in (before, *after)]
                answers = (
                    f"{measure_recall(model, tokenizer, probes):.3f}"
                    if what == "biographies"
                    else ""
                )
                cells = [f"{mean:.2f}" for mean in means] + [
                    f"{elsewhere:.3f}, {nats(other):.3f}",
                    answers,
                ]
                print(
                    f"| {what} | {len(texts)} | {' | '.join(cells)} | {1_000 * spent / 2 / len(texts):.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
