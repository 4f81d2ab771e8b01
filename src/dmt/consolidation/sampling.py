"""Sample texts after a context: its sentences, continuations, generated questions; and batches."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dmt.config import ContextConfig
from dmt.consolidation.context import MAX_TEXT_TOKENS, Context, ContextChunk
from dmt.models.forward import ContextTeacher, ForwardOutputs, encode_text, pad_token_ids

# How sampled continuations begin, beside the names in the context.
CONTINUATION_PREFIXES = ("", "Question:", "What", "Where", "When", "Who", "The")
NAME_TEMPLATES = (
    "{s}",
    "{s}'s",
    "The {s}",
    "Question: What",
    "Question: Where",
    "Question: Who",
    "Question: When",
)
# Examples of questions about a sentence, for `generate_qa`.
FEW_SHOT_PROMPT = """Text: The old mill of Hartley was bought in 1802 by the merchant Peter Lang.
Question: Who bought the old mill of Hartley?
Answer: Peter Lang

Text: The old mill of Hartley was bought in 1802 by the merchant Peter Lang.
Question: In which year was the old mill of Hartley bought?
Answer: 1802

Text: Maria Sand keeps nine horses behind her house and rides every Sunday.
Question: How many horses does Maria Sand keep?
Answer: nine

Text: Maria Sand keeps nine horses behind her house and rides every Sunday.
Question: On which day does Maria Sand ride?
Answer: Sunday

"""
ANSWER_PREFIX = "\nAnswer: "  # between a question and its answer
QA_PATTERN = re.compile(r"\s*(?P<question>[^\n]+\?)\s*\nAnswer:(?P<answer>[^\n]+)")


@dataclass(frozen=True)
class DistillationBatch:
    """Texts that follow a context, and the outputs of the model with the context for them.

    Attributes:
        tokens: token ids `(batch, time)`, padded on the right.
        mask: `(batch, time)`, True where a token is not padding.
        teacher_signals: outputs of the model with context, aligned to `tokens`; None if the texts
            themselves are learned.
    """

    tokens: Tensor
    mask: Tensor
    teacher_signals: ForwardOutputs | None


def encode_sentences(chunk: ContextChunk, tokenizer: Any) -> list[list[int]]:
    """Return the token ids of each sentence of a chunk."""
    return [
        ids
        for sentence in chunk.sentences
        if len(ids := encode_text(tokenizer, sentence, add_prefix=False)[:MAX_TEXT_TOKENS]) > 1
    ]


def sample_continuations(
    teacher: ContextTeacher, chunk: ContextChunk, tokenizer: Any, settings: ContextConfig, seed: int
) -> list[list[int]]:
    """Return about `settings.num_samples` sampled texts after a chunk, cut to whole sentences."""
    prefixes = [
        *CONTINUATION_PREFIXES,
        *(template.format(s=name) for name in chunk.names for template in NAME_TEMPLATES[:3]),
    ]
    prefixes += list(NAME_TEMPLATES[3:])
    rng = random.Random(f"openers-{seed}")
    rng.shuffle(prefixes)
    prefixes = prefixes[: settings.num_samples]
    quotient, remainder = divmod(settings.num_samples, max(1, len(prefixes)))
    texts: list[list[int]] = []
    for index, prefix in enumerate(prefixes):
        num_samples = quotient + (index < remainder)
        if num_samples:
            ids = encode_text(tokenizer, prefix, add_prefix=False) if prefix else []
            samples = teacher.sample(
                ids,
                num_samples,
                MAX_TEXT_TOKENS,
                settings.temperature,
                seed * 1_009 + index,
                tokenizer.eos_token_id,
            )
            texts += [
                trimmed
                for text in samples
                if len(trimmed := _trim_to_sentence(text, tokenizer)) > 2
            ]
    return texts


def generate_qa(
    model: PreTrainedModel, chunk: ContextChunk, tokenizer: Any, settings: ContextConfig, seed: int
) -> list[list[int]]:
    """Return questions and answers that the model generates about each sentence of a chunk.

    An answer has to occur in the sentence; the teacher decides how probable it is. Models with too
    few positions for the examples generate none.
    """
    ids = encode_text(tokenizer, FEW_SHOT_PROMPT)
    max_sentence_tokens = max(
        (len(sentence) for sentence in encode_sentences(chunk, tokenizer)), default=0
    )
    if (
        not settings.qa_per_sentence
        or len(ids) + max_sentence_tokens + MAX_TEXT_TOKENS > model.config.max_position_embeddings
    ):
        return []
    few_shot_model, texts = ContextTeacher(model, ids), []
    for index, sentence in enumerate(chunk.sentences):
        prompt_ids = encode_text(tokenizer, f"Text: {sentence}\nQuestion:", add_prefix=False)
        samples = few_shot_model.sample(
            prompt_ids,
            settings.qa_per_sentence,
            len(prompt_ids) + MAX_TEXT_TOKENS // 2,
            settings.temperature,
            seed * 1_013 + index,
            tokenizer.eos_token_id,
        )
        for text in samples:
            match = QA_PATTERN.match(tokenizer.decode(text[len(prompt_ids) :]))
            if match and match["answer"].strip(" .").lower() in sentence.lower():
                question, answer = match["question"].strip(), match["answer"].strip(" .")
                qa_text = f"Question: {question}{ANSWER_PREFIX}{answer}"
                texts.append(encode_text(tokenizer, qa_text, add_prefix=False)[:MAX_TEXT_TOKENS])
    return [list(text) for text in dict.fromkeys(map(tuple, texts))]


def _trim_to_sentence(ids: list[int], tokenizer: Any) -> list[int]:
    """Return a text up to the end of its last complete sentence, all of it if there is none."""
    for position in range(len(ids) - 1, 0, -1):
        if tokenizer.decode(ids[position : position + 1]).rstrip().endswith((".", "!", "?", "\n")):
            return ids[: position + 1]
    return ids


class BatchSampler:
    """Sample the batch of each step, a function of seed and step alone, as a resumed run needs.

    Args:
        teachers: the teacher with each chunk of the context in its cache.
        tokenizer: its tokenizer.
        context: the context.
        settings: objective and sampling.
        batch_size: texts in a batch.
        seed: random seed.
        blocks: whether the teacher's outputs of all layers are needed.
    """

    def __init__(
        self,
        teachers: Sequence[ContextTeacher],
        tokenizer: Any,
        context: Context,
        settings: ContextConfig,
        batch_size: int,
        seed: int,
        blocks: bool,
    ) -> None:
        self.teachers, self.tokenizer, self.context, self.settings = (
            teachers,
            tokenizer,
            context,
            settings,
        )
        self.batch_size, self.seed, self.blocks = batch_size, seed, blocks
        self.model = teachers[0].model
        self.device = next(self.model.parameters()).device
        self._sentence_ids = [encode_sentences(chunk, tokenizer) for chunk in context.chunks]
        self._generated: dict[int, tuple[int, list[list[int]]]] = {}

    def get_texts(self, chunk_index: int, step: int) -> list[list[int]]:
        """Return the texts to choose from after a chunk at a step, token ids of each."""
        sentence_ids = self._sentence_ids[chunk_index]
        if self.settings.objective != "generated":
            return sentence_ids
        round_index = step // self.settings.resample_every
        if self._generated.get(chunk_index, (-1,))[0] != round_index:
            seed = (self.seed * 10_007 + round_index) * 101 + chunk_index
            chunk = self.context.chunks[chunk_index]
            continuations = sample_continuations(
                self.teachers[chunk_index], chunk, self.tokenizer, self.settings, seed
            )
            self._generated[chunk_index] = (
                round_index,
                continuations + generate_qa(self.model, chunk, self.tokenizer, self.settings, seed),
            )
        return self._generated[chunk_index][1] + sentence_ids

    def get_batch(self, step: int) -> DistillationBatch:
        """Return the texts of a step, after one chunk, and the teacher's outputs for them."""
        chunk_index = step % len(self.teachers)
        rng = random.Random(f"lesson-{self.seed}-{step}")
        if self.settings.objective == "causal_lm":
            return _collate_texts(
                [self._sample_segment(chunk_index, rng) for _ in range(self.batch_size)],
                self.device,
            )
        texts = self.get_texts(chunk_index, step)
        sentence_ids = (
            self._sentence_ids[chunk_index] if self.settings.objective == "generated" else []
        )
        chosen = rng.sample(sentence_ids, min(len(sentence_ids), self.batch_size // 2))
        chosen += rng.sample(texts, min(len(texts), self.batch_size - len(chosen)))
        batch = _collate_texts(chosen, self.device)
        return DistillationBatch(
            batch.tokens,
            batch.mask,
            self.teachers[chunk_index].predict(batch.tokens, blocks=self.blocks),
        )

    def _sample_segment(self, chunk_index: int, rng: random.Random) -> list[int]:
        """Return a sentence of a chunk, or half of the time the whole chunk."""
        ids = self.context.chunks[chunk_index].ids[1:]
        sentences = self._sentence_ids[chunk_index]
        return ids if not sentences or rng.random() < 0.5 else rng.choice(sentences)


def _collate_texts(texts: Sequence[list[int]], device: torch.device) -> DistillationBatch:
    tokens = pad_token_ids(texts).to(device)
    lengths = torch.tensor([len(text) for text in texts], device=device)
    mask = torch.arange(tokens.shape[1], device=device) < lengths.unsqueeze(1)
    return DistillationBatch(tokens, mask, None)
