"""Equal and nearly equal documents."""

import random

import pytest

from dmt.data import duplicates
from dmt.data.duplicates import find_copies, group_near_duplicates

WORDS = [
    f"{a}{b}" for a in "bdfgklmnprst" for b in ("an", "el", "ion", "ure", "ock", "ith", "erty")
]


def make_words(count, seed):
    return random.Random(seed).choices(WORDS, k=count)


def jaccard(a, b):
    """Return the exact similarity that the sketches estimate."""
    sets = []
    for text in (a, b):
        text = "".join(text.split())
        sets.append({text[start : start + 16] for start in range(len(text) - 15)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_copies_differ_in_white_space_alone():
    documents = ["a b", "c", "a  b", " a\nb\n", "A b", "c"]
    assert list(find_copies(documents)) == [(0, 2), (0, 3), (1, 5)]


def test_copies_of_long_documents_are_found(monkeypatch):
    monkeypatch.setattr(duplicates, "MAX_CHARS", 7)
    text = " ".join(make_words(30, 0))
    assert list(find_copies([text, "  " + text.replace(" ", "\n\n"), text[:-1]])) == [(0, 1)]


def test_near_duplicates_of_known_similarity_are_grouped():
    base = [make_words(300, seed) for seed in range(40)]
    near = [["changed", *words[:150], "changed", *words[151:]] for words in base]
    half = [words[:200] + make_words(100, 1000 + seed) for seed, words in enumerate(base)]
    documents = [" ".join(words) for words in base + near + half]
    assert all(jaccard(documents[i], documents[40 + i]) > 0.95 for i in range(40))
    assert all(0.4 < jaccard(documents[i], documents[80 + i]) < 0.6 for i in range(40))
    groups = group_near_duplicates(documents)
    assert groups == [[i, 40 + i] for i in range(40)] + [[80 + i] for i in range(40)]


@pytest.mark.parametrize("batch_chars", [1, 3_000, 2**20])
def test_groups_do_not_depend_on_batches(monkeypatch, batch_chars):
    monkeypatch.setattr(duplicates, "BATCH_CHARS", batch_chars)
    base = [" ".join(make_words(count, count)) for count in (60, 300, 900, 65, 70)]
    documents = [*base, *(f"{text} and more" for text in base[:3]), "short", "short"]
    assert group_near_duplicates(documents) == [[0, 5], [1, 6], [2, 7], [3], [4], [8, 9]]


def test_a_common_header_makes_no_duplicates():
    header = " ".join(make_words(60, 0))
    documents = [f"{header} {' '.join(make_words(120, seed))}" for seed in range(1, 50)]
    documents += [documents[7] + " and more", documents[3] + " and more"]
    groups = [group for group in group_near_duplicates(documents) if len(group) > 1]
    assert groups == [[3, 50], [7, 49]]


def test_text_without_spaces_is_compared():
    text = "".join(random.Random(0).choices([chr(code) for code in range(0x4E00, 0x5E00)], k=600))
    other = "".join(random.Random(1).choices([chr(code) for code in range(0x4E00, 0x5E00)], k=600))
    assert group_near_duplicates([text, other, text[:300] + "\n" + text[302:]]) == [[0, 2], [1]]


def test_nothing_is_near_to_nothing():
    assert group_near_duplicates([]) == []
    assert group_near_duplicates(["", "a"]) == [[0], [1]]
