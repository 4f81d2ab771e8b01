"""From a folder to a model and its tokenizer: what its config says is held against its weights before anything is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dmt.errors import UserError
from dmt.memory.paging import Mapped
from dmt.models.architectures import architecture_of
from dmt.models.slots import SLOTS
from dmt.versions import STUDENT, check_version
from dmt.wording import shown

SAFELY: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False}
"""How everything is loaded: a pickle from outside may run code, and so may Python files beside the weights."""
NEEDED = "it needs config.json, model.safetensors and tokenizer.json that belong together, as save_pretrained writes them"
OLD_BUFFERS = ("attn.bias", "attn.masked_bias")
"""Constant buffers that checkpoints of early GPT-2 conversions hold beside the weights."""
LAYERS = ("n_layer", "num_hidden_layers")
WIDTHS = ("n_embd", "hidden_size", "vocab_size")
OTHERS = ("n_head", "num_attention_heads", "num_key_value_heads", "n_positions", "max_position_embeddings", "n_inner",
          "intermediate_size", "head_dim")  # fmt: skip
LARGEST = 2**24
"""Of any size that a config names; no model has more tokens, positions or neurons."""


def load(place: str, called: str) -> tuple[PreTrainedModel, Any]:
    """The model in float32 and its tokenizer, from a folder or a name on a hub; no code or pickle in it is ever run.

    Args:
        called: what a refusal calls it, as in `teacher=gpt2`.

    Raises:
        UserError: what is there cannot be loaded, does not belong together, or is of a family that is not supported.
    """
    loaded: Any
    try:
        if Path(place).is_dir():
            check_folder(Path(place), called)
        loaded = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, output_loading_info=True, **SAFELY)
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # whatever libraries make of a file that anybody may have written
        raise UserError(f"{called} cannot be loaded ({why_not(Path(place), error)}); {NEEDED}") from None
    model, loading = loaded
    # What a file lacks is filled with random numbers, and one would go on with them.
    unexpected = [name for name in loading["unexpected_keys"] if not name.endswith(OLD_BUFFERS)]
    if odd := sorted(loading["missing_keys"]) + sorted(unexpected):
        raise UserError(
            f"{called}: its weights are not those of its config.json ({odd[0]} and {len(odd) - 1} more are missing "
            "or too many); save it anew with save_pretrained"
        )
    architecture_of(model.config.model_type)
    return model, tokenizer


def why_not(folder: Path, error: Exception) -> str:
    """Why a model could not be loaded from `folder`, in a few words; a file that may not be read, or is not whole, is named."""
    for file in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        try:
            file.open("rb").close()
        except OSError as denied:
            return f"{file} cannot be read ({denied.strerror}); make it readable"
        if file.suffix == ".json":
            continue
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as damage:
            return f"{file} is damaged: {' '.join(str(damage).split())[:120]}; get another copy"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]


def check_folder(folder: Path, called: str) -> None:
    """Refuse what would take memory or time without end, or bring code, before anything is built.

    Raises:
        UserError: a size in `config.json` is none, or not that of the weights; the folder holds an adapter.
    """
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{called} holds an adapter (adapter_config.json), no whole model; merge it into its model, save that")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        sizes = {name: config[name] for name in (*LAYERS, *WIDTHS, *OTHERS) if config.get(name) is not None}
    except (OSError, ValueError, AttributeError, RecursionError):
        return  # loading it says what is wrong
    if str(config.get("model_type")).startswith("dmt_"):
        check_version(config.get("dmt", 1), STUDENT, f"{called}: version", "distil it anew, or use the dmt that made it")
    for name, size in sizes.items():
        if type(size) is not int or not 1 <= size <= LARGEST:
            raise UserError(f"{called}: its config.json says {name}={shown(size)}, which must be in [1, {LARGEST}]; {NEEDED}")
    shapes = shapes_in(folder) + (Mapped(folder / SLOTS).shapes if config.get("slots") else [])
    if not shapes:
        return
    there = {size for shape in shapes for size in shape}
    asked = {f"slots of layer {layer}": size for layer, size in _slots_in(config)}
    for name in WIDTHS:
        asked |= {name: sizes[name]} if name in sizes else {}
    for name, size in asked.items():
        if size not in there:
            raise UserError(f"{called}: its config.json says {name}={shown(size)}, no tensor of its weights has it; {NEEDED}")
    for name in LAYERS:
        if sizes.get(name, 0) > len(shapes):
            raise UserError(
                f"{called}: its config.json says {name}={sizes[name]}, its model.safetensors has {len(shapes)} tensors; {NEEDED}"
            )


def shapes_in(folder: Path) -> list[list[int]]:
    """Shapes of the weights that lie in a folder, from the headers of its files."""
    found = []
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "np") as opened:  # which holds the header against the file's length
            found += [opened.get_slice(name).get_shape() for name in opened.keys()]  # noqa: SIM118
    return found


def _slots_in(config: dict[str, Any]) -> list[tuple[str, Any]]:
    """How many slots a student's config says each layer has."""
    memory = config.get("memory")
    parts = [(layer, part) for layer, part in memory.items() if isinstance(part, dict)] if isinstance(memory, dict) else []
    parts += [(layer, part[name]) for layer, part in parts for name in ("base", "rows") if isinstance(part.get(name), dict)]
    return [(layer, part[name]) for layer, part in parts for name in ("slots", "places") if name in part]
