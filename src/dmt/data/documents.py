"""Read documents from files: plain text, JSON lines, tables, and folders of them."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmt.errors import UserError
from dmt.files import format_fields, iterate_lines, parse_json, read_json_lines, read_text_file

TEXT_KINDS = (".txt", ".md")
TABLE_KINDS = (".json", ".csv", ".parquet")  # in a folder, those without text are skipped
FILE_KINDS = (*TEXT_KINDS, ".jsonl", *TABLE_KINDS)
ACCEPTED_KINDS = f"{', '.join(FILE_KINDS)} (all but the last also with .gz)"
# Fields that hold the text of a record, the usual ones first.
TEXT_FIELDS = (("text",), ("content",), ("messages",), ("prompt", "completion"))
EXAMPLE = '{"text": "..."}'
MAX_CSV_FIELD = 2**31 - 1
READ_ADVICE = "remove it or name another"

Record = Mapping[str, Any]
LocatedRecord = tuple[str, Record]  # where it stands, as in `a.jsonl line 3`, and its fields


class NoTextFieldError(UserError):
    """The records of a file have no field of text."""


@dataclass
class Documents:
    """Documents of a file or folder, and what was skipped.

    Attributes:
        texts: the documents.
        num_files: files that were read.
        skipped: what was not read, by reason.
    """

    texts: list[str] = field(default_factory=list)
    num_files: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def describe(self) -> str:
        """Return what was read and skipped in a few words."""
        skipped = format_counts(self.skipped)
        return f"files read: {self.num_files}" + (f", skipped: {skipped}" if skipped else "")

    def add(self, texts: Iterable[str]) -> None:
        """Add texts that are not blank."""
        for text in texts:
            if text.strip():
                self.texts.append(text)
            else:
                self.skipped["blank documents"] += 1


def format_counts(counts: Mapping[str, int]) -> str:
    """Return counts as in `2 hidden, 1 .pdf`."""
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items())


class RecordReader:
    """Takes the text out of records: JSON objects, rows of tables, rows of hub datasets.

    Args:
        field_name: field that holds the text, None for the first usual one (`TEXT_FIELDS`).
        tokenizer: its chat template renders messages; without one their contents are joined by
            blank lines, as they are where this is None.
    """

    def __init__(self, field_name: str | None = None, tokenizer: Any = None) -> None:
        self.field_name, self.tokenizer = field_name, tokenizer
        self.has_chat_template = bool(getattr(tokenizer, "chat_template", None))
        self.num_chats = 0

    def find_fields(self, names: Iterable[str]) -> tuple[str, ...] | None:
        """Return the fields that hold the text, or None if they are not among `names`."""
        available = set(names)
        options = TEXT_FIELDS if self.field_name is None else ((self.field_name,),)
        return next((option for option in options if available.issuperset(option)), None)

    def read_texts(self, records: Iterable[LocatedRecord]) -> Iterator[str]:
        """Yield the text of each record, which may be empty; all have the fields of the first.

        Raises:
            UserError: a record has no text.
        """
        text_fields = None
        for location, record in records:
            text_fields = text_fields or self.find_fields(record)
            if text_fields is None or not record.keys() >= set(text_fields):
                raise NoTextFieldError(
                    f"{location} has no text in {self._describe_fields(text_fields)} "
                    f"({format_fields(record)}); name its field by data.field"
                )
            yield self._get_text(location, record, text_fields)

    def _describe_fields(self, text_fields: tuple[str, ...] | None) -> str:
        if self.field_name is not None:
            return f"data.field={self.field_name}"
        if text_fields is None:
            return "a field text, content, messages, or prompt and completion"
        return f"{' and '.join(text_fields)}, as the first one has"

    def _get_text(self, location: str, record: Record, text_fields: tuple[str, ...]) -> str:
        values = [record[name] for name in text_fields if record[name] is not None]
        if all(isinstance(value, str) for value in values):
            return "".join(values)
        if all(_is_chat(value) for value in values):
            return self._render_chat(location, [message for chat in values for message in chat])
        raise UserError(
            f'{location} has no text in its field "{text_fields[0]}"; accepted are text and a list '
            'of messages such as {"role": "user", "content": "..."}'
        )

    def _render_chat(self, location: str, messages: list[dict[str, Any]]) -> str:
        self.num_chats += 1
        if not self.has_chat_template:
            return "\n\n".join(_get_content(message) for message in messages)
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # templates raise what they like
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"{location}: the tokenizer's chat template refuses the messages ({reason}); "
                "correct them, or write the text into a field of its own"
            ) from None


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and (message.get("content") is None or isinstance(message["content"], str | list))
        for message in value
    )


def _get_content(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(
        part["text"]
        for part in content
        if isinstance(part, dict) and isinstance(part.get("text"), str)
    )


def read_documents(path: Path, reader: RecordReader) -> Documents:
    """Read the documents of a file, or of all files of a folder.

    In a folder, hidden files and folders, files of other kinds, and tables without a field of text
    are skipped and counted.

    Raises:
        UserError: a file cannot be read, or a named file is of another kind.
    """
    documents = Documents()
    if not path.is_dir():
        if _get_kind(path) is None:
            raise UserError(
                f"data.corpora: {path} is none of {ACCEPTED_KINDS}; convert it or name another file"
            )
        documents.add(_read_file(path, reader))
        documents.num_files = 1
        return documents
    for file in _list_files(path, documents.skipped):
        try:
            documents.add(list(_read_file(file, reader)))
        except NoTextFieldError:
            if _get_kind(file) not in TABLE_KINDS:
                raise
            documents.skipped["tables without a field of text"] += 1
        else:
            documents.num_files += 1
    return documents


def _list_files(folder: Path, skipped: Counter[str]) -> list[Path]:
    """Return the files of a folder that can be read, sorted; count the others."""
    paths = []
    for parent, folder_names, file_names in os.walk(folder):
        hidden = [name for name in (*folder_names, *file_names) if name.startswith(".")]
        folder_names[:] = [name for name in folder_names if name not in hidden]
        if hidden:
            skipped["hidden"] += len(hidden)
        for name in file_names:
            path = Path(parent, name)
            if name in hidden:
                continue
            if _get_kind(path) is not None:
                paths.append(path)
            else:
                skipped[path.suffix.lower() or "files without an ending"] += 1
    return sorted(paths)


def _get_kind(path: Path) -> str | None:
    """Return the kind of a file, one of `FILE_KINDS`, or None for another."""
    name = path.name.lower()
    is_compressed = name.endswith(".gz")
    kind = Path(name.removesuffix(".gz")).suffix
    return kind if kind in FILE_KINDS and not (is_compressed and kind == ".parquet") else None


def _read_file(path: Path, reader: RecordReader) -> Iterator[str]:
    name = f"data.corpora: {path}"
    if not path.is_file():  # reading a pipe would block
        raise UserError(f"{name} is not a file; {READ_ADVICE}")
    kind = _get_kind(path)
    if kind in TEXT_KINDS:
        yield read_text_file(path, name, READ_ADVICE)
    elif kind == ".jsonl":
        yield from reader.read_texts(read_json_lines(path, name, READ_ADVICE, EXAMPLE))
    elif kind == ".json":
        yield from reader.read_texts(_read_json(path, name))
    elif kind == ".csv":
        yield from reader.read_texts(_read_csv(path, name))
    else:
        yield from reader.read_texts(_read_parquet(path, name, reader.find_fields))


def _read_json(path: Path, name: str) -> Iterator[LocatedRecord]:
    """Yield the objects of a JSON file: a list of them, a single one, or one in each line."""
    value, _ = parse_json(read_text_file(path, name, READ_ADVICE))
    if isinstance(value, dict):
        yield name, value
    elif isinstance(value, list):
        for number, item in enumerate(value, 1):
            if not isinstance(item, dict):
                raise UserError(f"{name} item {number} is not an object such as {EXAMPLE}")
            yield f"{name} item {number}", item
    else:
        yield from read_json_lines(path, name, READ_ADVICE, EXAMPLE)


def _read_csv(path: Path, name: str) -> Iterator[LocatedRecord]:
    """Yield the rows of a table in CSV; its first line names the columns."""
    text = read_text_file(path, name, READ_ADVICE)
    limit = csv.field_size_limit(MAX_CSV_FIELD)
    try:
        rows = csv.DictReader(iterate_lines(text), restkey="", strict=True)
        for row in rows:
            if "" in row and isinstance(row[""], list):
                raise UserError(
                    f"{name} line {rows.line_num} has more cells than columns; put cells that hold "
                    "commas in quotation marks"
                )
            yield f"{name} line {rows.line_num}", row
    except csv.Error as error:
        raise UserError(f"{name} line {rows.reader.line_num}: {error}; correct the line") from None
    finally:
        csv.field_size_limit(limit)


def _read_parquet(
    path: Path, name: str, find_fields: Callable[[Iterable[str]], tuple[str, ...] | None]
) -> Iterator[LocatedRecord]:
    """Yield the rows of a Parquet file, of which only the columns of text are read."""
    try:
        from pyarrow import ArrowException  # type: ignore[import-not-found,unused-ignore]
        from pyarrow.parquet import ParquetFile  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise UserError(f"{name} needs pyarrow: pip install pyarrow") from None
    number = 0
    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = find_fields(names)
            if columns is None:
                yield name, dict.fromkeys(names)
                return
            for batch in file.iter_batches(batch_size=1_000, columns=list(columns)):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name} row {number}", row
    except (ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{name} cannot be read ({reason}); {READ_ADVICE}") from None
