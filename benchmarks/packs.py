"""Two packs that contradict each other about the same people: one loaded, swapped for the other, taken away again.

    python benchmarks/packs.py [--facts 1000] [--threads 1]

The embedded teacher; each fact in one of the phrasings that it knows, asked as written and in two others. `swap`: seconds from
the packs in memory to a model that answers by the other one; `load`: reading and checking the file.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from editing import nexts, people_task

from dmt.data.synthetic import Probe
from dmt.editing import packs
from dmt.editing.fact import Fact
from dmt.editing.fact_store import FactStore
from dmt.editing.packs import diff_facts, load_packs, make_fact_pack, merge_packs
from dmt.evaluation.metrics import measure_recall
from dmt.models.fingerprint import hash_model
from dmt.models.loading import load_teacher
from dmt.store import RowStore
from dmt.training.trainer import silence_libraries


def other_answers(written: list[Probe]) -> dict[tuple[str, str], str]:
    """Answers to the same questions that are those of somebody else."""
    draw, found = random.Random(1), {}
    for relation in {each.relation for each in written}:
        there = [each for each in written if each.relation == relation]
        answers = [each.answer for each in there]
        for each in there:
            found[each.person, relation] = draw.choice(
                [answer for answer in answers if answer != each.answer]
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--facts", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    silence_libraries()
    torch.set_num_threads(options.threads)
    task = people_task(options.facts)
    others = task.asked["two other phrasings"]
    swapped = other_answers(task.written)
    told = {"A": (task.written, others)}
    contrary = [
        [replace(each, answer=swapped[each.person, each.relation]) for each in probes]
        for probes in told["A"]
    ]
    told["B"] = contrary[0], contrary[1]
    prompts = [each.prompt for each in task.written]
    columns = (
        "",
        "A as written",
        "A in other words",
        "B as written",
        "B in other words",
        "seconds",
        "logits",
    )
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    with tempfile.TemporaryDirectory() as folder:
        loaded = {}
        for name, (written, _) in told.items():
            model, tokenizer = load_teacher("embedded")
            book = FactStore(model, tokenizer, RowStore(f"{folder}/{name}.db", hash_model(model)))
            book.write_many([Fact(each.prompt, each.answer, each.person, tag=name) for each in written])
            place = Path(folder) / f"{name}.safetensors"
            packs.save_fact_pack(
                make_fact_pack(
                    book, list(book.records.values()), name, "CC0-1.0", hash_model(model)
                ),
                place,
            )
            book.close()
            began = time.perf_counter()
            loaded[name] = packs.load_fact_pack(place)
            print(
                f"| load {name}, {place.stat().st_size / 2**20:.1f} MiB | | | | | {time.perf_counter() - began:.2f} | |"
            )
        model, tokenizer = load_teacher("embedded")
        model_is = hash_model(model)
        guest = FactStore(model, tokenizer, None)
        before = nexts(model, tokenizer, prompts)
        for name, chosen in (("A", ["A"]), ("B in place of A", ["B"]), ("none", [])):
            began = time.perf_counter()
            load_packs(guest, [loaded[each] for each in chosen], model_is)
            seconds = time.perf_counter() - began
            cells = [
                f"{measure_recall(model, tokenizer, probes):.3f}"
                for both in told.values()
                for probes in both
            ]
            same = torch.equal(before, nexts(model, tokenizer, prompts))
            print(
                f"| {name} | {' | '.join(cells)} | {seconds:.3f} | {'exactly as before' if same else 'changed'} |",
                flush=True,
            )
        found = diff_facts(loaded["A"].facts, loaded["B"].facts)
        _, conflicts = merge_packs(list(loaded.values()), "both")
        print(
            f"\ndiff: {found.num_same} the same, {len(found.different)} different; merge: {len(conflicts)} contradictions reported"
        )


if __name__ == "__main__":
    main()
