"""From the words a person types to a checked `Config`, and back to a file that replays the run.

A value against the annotation of its field, and what to say when it does not fit, in the words a person types.

Which memory each layer has: the config's own, then the rules for some layers.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, fields, is_dataclass, replace
from difflib import get_close_matches
from functools import reduce
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException
from yaml import YAMLError

import dmt.config as schema
from dmt import files
from dmt.config import LOSS_TERMS, Config, MemoryConfig
from dmt.config_files import resolve_context_files
from dmt.errors import UnknownSettingError, UserError, format_value
from dmt.files import CONFIG_VERSION, check_version
from dmt.paths import check_run_name

_TYPE_DESCRIPTIONS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list[str]: "a list such as [speeches, biographies]",
    list[float]: "a list of numbers such as [3, 1]",
    list[dict[str, Any]]: "a list of rules such as [{layers: 0-1, memory: {k: 64}}]",
    dict[str, Any]: "a rule such as {layers: 0-1, memory: {k: 64}}",
}


def coerce(annotation: Any, value: Any, name: str) -> Any:
    """`value`, parsed from YAML, as the annotation `kind` of the setting `name` wants it.

    Raises:
        UserError: it is of another type, not one of the choices, not finite or too large.
    """
    if get_origin(annotation) is list and isinstance(value, list):
        return [
            coerce(get_args(annotation)[0], item, f"{name}[{index}]")
            for index, item in enumerate(value)
        ]
    if (
        get_origin(annotation) in UNION_TYPES
    ):  # a number, a word or nothing: the first that is not nothing names the mistake
        choices = [choice for choice in get_args(annotation) if choice is not type(None)]
        if value is None and len(choices) < len(get_args(annotation)):
            return None
        for choice in choices[1:]:
            if isinstance(value, str) and value in get_args(choice):
                return value
        base_type = choices[0]
    else:
        base_type = annotation
    if get_origin(base_type) is Literal and isinstance(value, str) and value in get_args(base_type):
        return value
    if base_type is bool and isinstance(value, bool):
        return value
    if base_type is int and type(value) is int and abs(value) < 2**63:
        return value
    if (
        base_type is float and type(value) in (int, float) and abs(value) <= sys.float_info.max
    ):  # neither nan nor infinite
        return float(value)
    if (
        base_type is str
        and type(value) in (int, str)
        and str(value).strip()
        and str(value).isprintable()
        and "${" not in str(value)
    ):
        return str(value)
    if get_origin(base_type) is dict and isinstance(value, dict):
        return value
    raise UserError(
        f"{name} must be {describe_type(annotation)}, got {format_value(value)}{_get_coercion_hint(base_type, value, name)}"
    )


def describe_type(annotation: Any) -> str:
    """What a setting of this annotation may be, as words that follow `must be`."""
    if get_origin(annotation) in UNION_TYPES:
        choices = [
            describe_type(choice).removeprefix("one of ")
            for choice in get_args(annotation)
            if choice is not type(None)
        ]
        return ", ".join(
            [*choices[:-1], f"{choices[-1]} or empty"]
            if len(choices) > 1
            else [f"{choices[0]} or empty"]
        )
    if get_origin(annotation) is Literal:
        return ("one of " if len(get_args(annotation)) > 1 else "") + ", ".join(
            get_args(annotation)
        )
    return _TYPE_DESCRIPTIONS[annotation]


def unknown_setting_error(
    name: str, siblings: Iterable[str], all_names: Iterable[str]
) -> UnknownSettingError:
    """The error for a key that is not there: the closest of `near`, failing that of `others`, are proposed."""
    siblings, all_names = list(siblings), list(all_names)
    leaf = name.rpartition(".")[2]
    suggestions = get_close_matches(name, siblings, 1, 0.8)
    suggestions = (
        suggestions
        or [candidate for candidate in all_names if candidate.rpartition(".")[2] == leaf]
        or get_close_matches(name, all_names, 3, 0.7)
    )
    hint = f"did you mean {' or '.join(suggestions)}?" if suggestions else "--help lists them"
    return UnknownSettingError(f"{format_value(name)} is not a setting; {hint}")


def list_setting_names() -> list[str]:
    """Every setting and every group as typed."""
    setting_names = []
    for config_field in fields(Config):
        value = getattr(Config(), config_field.name)
        setting_names += [
            config_field.name,
            *(
                f"{config_field.name}.{group_field.name}"
                for group_field in (fields(value) if is_dataclass(value) else ())
            ),
        ]
    return setting_names


def read_field_docs() -> dict[tuple[str, ...], str]:
    """The docstring under each field by (class, field), and its choices by (class, field, "choices")."""
    docs: dict[tuple[str, ...], str] = {}
    for node in ast.parse(inspect.getsource(schema)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field_node, doc_node in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(field_node, ast.AnnAssign)
                and isinstance(doc_node, ast.Expr)
                and isinstance(doc_node.value, ast.Constant)
            ):
                assert isinstance(field_node.target, ast.Name), "settings are plain names"
                docs[node.name, field_node.target.id] = str(doc_node.value.value)
                annotation = ast.unparse(field_node.annotation)
                if annotation.startswith("Literal["):
                    docs[node.name, field_node.target.id, "choices"] = ", ".join(
                        ast.literal_eval(f"({annotation[8:-1]},)")
                    )
    return docs


def _get_coercion_hint(annotation: Any, value: Any, name: str) -> str:
    if isinstance(value, str) and "${" in value:
        return "; ${...} is not filled in here, write the value itself"
    if get_origin(annotation) is list and isinstance(value, str):
        return f"; write {name}=[{format_value(value)}]"
    if annotation is str and isinstance(value, float | bool):
        return "; put it in quotes"
    if annotation is int and isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
        return f"; write {int(value)}"
    if annotation is float and str(value).lower().strip("+-.") in ("inf", "infinity", "nan"):
        return "; it must be finite"
    if annotation in (int, float) and isinstance(value, int) and not isinstance(value, bool):
        return "; it is too large"
    return ""


def merge(base: Any, changes: dict[Any, Any], prefix: str = "") -> Any:
    """The dataclass `base` with the differences in `change`, each fitted to its field."""
    field_types, updates = get_type_hints(type(base)), {}
    for key, value in changes.items():
        name = f"{prefix}{key}"
        if key not in field_types:
            if not prefix and key in list_setting_names():
                group, _, leaf = key.partition(".")
                raise UserError(
                    f"{name} with a dot is for the command line; in a file write {group}: {{{leaf}: {format_value(value)}}}"
                )
            raise unknown_setting_error(
                name, [prefix + sibling for sibling in field_types], list_setting_names()
            )
        current = getattr(base, key)
        if is_dataclass(current):
            if not isinstance(value, dict):
                example = f"{name}.{fields(current)[0].name}"
                raise UserError(
                    f"{name} is a group of settings such as {example}, got {format_value(value)}; --help lists them"
                )
            updates[key] = merge(current, value, f"{name}.")
        else:
            updates[key] = coerce(field_types[key], value, name)
    return replace(base, **updates)


MAX_SLOTS_PER_LAYER = 2**26
"""Slots of a layer beyond which no machine holds them."""


def resolve_layer_memories(
    config: Config, num_layers: int, block_slots: int | None = None
) -> list[MemoryConfig]:
    """The memory settings of each of `layers` layers, rules applied in order.

    Args:
        block_slots: neurons in the teacher's blocks, where known: what empty `slots` stand for.

    Raises:
        UserError: a rule has an unknown key, names a layer that is not there, or contradicts itself.
    """
    memories = [config.memory] * num_layers
    for index, rule in enumerate(config.student.layer_overrides):
        name = f"student.layer_overrides[{index}]"
        if set(rule) != {"layers", "memory"} or not isinstance(rule["memory"], dict):
            raise UserError(
                f"{name} must be a rule such as {{layers: 0-1, memory: {{k: 64}}}}, got {format_value(rule)}"
            )
        rule_layers = rule["layers"]
        selector = (
            ",".join(map(str, rule_layers)) if isinstance(rule_layers, list) else str(rule_layers)
        )
        resolved: dict[MemoryConfig, MemoryConfig] = {}
        for layer in select_layers(selector, num_layers, f"{name}.layers"):
            previous = memories[layer]
            if previous not in resolved:
                resolved[previous] = merge(previous, rule["memory"], f"{name}.memory.")
                check_memory_config(resolved[previous], f"{name}.memory", block_slots)
            memories[layer] = resolved[previous]
    _check_shared_budget(memories)
    return memories


def select_layers(selector: str, num_layers: int, name: str) -> list[int]:
    """Layer numbers from `all`, `last`, `3`, `0-2`, `2-` or a comma-separated list of these; 0 is the lowest."""
    selected: set[int] = set()
    for part in selector.replace(" ", "").replace("last", str(num_layers - 1)).split(","):
        first, separator, last = part.partition("-")
        try:
            low, high = (
                (0, num_layers - 1)
                if part == "all"
                else (int(first), int(last or num_layers - 1) if separator else int(first))
            )
        except ValueError:
            accepted_forms = "`all`, `last`, a layer, a range such as 0-2 or 2-, or a list"
            raise UserError(
                f"{name} must be {accepted_forms}; got {format_value(selector)}"
            ) from None
        if not 0 <= low <= high < num_layers:
            raise UserError(
                f"{name} must name layers in [0, {num_layers - 1}], got {format_value(selector)}"
            )
        selected.update(range(low, high + 1))
    return sorted(selected)


def check_memory_config(memory: MemoryConfig, name: str, block_slots: int | None) -> None:
    """Raise `UserError` where one memory's settings, called `name`, are out of range or contradict each other."""
    slots = memory.num_slots if memory.num_slots is not None else block_slots
    for setting in ("num_slots", "k", "mean_k", "heads"):
        value = getattr(memory, setting)
        if isinstance(value, int) and value < 1:
            raise UserError(f"{name}.{setting} must be at least 1, got {value}")
        if isinstance(value, int) and value > MAX_SLOTS_PER_LAYER:
            raise UserError(f"{name}.{setting} must be in [1, {MAX_SLOTS_PER_LAYER}], got {value}")
        if (
            slots is not None
            and setting in ("k", "mean_k")
            and isinstance(value, int)
            and value > slots
        ):
            raise UserError(
                f"{name}.{setting} must be in [1, {name}.num_slots={slots}], got {value}"
            )
    if (
        name == "memory" and memory.mean_k is not None and memory.k != "auto"
    ):  # a rule may set its layers apart
        raise UserError(
            f"{name}.mean_k is spent by {name}.k=auto alone, got {name}.k={format_value(memory.k)}; leave one of them out"
        )
    for setting in ("knn_k", "capacity"):
        if getattr(memory, setting) < 1:
            raise UserError(f"{name}.{setting} must be at least 1, got {getattr(memory, setting)}")
    for setting, maximum in (
        ("min_distance", 2),
        ("merge_distance", 2),
        ("lrfu_decay", 1),
        ("write_start", 1),
    ):
        if not 0 <= getattr(memory, setting) <= maximum:
            raise UserError(
                f"{name}.{setting} must be in [0, {maximum}], got {getattr(memory, setting)}"
            )
    if memory.kind == "associative" and memory.base == "none" and memory.value_target == "residual":
        raise UserError(
            f"{name}.value_target=residual is what a base lacks, and {name}.base=none; set {name}.value_target=teacher or projection"
        )
    for setting, count in (
        ("num_slots", slots),
        ("k", memory.k if isinstance(memory.k, int) else None),
    ):
        if count is not None and count % memory.heads:
            raise UserError(
                f"{name}.{setting}={count} must be a multiple of {name}.heads={memory.heads}"
            )
    if memory.selection != "score" and memory.activation in ("softmax", "distance"):
        raise UserError(
            f"{name}.selection={memory.selection} needs a weight per slot, which {name}.activation={memory.activation} has not; "
            f"set {name}.selection=score"
        )
    if memory.gradient == "straight_through" and memory.activation in ("softmax", "distance"):
        raise UserError(
            f"{name}.gradient=straight_through needs {name}.activation=activation or relu, got {memory.activation}"
        )
    _check_search_config(memory, name)
    if memory.k == "auto" and memory.selection == "score":
        raise UserError(
            f"{name}.k=auto compares slots of all layers, which scores do not allow; set {name}.k to a number or "
            f"{name}.selection=contribution, got {name}.selection=score"
        )
    if memory.k == "auto" and memory.heads > 1 and not memory.projections:
        raise UserError(
            f"{name}.heads={memory.heads} share out k, which {name}.k=auto does not; set {name}.k to a number, or "
            f"{name}.projections=true to give each a query of its own"
        )


def _check_search_config(memory: MemoryConfig, name: str) -> None:
    """Raise `UserError` where a search by candidates could not serve what is asked of it."""
    if memory.offload == "slots" and memory.search != "int8":
        raise UserError(
            f"{name}.offload=slots leaves keys on the disk, where only their 8-bit codes can be searched; set {name}.search=int8 or "
            f"{name}.offload=values, got {name}.search={memory.search}"
        )
    if memory.offload == "slots" and memory.activation == "distance":
        raise UserError(
            f"{name}.activation=distance needs the length of every key, which {name}.offload=slots leaves on the disk; set "
            f"{name}.offload=values"
        )
    if memory.search == "exact":
        return
    if memory.heads > 1:
        raise UserError(
            f"{name}.search={memory.search} finds slots for one head, got {name}.heads={memory.heads}; set {name}.search=exact"
        )
    if memory.gradient == "straight_through":
        raise UserError(
            f"{name}.gradient=straight_through reaches every slot, {name}.search={memory.search} does not look at all of them; "
            f"set {name}.search=exact"
        )
    if memory.search != "int8" and memory.selection == "centered":
        raise UserError(
            f"{name}.search={memory.search} finds large weights, not unusual ones; set {name}.selection=contribution or "
            f"{name}.search=int8, got {name}.selection=centered"
        )


def has_slots(memory: MemoryConfig) -> bool:
    """Whether a layer gets slots: a featural memory, or an associative one with such a base."""
    return memory.kind == "featural" or (memory.kind == "associative" and memory.base == "featural")


def _check_shared_budget(memories: list[MemoryConfig]) -> None:
    """Raise `UserError` where memories that share a budget would not speak of the same thing."""
    for setting in ("mean_k", "metric", "selection"):
        values = {
            getattr(memory, setting): None
            for memory in memories
            if has_slots(memory) and memory.k == "auto"
        }
        if len(values) > 1:
            raise UserError(
                f"memory.{setting} must be the same in all layers with memory.k=auto, which share one budget, got "
                f"{' and '.join(map(format_value, values))}; set memory.k to a number in the layers that differ"
            )


EMBEDDED_TEACHER_DIR = Path(__file__).parent / "assets"
READER_DIR = EMBEDDED_TEACHER_DIR / "reader"
"""Goes on from the embedded teacher: configs/reader.yaml."""
SMOLLM2 = "smollm2"
"""Name of the teacher that `python -m dmt.models.smollm2` fetches."""
CONFIG_HEADER = "# Settings of dmt, version {}\n"
"""First line of a run's settings; files without one are of version 1."""
MAX_TEACHER_LAYERS = 1_000
"""Layers a teacher may have whose config.json is not here to be asked."""


def load_config(
    path: str | Path | None = None, overrides: tuple[str, ...] | list[str] = ()
) -> Config:
    """Defaults, then the differences in `file` (YAML, or the `run.json` of a run), then `key=value` words; checked.

    Raises:
        UserError: a missing or malformed file, an unknown key, a wrong type, a bad choice or a contradiction.
    """
    config = Config()
    if path is not None:
        file_values = _read_config_file(Path(path))
        try:
            config = merge(config, file_values)
        except UserError as error:
            raise type(error)(f"{path}: {error}") from None
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise UserError(
                f"cannot read {format_value(override)}: a setting is written key=value, as in memory.k=64; --help lists them"
            )
        if key not in list_setting_names():
            raise unknown_setting_error(
                key,
                [
                    name
                    for name in list_setting_names()
                    if name.rpartition(".")[0] == key.rpartition(".")[0]
                ],
                list_setting_names(),
            )
        value = _parse_yaml(f"value={text}", f"{key}={format_value(text)}")["value"]
        for key_part in reversed(key.split(".")):
            value = {key_part: value}
        config = merge(config, value)
    check_config(config)
    return config


def save_config(config: Config, path: Path) -> None:
    """Write every setting as YAML; `load_config(path)` gives an equal `Config`."""
    files.atomic_write(path, format_config(config))


def format_config(config: Config) -> str:
    """Return every setting as YAML, with the version of the file in its first line."""
    yaml = OmegaConf.to_yaml(OmegaConf.create(asdict(config)))
    return CONFIG_HEADER.format(CONFIG_VERSION) + yaml


def check_config(config: Config) -> None:
    """Raise `UserError` for values out of range and settings that contradict each other."""
    minimums = {
        "data.seq_len": 2,
        "data.batch_size": 1,
        "data.micro_batch_size": 1,
        "data.validation_tokens": 1,
        "data.test_tokens": 1,
        "loss.kl": 0,
        "loss.reverse_kl": 0,
        "loss.ce": 0,
        "loss.hidden_mse": 0,
        "loss.block_fvu": 0,
        "loss.hidden_cosine": 0,
        "loss.chunk_size": 0,
        "stages.calibration_tokens": 0,
        "stages.layerwise_steps": 0,
        "stages.end_to_end_steps": 0,
        "stages.k_warmup_factor": 1,
        "optim.value_lr_scale": 0,
        "store.flush_every": 1,
        "optim.warmup_steps": 0,
        "optim.min_lr_ratio": 0,
        "optim.weight_decay": 0,
        "optim.grad_clip": 0,
        "pretrain.width": 1,
        "pretrain.layers": 1,
        "pretrain.heads": 1,
        "pretrain.vocabulary": 257,
        "pretrain.steps": 1,
        "trainer.devices": 1,
        "trainer.num_threads": 0,
        "trainer.log_every": 1,
        "trainer.validate_every": 0,
        "trainer.checkpoint_every": 1,
        "seed": 0,
        "logit_cache.top_k": 16,
        "context.lora_rank": 1,
        "context.prompt_length": 1,
        "context.num_samples": 1,
        "context.resample_every": 1,
        "context.unrelated_kl_weight": 0,
        "context.qa_per_sentence": 0,
        "context.max_tokens": 1,
    }
    for name, minimum in minimums.items():
        if not _get_setting(config, name) >= minimum:
            raise UserError(f"{name} must be at least {minimum}, got {_get_setting(config, name)}")
    for name in (
        "loss.temperature",
        "stages.layerwise_lr",
        "stages.end_to_end_lr",
        "pretrain.lr",
        "context.temperature",
    ):
        if not _get_setting(config, name) > 0:
            raise UserError(f"{name} must be a positive number, got {_get_setting(config, name)}")
    maximums = {  # beyond these a machine would be busy for ever, or out of memory, before it could say why
        "data.seq_len": 2**20,
        "data.batch_size": 2**20,
        "data.micro_batch_size": 2**20,
        "stages.calibration_tokens": 2**24,
        "stages.layerwise_steps": 2**31,
        "stages.end_to_end_steps": 2**31,
        "context.lora_rank": 2**14,
        "context.num_samples": 2**16,
        "context.qa_per_sentence": 2**10,
        "context.prompt_length": 2**16,
        "pretrain.width": 2**16,
        "pretrain.layers": 2**10,
        "pretrain.heads": 2**10,
        "pretrain.vocabulary": 2**20,
        "pretrain.steps": 2**31,
        "trainer.num_threads": 2**10,
        "trainer.devices": 2**8,
        "seed": 2**32 - 1,
    }
    for name, maximum in maximums.items():
        if (_get_setting(config, name) or 0) > maximum:
            raise UserError(
                f"{name} must be in [{minimums.get(name, 1)}, {maximum}], got {_get_setting(config, name)}"
            )
    if config.optim.min_lr_ratio > 1:
        raise UserError(
            f"optim.min_lr_ratio must be in [0, 1], a share of the peak, got {config.optim.min_lr_ratio}"
        )
    for name in ("optim.beta1", "optim.beta2"):
        if not 0 <= _get_setting(config, name) < 1:
            raise UserError(f"{name} must be in [0, 1), got {_get_setting(config, name)}")
    if not config.data.corpora:
        raise UserError(
            "data.corpora is empty; name at least one of speeches, biographies, a file, a folder, hub:<dataset>"
        )
    if config.trainer.run_name is not None:
        check_run_name(config.trainer.run_name)
    for name in (
        "trainer.log_dir",
        "pretrain.output",
        *(["logit_cache.dir"] if config.logit_cache.dir else []),
    ):
        _expand_setting_path(_get_setting(config, name), name)
    for corpus in config.data.corpora:
        _expand_setting_path(corpus, "data.corpora")
    shares = config.data.mixture_weights
    if shares and (
        len(shares) != len(config.data.corpora) or min(shares) < 0 or not sum(shares) > 0
    ):
        raise UserError(
            f"data.mixture_weights must be one number >= 0 for each of the {len(config.data.corpora)} data.corpora, got {format_value(shares)}"
        )
    if config.data.batch_size % config.trainer.devices:
        raise UserError(
            f"data.batch_size={config.data.batch_size} must be a multiple of trainer.devices={config.trainer.devices}, which share it out"
        )
    if config.trainer.devices > 1 and config.task == "consolidate":
        raise UserError(
            f"trainer.devices must be 1 with task=consolidate, got {config.trainer.devices}; leave it out"
        )
    if config.task == "pretrain":
        if config.pretrain.width % config.pretrain.heads:
            raise UserError(
                f"pretrain.width={config.pretrain.width} must be a multiple of pretrain.heads={config.pretrain.heads}"
            )
        return
    if config.task == "consolidate":
        _check_context(config)
        return
    if config.stages.end_to_end_steps and not any(
        getattr(config.loss, term) for term in LOSS_TERMS
    ):
        raise UserError(
            "every weight in loss is 0, so the end-to-end stage has nothing to learn; set loss.kl=1"
        )
    if not (
        config.stages.calibration_tokens
        or config.stages.layerwise_steps
        or config.stages.end_to_end_steps
    ):
        raise UserError("every stage is 0, nothing would happen; set stages.end_to_end_steps, say")
    shape = read_teacher_shape(config.teacher)
    check_memory_config(config.memory, "memory", shape["slots"] if shape else None)
    memories = resolve_layer_memories(
        config, *((shape["layers"], shape["slots"]) if shape else (MAX_TEACHER_LAYERS,))
    )
    if not config.stages.calibration_tokens and any(
        has_slots(memory) and memory.k == "auto" for memory in memories
    ):
        raise UserError(
            "memory.k=auto is settled by calibration, got stages.calibration_tokens=0; set memory.k to a number"
        )
    associative = [memory for memory in memories if memory.kind == "associative"]
    if associative and not config.stages.end_to_end_steps:
        raise UserError(
            "memory.kind=associative is written to in the end-to-end stage; set stages.end_to_end_steps"
        )
    if config.stages.layerwise_steps and not any(map(has_slots, memories)) and associative:
        raise UserError(
            "memory.base=none in every layer has nothing to learn layer by layer; set stages.layerwise_steps=0"
        )
    if config.logit_cache.dir:
        _check_cache(config, bool(associative))
    if shape and config.data.seq_len > shape["positions"]:
        raise UserError(
            f"data.seq_len={config.data.seq_len} is longer than the {shape['positions']} positions of "
            f"teacher={config.teacher}; set data.seq_len={shape['positions']} or less"
        )


def _check_context(config: Config) -> None:
    """Raise `UserError` where what is to be consolidated, or where it is to go, contradicts itself."""
    context = config.context
    if (context.text is None) == (context.file is None):
        num_sources = "neither" if context.text is None else "both"
        raise UserError(
            f"one of context.text and context.file names what is to be consolidated, got {num_sources}"
        )
    for name in ("file", "questions"):
        if getattr(context, name) is not None:
            _expand_setting_path(getattr(context, name), f"context.{name}")
    if (
        context.target == "memory"
        and context.row_method == "activation_delta"
        and context.objective == "causal_lm"
    ):
        raise UserError(
            "context.objective=causal_lm has no teacher, and context.row_method=activation_delta is what a teacher makes of the context; "
            "set context.row_method=gradient, or context.objective=logits"
        )
    if (
        context.target != "memory" or context.row_method == "trained"
    ) and not config.stages.end_to_end_steps:
        raise UserError(
            f"context.target={context.target} is trained, got stages.end_to_end_steps=0; set it to 200, say"
        )


def _check_cache(config: Config, has_rows: bool) -> None:
    """Raise `UserError` where a run asks for more than the teacher's distributions and for its cache."""
    unsupported = [
        f"loss.{term}"
        for term in LOSS_TERMS
        if term not in ("kl", "ce") and getattr(config.loss, term)
    ]
    if unsupported:
        raise UserError(
            f"{' and '.join(unsupported)} {'needs' if len(unsupported) == 1 else 'need'} more of the teacher than logit_cache.dir="
            f"{config.logit_cache.dir} keeps; set {' '.join(f'{name}=0' for name in unsupported)}, or leave logit_cache.dir empty"
        )
    if has_rows:
        raise UserError(
            f"memory.kind=associative is taught by the teacher's states, which logit_cache.dir={config.logit_cache.dir} does not keep; "
            "set memory.kind=featural, or leave logit_cache.dir empty"
        )
    if not config.loss.kl or not config.stages.end_to_end_steps:
        name = "stages.end_to_end_steps" if config.loss.kl else "loss.kl"
        raise UserError(
            f"logit_cache.dir={config.logit_cache.dir} serves loss.kl in the end-to-end stage, got {name}=0; leave it empty"
        )


def read_teacher_shape(teacher: str) -> dict[str, int] | None:
    """Layers, slots (feed-forward neurons) and positions from a teacher's config.json; None where it is on a hub."""
    local_dirs = {
        "embedded": EMBEDDED_TEACHER_DIR,
        "reader": READER_DIR,
        SMOLLM2: get_smollm2_dir(),
    }
    config_path = (
        local_dirs[teacher] if teacher in local_dirs else _expand_setting_path(teacher, "teacher")
    ) / "config.json"
    try:
        teacher_config = json.loads(config_path.read_text(encoding="utf-8"))
        if "n_layer" in teacher_config:
            slots = teacher_config.get("n_inner") or 4 * teacher_config["n_embd"]
            shape = {
                "layers": teacher_config["n_layer"],
                "slots": slots,
                "positions": teacher_config["n_positions"],
            }
        else:
            keys_by_name = {
                "layers": "num_hidden_layers",
                "slots": "intermediate_size",
                "positions": "max_position_embeddings",
            }
            shape = {name: teacher_config[key] for name, key in keys_by_name.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # loading the teacher says what is wrong with it
    is_valid = all(type(size) is int and size > 0 for size in shape.values())
    return (
        shape if is_valid and shape["layers"] <= MAX_TEACHER_LAYERS else None
    )  # more are no model's: nothing is made for each of them


def get_cache_dir() -> Path:
    """What outlives runs, outside the repository: `DMT_CACHE`, or `~/.cache/dmt`."""
    return Path(os.environ.get("DMT_CACHE") or Path.home() / ".cache" / "dmt")


def get_smollm2_dir() -> Path:
    """Where SmolLM2 is kept once it is fetched."""
    return get_cache_dir() / SMOLLM2


def describe_settings() -> str:
    """The list of settings for `--help`: name, default and meaning, made from the schema's own docstrings."""
    docs = read_field_docs()
    lines = []
    for name in list_setting_names():
        group, _, field = name.rpartition(".")
        class_name, default = (
            type(_get_setting(Config(), group) if group else Config()).__name__,
            _get_setting(Config(), name),
        )
        if is_dataclass(default):
            continue
        choices = docs.get((class_name, field, "choices"))
        lines.append(
            f"{name}={'' if default is None else format_value(default)}{f'   [{choices}]' if choices else ''}"
        )
        lines.append(f"    {docs[class_name, field]}")
    return "\n".join(lines)


def _read_config_file(path: Path) -> dict[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except PermissionError as error:
        raise UserError(
            f"config file {path} cannot be read ({error.strerror}); make it readable, or name another"
        ) from None
    except OSError as error:
        shipped_configs = ", ".join(
            sorted(str(config_path) for config_path in Path("configs").glob("*.yaml"))
        )
        raise UserError(
            f"cannot read config file {format_value(str(path))} ({error.strerror}); there are: {shipped_configs or 'none here'}; "
            "a setting is written key=value"
        ) from None
    except ValueError:
        raise UserError(
            f"{format_value(str(path))} is not UTF-8 text; a config file is YAML such as `memory: {{k: 64}}`"
        ) from None
    if version_match := re.match(CONFIG_HEADER.format(r"(\S+)"), text):
        check_version(
            version_match[1],
            CONFIG_VERSION,
            f"{path}: settings of version",
            "write those that differ from the defaults into a new file",
        )
    values = _parse_yaml(text, str(path), is_file=True)
    if not isinstance(values, dict):
        raise UserError(
            f"{path} must hold settings such as `memory: {{k: 64}}`, got {format_value(values)}"
        )
    if path.name == "run.json":
        values = _get_record_config(values, path)
    resolve_context_files(values, path)
    return values


def _get_record_config(record: dict[Any, Any], path: Path) -> dict[Any, Any]:
    """The settings of the run that a `run.json` tells of."""
    values = record.get("config")
    if not isinstance(values, dict):
        raise UserError(
            f"{path} holds no settings (an older dmt made it); give {path.parent / 'config.yaml'}"
        )
    return values


def _parse_yaml(text: str, source: str, is_file: bool = False) -> Any:
    """Plain values from a YAML file's text, or from one dotted word."""
    try:
        parsed = OmegaConf.load(io.StringIO(text)) if is_file else OmegaConf.from_dotlist([text])
        return OmegaConf.to_container(parsed, resolve=False)
    except GrammarParseError:
        raise UserError(
            f"cannot read {source}: ${{...}} is not filled in here, write the value itself"
        ) from None
    except OSError:  # OmegaConf's word for a file that holds one number, say
        return text.strip()
    except (YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        location = f" line {mark.line + 1}" if is_file and mark else ""
        reason = (
            getattr(error, "problem", None) or " ".join(str(error).split()) or type(error).__name__
        )
        tab_hint = (
            "; indent with spaces, not tabs"
            if is_file and "\t" in text and "start any token" in reason
            else ""
        )
        raise UserError(
            f"cannot read {source}{location}: not valid YAML ({format_value(reason)}){tab_hint or '; mend or quote it'}"
        ) from None


def _expand_setting_path(path: str, name: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"{name}={path} begins with a home folder that is not there; write the path in full"
        ) from None


def _get_setting(config: Config, name: str) -> Any:
    return reduce(getattr, name.split("."), config)


UNION_TYPES = (Union, UnionType)
