"""Find documents that are the same, or nearly so.

White space is ignored throughout. Two documents are near duplicates if about four fifths of their
shingles are the same: Jaccard similarity of the sets of all stretches of 16 characters, estimated
from the 64 smallest hashes of each set. Documents of fewer than 200 characters are compared
exactly, longer ones by their first million.

Source: Broder 1997, On the resemblance and containment of documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

MIN_CHARS = 200  # a change of one word makes shorter documents differ by a fifth
MAX_CHARS = 1_000_000
SHINGLE_CHARS = 16  # a power of two
SKETCH_SIZE = 64
MIN_SIMILARITY = 0.8
BATCH_CHARS = 2**20  # hashed at once
HASH_BITS = 44  # the upper bits of a key are the document's index in its batch
HASH_MULTIPLIER = 0x9E3779B97F4A7C15


def remove_spaces(text: str) -> str:
    """Return `text` without white space."""
    return "".join(text.split())


def hash_text(text: str) -> bytes:
    """Return a hash of `text` that does not depend on white space."""
    digest = hashlib.blake2b(digest_size=16)
    for start in range(0, len(text), MAX_CHARS):  # bounds the memory
        digest.update(remove_spaces(text[start : start + MAX_CHARS]).encode())
    return digest.digest()


def find_copies(documents: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield the indices of equal documents: the first one and each copy of it."""
    first_index: dict[bytes, int] = {}
    for index, document in enumerate(documents):
        first = first_index.setdefault(hash_text(document), index)
        if first != index:
            yield first, index


def group_near_duplicates(documents: Sequence[str]) -> list[list[int]]:
    """Return the indices of documents in groups of equal and near duplicates.

    The groups are ordered by their first document. Time and memory grow with the number of
    characters alone: each document is compared with at most four later ones.
    """
    parents = list(range(len(documents)))

    def find_root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    for first, second in chain(find_copies(documents), _find_near_pairs(documents)):
        roots = sorted((find_root(first), find_root(second)))
        parents[roots[1]] = roots[0]
    groups: dict[int, list[int]] = {}
    for index in range(len(documents)):
        groups.setdefault(find_root(index), []).append(index)
    return list(groups.values())


def _find_near_pairs(documents: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield pairs of similar documents; a group of them is connected by its pairs."""
    hashes, owners = _compute_sketches(documents)
    order = np.argsort(hashes, kind="stable")
    is_shared = hashes[order[1:]] == hashes[order[:-1]]
    # Neighbors among the owners of a hash, which ascend.
    first, second = owners[order[:-1]][is_shared], owners[order[1:]][is_shared]
    pairs, counts = np.unique(first * len(documents) + second, return_counts=True)
    starts = np.searchsorted(owners, np.arange(len(documents) + 1))
    for pair in pairs[counts >= SKETCH_SIZE // 4].tolist():
        a, b = divmod(pair, len(documents))
        sketches = [hashes[starts[index] : starts[index + 1]] for index in (a, b)]
        if _estimate_similarity(*sketches) >= MIN_SIMILARITY:
            yield a, b


def _estimate_similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Jaccard similarity of two sets, given their smallest hashes."""
    union = np.union1d(a, b)
    if max(len(a), len(b)) == SKETCH_SIZE:  # else the sketches are the whole sets
        union = union[:SKETCH_SIZE]
    return float(np.isin(union, np.intersect1d(a, b)).mean())


def _compute_sketches(documents: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest hashes of each document in ascending order, and whose they are."""
    hashes, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    batch: dict[int, str] = {}
    num_chars = 0
    for index, document in enumerate(documents):
        if len(document) < MIN_CHARS:
            continue
        text = remove_spaces(document[:MAX_CHARS])
        if len(text) < MIN_CHARS:
            continue
        batch[index] = text
        num_chars += len(text)
        if num_chars >= BATCH_CHARS:
            _append_sketches(batch, hashes, owners)
            batch, num_chars = {}, 0
    if batch:
        _append_sketches(batch, hashes, owners)
    return np.concatenate(hashes), np.concatenate(owners)


def _append_sketches(
    batch: dict[int, str], hashes: list[np.ndarray], owners: list[np.ndarray]
) -> None:
    lengths = np.array([len(text) for text in batch.values()])
    codes = np.frombuffer("".join(batch.values()).encode("utf-32-le"), np.uint32)
    shingles = _hash_shingles(codes.astype(np.uint64))
    numbers = np.repeat(np.arange(len(batch)), lengths)
    is_within = np.arange(len(codes)) <= np.repeat(np.cumsum(lengths) - SHINGLE_CHARS, lengths)
    shift, mask = np.uint64(HASH_BITS), np.uint64(2**HASH_BITS - 1)
    keys = np.sort(
        (numbers[is_within].astype(np.uint64) << shift)
        | (shingles[is_within[: len(shingles)]] >> np.uint64(64 - HASH_BITS))
    )
    keys = keys[np.concatenate([[True], keys[1:] != keys[:-1]])]  # np.unique is far slower
    numbers = (keys >> shift).astype(np.int64)
    starts = np.searchsorted(numbers, np.arange(len(batch)))
    is_smallest = np.arange(len(keys)) - starts[numbers] < SKETCH_SIZE
    hashes.append(keys[is_smallest] & mask)
    owners.append(np.array(list(batch))[numbers[is_smallest]])


def _hash_shingles(codes: np.ndarray) -> np.ndarray:
    """Return a hash of each stretch of `SHINGLE_CHARS` character codes."""
    hashes, multiplier, width = codes, HASH_MULTIPLIER, 1
    while width < SHINGLE_CHARS:
        hashes = hashes[:-width] * np.uint64(multiplier) + hashes[width:]
        multiplier, width = multiplier * multiplier % 2**64, 2 * width
    for shift in (30, 27, 31):  # mix all bits into all others
        hashes = (hashes ^ (hashes >> np.uint64(shift))) * np.uint64(0xBF58476D1CE4E5B9)
    return hashes
