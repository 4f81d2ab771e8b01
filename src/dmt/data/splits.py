"""Split documents into training, validation and test text that have nothing in common."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dmt.data.duplicates import MIN_CHARS, find_copies, group_near_duplicates

SPLITS = ("train", "validation", "test")
HELD_OUT = ("validation", "test")
MIN_DOCUMENTS = 20  # fewer documents are split inside
HELD_OUT_PARTS = 20  # one in 20 documents goes into validation, another one into test
MAX_HELD_OUT_SHARE = 0.2  # of the characters; what is longer is split inside
STRETCHES = 100  # into which text without paragraphs is cut
BOUNDARY_SEARCH_CHARS = 10_000
SAMPLE_CHARS_PER_TOKEN = 64  # enough to see whether a long text has enough tokens
BLANK_LINE = re.compile(r"\n[^\S\n]*\n")
# Where a text is cut, the best places first.
BOUNDARIES = (
    re.compile(r"\n"),
    re.compile(r"[.!?…][\"'”’)\]]*\s+|[。！？]"),
    re.compile(r"\s+"),
)

TokenCounter = Callable[[str], int]


@dataclass(frozen=True, slots=True)
class Piece:
    """A document, or a part of one that goes into a split of its own.

    Attributes:
        text: its text.
        document: index of the document.
        is_joined: whether it is joined again to the piece before it if both are in one split.
    """

    text: str
    document: int
    is_joined: bool = False


@dataclass(frozen=True)
class Split:
    """Documents by split, and how they were divided.

    Attributes:
        documents: documents of each of `SPLITS`.
        unit: what was divided: `documents`, `paragraphs` or `stretches`.
        num_copies: documents that were removed, because an earlier one is the same.
        num_near_duplicates: units beside another one that is nearly the same, in the same split.
        has_overlap: whether units of different splits are nearly the same, which is so only where
            there is no other way to divide the text.
    """

    documents: dict[str, list[str]]
    unit: str
    num_copies: int = 0
    num_near_duplicates: int = 0
    has_overlap: bool = False


def split_documents(
    documents: Sequence[str], seed: int, min_tokens: int = 1, count_tokens: TokenCounter = len
) -> Split | None:
    """Hold out 5 % each for validation and test, more where that has fewer than `min_tokens`.

    Copies are removed; near duplicates stay in one split. Units are documents, or parts of them
    where there are fewer than 20 documents or some are too long: paragraphs, else stretches of a
    hundredth of the text that end with a line, a sentence or a word.

    Returns:
        The split, or None if the text is too short to be divided into three.
    """
    copies = {copy for _, copy in find_copies(documents)}
    documents = [document for index, document in enumerate(documents) if index not in copies]
    for unit, cut in (
        ("documents", _keep_whole),
        ("paragraphs", _cut_at_double_breaks),
        ("paragraphs", _cut_at_blank_lines),
        ("stretches", _cut_into_stretches),
    ):
        if unit == "documents" and len(documents) < MIN_DOCUMENTS:
            continue
        pieces = list(cut(documents))
        groups = group_near_duplicates([piece.text for piece in pieces])
        labels = _hold_out(pieces, groups, seed, min_tokens, count_tokens)
        if labels is not None:
            return Split(_collect(pieces, labels), unit, len(copies), len(pieces) - len(groups))
    # The text is short, or nearly all of it is alike: then parts of it cannot be kept apart.
    num_near_duplicates = len(pieces) - len(groups)
    pieces = list(_cut_into_stretches(documents, min_chars=1))
    labels = _divide_in_order(pieces, min_tokens, count_tokens)
    if labels is None:
        return None
    return Split(
        _collect(pieces, labels),
        unit,
        len(copies),
        num_near_duplicates,
        has_overlap=num_near_duplicates > 0,
    )


def _keep_whole(documents: Sequence[str]) -> Iterator[Piece]:
    return (Piece(document, index) for index, document in enumerate(documents))


def _cut_at_double_breaks(documents: Sequence[str]) -> Iterator[Piece]:
    for index, document in enumerate(documents):
        yield from (Piece(part, index) for part in document.split("\n\n") if part.strip())


def _cut_at_blank_lines(documents: Sequence[str]) -> Iterator[Piece]:
    for index, document in enumerate(documents):
        yield from (Piece(part, index) for part in BLANK_LINE.split(document) if part.strip())


def _cut_into_stretches(documents: Sequence[str], min_chars: int = MIN_CHARS) -> Iterator[Piece]:
    size = max(min_chars, sum(map(len, documents)) // STRETCHES)
    for index, document in enumerate(documents):
        start = 0
        while start < len(document):
            end = _find_boundary(document, start, size)
            yield Piece(document[start:end], index, is_joined=start > 0)
            start = end


def _find_boundary(text: str, start: int, size: int) -> int:
    """Return where a stretch of about `size` characters from `start` on ends."""
    if len(text) - start <= size + size // 2:
        return len(text)
    end = start + size
    search_start = max(start + size // 2, end - BOUNDARY_SEARCH_CHARS)
    for pattern in BOUNDARIES:
        matches = list(pattern.finditer(text, search_start, end))
        if matches:
            return matches[-1].end()
    return end


def _hold_out(
    pieces: Sequence[Piece],
    groups: Sequence[Sequence[int]],
    seed: int,
    min_tokens: int,
    count_tokens: TokenCounter,
) -> list[str] | None:
    """Draw groups of pieces for validation and test; return the split of each piece.

    Returns:
        None if a split has not enough text without the groups that are too long to be held out.
    """
    order = list(range(len(groups)))
    random.Random(f"split-{seed}").shuffle(order)
    num_held_out = max(1, len(groups) // HELD_OUT_PARTS)
    max_chars = MAX_HELD_OUT_SHARE * sum(len(piece.text) for piece in pieces)
    labels = ["train"] * len(pieces)
    num_groups, num_chars, num_tokens = (dict.fromkeys(HELD_OUT, 0) for _ in range(3))

    def is_full(split: str) -> bool:
        return num_groups[split] >= num_held_out and num_tokens[split] >= min_tokens

    for index in order:
        length = sum(len(pieces[member].text) for member in groups[index])
        for split in HELD_OUT:
            if is_full(split) or num_chars[split] + length > max_chars:
                continue
            num_groups[split] += 1
            num_chars[split] += length
            for member in groups[index]:
                labels[member] = split
                if num_tokens[split] < min_tokens:
                    num_tokens[split] += count_tokens(pieces[member].text)
            break
    return labels if _have_enough(_collect(pieces, labels), min_tokens, count_tokens) else None


def _divide_in_order(
    pieces: Sequence[Piece], min_tokens: int, count_tokens: TokenCounter
) -> list[str] | None:
    """Take the first pieces for validation, the next for test, all others for training."""
    labels = ["train"] * len(pieces)
    index = 0
    for split in HELD_OUT:
        while index < len(pieces):
            labels[index] = split
            index += 1
            if _has_enough(_collect(pieces, labels)[split], min_tokens, count_tokens):
                break
    return labels if _have_enough(_collect(pieces, labels), min_tokens, count_tokens) else None


def _collect(pieces: Sequence[Piece], labels: Sequence[str]) -> dict[str, list[str]]:
    """Return the documents of each split; pieces that followed each other are joined again."""
    documents: dict[str, list[list[str]]] = {split: [] for split in SPLITS}
    previous_label = ""
    for piece, label in zip(pieces, labels, strict=True):
        if piece.is_joined and label == previous_label:
            documents[label][-1].append(piece.text)
        else:
            documents[label].append([piece.text])
        previous_label = label
    return {split: list(map("".join, parts)) for split, parts in documents.items()}


def _have_enough(
    documents: dict[str, list[str]], min_tokens: int, count_tokens: TokenCounter
) -> bool:
    return all(_has_enough(documents[split], min_tokens, count_tokens) for split in SPLITS)


def _has_enough(documents: Sequence[str], min_tokens: int, count_tokens: TokenCounter) -> bool:
    """Return whether documents that are not blank have `min_tokens` tokens."""
    num_tokens = 0
    for document in documents:
        if not document.strip():
            continue
        sample = document[: SAMPLE_CHARS_PER_TOKEN * min_tokens]
        if num_tokens + count_tokens(sample) >= min_tokens:
            return True
        num_tokens += count_tokens(document)
    return False
