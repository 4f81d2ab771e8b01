"""Which stored facts the tokens of a pass ask for.

The decision for a token is a function of the text up to it: whom the text asks about, what it asks
of them, and whether a fact that fired before is not completed. So batches, padding, beams and
caches never change it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from dmt.matching.mentions import find_mentions, list_candidate_names
from dmt.matching.questions import SUBJECT, Question, find_question, get_last_clause
from dmt.matching.relations import (
    RelationMatcher,
    may_ask_the_same,
    names_same_things,
)
from dmt.memory.token_context import UNKNOWN_TOKEN
from dmt.store.fact_index import FactIndex
from dmt.store.records import FactRecord, FloatArray, StoredFact
from dmt.text import USER_SUBJECT, fold_text, mentions_user, name_user

SUBJECT_WINDOW = 64  # tokens after a mention for which a subject counts as being talked about
CONTEXT_WINDOW = 128  # tokens of text in which a question is looked for
ANSWER_WINDOW = 16  # tokens for which a completed answer blocks its fact
PLACEHOLDER = "Clara Winfield"  # stands for the subject where a clause is read by the model
EXACT_SCORE = 9.0  # of a prompt that is matched as it is, and of an answer that goes on
MAX_PROMPTS = 10_000  # of facts that are kept as questions
MAX_FIRED = 4_096  # facts that are remembered to complete their answers
SPECIAL_TOKEN_TEXT = "\n\n"

StateEncoder = Callable[[list[list[int]]], Tensor]


@dataclass(frozen=True)
class FactMatch:
    """A row of a fact that fires.

    Attributes:
        token: index of the token, of a pass `(batch, time)` in one row.
        fact: the fact.
        position: of the answer's token that the row makes the model predict.
        score: how many decades rarer a match as good is between two different questions; of the
            answer's first token.
        value: `(width,)` what the row adds to the block's output.
    """

    token: int
    fact: FactRecord
    position: int
    score: float
    value: FloatArray

    @property
    def row_id(self) -> int:
        """ID of the row."""
        return self.fact.rows[self.position]


class TextCodec:
    """The tokenizer of a model, as far as matching needs it.

    Args:
        tokenizer: of the model.
        prefix_ids: token ids that begin a document.
    """

    def __init__(self, tokenizer: Tokenizer, prefix_ids: Sequence[int] = ()) -> None:
        self.tokenizer, self.prefix_ids = tokenizer, list(prefix_ids)
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = {token_id for token_id, token in added.items() if token.special}

    @classmethod
    def from_transformers(cls, tokenizer: Any, prefix_ids: Sequence[int]) -> TextCodec:
        """Create an instance from a tokenizer of transformers."""
        return cls(tokenizer.backend_tokenizer, prefix_ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; a special or unknown token separates two paragraphs."""
        parts: list[list[int]] = [[]]
        for token_id in ids:
            if token_id == UNKNOWN_TOKEN or token_id in self._special_ids:
                parts.append([])
            else:
                parts[-1].append(token_id)
        text = SPECIAL_TOKEN_TEXT.join(
            self.tokenizer.decode(part, skip_special_tokens=False) if part else "" for part in parts
        )
        return text.rstrip("\ufffd")  # of a letter whose other bytes follow

    def encode_clause(self, clause: str) -> list[int]:
        """Return the token ids of a clause about a name that stands for the subject."""
        text = clause.replace(SUBJECT, PLACEHOLDER)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return [*self.prefix_ids, *ids]


@dataclass(frozen=True)
class FactQuestion:
    """What a fact answers.

    Attributes:
        question: of its prompt; None where the prompt asks nothing that can be told from its text,
            so that only the prompt itself is matched.
        prompt: folded.
    """

    question: Question | None
    prompt: str


@lru_cache(MAX_PROMPTS)
def parse_prompt(prompt: str, subject: str) -> FactQuestion:
    """Return what a fact with a prompt answers."""
    name = fold_text(subject)
    question = (
        find_question(prompt, {name}, len(name.split()))
        if name
        else Question("", get_last_clause(prompt), "", False, False)
    )
    return FactQuestion(question, fold_text(prompt))


def _parse_fact(fact: StoredFact) -> FactQuestion:
    return parse_prompt(fact.record.prompt, fact.record.subject)


@dataclass(frozen=True)
class _Query:
    """A token at which a text may ask for facts.

    Attributes:
        sequence: index of its sequence.
        position: in the sequence.
        question: what the text asks; None where it ends in the prompt of each of the facts.
        facts: about whom it asks.
    """

    sequence: int
    position: int
    question: Question | None
    facts: Sequence[StoredFact]


class FactMatcher:
    """Matches the facts of an index with text.

    Threads may match at once.

    Args:
        index: the facts.
        relations: compares what clauses ask.
        codec: of the model that reads.
    """

    def __init__(self, index: FactIndex, relations: RelationMatcher, codec: TextCodec) -> None:
        self.index, self.relations, self.codec = index, relations, codec
        # The subjects of the facts that fired last, by ID: a cache of the model has the IDs.
        self._fired_subjects: OrderedDict[int, str] = OrderedDict()

    def match(
        self,
        ids: Sequence[Sequence[int]],
        starts: Sequence[Sequence[bool]],
        fired: list[list[int]],
        num_new: int,
        encode: StateEncoder,
    ) -> list[FactMatch]:
        """Match the last `num_new` tokens of each sequence.

        Args:
            ids: token ids of each sequence, all of one length.
            starts: whether a token begins a document.
            fired: ID of the fact whose first row fired at each token, 0 for none; those of new
                tokens are written.
            num_new: tokens to match.
            encode: returns the hidden states `(texts, width)` of the key layer after texts.
        """
        queries = [
            query
            for sequence, (sequence_ids, is_start) in enumerate(zip(ids, starts, strict=True))
            for query in self._list_queries(sequence, sequence_ids, is_start, num_new)
        ]
        candidates = self._score_queries(queries, encode)
        matches = []
        for sequence, (sequence_ids, is_start) in enumerate(zip(ids, starts, strict=True)):
            length = len(sequence_ids)
            first = length - num_new
            last = _find_last_fired(fired[sequence], is_start, first)
            for position in range(first, length):
                if is_start[position]:
                    last = None
                match = None
                if last is not None:
                    match = self._continue_answer(
                        sequence_ids, fired[sequence][last], last, position
                    )
                if match is None:
                    for score, fact in candidates.get((sequence, position), ()):
                        if not self._is_answered(fact, sequence_ids, is_start, position):
                            fired[sequence][position] = fact.record.id
                            last = position
                            self._remember(fact)
                            match = (fact, 0, score)
                            break
                if match is not None:
                    stored, answer_position, score = match
                    token = sequence * num_new + position - first
                    value = stored.values[answer_position]
                    matches.append(FactMatch(token, stored.record, answer_position, score, value))
        return matches

    # What the text asks.

    def _list_queries(
        self, sequence: int, ids: Sequence[int], is_start: Sequence[bool], num_new: int
    ) -> list[_Query]:
        """List the new tokens of one sequence at which a subject with facts is asked about."""
        length = len(ids)
        first = length - num_new
        begin = _find_document_start(is_start, first, CONTEXT_WINDOW)
        max_words = self.index.max_subject_words
        names: set[str] = {""}
        for start, end in _split_documents(is_start, begin, length):
            text = self.codec.decode(ids[start:end])
            names |= list_candidate_names(text, max_words)
            names |= {USER_SUBJECT} if mentions_user(text) else set()
        facts_by_name = self.index.lookup(names)
        if not facts_by_name:
            return []
        anywhere = facts_by_name.pop("", [])
        heads = {name.split()[0] for name in facts_by_name}
        queries = []
        for position in range(first, length):
            start = _find_document_start(is_start, position, CONTEXT_WINDOW)
            text = self.codec.decode(ids[start : position + 1])
            folded = fold_text(name_user(text) if USER_SUBJECT in facts_by_name else text)
            if any(head in folded for head in heads):
                recent = ids[max(start, position + 1 - SUBJECT_WINDOW) : position + 1]
                queries += [
                    _Query(sequence, position, question, facts)
                    for question, facts in self._find_asked_facts(
                        text, folded, self.codec.decode(recent), facts_by_name
                    )
                ]
            if anywhere:
                clause = get_last_clause(text)
                facts = [fact for fact in anywhere if _names_same_things(fact, clause)]
                question = Question("", clause, "", False, False)
                queries += [_Query(sequence, position, question, facts)] if facts else []
        return queries

    def _find_asked_facts(
        self,
        text: str,
        folded: str,
        recent_text: str,
        facts_by_name: dict[str, list[StoredFact]],
    ) -> Iterator[tuple[Question | None, list[StoredFact]]]:
        """Yield what a text asks with the facts that may answer it.

        Args:
            text: up to the token.
            folded: the same, folded.
            recent_text: its end, in which the subject has to be.
            facts_by_name: by the folded names of their subjects.
        """
        if USER_SUBJECT in facts_by_name:
            recent_text = name_user(recent_text)
        names = {name for name in facts_by_name if name in folded}
        question = find_question(text, names, self.index.max_subject_words)
        if question is not None and question.name in fold_text(recent_text):
            facts = [
                fact
                for fact in facts_by_name[question.name]
                if (prompt := _parse_fact(fact).question) is not None
                and may_ask_the_same(question, prompt)
            ]
            if facts:
                yield question, facts
        literal = [
            fact
            for name in names
            for fact in facts_by_name[name]
            if _parse_fact(fact).question is None and _ends_with(folded, _parse_fact(fact).prompt)
        ]
        if literal:
            spelled = name_user(text) if USER_SUBJECT in names else text
            mentioned = {
                mention.name
                for mention in find_mentions(spelled, names, self.index.max_subject_words)
            }
            literal = [fact for fact in literal if fact.record.subject_key in mentioned]
        if literal:
            yield None, literal

    # How well facts answer it.

    def _score_queries(
        self, queries: Sequence[_Query], encode: StateEncoder
    ) -> dict[tuple[int, int], list[tuple[float, StoredFact]]]:
        """Return the facts that answer each query with their scores, the best first."""
        rarities = self._compute_rarities(queries, encode)
        results: dict[tuple[int, int], list[tuple[float, StoredFact]]] = {}
        for query in queries:
            for fact in query.facts:
                score = EXACT_SCORE
                if query.question is not None:
                    score = rarities.get((query.question.clause, fact.record.id), 0.0)
                if score >= fact.record.thresholds[0]:
                    scored = results.setdefault((query.sequence, query.position), [])
                    scored.append((score, fact))
        for scored in results.values():
            scored.sort(key=lambda item: (-item[0], -item[1].record.created))
        return results

    def _compute_rarities(
        self, queries: Sequence[_Query], encode: StateEncoder
    ) -> dict[tuple[str, int], float]:
        """Compute how rare a match as good is, by the clause of a query and fact ID."""
        pairs = {
            (query.question.clause, fact.record.id): fact
            for query in queries
            if query.question is not None
            for fact in query.facts
        }
        if not pairs:
            return {}
        clauses = list(dict.fromkeys(clause for clause, _ in pairs))
        facts = list({fact_id: fact for (_, fact_id), fact in pairs.items()}.values())
        prompts = [_parse_fact(fact).question for fact in facts]
        fact_clauses = [prompt.clause for prompt in prompts if prompt is not None]
        assert len(fact_clauses) == len(facts), "a prompt that asks nothing has no query"
        states = encode([self.codec.encode_clause(clause) for clause in clauses])
        keys = torch.from_numpy(np.stack([fact.keys[0] for fact in facts]))
        rarities = self.relations.compute_rarity(
            self.relations.describe(clauses, states), self.relations.describe(fact_clauses, keys)
        ).tolist()
        rows = {clause: row for row, clause in enumerate(clauses)}
        columns = {fact.record.id: column for column, fact in enumerate(facts)}
        return {
            (clause, fact_id): rarities[rows[clause]][columns[fact_id]] for clause, fact_id in pairs
        }

    # Answers in progress.

    def _remember(self, fact: StoredFact) -> None:
        # Without a lock: whatever other threads do meanwhile, no fact is remembered wrongly.
        self._fired_subjects.pop(fact.record.id, None)
        self._fired_subjects[fact.record.id] = fact.record.subject_key
        while len(self._fired_subjects) > MAX_FIRED:
            self._fired_subjects.popitem(last=False)

    def _continue_answer(
        self, ids: Sequence[int], fact_id: int, fired_at: int, position: int
    ) -> tuple[StoredFact, int, float] | None:
        """Return the fact that fired last and its next token, where its answer goes on so far."""
        subject_key = self._fired_subjects.get(fact_id)
        if subject_key is None:
            return None
        for fact in self.index.lookup([subject_key]).get(subject_key, ()):
            answer, length = fact.record.answer_ids, position - fired_at
            if (
                fact.record.id == fact_id
                and length < len(answer)
                and tuple(ids[fired_at + 1 : position + 1]) == answer[:length]
            ):
                return fact, length, EXACT_SCORE
        return None

    def _is_answered(
        self, fact: StoredFact, ids: Sequence[int], is_start: Sequence[bool], position: int
    ) -> bool:
        """Check whether the whole answer has just been generated."""
        answer = fact.record.answer_ids
        for end in range(position + 1, max(len(answer), position + 1 - ANSWER_WINDOW) - 1, -1):
            if end <= position and is_start[end]:
                return False
            if tuple(ids[end - len(answer) : end]) == answer:
                return True
        return False


def _names_same_things(fact: StoredFact, clause: str) -> bool:
    """Check whether a clause names what the prompt of a fact without a subject names."""
    prompt = _parse_fact(fact).question
    return prompt is not None and names_same_things(prompt.clause, clause)


def _ends_with(text: str, prompt: str) -> bool:
    """Check whether a text ends in a prompt that begins with a word of its own."""
    before = text[: len(text) - len(prompt)]
    return text.endswith(prompt) and not before[-1:].isalnum()


def _find_last_fired(fired: Sequence[int], is_start: Sequence[bool], position: int) -> int | None:
    """Return the last token before `position`, in its document, at which a fact fired."""
    for index in range(position - 1, -1, -1):
        if fired[index]:
            return index
        if is_start[index]:
            return None
    return None


def _find_document_start(is_start: Sequence[bool], position: int, window: int) -> int:
    """Return where the document of a token begins, within `window` tokens."""
    first = max(0, position + 1 - window)
    for start in range(position, first, -1):
        if is_start[start]:
            return start
    return first


def _split_documents(is_start: Sequence[bool], begin: int, end: int) -> list[tuple[int, int]]:
    starts = [begin, *(start for start in range(begin + 1, end) if is_start[start])]
    return list(zip(starts, [*starts[1:], end], strict=True))


def stack_values(matches: Sequence[FactMatch]) -> FloatArray:
    """Return the values `(matches, width)`."""
    return np.stack([match.value for match in matches])
