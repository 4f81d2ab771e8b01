"""Load a teacher and its tokenizer: the embedded one, a local directory, or a name on a hub."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dmt.errors import UserError
from dmt.models.architectures import architecture_of
from dmt.settings import EMBEDDED_TEACHER

PADDING = 128
"""Embedding matrices are often padded by up to this many rows that no token uses."""


def load_teacher(source: str) -> tuple[PreTrainedModel, Any]:
    """The model in float32, eval mode and without gradients, and its tokenizer.

    Raises:
        UserError: nothing usable is at `source`, the family is not supported, or the tokenizer belongs to another model.
    """
    place = _place(source)
    try:
        # Half-precision files load as half unless told; `use_safetensors` because a pickle from outside may run code.
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"teacher={source} cannot be loaded ({str(error).splitlines()[0][:160]}); it needs config.json, "
            "model.safetensors and tokenizer.json, as save_pretrained writes them"
        ) from None
    architecture_of(model.config.model_type)
    vocabulary = model.config.vocab_size
    if not vocabulary - PADDING < len(tokenizer) <= vocabulary:
        raise UserError(
            f"teacher={source}: its tokenizer has {len(tokenizer):,} tokens, its model {vocabulary:,}; "
            "they belong to different models, put the right tokenizer.json beside the weights"
        )
    return model.eval().requires_grad_(False), tokenizer


def _place(source: str) -> str:
    """A directory or hub name from which loading is quick to succeed or fail."""
    if source == "embedded":
        return str(EMBEDDED_TEACHER)
    directory = Path(source).expanduser()
    if directory.is_dir():
        return str(directory)
    if directory.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise UserError(
            f"teacher={source}: no such directory; accepted are embedded, a local directory, or a hub name such as gpt2"
        )
    from huggingface_hub import constants, try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(source, "config.json"), str) and not _reachable(constants.ENDPOINT):
        raise UserError(
            f"teacher={source} is neither a local directory nor in the cache, and the hub does not answer; save the model "
            "elsewhere with save_pretrained, copy the folder here and set teacher=<that folder>, or use teacher=embedded"
        )
    return source


def _reachable(endpoint: str, seconds: float = 3.0) -> bool:
    """Whether the hub can be asked; the libraries would retry for half a minute before they said no."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True
    host = urlparse(endpoint)
    try:
        socket.create_connection((host.hostname or "", host.port or 443), timeout=seconds).close()
    except OSError:
        return False
    return True
