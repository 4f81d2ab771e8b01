"""Train a byte-level BPE tokenizer; save the tokenizer of a student."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
MEMORY_TOKEN_FORMAT = "<|memory_{}|>"  # the tokens of a soft prompt


def get_prefix_ids(tokenizer: Any) -> list[int]:
    """Return the token ids before a document: end of text, if the tokenizer has it, and memory."""
    eos_ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    count = getattr(tokenizer, "init_kwargs", {}).get("memory_tokens", 0)
    return eos_ids + [
        tokenizer.convert_tokens_to_ids(MEMORY_TOKEN_FORMAT.format(number))
        for number in range(count)
    ]


def train_tokenizer(
    documents: Iterable[str], vocab_size: int, max_length: int
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; it encodes any text without loss.

    Args:
        documents: texts to train on.
        vocab_size: maximum number of tokens, at least 257.
        max_length: tokens that the model reads at once.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=max_length,
    )


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save the tokenizer of a student, so that `tokenizer(text)` begins as training texts did.

    Students read documents after the end-of-text token, and facts are written in the states behind
    it. A tokenizer that adds a token of its own at the start stays as it is.
    """
    if tokenizer("a")["input_ids"] == tokenizer("a", add_special_tokens=False)["input_ids"]:
        tokenizer = copy.deepcopy(tokenizer)
        prepend_prefix(tokenizer)
    tokenizer.save_pretrained(folder)


def prepend_prefix(tokenizer: Any) -> None:
    """Let `tokenizer(text)` begin with `windows.get_prefix_ids`."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    prefix_ids = get_prefix_ids(tokenizer)
    if backend is None or not prefix_ids:
        return
    tokens = tokenizer.convert_ids_to_tokens(prefix_ids)
    backend.post_processor = processors.TemplateProcessing(
        single=" ".join([*(f"{token}:0" for token in tokens), "$A:0"]),
        special_tokens=list(zip(tokens, prefix_ids, strict=True)),
    )
