"""Facts: rows that answer in full where they are asked, and not at all elsewhere.

Known phrases in a stream of token ids: who is being talked about, and what has just been said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HASH_BASE = 1_000_003
"""Base of the hash; products wrap around, and what it finds is compared token by token."""

ANSWER_WINDOW = 16
"""Tokens for which what has been said counts as said not long ago."""


class PhraseMatcher:
    """Finds every place where one of many known phrases ends, all at once.

    Args:
        phrases: token ids of each; none of them empty.
    """

    def __init__(self, phrases: Sequence[Sequence[int]] = ()) -> None:
        self._by_length: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        for length in sorted({len(phrase) for phrase in phrases}):
            phrase_ids = [
                phrase_id for phrase_id, phrase in enumerate(phrases) if len(phrase) == length
            ]
            token_ids = torch.tensor(
                [list(phrases[phrase_id]) for phrase_id in phrase_ids], dtype=torch.long
            ).view(len(phrase_ids), length)
            hashes, order = _hash_tokens(token_ids).sort(stable=True)
            self._by_length[length] = hashes, token_ids[order], torch.tensor(phrase_ids)[order]
        self.lengths = torch.tensor([len(phrase) for phrase in phrases], dtype=torch.long)
        self.max_length = max(self._by_length, default=0)
        """Tokens of the longest phrase."""

    def find_ends(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sequence, position of the last token, and number of each phrase found in token ids `(batch, time)`; all `(n,)`."""
        tokens = tokens.cpu()
        matches = [torch.zeros(3, 0, dtype=torch.long)]
        for length, (hashes, token_ids, group_ids) in self._by_length.items():
            if tokens.shape[1] < length:
                continue
            windows = tokens.unfold(1, length, 1)  # (batch, time - length + 1, length)
            window_hashes = _hash_tokens(windows).contiguous()
            first, last = (
                torch.searchsorted(hashes, window_hashes, right=right) for right in (False, True)
            )
            sequence, start = (last > first).nonzero(as_tuple=True)
            first_match, counts = first[sequence, start], (last - first)[sequence, start]
            # Several phrases may share a hash, most often because they are equal.
            window_indices = torch.arange(len(counts)).repeat_interleave(counts)
            candidates = (
                first_match[window_indices]
                + torch.arange(len(window_indices))
                - (counts.cumsum(0) - counts)[window_indices]
            )
            is_equal = (
                token_ids[candidates] == windows[sequence[window_indices], start[window_indices]]
            ).all(-1)
            window_indices, candidates = window_indices[is_equal], candidates[is_equal]
            matches.append(
                torch.stack(
                    [
                        sequence[window_indices],
                        start[window_indices] + length - 1,
                        group_ids[candidates],
                    ]
                )
            )
        sequences, positions, phrase_ids = torch.cat(matches, dim=1)
        return sequences, positions, phrase_ids


def _hash_tokens(ids: Tensor) -> Tensor:
    powers = torch.tensor([pow(HASH_BASE, power, 2**62) for power in range(ids.shape[-1])])
    return ((ids + 1) * powers).sum(-1)


@dataclass(frozen=True)
class PhraseMatches:
    """What a pass over token ids `(batch, time)` is told of its text, places being numbered `sequence * time + position`.

    Attributes:
        places: `(m,)` places at which a subject has been named, not long ago.
        subjects: `(m,)` which; a place has several where several were named.
        ago: `(m,)` tokens since it was named last.
        led: `(l,)` places at which a lead has just been said.
        leads: `(l,)` which.
        since: `(s,)` places at which one has been said not long ago.
        spent: `(s,)` which.
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
    """Of phrases found that end at the same place the longest: who names New York has not named York."""
    if not len(phrase_ids):
        return sequences, positions, phrase_ids
    end_positions = sequences * time + positions
    unique_ends, group = end_positions.unique(return_inverse=True)
    longest_lengths = torch.zeros(len(unique_ends), dtype=torch.long).scatter_reduce(
        0, group, matcher.lengths[phrase_ids], "amax"
    )
    is_longest = matcher.lengths[phrase_ids] == longest_lengths[group]
    return sequences[is_longest], positions[is_longest], phrase_ids[is_longest]


def match_phrases(
    tokens: Tensor,
    num_new: int,
    subject_matcher: PhraseMatcher,
    subject_by_phrase: Tensor,
    prefix_matcher: PhraseMatcher,
    window: int,
    end_ids: int | Sequence[int] | None = None,
) -> PhraseMatches:
    """Who has been named and what has just been said at each of the `new` last tokens of `(batch, time)`.

    Args:
        subjects: its phrases are names; `subject_of` `(phrases,)` says whose.
        window: tokens for which a subject is talked about after it was named.
        end: token id that ends a document, or several; what was named or said before is not after it.
    """
    time = tokens.shape[1]
    sequences, positions, phrase_ids = _keep_longest(
        subject_matcher, *subject_matcher.find_ends(tokens), time
    )
    end_tokens = torch.tensor([] if end_ids is None else end_ids, device=tokens.device)
    document_ids = torch.isin(tokens, end_tokens).cumsum(1).cpu()
    offsets = torch.arange(window)
    window_positions = positions.unsqueeze(1) + offsets  # (named, window)
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
    if len(subject_positions):  # of several times the last
        order = ages.argsort(stable=True)
        pairs = torch.stack([subject_positions, subject_ids], dim=1)[order]
        unique_pairs, group = pairs.unique(dim=0, return_inverse=True)
        min_ages = torch.full((len(unique_pairs),), window).scatter_reduce(
            0, group, ages[order], "amin"
        )
        subject_positions, subject_ids, ages = (
            unique_pairs[:, 0].contiguous(),
            unique_pairs[:, 1].contiguous(),
            min_ages,
        )
    sequences, positions, prefix_ids = prefix_matcher.find_ends(tokens)
    first_new = time - num_new  # of the new ones
    is_new = positions >= first_new
    prefix_positions = sequences[is_new] * num_new + positions[is_new] - first_new
    recent_positions = positions.unsqueeze(1) + torch.arange(ANSWER_WINDOW)
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


NO_SUBJECT = -1
"""Subject of a row that answers whoever is talked about; lead of one that needs no word before it."""
MAX_PAIRS = 400_000
"""Pairs of token and row compared at once."""


@dataclass(frozen=True)
class EditRows:
    """Rows of one layer, arrays over the same `n` rows.

    Attributes:
        ids: numbers of the rows.
        keys: `(n, width)` hidden states in which they were written.
        values: `(n, width)` what they add to the block's answer.
        reach: cosine between key and query from which on they answer.
        subjects: who has to have been named, or `NOBODY`.
        leads: what has to have been said just before, or `NOBODY`.
        answers: the whole answer, numbered like leads; a row without a lead does not begin it again when it has just been said.
    """

    ids: Tensor
    keys: Tensor
    values: Tensor
    thresholds: Tensor
    subjects: Tensor
    prefixes: Tensor
    answers: Tensor

    @classmethod
    def empty(cls, width: int) -> EditRows:
        """No rows."""
        no_ids = torch.zeros(0, dtype=torch.long)
        return cls(
            no_ids,
            torch.zeros(0, width),
            torch.zeros(0, width),
            torch.zeros(0),
            no_ids,
            no_ids,
            no_ids,
        )

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Matches:
    """Which rows answered in one pass, all `(n,)`: places of tokens, places of rows, cosines."""

    tokens: Tensor
    rows: Tensor
    cosines: Tensor


class EditMemory(nn.Module):
    """Adds the value of one row, or nothing, to what a block says.

    A row answers a token when three things hold: its subject has been named not long before; the words that lead to it
    have just been said or, where none do, its whole answer has not; and the hidden state is near enough to the one it was
    written in. Of several the one with a lead goes first, then the one whose subject was named last, then the nearest. A
    token's answer depends on itself and what stands before it alone.

    Nearness is the cosine of hidden states less their mean, in a metric that weighs directions in which states of prose
    vary, or in which one question asked in several ways varies, the less the more they do (`facts/calibration.py`).

    Args:
        width: size of a hidden state.
        mean: `(width,)`.
        metric: `(width, width)`; a state `x` is compared as `(x - mean) @ metric`.

    Source: a codebook with a radius to each entry, Hartvigsen et al. 2023, arXiv 2211.11031. That a row knows by name
        whom it is about, and adds to the block's answer instead of replacing it, is ours.
    """

    def __init__(
        self, width: int, mean: Tensor | None = None, metric: Tensor | None = None
    ) -> None:
        super().__init__()
        self.width = width
        self.mean: Tensor
        self.metric: Tensor
        self.register_buffer("mean", torch.zeros(width) if mean is None else mean, persistent=False)
        self.register_buffer(
            "metric", torch.eye(width) if metric is None else metric, persistent=False
        )
        self.match_log: list[Matches] | None = None
        """Where somebody sets a list, the answers of each pass are noted in it."""
        self.set_rows(EditRows.empty(width))

    def set_rows(self, rows: EditRows) -> None:
        """Have these rows and no others."""
        device = self.mean.device
        self.rows = EditRows(**{name: tensor.to(device) for name, tensor in vars(rows).items()})
        self._whitened_keys = self.whiten(self.rows.keys)
        order = self.rows.subjects.argsort(stable=True)
        self._subject_order = order  # rows in the order of their subjects, those of nobody first
        self._sorted_subjects = self.rows.subjects[order]
        self._rows_without_subject = order[self._sorted_subjects == NO_SUBJECT]

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        full_precision = {
            name: tensor for name, tensor in self.named_buffers() if tensor.dtype == torch.float32
        }
        result = super()._apply(fn, recurse)
        for (
            name,
            tensor,
        ) in (
            full_precision.items()
        ):  # of a model in half precision too: near enough is measured in full
            setattr(self, name, tensor.to(getattr(self, name).device))
        self.set_rows(self.rows)
        return result

    def whiten(self, hidden: Tensor) -> Tensor:
        """Hidden states `(n, width)` as they are compared: unit vectors of the same shape, in full precision."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.normalize((hidden.float() - self.mean) @ self.metric, dim=-1)

    def add_values(self, output: Tensor, matches: Matches) -> Tensor:
        """`said` `(..., width)` and the values of the rows found; `said` itself where there are none."""
        if self.match_log is not None:
            self.match_log.append(matches)
        if not len(matches.tokens):
            return output
        flat_output = output.reshape(-1, self.width)
        return flat_output.index_add(
            0, matches.tokens, self.rows.values[matches.rows].to(flat_output.dtype)
        ).view_as(output)

    @torch.no_grad()
    def find_matches(self, hidden: Tensor, phrase_matches: PhraseMatches) -> Matches:
        """Which row answers which of `hidden` `(tokens, width)`; a token has one answer at most."""
        if not len(self.rows):
            no_indices = torch.zeros(0, dtype=torch.long, device=hidden.device)
            return Matches(no_indices, no_indices, torch.zeros(0, device=hidden.device))
        groups = [
            self._match_by_subject(hidden, phrase_matches),
            self._match_without_subject(hidden, phrase_matches),
        ]
        tokens, rows, cosines, ages = (torch.cat(column) for column in zip(*groups, strict=True))
        # Least important first, so that the last of each token is the one that answers.
        order = cosines.argsort(stable=True)
        order = order[ages[order].argsort(stable=True, descending=True)]
        order = order[(self.rows.prefixes[rows[order]] != NO_SUBJECT).long().argsort(stable=True)]
        order = order[tokens[order].argsort(stable=True)]
        is_last = torch.ones(len(order), dtype=torch.bool, device=order.device)
        is_last[:-1] = tokens[order][1:] != tokens[order][:-1]
        selected = order[is_last]
        return Matches(tokens[selected], rows[selected], cosines[selected])

    def _match_by_subject(
        self, hidden: Tensor, phrase_matches: PhraseMatches
    ) -> tuple[Tensor, ...]:
        """Tokens, rows, cosines and how long ago the subject was named: all that are near enough."""
        device = hidden.device
        subjects = phrase_matches.subjects.to(device).contiguous()
        first, last = (
            torch.searchsorted(self._sorted_subjects, subjects, right=right)
            for right in (False, True)
        )
        counts = last - first
        phrase_indices = torch.arange(len(counts), device=device).repeat_interleave(counts)
        rows = self._subject_order[
            first[phrase_indices]
            + torch.arange(len(phrase_indices), device=device)
            - (counts.cumsum(0) - counts)[phrase_indices]
        ]
        tokens, ages = (
            phrase_matches.subject_positions.to(device)[phrase_indices],
            phrase_matches.subject_ages.to(device)[phrase_indices],
        )
        return self._filter_matches(hidden, tokens, rows, ages, phrase_matches)

    def _match_without_subject(
        self, hidden: Tensor, phrase_matches: PhraseMatches
    ) -> tuple[Tensor, ...]:
        """The same of rows without a subject: for each token the nearest that may speak."""
        device = hidden.device
        rows = self._rows_without_subject
        unprefixed, prefixed = (
            rows[self.rows.prefixes[rows] == NO_SUBJECT],
            rows[self.rows.prefixes[rows] != NO_SUBJECT],
        )
        token_groups, row_groups = [], []
        if len(unprefixed):
            queries = self.whiten(hidden)
            best_cosines, best_rows = (
                hidden.new_full((len(hidden),), -torch.inf).float(),
                torch.zeros_like(unprefixed[:1]).expand(len(hidden)),
            )
            for candidates in unprefixed.split(max(1, MAX_PAIRS // len(hidden))):
                cosines = (
                    queries @ self._whitened_keys[candidates].t()
                )  # each row has a reach of its own: not the nearest of all
                blocked = cosines < self.rows.thresholds[candidates]
                answered = (
                    torch.isin(
                        self.rows.answers[candidates], phrase_matches.recent_answers.to(device)
                    )
                    .nonzero()
                    .flatten()
                )
                blocked[:, answered] |= self._is_answer_recent(
                    torch.arange(len(hidden), device=device).unsqueeze(1),
                    candidates[answered],
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
            candidates = prefixed[self.rows.prefixes[prefixed] == prefix]
            token_groups.append(torch.full_like(candidates, position))
            row_groups.append(candidates)
        empty = torch.zeros(0, dtype=torch.long, device=device)
        indices, row_indices = torch.cat([empty, *token_groups]), torch.cat([empty, *row_groups])
        return self._filter_matches(
            hidden,
            indices,
            row_indices,
            torch.full_like(indices, torch.iinfo(torch.long).max),
            phrase_matches,
        )

    def _filter_matches(
        self,
        hidden: Tensor,
        tokens: Tensor,
        rows: Tensor,
        ages: Tensor,
        phrase_matches: PhraseMatches,
    ) -> tuple[Tensor, ...]:
        prefixes = self.rows.prefixes[rows]
        prefix_pairs = _encode_pairs(
            phrase_matches.prefix_positions.to(rows.device), phrase_matches.prefixes.to(rows.device)
        )
        eligible = torch.where(
            prefixes == NO_SUBJECT,
            ~self._is_answer_recent(tokens, rows, phrase_matches),
            torch.isin(_encode_pairs(tokens, prefixes), prefix_pairs),
        )
        tokens, rows, ages = tokens[eligible], rows[eligible], ages[eligible]
        unique_tokens, query_indices = tokens.unique(return_inverse=True)
        queries = self.whiten(hidden[unique_tokens])
        cosines = torch.cat(
            [hidden.new_zeros(0).float()]
            + [
                (queries[token_chunk] * self._whitened_keys[row_chunk]).sum(-1)
                for token_chunk, row_chunk in zip(
                    query_indices.split(MAX_PAIRS), rows.split(MAX_PAIRS), strict=True
                )
            ]
        )
        within_threshold = cosines >= self.rows.thresholds[rows]
        return (
            tokens[within_threshold],
            rows[within_threshold],
            cosines[within_threshold],
            ages[within_threshold],
        )

    def _is_answer_recent(
        self, tokens: Tensor, rows: Tensor, phrase_matches: PhraseMatches
    ) -> Tensor:
        """Whether all that a row's fact answers has been said not long before the token; the two are broadcast."""
        answer_pairs = _encode_pairs(
            phrase_matches.answer_positions.to(rows.device),
            phrase_matches.recent_answers.to(rows.device),
        )
        return torch.isin(_encode_pairs(tokens, self.rows.answers[rows]), answer_pairs)

    def extra_repr(self) -> str:
        return f"width={self.width}, rows={len(self.rows)}"


def _encode_pairs(positions: Tensor, phrase_ids: Tensor) -> Tensor:
    """One number for each pair of a place and a lead."""
    return positions * 2**32 + phrase_ids
