"""The files of a model's folder: formats and settings that are refused, and files left behind."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.activations import ACT2FN

from dmt.errors import UserError, format_value
from dmt.models.architectures import ARCHITECTURES

PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
OTHER_WEIGHT_ENDINGS = (".gguf", ".h5", ".msgpack", ".npz")
GENERATION_FILE = "generation_config.json"
# Files whose content a student's folder has, too: its config, weights and tokenizer.
CARRIED_FILES = (
    "config.json",
    GENERATION_FILE,
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates",
)
MAX_LISTED_FILES = 8
MAX_REASON_CHARS = 120  # of a message of transformers


def check_model_files(folder: Path, config: dict[str, Any], label: str) -> None:
    """Check a folder for formats that are never read and settings that no model has.

    Args:
        folder: the folder.
        config: content of its `config.json`.
        label: name of the model in messages.

    Raises:
        UserError: the weights are a pickle or quantized, a number is not finite, the activation is
            unknown, or the generation settings are not valid.
    """
    _check_weight_format(folder, label)
    if quantization := config.get("quantization_config"):
        method = (
            quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        )
        raise UserError(
            f"{label} is quantized ({format_value(method)}), which is not supported; use the model "
            "before it was quantized"
        )
    _check_numbers(config, f"{label}: its config.json says")
    architecture = ARCHITECTURES.get(str(config.get("model_type")).removeprefix("dmt_"))
    name = config.get(architecture.activation) if architecture else None
    if name is not None and (not isinstance(name, str) or name not in ACT2FN):
        raise UserError(
            f"{label}: its config.json says {architecture.activation}={format_value(name)}, which "  # type: ignore[union-attr]
            f"transformers does not have; it has {', '.join(ACT2FN)}"
        )
    _check_generation_settings(folder / GENERATION_FILE, label)


def _check_weight_format(folder: Path, label: str) -> None:
    if any(folder.glob("model*.safetensors")):
        return
    for path in sorted(folder.iterdir()):
        if path.suffix in PICKLE_ENDINGS and path.name != "training_args.bin":
            raise UserError(
                f"{label} has no model.safetensors, only {path.name}: a pickle, which can run code "
                "and is never opened; where you trust it, convert it with transformers: "
                "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
            )
        if path.suffix in OTHER_WEIGHT_ENDINGS:
            raise UserError(
                f"{label} has no model.safetensors, only {path.name}, a format that is not read; "
                "use the model as save_pretrained writes it"
            )


def _check_numbers(config: dict[str, Any], prefix: str) -> None:
    for name, value in _walk(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{prefix} {name}={value}, which is not finite; correct it")
    spread = config.get("initializer_range")
    if isinstance(spread, int | float) and not 0 <= spread <= 1:
        raise UserError(f"{prefix} initializer_range={spread}, which must be in [0, 1]")


def _walk(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values within JSON content, each with its name."""
    items: Any = ()
    if isinstance(value, dict):
        items = ((f"{name}.{key}" if name else str(key), item) for key, item in value.items())
    elif isinstance(value, list):
        items = ((name, item) for item in value)
    else:
        yield name, value
    for item_name, item in items:
        yield from _walk(item, item_name)


def _check_generation_settings(path: Path, label: str) -> None:
    """Check `generation_config.json`; transformers ignores one that it cannot parse."""
    if not path.is_file():
        return
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("not an object")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = settings.get(name)
            if any(type(token) is not int for _, token in _walk(ids) if token is not None):
                raise ValueError(f"{name} is {format_value(ids)}")
        for name, value in _walk(settings):
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} is {value}")
        GenerationConfig.from_dict(settings).validate()
    except Exception as error:  # whatever transformers raises for what anybody may have written
        reason = " ".join(str(error).split())[:MAX_REASON_CHARS]
        raise UserError(
            f"{label}: its {GENERATION_FILE} is not valid ({reason}); correct it, or remove it"
        ) from None


def explain_names(missing: Sequence[str], unexpected: Sequence[str], backbone: str) -> str:
    """Say why the weights of a model do not have the names that its class has, and what to do.

    Args:
        missing: names that the class has and the file lacks.
        unexpected: names that only the file has.
        backbone: name of the module below the head.
    """
    for name in unexpected:
        for suffix in missing:
            prefix = name.removesuffix(suffix)
            if prefix != name and all(other.startswith(prefix) for other in unexpected):
                return (
                    f"the names of its weights begin with {prefix}, which a wrapper of the model "
                    "added; save the model within the wrapper, or remove the prefix from the names"
                )
    heads = [name for name in unexpected if not name.startswith(f"{backbone}.")]
    if heads and len(heads) == len(unexpected) and set(missing) <= {"lm_head.weight"}:
        return (
            f"it has the head of another task ({heads[0]}), and a teacher is a language model; use "
            "the model that it was fine-tuned from"
        )
    if missing and not unexpected and all(name.endswith(".bias") for name in missing):
        return (
            f"it lacks biases that its class has ({missing[0]} and {len(missing) - 1} more; "
            "nanoGPT trains without); add tensors of zeros with these names"
        )
    names = [*missing, *unexpected]
    return (
        f"its weights are not those of its config.json ({names[0]} and {len(names) - 1} more are "
        "missing or too many); save it again with save_pretrained"
    )


def format_other_files(folder: Path) -> str:
    """Return the names of the files in a model's folder that a student's does not get; or empty."""
    if not folder.is_dir():
        return ""
    names = [
        f"{path.name}/" if path.is_dir() else path.name
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".") and not any(map(path.match, CARRIED_FILES))
    ]
    more = len(names) - MAX_LISTED_FILES
    return ", ".join(names[:MAX_LISTED_FILES]) + (f" and {more} more" if more > 0 else "")
