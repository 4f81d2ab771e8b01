"""Write facts into a model and compare with other methods: recall, side effects and cost.

    python benchmarks/editing.py [--model embedded] [--facts 100,1000] [--peers]
                                 [--growth 10000] [--threads 1]

`embedded`: five facts each about people that the teacher never saw, in one of the six phrasings of
its training text, drawn at random. Recall is measured as written, in two others of the six
(`paraphrase`), and in the two phrasings of no training text (`new phrasing`). `smollm2` (after
`python scripts/fetch_smollm2.py`): counterfactual facts about real countries, written in one of
three phrasings and asked in the two others. `unrelated`: recall of known people before -> after;
for SmolLM2 the share of questions about other countries whose next token is unchanged. `locality`:
with one fact per subject written, the share of questions about its other facts whose answer
changed. KL: on held-out prose. `logits restored`: whether deletion restores the logits exactly.
`--growth` writes that many facts by our method alone and shows how time and errors grow.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peer_editing
import peer_side_memory
import peer_weights
import torch
from counterfactuals import PHRASINGS, list_unrelated_prompts, make_counterfactuals
from peer_editing import Edited
from torch import Tensor

from dmt.data.corpora import load_corpus
from dmt.data.synthetic import (
    HELD_OUT_PHRASINGS,
    RELATIONS,
    TRAINED_PHRASINGS,
    Probe,
    make_probe,
    make_unseen_people,
)
from dmt.editing.fact import Fact
from dmt.editing.fact_store import FactStore
from dmt.evaluation.metrics import measure_fidelity, measure_recall
from dmt.models.fingerprint import hash_model
from dmt.models.forward import encode_text, forward_with_activations, pad_token_ids
from dmt.models.loading import load_teacher
from dmt.store import RowStore
from dmt.training.trainer import silence_libraries

METHODS = peer_editing.METHODS | peer_weights.METHODS | peer_side_memory.METHODS
WINDOWS, WINDOW = 32, 256  # windows of held-out prose, and their tokens
NUM_KNOWN = 320  # known facts that are asked before and after


@dataclass(frozen=True)
class Task:
    """Facts to write into a model, and questions.

    Attributes:
        facts: as they are written.
        paraphrases: the same facts in other phrasings, by column of the table.
        unrelated: facts or prompts whose answers should not change.
        single_facts: one fact per subject, written alone to measure locality.
        neighbors: questions about the other facts of the same subjects.
    """

    facts: list[Probe]
    paraphrases: dict[str, list[Probe]]
    unrelated: list[Probe] | list[str]
    single_facts: list[Probe]
    neighbors: list[str]


def make_people_task(count: int) -> Task:
    """Make `count` facts about invented people."""
    rng = random.Random(0)
    facts, paraphrases, new_phrasings, single_facts, neighbors = [], [], [], [], []
    for person in make_unseen_people(-(-count // len(RELATIONS))):
        single_relation = rng.choice(RELATIONS)
        for relation in RELATIONS:
            phrasing = rng.randrange(TRAINED_PHRASINGS)
            facts.append(make_probe(person, relation, phrasing))
            others = [number for number in range(TRAINED_PHRASINGS) if number != phrasing]
            paraphrases += [
                make_probe(person, relation, number) for number in rng.sample(others, 2)
            ]
            new_phrasings += [
                make_probe(person, relation, TRAINED_PHRASINGS + number)
                for number in range(HELD_OUT_PHRASINGS)
            ]
            if relation == single_relation:
                single_facts.append(facts[-1])
            else:
                neighbors.append(
                    make_probe(person, relation, rng.randrange(TRAINED_PHRASINGS)).prompt
                )
    return Task(
        facts[:count],
        {"paraphrase": paraphrases[: 2 * count], "new phrasing": new_phrasings[: 2 * count]},
        load_corpus("biographies").probes[:NUM_KNOWN],
        single_facts,
        neighbors,
    )


def make_countries_task(count: int) -> Task:
    """Make `count` counterfactual facts about real countries."""
    counterfactuals = make_counterfactuals(count)
    first_facts: dict[str, Probe] = {}
    for fact, _ in counterfactuals:
        first_facts.setdefault(fact.person, fact)
    neighbors = [
        phrasings[random.Random(country + relation).randrange(3)].format(s=country)
        for country, fact in first_facts.items()
        for relation, phrasings in PHRASINGS.items()
        if relation != fact.relation
    ]
    return Task(
        [fact for fact, _ in counterfactuals],
        {"paraphrase": [probe for _, others in counterfactuals for probe in others]},
        list_unrelated_prompts(),
        list(first_facts.values()),
        neighbors,
    )


def load_prose(tokenizer: Any) -> Tensor:
    """Return held-out test prose that calibration did not see, `(windows, time)`."""
    ids: list[int] = []
    for document in load_corpus("speeches").test:
        ids += tokenizer(document[:20_000], add_special_tokens=False, verbose=False)["input_ids"][
            : 4 * WINDOW
        ]
        if len(ids) >= WINDOWS * WINDOW:
            break
    return torch.tensor(ids[: WINDOWS * WINDOW]).view(WINDOWS, WINDOW)


@torch.no_grad()
def predict_next(model: Any, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Return the logits after each prompt, `(prompts, vocabulary)`."""
    logits_by_batch = []
    for start in range(0, len(prompts), 64):
        ids = [encode_text(tokenizer, prompt) for prompt in prompts[start : start + 64]]
        logits = forward_with_activations(model, pad_token_ids(ids)).logits
        logits_by_batch.append(
            torch.stack([logits[index, len(prompt) - 1] for index, prompt in enumerate(ids)])
        )
    return torch.cat(logits_by_batch)


def measure_changes(model: Any, other: Any, tokenizer: Any, prompts: Sequence[str]) -> float:
    """Return the share of prompts after which two models predict different tokens."""
    first, second = (
        predict_next(either, tokenizer, prompts).argmax(-1) for either in (model, other)
    )
    return float((first != second).float().mean())


def print_row(
    name: str,
    edited: Edited,
    original: Any,
    tokenizer: Any,
    task: Task,
    windows: Tensor,
    measure_last: Callable[[], Sequence[str]],
) -> None:
    """Measure one model and print its row; `measure_last` returns the last two cells."""
    cells = []
    for probes in (task.facts, *task.paraphrases.values()):
        questions = [edited.make_question(probe) for probe in probes]
        cells.append(f"{measure_recall(edited.model, tokenizer, questions):.3f}")
    if isinstance(task.unrelated[0], Probe):
        unrelated: Any = task.unrelated
        questions = [edited.make_question(probe) for probe in unrelated]
        before = measure_recall(original, tokenizer, unrelated)
        cells.append(f"{before:.3f} -> {measure_recall(edited.model, tokenizer, questions):.3f}")
    else:
        prompts: Any = task.unrelated
        cells.append(f"{1 - measure_changes(edited.model, original, tokenizer, prompts):.3f}")
    cells.append(f"{measure_fidelity(edited.model, original, windows).kl:.1e}")
    cells.append(f"{len(task.facts) / edited.seconds:,.1f}" if edited.seconds else "")
    cells += measure_last()
    print(f"| {name} | {len(task.facts):,} | {' | '.join(cells)} |", flush=True)


def write_facts(fact_store: FactStore, probes: Sequence[Probe]) -> float:
    """Write facts as `dmt memory write` does; return the seconds."""
    start = time.perf_counter()
    fact_store.write_many([make_stored_fact(probe) for probe in probes])
    return time.perf_counter() - start


def make_stored_fact(probe: Probe) -> Fact:
    """Make the fact that answers a question."""
    return Fact(probe.prompt, probe.answer, probe.person, tag="benchmark")


def measure_ours(
    model: Any, tokenizer: Any, original: Any, task: Task, windows: Tensor, path: str
) -> None:
    """Write facts, measure, delete them, and compare the logits with those of before."""
    fact_store = open_fact_store(model, tokenizer, path, task.facts)
    prompts = [probe.prompt for probe in task.facts[:200]]
    logits_before = predict_next(model, tokenizer, prompts)
    write_facts(fact_store, task.single_facts)
    locality = measure_changes(model, original, tokenizer, task.neighbors)
    fact_store.delete(list(fact_store.records))
    seconds = write_facts(fact_store, task.facts)

    def measure_last() -> Sequence[str]:
        fact_store.delete(list(fact_store.records))
        difference = float((predict_next(model, tokenizer, prompts) - logits_before).abs().max())
        return f"{locality:.3f}", f"no, by {difference:.1e}" if difference else "exactly"

    edited = Edited(model, seconds)
    print_row("**ours**", edited, original, tokenizer, task, windows, measure_last)
    fact_store.close()


def open_fact_store(model: Any, tokenizer: Any, path: str, probes: Sequence[Probe]) -> FactStore:
    """Create a fact store, calibrate it, and print the chosen layers."""
    fact_store = FactStore(model, tokenizer, RowStore(path, hash_model(model)))
    start = time.perf_counter()
    fact_store.initialize([make_stored_fact(probe) for probe in probes[:8]])
    hooks = fact_store.hooks
    print(
        f"<!-- key layer {hooks.key_layer}, value layer {hooks.value_layer}; "
        f"{time.perf_counter() - start:.0f} s, once -->",
        flush=True,
    )
    return fact_store


def measure_growth(
    model: Any, tokenizer: Any, original: Any, max_facts: int, windows: Tensor, folder: str
) -> None:
    """Print how time and errors grow with the number of facts about people."""
    task = make_people_task(max_facts)
    known_people: Any = task.unrelated
    paraphrases = task.paraphrases["paraphrase"]
    fact_store = open_fact_store(model, tokenizer, f"{folder}/growth.db", task.facts)
    columns = (
        "facts",
        "written",
        "paraphrase",
        "known people",
        "KL",
        "facts per second",
        "ms for 2,048 tokens: without, with",
        "MiB",
    )
    print(f"\n| {' | '.join(columns)} |\n|{'---:|' * len(columns)}")
    num_written = 0
    for count in (100, 300, 1_000, 3_000, 10_000, 30_000):
        if count > max_facts:
            break
        seconds = write_facts(fact_store, task.facts[num_written:count])
        sample = random.Random(count).sample(range(count), min(count, 500))
        probe_lists = (
            [task.facts[index] for index in sample],
            [paraphrases[2 * index + offset] for index in sample for offset in (0, 1)],
            known_people,
        )
        recalls = [measure_recall(model, tokenizer, probes) for probes in probe_lists]
        milliseconds = [measure_forward(either, windows[:8]) for either in (original, model)]
        size = sum(file.stat().st_size for file in Path(folder).glob("growth.db*")) / 2**20
        cells = [
            f"{count:,}",
            *(f"{recall:.3f}" for recall in recalls),
            f"{measure_fidelity(model, original, windows).kl:.1e}",
            f"{(count - num_written) / seconds:,.0f}",
            f"{milliseconds[0]:.0f}, {milliseconds[1]:.0f}",
            f"{size:.1f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
        num_written = count
    fact_store.close()


@torch.no_grad()
def measure_forward(model: Any, windows: Tensor) -> float:
    """Return the median milliseconds of a forward pass."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        forward_with_activations(model, windows)
        seconds.append(time.perf_counter() - start)
    return 1_000 * sorted(seconds)[2]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="embedded", choices=("embedded", "smollm2"))
    parser.add_argument("--facts", default="100,1000")
    parser.add_argument(
        "--peers",
        action="store_true",
        help="other methods beside ours, at the first number of facts",
    )
    parser.add_argument(
        "--growth", type=int, default=0, help="number of facts about people, by our method alone"
    )
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    silence_libraries()
    torch.set_num_threads(args.threads)
    original, tokenizer = load_teacher(args.model)
    windows = load_prose(tokenizer)[: WINDOWS if args.model == "embedded" else WINDOWS // 4]
    make_task = make_people_task if args.model == "embedded" else make_countries_task
    counts = [int(count) for count in args.facts.split(",") if count]
    with tempfile.TemporaryDirectory() as folder:
        for index, count in enumerate(counts):
            task = make_task(count)
            columns = [
                "method",
                "facts",
                "as written",
                *task.paraphrases,
                "unrelated",
                "KL",
                "facts per second",
                "locality",
                "logits restored",
            ]
            print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
            model = load_teacher(args.model)[0]
            path = f"{folder}/{len(task.facts)}.db"
            measure_ours(model, tokenizer, original, task, windows, path)
            for name, method in METHODS.items() if args.peers and index == 0 else ():
                edited = method(original, tokenizer, task.facts)
                print_row(name, edited, original, tokenizer, task, windows, lambda: ("", ""))
        if args.growth:
            model = load_teacher(args.model)[0]
            measure_growth(model, tokenizer, original, args.growth, windows, folder)


if __name__ == "__main__":
    main()
