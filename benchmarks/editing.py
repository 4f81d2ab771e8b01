"""Facts written into a model, beside other ways to teach it: recall, what else changes, and what it costs.

    python benchmarks/editing.py [--model embedded] [--facts 100,1000] [--peers] [--growth 10000] [--threads 1]

`embedded`: people that the teacher never saw, each of five facts written in one of the six phrasings that the teacher knows,
drawn at random. Asked: as written; in two of the other five; in the two phrasings that no training text has. `smollm2` (after
`python scripts/fetch_smollm2.py`): things that are not so about real countries, written in one of three phrasings, asked in the
two others. `else`: of known people, share recalled before -> after; of SmolLM2, share of questions about other countries that
are answered as before. `unasked`: share of other questions about the same subjects, of which nothing is written, whose answer
is changed (one fact in five is written for this, or one in nine). KL: of held-out prose. `back`: whether logits are exactly
those of before when all facts are forgotten. `--growth` writes so many, ours alone, and tells how time and errors grow.
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

import torch
from counterfactuals import ASKED, counterfactuals, spared
from peer_editing import METHODS, Edited
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

WINDOWS, WINDOW = 32, 256
"""Of held-out prose."""
KNOWN = 320
"""Known facts that are asked about before and after."""
LONGEST = 8
"""Tokens of an answer that is compared with that of before."""


@dataclass(frozen=True)
class Task:
    """What is taught to one model and what it is asked.

    Attributes:
        written: facts as they are written.
        asked: by the name of a column, the same facts in other words.
        kept: what should be answered as before, facts or prompts.
        unasked: questions about the subjects of `one`, of which only those facts are written.
    """

    written: list[Probe]
    asked: dict[str, list[Probe]]
    kept: list[Probe] | list[str]
    one: list[Probe]
    unasked: list[str]


def people_task(count: int) -> Task:
    """About invented people."""
    draw = random.Random(0)
    written, others, unknown, one, unasked = [], [], [], [], []
    for person in make_unseen_people(-(-count // len(RELATIONS))):
        chosen = draw.choice(RELATIONS)
        for relation in RELATIONS:
            way = draw.randrange(TRAINED_PHRASINGS)
            written.append(make_probe(person, relation, way))
            other = draw.sample([each for each in range(TRAINED_PHRASINGS) if each != way], 2)
            others += [make_probe(person, relation, each) for each in other]
            unknown += [
                make_probe(person, relation, TRAINED_PHRASINGS + each)
                for each in range(HELD_OUT_PHRASINGS)
            ]
            if relation == chosen:
                one.append(written[-1])
            else:
                unasked.append(
                    make_probe(person, relation, draw.randrange(TRAINED_PHRASINGS)).prompt
                )
    asked = {"two other phrasings": others[: 2 * count], "two nobody trained": unknown[: 2 * count]}
    return Task(written[:count], asked, load_corpus("biographies").probes[:KNOWN], one, unasked)


def countries_task(count: int) -> Task:
    """About real countries."""
    made = counterfactuals(count)
    first: dict[str, Probe] = {}
    for written, _ in made:
        first.setdefault(written.person, written)
    unasked = [
        ways[random.Random(name + about).randrange(3)].format(s=name)
        for name, fact in first.items()
        for about, ways in ASKED.items()
        if about != fact.relation
    ]
    others = {"two other phrasings": [each for _, asked in made for each in asked]}
    return Task([written for written, _ in made], others, spared(), list(first.values()), unasked)


def prose(tokenizer: Any) -> Tensor:
    """Held-out prose that calibration did not see: test text, `(windows, time)`."""
    ids: list[int] = []
    for document in load_corpus("speeches").test:
        ids += tokenizer(document[:20_000], add_special_tokens=False, verbose=False)["input_ids"][
            : 4 * WINDOW
        ]
        if len(ids) >= WINDOWS * WINDOW:
            break
    return torch.tensor(ids[: WINDOWS * WINDOW]).view(WINDOWS, WINDOW)


@torch.no_grad()
def nexts(model: Any, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Logits after each prompt, `(prompts, vocabulary)`."""
    found = []
    for start in range(0, len(prompts), 64):
        ids = [encode_text(tokenizer, prompt) for prompt in prompts[start : start + 64]]
        logits = forward_with_activations(model, pad_token_ids(ids)).logits
        found.append(torch.stack([logits[at, len(each) - 1] for at, each in enumerate(ids)]))
    return torch.cat(found)


@torch.no_grad()
def changed(model: Any, other: Any, tokenizer: Any, prompts: Sequence[str]) -> float:
    """Share of prompts after which both do not find the same token likeliest."""
    mine, theirs = (nexts(each, tokenizer, prompts).argmax(-1) for each in (model, other))
    return float((mine != theirs).float().mean())


def row(
    name: str,
    edited: Edited,
    original: Any,
    tokenizer: Any,
    task: Task,
    windows: Tensor,
    more: Callable[[], Sequence[str]],
) -> None:
    """Measure one model and print its line."""
    ask = [
        [edited.prompt(each) for each in probes] for probes in (task.written, *task.asked.values())
    ]
    cells = [f"{measure_recall(edited.model, tokenizer, probes):.3f}" for probes in ask]
    if isinstance(task.kept[0], Probe):
        kept: Any = task.kept
        after = measure_recall(edited.model, tokenizer, [edited.prompt(each) for each in kept])
        cells.append(f"{measure_recall(original, tokenizer, kept):.3f} -> {after:.3f}")
    else:
        cells.append(f"{1 - changed(edited.model, original, tokenizer, task.kept):.3f}")  # type: ignore[arg-type]
    cells.append(f"{measure_fidelity(edited.model, original, windows).kl:.1e}")
    speed = f"{len(task.written) / edited.seconds:,.1f}" if edited.seconds else ""
    print(
        f"| {name} | {len(task.written):,} | {' | '.join(cells)} | {speed} | {' | '.join(more())} |",
        flush=True,
    )


def wrote(book: FactStore, probes: Sequence[Probe]) -> float:
    """Write facts as the command does; seconds."""
    began = time.perf_counter()
    book.write_many([Fact(each.prompt, each.answer, each.person, tag="benchmark") for each in probes])
    return time.perf_counter() - began


def ours(
    load: Callable[[], Any], tokenizer: Any, original: Any, task: Task, windows: Tensor, folder: str
) -> None:
    """Write, measure, forget, and see that nothing is left."""
    book = _book(load, tokenizer, f"{folder}/{len(task.written)}.db", task)
    before = nexts(book.model, tokenizer, [each.prompt for each in task.written[:200]])
    seconds = wrote(book, task.one)
    unasked = changed(book.model, original, tokenizer, task.unasked)
    book.delete(list(book.records))
    seconds = wrote(book, task.written)
    edited = Edited(book.model, seconds)

    def at_last() -> Sequence[str]:
        return f"{unasked:.3f}", _back(book, tokenizer, task, before)

    row("**ours**", edited, original, tokenizer, task, windows, at_last)
    book.close()


def _book(load: Callable[[], Any], tokenizer: Any, place: str, task: Task) -> FactStore:
    model = load()
    book = FactStore(model, tokenizer, RowStore(place, hash_model(model)))
    began = time.perf_counter()
    lines: list[str] = []
    book.initialize(
        [Fact(each.prompt, each.answer, each.person) for each in task.written[:8]], log=lines.append
    )
    print(f"<!-- {'; '.join(lines)}; {time.perf_counter() - began:.0f} s, once -->", flush=True)
    return book


def _back(book: FactStore, tokenizer: Any, task: Task, before: Tensor) -> str:
    book.delete(list(book.records))
    after = nexts(book.model, tokenizer, [each.prompt for each in task.written[:200]])
    return (
        "exactly"
        if torch.equal(before, after)
        else f"no, by {float((before - after).abs().max()):.1e}"
    )


def growth(
    load: Callable[[], Any], tokenizer: Any, original: Any, most: int, windows: Tensor, folder: str
) -> None:
    """How time and errors grow with facts: of people alone, for want of so many countries."""
    task = people_task(most)
    book = _book(load, tokenizer, f"{folder}/growth.db", task)
    columns = "facts | written | two other phrasings | known people | KL | facts a second | ms for 2,048 tokens: without, with | MiB"
    print(f"\n| {columns} |")
    print(f"|{'---:|' * 8}")
    given = 0
    for mark in [mark for mark in (100, 300, 1_000, 3_000, 10_000, 30_000) if mark <= most]:
        seconds = wrote(book, task.written[given:mark])
        sample = random.Random(mark).sample(range(mark), min(mark, 500))
        others = task.asked["two other phrasings"]
        asked = (
            [task.written[at] for at in sample],
            [others[2 * at + side] for at in sample for side in (0, 1)],
        )
        cells = [
            f"{measure_recall(book.model, tokenizer, probes):.3f}" for probes in (*asked, task.kept)
        ]  # type: ignore[arg-type]
        speed = [_milliseconds(model, windows[:8]) for model in (original, book.model)]
        size = sum(file.stat().st_size for file in Path(folder).glob("growth.db*")) / 2**20
        kl = measure_fidelity(book.model, original, windows).kl
        cells += [
            f"{kl:.1e}",
            f"{(mark - given) / seconds:,.0f}",
            f"{speed[0]:.0f}, {speed[1]:.0f}",
            f"{size:.1f}",
        ]
        print(f"| {mark:,} | {' | '.join(cells)} |", flush=True)
        given = mark
    book.close()


@torch.no_grad()
def _milliseconds(model: Any, windows: Tensor) -> float:
    times = []
    for _ in range(5):
        began = time.perf_counter()
        forward_with_activations(model, windows)
        times.append(time.perf_counter() - began)
    return 1_000 * sorted(times)[2]


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
        "--growth", type=int, default=0, help="write so many facts about people, ours alone"
    )
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    silence_libraries()
    torch.set_num_threads(options.threads)
    original, tokenizer = load_teacher(options.model)
    windows = prose(tokenizer)[: WINDOWS if options.model == "embedded" else WINDOWS // 4]
    make = people_task if options.model == "embedded" else countries_task
    counts = [int(count) for count in options.facts.split(",") if count]
    with tempfile.TemporaryDirectory() as folder:
        for number, count in enumerate(counts):
            task = make(count)
            head = [
                "method",
                "facts",
                "as written",
                *task.asked,
                "else",
                "KL",
                "facts a second",
                "unasked",
                "back",
            ]
            print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
            ours(lambda: load_teacher(options.model)[0], tokenizer, original, task, windows, folder)
            for name, method in METHODS.items() if options.peers and not number else ():
                row(
                    name,
                    method(original, tokenizer, task.written),
                    original,
                    tokenizer,
                    task,
                    windows,
                    lambda: ("", ""),
                )
        if options.growth:
            growth(
                lambda: load_teacher(options.model)[0],
                tokenizer,
                original,
                options.growth,
                windows,
                folder,
            )


if __name__ == "__main__":
    main()
