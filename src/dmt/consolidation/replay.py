"""Replay examples: facts stated in several ways, for slots that are to learn or to retain them.

All of it is text, and the predictions of the model that has the facts.
"""

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
from dmt.data.tokenizer import get_prefix_ids
from dmt.models.forward import (
    batch_by_length,
    encode_text,
    forward_with_activations,
    pad_token_ids,
)
from dmt.store.records import FactRecord

MAX_PARAPHRASES = 3_000  # default of the setting `sleep.max_paraphrases`
MAX_PARAPHRASES_PER_SUBJECT = 150
MIN_ANSWER_PROB = 0.3  # probability of an answer's first token where a sentence asks for it
NEGATIVES_PER_SUBJECT = 5  # sentences about each subject in which no answer is predicted
NON_ANSWER_WEIGHT = 0.1  # weight of a position that predicts no answer; one that does weighs 1
MAX_REPLAY_TOKENS = 64
MAX_DOCUMENT_CHARS = 4_000  # of a document that sentences are sampled from
SENTENCES_PER_DOCUMENT = 5
# A name of two words or more. (`editing.calibration` has another pattern: any name within a
# sentence, of one word too.)
FULL_NAME_PATTERN = re.compile(r"\b[A-Z][a-z]+(?: [A-Z][a-z]+)+")
# Coarser than `consolidation.context.split_sentences`, which knows titles and line breaks: of
# training text sentences are sampled, of a context every one is needed.
SENTENCE_BREAK_PATTERN = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"“])")


@dataclass(frozen=True)
class ReplayExample:
    """A text to be learned.

    Attributes:
        ids: token ids with the document prefix.
        answer_start: index of the first token of the answer, None if the text has no answer.
    """

    ids: tuple[int, ...]
    answer_start: int | None

    def position_weights(self) -> Tensor:
        """Return the weight of each position `(time,)`, 1 where an answer token comes next."""
        weights = torch.full((len(self.ids),), NON_ANSWER_WEIGHT)
        if self.answer_start is not None:
            weights[self.answer_start - 1 : -1] = 1.0
        return weights


def make_replay_example(
    tokenizer: Any, fact: FactRecord, preceding_text: str = "", max_tokens: int = MAX_REPLAY_TOKENS
) -> ReplayExample:
    """Return a fact's prompt and answer, after another text or alone."""
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
    max_paraphrases: int = MAX_PARAPHRASES,
) -> list[ReplayExample]:
    """Return every fact alone, after another sentence, and wherever a sentence asks for it.

    Args:
        model: a model that predicts the facts, by rows or by slots.
        tokenizer: its tokenizer.
        facts: facts to be replayed.
        sentences: sentences of training text.
        seed: random seed.
        max_paraphrases: sentences in which a subject replaces a name, at most.
    """
    rng = random.Random(f"tellings-{seed}")
    max_tokens = min(MAX_REPLAY_TOKENS, model.config.max_position_embeddings)
    examples = [make_replay_example(tokenizer, fact, max_tokens=max_tokens) for fact in facts]
    examples += (
        [make_replay_example(tokenizer, fact, rng.choice(sentences), max_tokens) for fact in facts]
        if sentences
        else []
    )
    examples += _paraphrase(model, tokenizer, facts, sentences, rng, max_tokens, max_paraphrases)
    return list(dict.fromkeys(example for example in examples if len(example.ids) <= max_tokens))


def sample_sentences(
    corpora: Sequence[Corpus], seed: int, documents_per_corpus: int = 200
) -> list[str]:
    """Return sentences of some documents of the training text, those with a full name first."""
    rng = random.Random(f"sentences-{seed}")
    sentences: list[str] = []
    for corpus in corpora:
        for document in rng.sample(corpus.train, min(documents_per_corpus, len(corpus.train))):
            candidates = [
                candidate
                for candidate in SENTENCE_BREAK_PATTERN.split(document[:MAX_DOCUMENT_CHARS])
                if 10 < len(candidate) < 200
            ]
            sentences += rng.sample(candidates, min(len(candidates), SENTENCES_PER_DOCUMENT))
    rng.shuffle(sentences)
    return sorted(sentences, key=lambda sentence: FULL_NAME_PATTERN.search(sentence) is None)


def _paraphrase(
    model: PreTrainedModel,
    tokenizer: Any,
    facts: Sequence[FactRecord],
    sentences: Sequence[str],
    rng: random.Random,
    max_tokens: int,
    max_paraphrases: int,
) -> list[ReplayExample]:
    """Return sentences about a fact's subject instead of a name, up to where they ask for it."""
    facts_by_subject: dict[str, list[FactRecord]] = {}
    for fact in facts:
        if fact.subject:
            facts_by_subject.setdefault(fact.subject, []).append(fact)
    named_sentences = [sentence for sentence in sentences if FULL_NAME_PATTERN.search(sentence)]
    num_per_subject = min(
        MAX_PARAPHRASES_PER_SUBJECT,
        max_paraphrases // max(1, len(facts_by_subject)),
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
    return FULL_NAME_PATTERN.sub(lambda _: subject, sentence, count=1)


@torch.no_grad()
def _find_answer_positions(
    model: PreTrainedModel, texts: Sequence[list[int]], facts: Sequence[FactRecord]
) -> list[ReplayExample]:
    """Return each text up to where the model predicts the answer of a fact, with this answer.

    Some texts in which it predicts none are added as negatives.
    """
    facts_by_first_token: dict[int, list[FactRecord]] = {}
    for fact in facts:
        facts_by_first_token.setdefault(fact.answer_ids[0], []).append(fact)
    first_tokens = torch.tensor(sorted(facts_by_first_token))
    examples, negatives = [], []
    for batch in batch_by_length([len(text) for text in texts]):
        tokens = pad_token_ids([texts[index] for index in batch]).to(
            next(model.parameters()).device
        )
        logits = forward_with_activations(model, tokens).logits.float()
        probs = logits.softmax(-1)[..., first_tokens.to(tokens.device)].cpu()
        for row, index in enumerate(batch):
            max_probs, best_tokens = probs[row, : len(texts[index])].max(-1)
            positions = (max_probs >= MIN_ANSWER_PROB).nonzero().flatten().tolist()
            if not positions:
                negatives.append(ReplayExample(tuple(texts[index]), None))
                continue
            position = positions[0]
            for fact in facts_by_first_token[int(first_tokens[best_tokens[position]])]:
                ids = (*texts[index][: position + 1], *fact.answer_ids)
                examples.append(ReplayExample(ids, position + 1))
    return examples + negatives[:NEGATIVES_PER_SUBJECT]


def batch_examples(examples: Sequence[ReplayExample]) -> Iterator[tuple[list[int], Tensor]]:
    """Yield indices and padded token ids `(batch, time)` of examples of similar length."""
    for batch in batch_by_length([len(example.ids) for example in examples]):
        yield batch, pad_token_ids([examples[index].ids for index in batch])
