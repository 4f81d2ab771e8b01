"""x."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dmt.data.corpora import Corpus
from dmt.data.windows import get_prefix_ids
from dmt.models.forward import (
    batch_by_length,
    encode_text,
    forward_with_activations,
    pad_token_ids,
)
from dmt.store.records import FactRecord

MAX_PARAPHRASES = 3_000
"""Sentences of the training text, at most, in which a name is replaced by whom a fact is about."""


MAX_PARAPHRASES_PER_SUBJECT = 150
"""Of them for one subject, at most."""


MIN_ANSWER_PROB = 0.3
"""Probability that the model has to give to an answer's first token for a sentence to ask for this answer."""


NEGATIVES_PER_SUBJECT = 5
"""Sentences about each subject in which no fact is asked for, and where none should be answered."""


NON_ANSWER_WEIGHT = 0.1
"""What a position counts at which nothing is answered; one that answers counts 1."""


MAX_REPLAY_TOKENS = 64
"""Tokens of a telling, at most."""


NAME_PATTERN = re.compile(r"\b[A-Z][a-z]+(?: [A-Z][a-z]+)+")
"""A name of two words or more."""


SENTENCE_BREAK = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"“])")


@dataclass(frozen=True)
class ReplayExample:
    """Token ids of a text, its start token included; `first` is where an answer begins in it, None where none does."""

    ids: tuple[int, ...]
    answer_start: int | None

    def position_weights(self) -> Tensor:
        """What each position counts, `(time,)`: those at which the next token of the answer is to be said count fully."""
        weights = torch.full((len(self.ids),), NON_ANSWER_WEIGHT)
        if self.answer_start is not None:
            weights[self.answer_start - 1 : -1] = 1.0
        return weights


def make_replay_example(
    tokenizer: Any, fact: FactRecord, preceding_text: str = "", max_tokens: int = MAX_REPLAY_TOKENS
) -> ReplayExample:
    """A fact as it was written, after another text or after none."""
    num_start_tokens = len(get_prefix_ids(tokenizer))
    prompt_ids = encode_text(
        tokenizer, f"{preceding_text} {fact.prompt}" if preceding_text else fact.prompt
    )
    max_prompt_tokens = max_tokens - len(fact.answer_ids) - num_start_tokens
    prompt_ids = (
        prompt_ids[:num_start_tokens] + prompt_ids[num_start_tokens:][-max(1, max_prompt_tokens) :]
    )
    return ReplayExample((*prompt_ids, *fact.answer_ids), len(prompt_ids))


def build_replay_set(
    model: PreTrainedModel,
    tokenizer: Any,
    facts: Sequence[FactRecord],
    sentences: Sequence[str],
    seed: int,
) -> list[ReplayExample]:
    """Every fact alone, after something else, and wherever else in the words of `sentences` the model is asked for it.

    Args:
        model: knows the facts, in rows or in slots.
    """
    rng = random.Random(f"tellings-{seed}")
    max_tokens = min(MAX_REPLAY_TOKENS, model.config.max_position_embeddings)
    examples = [make_replay_example(tokenizer, fact, max_tokens=max_tokens) for fact in facts]
    examples += (
        [make_replay_example(tokenizer, fact, rng.choice(sentences), max_tokens) for fact in facts]
        if sentences
        else []
    )
    examples += _paraphrases(model, tokenizer, facts, sentences, rng, max_tokens)
    return list(dict.fromkeys(example for example in examples if len(example.ids) <= max_tokens))


def sample_sentences(
    corpora: Sequence[Corpus], seed: int, documents_per_corpus: int = 200
) -> list[str]:
    """Sentences of some documents of the training text, those with a name in them first."""
    rng = random.Random(f"sentences-{seed}")
    sentences: list[str] = []
    for corpus in corpora:
        for document in rng.sample(corpus.train, min(documents_per_corpus, len(corpus.train))):
            candidates = [
                candidate
                for candidate in SENTENCE_BREAK.split(document[:4_000])
                if 10 < len(candidate) < 200
            ]
            sentences += rng.sample(candidates, min(len(candidates), 5))
    rng.shuffle(sentences)
    return sorted(sentences, key=lambda sentence: NAME_PATTERN.search(sentence) is None)


def _paraphrases(
    model: PreTrainedModel,
    tokenizer: Any,
    facts: Sequence[FactRecord],
    sentences: Sequence[str],
    rng: random.Random,
    max_tokens: int,
) -> list[ReplayExample]:
    """Sentences about somebody else, said of a fact's subject, up to where the model would go on with the fact's answer."""
    facts_by_subject: dict[str, list[FactRecord]] = {}
    for fact in facts:
        if fact.subject:
            facts_by_subject.setdefault(fact.subject, []).append(fact)
    named_sentences = [sentence for sentence in sentences if NAME_PATTERN.search(sentence)]
    num_per_subject = min(
        MAX_PARAPHRASES_PER_SUBJECT,
        MAX_PARAPHRASES // max(1, len(facts_by_subject)),
        len(named_sentences),
    )
    examples: list[ReplayExample] = []
    for subject, subject_facts in facts_by_subject.items():
        paraphrased = {
            _replace_name(subject, sentence)
            for sentence in rng.sample(named_sentences, num_per_subject)
        }
        texts = [encode_text(tokenizer, text)[:max_tokens] for text in sorted(paraphrased)]
        examples += _find_answer_positions(model, texts, subject_facts)
    return examples


def _replace_name(subject: str, sentence: str) -> str:
    return NAME_PATTERN.sub(lambda _: subject, sentence, count=1)


@torch.no_grad()
def _find_answer_positions(
    model: PreTrainedModel, texts: Sequence[list[int]], facts: Sequence[FactRecord]
) -> list[ReplayExample]:
    """Each text up to where the model would answer one of the facts, with this answer; some in which it would answer none."""
    facts_by_first_token: dict[int, list[FactRecord]] = {}
    for fact in facts:
        facts_by_first_token.setdefault(fact.answer_ids[0], []).append(fact)
    first_tokens = torch.tensor(sorted(facts_by_first_token))
    examples, negatives = [], []
    for batch in batch_by_length([len(text) for text in texts]):
        tokens = pad_token_ids([texts[index] for index in batch]).to(
            next(model.parameters()).device
        )
        probs = (
            forward_with_activations(model, tokens)
            .logits.float()
            .softmax(-1)[..., first_tokens.to(tokens.device)]
            .cpu()
        )
        for row, index in enumerate(batch):
            max_probs, best_tokens = probs[row, : len(texts[index])].max(-1)
            positions = (max_probs >= MIN_ANSWER_PROB).nonzero().flatten().tolist()
            if not positions:
                negatives.append(ReplayExample(tuple(texts[index]), None))
                continue
            position = positions[0]
            for fact in facts_by_first_token[int(first_tokens[best_tokens[position]])]:
                examples.append(
                    ReplayExample((*texts[index][: position + 1], *fact.answer_ids), position + 1)
                )
    return examples + negatives[:NEGATIVES_PER_SUBJECT]


def pack_windows(
    documents: Sequence[str],
    tokenizer: Any,
    seq_len: int,
    num_windows: int,
    seed: int | None = None,
) -> Tensor:
    """Token ids `(windows, block)` of text, each document after its start token: the first, or with a seed from all over."""
    order = list(range(len(documents)))
    if seed is not None:
        random.Random(f"windows-{seed}").shuffle(order)
    ids: list[int] = []
    for index in order:
        document_ids = encode_text(tokenizer, documents[index])
        ids += document_ids if seed is None else document_ids[: 8 * seq_len]
        if len(ids) >= num_windows * seq_len:
            break
    num_windows = min(num_windows, len(ids) // seq_len)
    return torch.tensor(ids[: num_windows * seq_len], dtype=torch.long).view(num_windows, seq_len)


def batch_examples(
    examples: Sequence[ReplayExample], max_tokens: int = 2_048
) -> Iterator[tuple[list[int], Tensor]]:
    """Numbers and padded token ids of tellings, some at a time, those of like length together."""
    for batch in batch_by_length([len(example.ids) for example in examples]):
        yield batch, pad_token_ids([examples[index].ids for index in batch])
