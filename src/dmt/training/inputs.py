"""What a run is made from: its model and its text, identified by digests and compared on resume."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dmt.config import Config
from dmt.data.windows import TextDataModule
from dmt.errors import UserError
from dmt.models.forward import check_vocabulary
from dmt.training.run_dir import format_distill_command, read_record

logger = logging.getLogger(__name__)

DIGEST_BYTES = 16
# Keys of a model's config that say what has loaded it, not what it is.
IGNORED_CONFIG_KEYS = ("transformers_version",)
# Keys of a tokenizer's JSON that calls change.
IGNORED_TOKENIZER_KEYS = ("truncation", "padding")


def identify_inputs(
    model: PreTrainedModel, tokenizer: Any, corpora: list[dict[str, Any]], **texts: str
) -> dict[str, Any]:
    """Return digests of what a run is made from, as `run.json` has them.

    Args:
        model: the model that the run begins with.
        tokenizer: its tokenizer.
        corpora: `name` and `digest` of each corpus, and more.
        **texts: other texts that the run reads, by name.

    Returns:
        `model` with digests of `weights`, `config` and `tokenizer`, `corpora`, and `texts`.
    """
    return {
        "model": {
            "weights": hash_weights(model),
            "config": _hash_json(model.config.to_diff_dict(), IGNORED_CONFIG_KEYS),
            "tokenizer": hash_tokenizer(tokenizer),
        },
        "corpora": corpora,
        "texts": {name: _hash_text(text) for name, text in texts.items()},
    }


def check_corpora_vocabulary(model: PreTrainedModel, tokenizer: Any, data: TextDataModule) -> None:
    """Check that a model has every token that its corpora use.

    Raises:
        UserError: the corpora hold a token that only the tokenizer has.
    """
    for corpus in data.corpora:
        for windows in (corpus.train, corpus.validation, corpus.test):
            check_vocabulary(model, tokenizer, windows, f"data.corpora: {corpus.name}")
    num_tokens, vocab_size = len(tokenizer), model.config.vocab_size
    if num_tokens != vocab_size:
        logger.info("the tokenizer has %d tokens, the model %d embeddings", num_tokens, vocab_size)


def check_inputs(run_dir: Path, config: Config, inputs: Mapping[str, Any]) -> None:
    """Check that a resumed run is made from what it began with.

    Args:
        run_dir: folder of the run.
        config: its settings.
        inputs: what `identify_inputs` returns now; what the record lacks is not compared.

    Raises:
        UserError: a model or a text has changed; the message names all of them.
    """
    record = read_record(run_dir)
    changed = [
        f"the {name} of teacher={config.teacher}"
        for name, digest in record.get("model", {}).items()
        if inputs["model"].get(name) != digest
    ]
    digests = {corpus["name"]: corpus["digest"] for corpus in inputs["corpora"]}
    changed += [
        f"the text of {corpus['name']}"
        for corpus in record.get("corpora", [])
        if digests.get(corpus["name"]) != corpus["digest"]
    ]
    changed += [
        f"the {name}"
        for name, digest in record.get("texts", {}).items()
        if inputs["texts"].get(name) != digest
    ]
    if changed:
        command = format_distill_command(f"{run_dir}/config.yaml")
        raise UserError(
            f"--resume {run_dir}: {', '.join(changed)} changed since the run began; restore it, or "
            f"start anew: {command}"
        )


def hash_weights(model: PreTrainedModel) -> str:
    """Return a digest of the tensors of a model and of their names."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            flat = tensor.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_tokenizer(tokenizer: Any) -> str:
    """Return a digest of how a tokenizer turns text into token ids."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        return _hash_json(tokenizer.get_vocab())
    return _hash_json(json.loads(backend.to_str()), IGNORED_TOKENIZER_KEYS)


def _hash_json(values: Mapping[str, Any], ignored_keys: tuple[str, ...] = ()) -> str:
    items = {name: value for name, value in values.items() if name not in ignored_keys}
    return _hash_text(json.dumps(items, sort_keys=True, default=str))


def _hash_text(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).hexdigest()
