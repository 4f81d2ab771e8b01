"""Declared knowledge in training text: where its answers stand, and the text without its subjects.

A student that is to be ignorant of facts must not learn them from its teacher. So it reads every
window with the subjects of the facts replaced by names that the teacher has never met. What the
teacher predicts there is what an ignorant model would predict: the style of the answer, not the
answer. New names are drawn at every step, so that the mean over many of them is learned.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dmt.data.tokenizer import get_prefix_ids
from dmt.errors import UserError

NAMES_PER_SUBJECT = 16  # replacements that are prepared for a subject
NAME_ATTEMPTS = 256  # names from which they are chosen
NEAREST_LENGTHS = 3  # numbers of tokens that a word may have
NUM_INVENTED_WORDS = 20_000  # words that are tried, of which names consist
MIN_WORDS_TO_MIX = 8  # words of several syllables from which new ones are made
SYLLABLE = re.compile(r"[^aeiouy]*[aeiouy]+|[^aeiouy]+$", re.IGNORECASE)
# Where the subjects have too few words of several syllables.
FALLBACK_WORDS = (
    "Balderon Carivel Dorinal Fenabor Galamun Helvira Jorandel Kasimor Lorvane Marivond Neralux "
    "Orivane Pelador Quillora Ravendel Solmira Taveron Ulmaren Valdoria Wendolin"
)
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class AnswerPositions:
    """Positions of a batch of windows that predict tokens of declared answers, each `(n,)`.

    Attributes:
        windows: index of the window in the batch.
        columns: position in the window.
        replaced_columns: the same position in the window with other subjects.
    """

    windows: Tensor
    columns: Tensor
    replaced_columns: Tensor


class SubjectNames:
    """Names for subjects that nobody has, of as many tokens where there are such.

    Every word is made of the syllables of two words of the subjects, and is a word of none of them:
    a model may know people by their surnames alone. Words that begin with no letter stay.

    Args:
        subjects: names of the declared facts' subjects.
        tokenizer: the model's tokenizer.
        seed: seed of the names.

    Raises:
        UserError: a subject has no word that can be replaced.
    """

    def __init__(self, subjects: Iterable[str], tokenizer: Any, seed: int = 0) -> None:
        self.subjects = sorted(set(subjects))
        self._tokenizer = tokenizer
        self._rng = random.Random(f"names-{seed}")
        # Invented words by whether they are capitalized and by their tokens after a space.
        self._words: dict[tuple[bool, int], list[str]] = defaultdict(list)
        words = self._invent_words()
        for word, length in zip(words, self._count_tokens(words), strict=True):
            self._words[word[:1].isupper(), length].append(word)
        self._names = {subject: self._choose_names(subject) for subject in self.subjects}

    def __getitem__(self, subject: str) -> list[str]:
        """Return the names that may replace a subject."""
        return self._names[subject]

    def _invent_words(self) -> list[str]:
        """Return words of the first syllables of one word and the last ones of another."""
        text = " ".join(self.subjects)
        syllables = _split_syllables(text)
        if len(syllables) < MIN_WORDS_TO_MIX:
            syllables = _split_syllables(FALLBACK_WORDS)
        subject_words = set(text.casefold().split())
        words: dict[str, None] = {}
        for _ in range(NUM_INVENTED_WORDS):
            first, last = self._rng.choice(syllables), self._rng.choice(syllables)
            start = first[: self._rng.randint(1, len(first) - 1)]
            word = "".join([*start, *last[self._rng.randint(1, len(last) - 1) :]]).lower()
            if word not in subject_words:
                words[word.capitalize()] = words[word] = None
        return list(words)

    def _choose_names(self, subject: str) -> list[str]:
        """Return different names, those first whose number of tokens is nearest."""
        words = subject.split()
        lengths = self._count_tokens(words)
        names = {" ".join(map(self._choose_word, words, lengths)) for _ in range(NAME_ATTEMPTS)}
        names_in_order = sorted(names - {subject})
        if not names_in_order:
            raise UserError(
                f"knowledge.facts: no word of the subject {subject!r} begins with a letter, so no "
                "other name can replace it in the text; leave its facts out"
            )
        self._rng.shuffle(names_in_order)
        # After a space and at the start of a line.
        spellings = [f"{space}{name}" for space in (" ", "") for name in [*names_in_order, subject]]
        num_tokens = np.array([len(ids) for ids in self._encode(spellings)]).reshape(2, -1)
        differences = np.abs(num_tokens[:, :-1] - num_tokens[:, -1:]).sum(0)
        nearest = np.argsort(differences, kind="stable")[:NAMES_PER_SUBJECT]
        return [names_in_order[index] for index in nearest.tolist()]

    def _choose_word(self, word: str, length: int) -> str:
        """Return an invented word of about as many tokens as `word`."""
        if not word[:1].isalpha():
            return word
        is_upper = word[:1].isupper()
        lengths = sorted(number for kind, number in self._words if kind == is_upper)
        nearest = sorted(lengths, key=lambda number: abs(number - length))[:NEAREST_LENGTHS]
        return self._rng.choice(self._words[is_upper, self._rng.choice(nearest)])

    def _count_tokens(self, words: list[str]) -> list[int]:
        return [len(ids) for ids in self._encode([f" {word}" for word in words])]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids


def _split_syllables(text: str) -> list[list[str]]:
    """Return the syllables of each word that has several."""
    words = [SYLLABLE.findall(word) for word in text.split()]
    return [parts for parts in words if len(parts) > 1]


class DeclaredText:
    """Training windows in which the answers of declared facts are known.

    Args:
        windows: token ids `(windows, time)`; rows of a corpus follow each other in its text.
        answers_by_subject: answers of the declared facts, as the text spells them.
        tokenizer: the model's tokenizer.
        seed: seed of the names that replace subjects.
    """

    def __init__(
        self,
        windows: Tensor,
        answers_by_subject: Mapping[str, Sequence[str]],
        tokenizer: Any,
        seed: int = 0,
    ) -> None:
        self.windows, self.seq_len, self.seed = windows, windows.shape[1], seed
        self.names = SubjectNames(answers_by_subject, tokenizer, seed)
        self.subjects = self.names.subjects
        stream = windows.reshape(-1).numpy()
        index = _TokenIndex(stream, len(tokenizer))
        prefix = get_prefix_ids(tokenizer)
        starts = stream == prefix[0] if prefix else np.arange(len(stream)) % self.seq_len == 0
        documents = np.cumsum(starts)
        self._replacements = [
            [
                _encode_spellings(tokenizer, name)
                for name in [*self.names[subject], subject]  # the last one is the subject itself
            ]
            for subject in self.subjects
        ]
        mentions: list[tuple[int, int, int, int]] = []  # start, length, subject, spelling
        answers: list[tuple[int, int]] = []
        for subject_id, subject in enumerate(self.subjects):
            mentioned: set[int] = set()
            for spelling, ids in enumerate(self._replacements[subject_id][-1]):
                for start in index.find(ids):
                    mentions.append((start, len(ids), subject_id, spelling))
                    mentioned.add(int(documents[start]))
            for answer in dict.fromkeys(answers_by_subject[subject]):
                for ids in _encode_spellings(tokenizer, answer.strip()):
                    answers += [
                        (start, len(ids))
                        for start in index.find(ids)
                        if int(documents[start]) in mentioned
                    ]
        self._mentions = _drop_overlaps(mentions)
        self._mention_starts = self._mentions[:, 0]
        predicting = np.zeros(len(stream) + 1, bool)
        for start, length in answers:
            predicting[max(0, start - 1) : start + length - 1] = True
        # The last position of a window predicts nothing in it.
        predicting[self.seq_len - 1 :: self.seq_len] = False
        self._predicting = torch.from_numpy(predicting[:-1].reshape(windows.shape))

    @property
    def num_mentions(self) -> int:
        """Mentions of subjects in the text."""
        return len(self._mentions)

    @property
    def num_answer_tokens(self) -> int:
        """Tokens of answers in the text."""
        return int(self._predicting.sum())

    def replace_subjects(self, window_ids: Tensor, step: int) -> tuple[Tensor, AnswerPositions]:
        """Return windows with other subjects, and where they predict declared answers.

        Args:
            window_ids: indices of the windows `(windows,)`.
            step: number that the names depend on; a subject has one name in a step.

        Returns:
            Token ids `(windows, time)`, cut where names are longer, and the positions.
        """
        rows, positions = [], []
        for number, window_id in enumerate(window_ids.tolist()):
            tokens, columns = self._replace_window(window_id, step)
            rows.append(tokens)
            real = self._predicting[window_id].nonzero().squeeze(1)
            replaced = columns[real]
            is_inside = replaced < self.seq_len - 1
            row = torch.full_like(real, number)
            positions.append(torch.stack([row, real, replaced])[:, is_inside])
        return torch.stack(rows), AnswerPositions(*torch.cat(positions, 1))

    def _replace_window(self, window_id: int, step: int) -> tuple[Tensor, Tensor]:
        """Return a window with other subjects, and where each of its positions is now."""
        begin, end = window_id * self.seq_len, (window_id + 1) * self.seq_len
        # A mention may begin in the window before.
        first = int(np.searchsorted(self._mention_starts, begin))
        first = first - 1 if first and self._mention_end(first - 1) > begin else first
        last = int(np.searchsorted(self._mention_starts, end))
        tokens = self.windows[window_id]
        parts: list[Tensor] = []
        columns: list[Tensor] = []
        position, num_written = begin, 0

        def copy_until(stop: int) -> None:
            """Copy the text from `position` on."""
            nonlocal num_written
            parts.append(tokens[position - begin : stop - begin])
            columns.append(torch.arange(num_written, num_written + stop - position))
            num_written += stop - position

        for start, length, subject, spelling in self._mentions[first:last].tolist():
            name, stop = self._choose_name(subject, spelling, step), min(start + length, end)
            # Of a mention that a border cuts, each window has a part.
            name, start = name[max(begin - start, 0) : end - start], max(start, begin)
            copy_until(start)
            parts.append(torch.tensor(name, dtype=torch.long))
            # Aligned at their ends: the last token of a name predicts what follows it.
            columns.append((torch.arange(start - stop, 0) + len(name)).clamp(min=0) + num_written)
            num_written += len(name)
            position = stop
        copy_until(end)
        replaced = torch.cat(parts)
        if len(replaced) < self.seq_len:  # shorter names: repeat the end, which predicts nothing
            replaced = torch.cat([replaced, replaced[-1:].expand(self.seq_len - len(replaced))])
        return replaced[: self.seq_len], torch.cat(columns)

    def _mention_end(self, index: int) -> int:
        return int(self._mentions[index, 0] + self._mentions[index, 1])

    def _choose_name(self, subject: int, spelling: int, step: int) -> list[int]:
        names = self._replacements[subject][:-1]
        # Hashing by hand, since a generator for each mention would take longer than the model.
        number = (subject * 2_654_435_761 + step * 40_503 + self.seed * 69_069) >> 7
        return names[number % len(names)][spelling]


class _TokenIndex:
    """Finds sequences of tokens in a stream by their rarest token.

    Args:
        stream: token ids `(tokens,)`.
        vocab_size: number of token ids.
    """

    def __init__(self, stream: IntArray, vocab_size: int) -> None:
        self._stream = stream
        self._counts = np.bincount(stream, minlength=vocab_size)
        self._order = np.argsort(stream, kind="stable")
        self._offsets = np.concatenate([[0], np.cumsum(self._counts)])

    def find(self, ids: Sequence[int]) -> list[int]:
        """Return where a sequence begins."""
        if not ids:
            return []
        rarest = min(range(len(ids)), key=lambda index: self._counts[ids[index]])
        token = ids[rarest]
        starts = self._order[self._offsets[token] : self._offsets[token + 1]] - rarest
        starts = starts[(starts >= 0) & (starts + len(ids) <= len(self._stream))]
        for offset, token in enumerate(ids):
            starts = starts[self._stream[starts + offset] == token]
        result: list[int] = starts.tolist()
        return result


def _encode_spellings(tokenizer: Any, text: str) -> list[list[int]]:
    """Return the tokens of a text after a space and at the start of a line."""
    ids: list[list[int]] = tokenizer([f" {text}", text], add_special_tokens=False)["input_ids"]
    return ids


def _drop_overlaps(mentions: Iterable[tuple[int, int, int, int]]) -> IntArray:
    """Return mentions `(n, 4)` in order; of overlapping ones the longer, as in Anna Bell Ray."""
    selected: list[tuple[int, int, int, int]] = []
    for mention in sorted(set(mentions)):
        if selected and mention[0] < selected[-1][0] + selected[-1][1]:
            if mention[1] > selected[-1][1]:
                selected[-1] = mention
        else:
            selected.append(mention)
    return np.array(selected, np.int64).reshape(-1, 4)
