"""Edit memory: rows that fire where a fact is asked for, and nowhere else.

A row is gated by phrases in the token stream (its subject and the preceding tokens of its answer)
and by the similarity of the hidden state to the one it was written in.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Base of the phrase hash; products wrap around, and hits are compared token by token.
HASH_BASE = 1_000_003
# Added to the hash for each token, so that phrases of different lengths differ.
LENGTH_HASH = 4_611_686_018_427
# Tokens for which a completed answer blocks its first row.
ANSWER_WINDOW = 16
# Subject of a row that fires for any subject; prefix of one that needs no preceding token.
NO_SUBJECT = -1
# Pairs of token and row that are compared at once.
MAX_PAIRS = 400_000


class ThreadState(threading.local):
    """Attributes of which each thread has its own; copies and unpickled objects start afresh.

    A subclass states the first value of each attribute as a class attribute.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class PhraseMatcher:
    """Finds all positions at which one of many phrases ends.

    Args:
        phrases: token ids of each, none of them empty.

    Attributes:
        lengths: `(phrases,)` tokens of each phrase.
        max_length: tokens of the longest phrase.
    """

    def __init__(self, phrases: Sequence[Sequence[int]] = ()) -> None:
        self.lengths = torch.tensor(
            [len(phrase) for phrase in phrases], dtype=torch.long, device="cpu"
        )
        self._distinct_lengths = set(self.lengths.tolist())
        self.max_length = max(self._distinct_lengths, default=0)
        self._powers = torch.tensor(
            [pow(HASH_BASE, power, 2**62) for power in range(self.max_length)],
            dtype=torch.long,
            device="cpu",
        )
        # All phrases one after the other.
        self._tokens = torch.tensor(
            [token for phrase in phrases for token in phrase], dtype=torch.long, device="cpu"
        )
        self._starts = self.lengths.cumsum(0) - self.lengths
        owners, offsets = _expand(self.lengths)
        hashes = torch.zeros_like(self.lengths).index_add(
            0, owners, (self._tokens + 1) * self._powers[offsets]
        )
        self._hashes, self._order = (hashes + self.lengths * LENGTH_HASH).sort(stable=True)

    def find_ends(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Find the phrases in token ids.

        Args:
            tokens: `(batch, time)`.

        Returns:
            Sequence, position of the last token, and index of each phrase, all `(n,)`.
        """
        tokens = tokens.cpu()
        batch, time = tokens.shape
        # The hash of the windows of each length, from that of the length before.
        hashes, hashes_by_length = torch.zeros_like(tokens), []
        for length in range(1, min(self.max_length, time) + 1):
            last = (tokens[:, length - 1 :] + 1) * self._powers[length - 1]
            hashes = hashes[:, : time - length + 1] + last
            if length in self._distinct_lengths:
                hashes_by_length.append((hashes + length * LENGTH_HASH).flatten())
        if not hashes_by_length:
            no_matches = torch.zeros(0, dtype=torch.long, device="cpu")
            return no_matches, no_matches, no_matches
        window_hashes = torch.cat(hashes_by_length)
        first, last = (
            torch.searchsorted(self._hashes, window_hashes, right=right) for right in (False, True)
        )
        windows = (last > first).nonzero().flatten()
        # Several phrases may share a hash, most often because they are equal.
        owners, offsets = _expand((last - first)[windows])
        windows = windows[owners]
        phrase_ids = self._order[first[windows] + offsets]
        # A hash that is not of the phrase's length may be at a place where it does not fit.
        sizes = torch.tensor([len(part) for part in hashes_by_length], device="cpu")
        ends = sizes.cumsum(0)
        group = torch.bucketize(windows, ends, right=True)
        widths = sizes[group] // batch
        index = windows - (ends - sizes)[group]
        sequences, starts = index // widths, index % widths
        lengths = self.lengths[phrase_ids]
        fits = lengths == time - widths + 1
        sequences, starts, phrase_ids = sequences[fits], starts[fits], phrase_ids[fits]
        lengths = lengths[fits]
        owners, offsets = _expand(lengths)
        differs = (
            self._tokens[self._starts[phrase_ids][owners] + offsets]
            != tokens[sequences[owners], starts[owners] + offsets]
        )
        is_equal = torch.zeros_like(lengths).index_add(0, owners, differs.long()) == 0
        return sequences[is_equal], (starts + lengths - 1)[is_equal], phrase_ids[is_equal]


def _expand(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return for `counts` items of each owner the owner and the number within the owner."""
    owners = torch.arange(len(counts), device="cpu").repeat_interleave(counts)
    offsets = torch.arange(len(owners), device="cpu") - (counts.cumsum(0) - counts)[owners]
    return owners, offsets


@dataclass(frozen=True)
class PhraseMatches:
    """Phrases in a pass over token ids `(batch, time)`; positions are `sequence * time + position`.

    Attributes:
        subject_positions: `(m,)` positions at which a subject occurred within the window.
        subjects: `(m,)` which; a position has several entries where several occurred.
        subject_ages: `(m,)` tokens since its last occurrence.
        prefix_positions: `(l,)` positions at which a prefix ends.
        prefixes: `(l,)` which.
        answer_positions: `(s,)` positions at which an answer ended within `ANSWER_WINDOW`.
        recent_answers: `(s,)` which.
    """

    subject_positions: Tensor
    subjects: Tensor
    subject_ages: Tensor
    prefix_positions: Tensor
    prefixes: Tensor
    answer_positions: Tensor
    recent_answers: Tensor


def _keep_longest(
    matcher: PhraseMatcher, sequences: Tensor, positions: Tensor, phrase_ids: Tensor, time: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the longest of several phrases that end at one token.

    So "New York" does not also match "York".
    """
    if not len(phrase_ids):
        return sequences, positions, phrase_ids
    end_positions = sequences * time + positions
    unique_ends, group = end_positions.unique(return_inverse=True)
    longest_lengths = torch.zeros_like(unique_ends).scatter_reduce(
        0, group, matcher.lengths[phrase_ids], "amax"
    )
    is_longest = matcher.lengths[phrase_ids] == longest_lengths[group]
    return sequences[is_longest], positions[is_longest], phrase_ids[is_longest]


def _find_phrases(
    matcher: PhraseMatcher, tokens: Tensor, document_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Find phrases that are within one document; see `PhraseMatcher.find_ends`."""
    sequences, positions, phrase_ids = matcher.find_ends(tokens)
    starts = positions + 1 - matcher.lengths[phrase_ids]
    is_whole = document_ids[sequences, starts] == document_ids[sequences, positions]
    return sequences[is_whole], positions[is_whole], phrase_ids[is_whole]


def match_phrases(
    tokens: Tensor,
    num_new: int,
    subject_matcher: PhraseMatcher,
    subject_by_phrase: Tensor,
    prefix_matcher: PhraseMatcher,
    window: int,
    end_ids: int | Sequence[int] | None = None,
    is_start: Tensor | None = None,
) -> PhraseMatches:
    """Find which subjects, prefixes and answers precede each of the last `num_new` tokens.

    Args:
        tokens: `(batch, time)`.
        num_new: tokens at the end to match for; those before are context.
        subject_matcher: its phrases are names of subjects.
        subject_by_phrase: `(phrases,)`, the subject that each phrase names.
        prefix_matcher: its phrases are prefixes and answers.
        window: tokens for which a subject matches after it occurred.
        end_ids: id or ids of tokens that end a document; nothing matches across them.
        is_start: `(batch, time)`, the tokens that begin another document, where no token says so.
    """
    time = tokens.shape[1]
    is_start = torch.zeros_like(tokens) if is_start is None else is_start.to(tokens.dtype)
    tokens, starts = torch.stack([tokens, is_start]).cpu()  # a host waits for each copy
    end_tokens = torch.tensor([] if end_ids is None else end_ids, device="cpu")
    document_ids = (torch.isin(tokens, end_tokens) | starts.bool()).cumsum(1)
    sequences, positions, phrase_ids = _keep_longest(
        subject_matcher, *_find_phrases(subject_matcher, tokens, document_ids), time
    )
    offsets = torch.arange(window, device="cpu")
    window_positions = positions.unsqueeze(1) + offsets  # (matches, window)
    valid = (window_positions < time) & (window_positions >= time - num_new)
    window_positions = window_positions.clamp_max(time - 1)
    valid &= document_ids[sequences.unsqueeze(1), window_positions] == document_ids[
        sequences, positions
    ].unsqueeze(1)
    match_indices, ages = valid.nonzero(as_tuple=True)
    subject_positions = (
        sequences[match_indices] * num_new
        + window_positions[match_indices, ages]
        - (time - num_new)
    )
    subject_ids = subject_by_phrase[phrase_ids[match_indices]] if len(phrase_ids) else phrase_ids
    if len(subject_positions):  # keep the last of several occurrences
        order = ages.argsort(stable=True)
        pairs = torch.stack([subject_positions, subject_ids], dim=1)[order]
        unique_pairs, group = pairs.unique(dim=0, return_inverse=True)
        min_ages = torch.full_like(unique_pairs[:, 0], window).scatter_reduce(
            0, group, ages[order], "amin"
        )
        subject_positions, subject_ids, ages = (
            unique_pairs[:, 0].contiguous(),
            unique_pairs[:, 1].contiguous(),
            min_ages,
        )
    sequences, positions, prefix_ids = _find_phrases(prefix_matcher, tokens, document_ids)
    first_new = time - num_new
    is_new = positions >= first_new
    prefix_positions = sequences[is_new] * num_new + positions[is_new] - first_new
    recent_positions = positions.unsqueeze(1) + torch.arange(ANSWER_WINDOW, device="cpu")
    valid = (recent_positions >= first_new) & (recent_positions < time)
    valid &= document_ids[
        sequences.unsqueeze(1), recent_positions.clamp_max(time - 1)
    ] == document_ids[sequences, positions].unsqueeze(1)
    answer_indices, offsets = valid.nonzero(as_tuple=True)
    answer_positions = (
        sequences[answer_indices] * num_new + recent_positions[answer_indices, offsets] - first_new
    )
    return PhraseMatches(
        subject_positions,
        subject_ids,
        ages,
        prefix_positions,
        prefix_ids[is_new],
        answer_positions,
        prefix_ids[answer_indices],
    )


@dataclass(frozen=True)
class PhraseTable:
    """The phrases that rows name by number.

    Attributes:
        subject_matcher: its phrases are spellings of subjects.
        subject_by_phrase: `(phrases,)`, the subject that each phrase names.
        prefix_matcher: its phrases are prefixes and answers.
    """

    subject_matcher: PhraseMatcher = field(default_factory=PhraseMatcher)
    subject_by_phrase: Tensor = field(
        default_factory=lambda: torch.zeros(0, dtype=torch.long, device="cpu")
    )
    prefix_matcher: PhraseMatcher = field(default_factory=PhraseMatcher)


@dataclass(frozen=True)
class EditRows:
    """Rows of one layer, arrays over the same `n` rows.

    Keys and values are where the model computes, the others on the CPU, where rows are matched.

    Attributes:
        ids: of the rows.
        keys: `(n, width)` hidden states in which they were written.
        values: `(n, width)` what they add to the block's output.
        thresholds: smallest cosine between key and query at which they fire.
        subjects: index of the subject that has to occur, or `NO_SUBJECT`.
        prefixes: index of the phrase that has to precede, or `NO_SUBJECT`.
        answers: index of the full answer; a row without a prefix does not fire where the answer
            has just been generated.
        phrases: what the indices refer to.
    """

    ids: Tensor
    keys: Tensor
    values: Tensor
    thresholds: Tensor
    subjects: Tensor
    prefixes: Tensor
    answers: Tensor
    phrases: PhraseTable = field(default_factory=PhraseTable)

    @classmethod
    def empty(cls, width: int) -> EditRows:
        """Create an instance without rows."""
        no_ids = torch.zeros(0, dtype=torch.long, device="cpu")
        no_states = torch.zeros(0, width, device="cpu")
        return cls(no_ids, no_states, no_states, no_states.new_zeros(0), no_ids, no_ids, no_ids)

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device) -> EditRows:
        """Return the rows with keys and values on a device."""
        devices = dict.fromkeys(("keys", "values"), device)
        tensors = {item.name: getattr(self, item.name) for item in fields(self)}
        phrases = tensors.pop("phrases")
        return EditRows(
            **{name: tensor.to(devices.get(name, "cpu")) for name, tensor in tensors.items()},
            phrases=phrases,
        )


@dataclass(frozen=True)
class RowIndex:
    """Rows with what finds them; never changed, so that a pass that reads it is undisturbed.

    Attributes:
        rows: the rows.
        whitened_keys: `(n, width)`.
        subject_order: `(n,)` rows sorted by subject, those without one first.
        sorted_subjects: `(n,)` their subjects.
        rows_without_subject: `(m,)`.
    """

    rows: EditRows
    whitened_keys: Tensor
    subject_order: Tensor
    sorted_subjects: Tensor
    rows_without_subject: Tensor


@dataclass(frozen=True)
class Matches:
    """Which rows fired in one pass, on the CPU.

    Attributes:
        tokens: `(n,)` indices of tokens.
        rows: `(n,)` indices of rows.
        cosines: `(n,)`.
        row_index: what `rows` refers to.
    """

    tokens: Tensor
    rows: Tensor
    cosines: Tensor
    row_index: RowIndex


class _Recording(ThreadState):
    matches: list[Matches] | None = None


class EditMemory(nn.Module):
    """Adds the value of at most one row per token to a block's output.

    A row fires when three things hold: its subject occurred shortly before; the tokens of its
    prefix have just been generated or, where it has none, its full answer has not; and the hidden
    state is within the row's similarity threshold. Of several rows one with a prefix comes first,
    then the one whose subject occurred last, then the nearest. The result for a token depends on
    that token and those before it alone.

    Similarity is the cosine of centered hidden states in a metric that gives little weight to
    directions in which states of prose vary, or in which paraphrases of one question vary
    (`dmt.editing.calibration`).

    Args:
        width: size of a hidden state.
        mean: `(width,)`.
        metric: `(width, width)`; a state `x` is compared as `(x - mean) @ metric`.

    Source: a codebook with a radius per entry, Hartvigsen et al. 2023, arXiv 2211.11031. Gating a
        row by its subject's name, and adding to the block's output instead of replacing it, is
        ours.
    """

    def __init__(
        self, width: int, mean: Tensor | None = None, metric: Tensor | None = None
    ) -> None:
        super().__init__()
        self.width = width
        # No buffers: they are not the model's, so neither its dtype nor its initialization apply.
        self.mean = torch.zeros(width) if mean is None else mean
        self.metric = torch.eye(width) if metric is None else metric
        self._recording = _Recording()
        self.set_rows(EditRows.empty(width))

    @property
    def rows(self) -> EditRows:
        """All rows."""
        return self.index.rows

    def set_rows(self, rows: EditRows) -> None:
        """Replace all rows."""
        rows = rows.to(self.mean.device)
        order = rows.subjects.argsort(stable=True)
        sorted_subjects = rows.subjects[order]
        # In one assignment: another thread may be within a pass.
        self.index = RowIndex(
            rows,
            self.whiten(rows.keys),
            order,
            sorted_subjects,
            order[sorted_subjects == NO_SUBJECT],
        )

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        result = super()._apply(fn, recurse)
        # Similarity is computed in full precision, in a model in half precision too.
        device = fn(self.mean.new_empty(0)).device
        if device.type != "meta":  # there are no weights to compute with
            self.mean, self.metric = self.mean.to(device), self.metric.to(device)
            self.set_rows(self.rows)
        return result

    def whiten(self, hidden: Tensor) -> Tensor:
        """Map hidden states `(n, width)` to the float32 unit vectors that are compared."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.normalize((hidden.float() - self.mean) @ self.metric, dim=-1)

    @contextmanager
    def recording_matches(self) -> Iterator[list[Matches]]:
        """Record which rows fire inside the block in this thread; an outer recording is paused.

        Yields:
            The matches of each pass, which grow while the block runs.
        """
        previous, log = self._recording.matches, list[Matches]()
        self._recording.matches = log
        try:
            yield log
        finally:
            self._recording.matches = previous

    def add_values(self, output: Tensor, matches: Matches) -> Tensor:
        """Add the values of the rows that fired to a block's output.

        Args:
            output: `(..., width)`; returned itself where no row fired.
            matches: of the same tokens, flattened.
        """
        if self._recording.matches is not None:
            self._recording.matches.append(matches)
        if not len(matches.tokens):
            return output
        flat_output = output.reshape(-1, self.width)
        values = matches.row_index.rows.values[matches.rows].to(flat_output)
        tokens = matches.tokens.to(flat_output.device)
        return flat_output.index_add(0, tokens, values).view_as(output)

    @torch.no_grad()
    def find_matches(
        self, hidden: Tensor, phrase_matches: PhraseMatches, index: RowIndex | None = None
    ) -> Matches:
        """Find the row that fires for each token, at most one per token.

        Args:
            hidden: `(tokens, width)`.
            phrase_matches: of the same tokens.
            index: the rows; all present ones where it is None.
        """
        index = self.index if index is None else index
        if not (len(phrase_matches.subjects) or len(index.rows_without_subject)):
            no_indices = phrase_matches.subjects.new_zeros(0)
            return Matches(no_indices, no_indices, torch.zeros(0, device="cpu"), index)
        hidden = hidden.to(self.mean.device)  # the key layer's may be another one
        groups = [
            self._match_by_subject(hidden, phrase_matches, index),
            self._match_without_subject(hidden, phrase_matches, index),
        ]
        tokens, rows, cosines, ages = (torch.cat(column) for column in zip(*groups, strict=True))
        # Least important first, so that the last row of each token is the one that fires.
        order = cosines.argsort(stable=True)
        order = order[ages[order].argsort(stable=True, descending=True)]
        order = order[(index.rows.prefixes[rows[order]] != NO_SUBJECT).long().argsort(stable=True)]
        order = order[tokens[order].argsort(stable=True)]
        is_last = torch.ones_like(order, dtype=torch.bool)
        is_last[:-1] = tokens[order][1:] != tokens[order][:-1]
        selected = order[is_last]
        return Matches(tokens[selected], rows[selected], cosines[selected], index)

    def _match_by_subject(
        self, hidden: Tensor, phrase_matches: PhraseMatches, index: RowIndex
    ) -> tuple[Tensor, ...]:
        """Return tokens, rows, cosines and subject ages of all rows that may fire by subject."""
        subjects = phrase_matches.subjects.contiguous()
        first, last = (
            torch.searchsorted(index.sorted_subjects, subjects, right=right)
            for right in (False, True)
        )
        counts = last - first
        phrase_indices = torch.arange(len(counts), device="cpu").repeat_interleave(counts)
        rows = index.subject_order[
            first[phrase_indices]
            + torch.arange(len(phrase_indices), device="cpu")
            - (counts.cumsum(0) - counts)[phrase_indices]
        ]
        tokens = phrase_matches.subject_positions[phrase_indices]
        ages = phrase_matches.subject_ages[phrase_indices]
        return self._filter_matches(hidden, tokens, rows, ages, phrase_matches, index)

    def _match_without_subject(
        self, hidden: Tensor, phrase_matches: PhraseMatches, index: RowIndex
    ) -> tuple[Tensor, ...]:
        """Return the same of rows without a subject, for each token the nearest that may fire."""
        rows = index.rows_without_subject
        has_prefix = index.rows.prefixes[rows] != NO_SUBJECT
        unprefixed, prefixed = rows[~has_prefix], rows[has_prefix]
        token_groups, row_groups = [], []
        if len(unprefixed):
            queries = self.whiten(hidden)
            best_cosines = torch.full((len(hidden),), -torch.inf, device="cpu")
            best_rows = torch.zeros_like(unprefixed[:1]).expand(len(hidden))
            for candidates in unprefixed.split(max(1, MAX_PAIRS // len(hidden))):
                # Each row has its own threshold, so the nearest of all may not fire.
                cosines = (queries @ index.whitened_keys[candidates].t()).cpu()
                blocked = cosines < index.rows.thresholds[candidates]
                is_answered = torch.isin(
                    index.rows.answers[candidates], phrase_matches.recent_answers
                )
                answered = is_answered.nonzero().flatten()
                blocked[:, answered] |= _is_answer_recent(
                    torch.arange(len(hidden), device="cpu").unsqueeze(1),
                    index.rows.answers[candidates[answered]],
                    phrase_matches,
                )
                cosines, indices = cosines.masked_fill(blocked, -torch.inf).max(1)
                best_rows = torch.where(cosines > best_cosines, candidates[indices], best_rows)
                best_cosines = best_cosines.maximum(cosines)
            matched = best_cosines.isfinite().nonzero().flatten()
            token_groups.append(matched)
            row_groups.append(best_rows[matched])
        for position, prefix in zip(
            phrase_matches.prefix_positions.tolist(), phrase_matches.prefixes.tolist(), strict=True
        ):
            candidates = prefixed[index.rows.prefixes[prefixed] == prefix]
            token_groups.append(torch.full_like(candidates, position))
            row_groups.append(candidates)
        empty = rows.new_zeros(0)
        indices, row_indices = torch.cat([empty, *token_groups]), torch.cat([empty, *row_groups])
        return self._filter_matches(
            hidden,
            indices,
            row_indices,
            torch.full_like(indices, torch.iinfo(torch.long).max),
            phrase_matches,
            index,
        )

    def _filter_matches(
        self,
        hidden: Tensor,
        tokens: Tensor,
        rows: Tensor,
        ages: Tensor,
        phrase_matches: PhraseMatches,
        index: RowIndex,
    ) -> tuple[Tensor, ...]:
        prefixes = index.rows.prefixes[rows]
        prefix_pairs = _encode_pairs(phrase_matches.prefix_positions, phrase_matches.prefixes)
        eligible = torch.where(
            prefixes == NO_SUBJECT,
            ~_is_answer_recent(tokens, index.rows.answers[rows], phrase_matches),
            torch.isin(_encode_pairs(tokens, prefixes), prefix_pairs),
        )
        tokens, rows, ages = tokens[eligible], rows[eligible], ages[eligible]
        if not len(tokens):  # nothing is computed on the device, for which the host would wait
            return tokens, rows, torch.zeros(0, device="cpu"), ages
        unique_tokens, query_indices = tokens.unique(return_inverse=True)
        queries = self.whiten(hidden[unique_tokens])
        cosines = torch.cat(
            [
                (queries[token_chunk] * index.whitened_keys[row_chunk]).sum(-1).cpu()
                for token_chunk, row_chunk in zip(
                    query_indices.split(MAX_PAIRS), rows.split(MAX_PAIRS), strict=True
                )
            ]
        )
        within_threshold = cosines >= index.rows.thresholds[rows]
        return (
            tokens[within_threshold],
            rows[within_threshold],
            cosines[within_threshold],
            ages[within_threshold],
        )

    def extra_repr(self) -> str:
        """Describe the layer in `repr`."""
        return f"width={self.width}, rows={len(self.rows)}"


def _is_answer_recent(tokens: Tensor, answers: Tensor, phrase_matches: PhraseMatches) -> Tensor:
    """Return whether an answer ended shortly before a token; both are broadcast."""
    answer_pairs = _encode_pairs(phrase_matches.answer_positions, phrase_matches.recent_answers)
    return torch.isin(_encode_pairs(tokens, answers), answer_pairs)


def _encode_pairs(positions: Tensor, phrase_ids: Tensor) -> Tensor:
    """Encode pairs of position and phrase as one number each."""
    return positions * 2**32 + phrase_ids
