"""Read settings from files and `key=value` arguments into a checked `Config`, and write them back.

`dmt.config` checks each group of settings; this module turns its errors into the dotted keys of
the user, resolves the memory of each layer, and checks what groups say together.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields, is_dataclass
from difflib import get_close_matches
from functools import cache, reduce
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException
from yaml import YAMLError

import dmt.config as schema
from dmt import files
from dmt.config import (
    LOSS_TERMS,
    MEMORY_CONFIGS,
    AssociativeConfig,
    Config,
    DenseConfig,
    FeaturalConfig,
    MemoryConfig,
    SumConfig,
)
from dmt.errors import UnknownSettingError, UserError, format_value
from dmt.files import CONFIG_VERSION, check_version
from dmt.paths import check_run_name
from dmt.validation import ArgumentError, field_types

EMBEDDED_TEACHER_DIR = Path(__file__).parent / "assets"
READER_DIR = (
    EMBEDDED_TEACHER_DIR / "reader"
)  # continues from the embedded teacher: scripts/reader.yaml
SMOLLM2 = "smollm2"  # the teacher that `python scripts/fetch_smollm2.py` fetches
CONFIG_HEADER = "# Settings of dmt, version {}\n"  # first line of a run's settings
# Settings that name files which a run reads.
INPUT_PATHS = (
    "teacher",
    "data.corpora",
    "context.file",
    "context.questions",
    "store.url",
    "logit_cache.dir",
    "knowledge.facts",
)
# Their values that are names, also where a folder is called so.
SHIPPED_NAMES = ("embedded", "reader", "speeches", "biographies", "strangers", "readings")
# What the settings of other trainers are called here, by the last part of their name.
ADVICE_BY_NAME = {
    "accumulate_grad_batches": "set data.micro_batch_size, the windows computed at once",
    "gradient_accumulation_steps": "set data.micro_batch_size, the windows computed at once",
    "per_device_train_batch_size": "set data.batch_size",
    "gradient_clip_val": "set optim.grad_clip",
    "max_grad_norm": "set optim.grad_clip",
    "learning_rate": "set stages.end_to_end_lr",
    "lr": "set stages.end_to_end_lr",
    "max_steps": "set stages.end_to_end_steps",
    "max_epochs": "set stages.end_to_end_steps; a run is one pass of steps",
    "num_train_epochs": "set stages.end_to_end_steps; a run is one pass of steps",
    "logger": "set trainer.loggers=[tensorboard, csv]",
    "wandb": "set trainer.loggers=[tensorboard, csv, wandb]",
    "mlflow": "set trainer.loggers=[tensorboard, csv, mlflow]",
    "max_time": "send SIGTERM or SIGUSR1, which save a checkpoint, and continue with --resume RUN",
    "resume": "continue a run with --resume RUN",
    "resume_from_checkpoint": "continue a run with --resume RUN",
    "early_stopping": "use a Trainer of your own with the callback, see docs/guides/lightning.md",
    "text_column": "set data.field",
    "dataset_text_field": "set data.field",
}
MAX_TEACHER_LAYERS = 1_000  # layers of a teacher whose config.json is not on this machine


def load_config(
    path: str | Path | None = None, overrides: tuple[str, ...] | list[str] = ()
) -> Config:
    """Return defaults, changed by a file, changed by `key=value` overrides, and checked.

    Args:
        path: a YAML file of differences from the defaults, or the `run.json` of a run.
        overrides: `key=value`, the value in YAML; later ones win, and `memory.kind` goes first,
            then `memory.parts` and layer overrides. A memory setting that the kind lacks changes
            the first part that has it, else the layer overrides whose kinds have it.

    Raises:
        UnknownSettingError: a key names no setting.
        UserError: a missing or malformed file, a wrong type, a bad choice or a contradiction.
    """
    values: dict[str, Any] = {}
    if path is not None:
        file_values = _read_config_file(Path(path))
        try:
            values = _merge(values, file_values)
        except UserError as error:
            raise _wrap(error, f"{path}: ") from None
    merged_file = values
    changes = [_parse_override(override) for override in overrides]
    for change in sorted(changes, key=_rank_override):
        values = _merge_override(values, change)
    try:
        config = build_config(values)
    except UserError as error:
        if path is not None and str(error) == _get_error(merged_file):
            raise _wrap(error, f"{path}: ") from None
        raise
    check_config(config)
    return config


def _get_error(values: dict[str, Any]) -> str | None:
    """Return what is wrong with `values`, or None."""
    try:
        build_config(values)
    except UserError as error:
        return str(error)
    return None


def save_config(config: Config, path: Path) -> None:
    """Write every setting as YAML; `load_config(path)` returns an equal `Config`."""
    files.atomic_write(path, format_config(config))


def format_config(config: Config) -> str:
    """Return every setting as YAML, with the version of the file in its first line."""
    yaml = OmegaConf.to_yaml(OmegaConf.create(asdict(config)))
    return CONFIG_HEADER.format(CONFIG_VERSION) + yaml


def _parse_override(override: str) -> dict[str, Any]:
    """Return `group.name=value` as nested dictionaries."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(
            f"cannot read {format_value(override)}: a setting is written key=value, as in "
            "memory.k=64; --help lists them"
        )
    group, _, leaf = key.partition(".")
    if key not in list_setting_names() and not (group == "memory" and leaf.isidentifier()):
        siblings = [
            name
            for name in list_setting_names()
            if name.rpartition(".")[0] == key.rpartition(".")[0]
        ]
        raise unknown_setting_error(key, siblings, list_setting_names())
    value = _parse_yaml(f"value={text}", f"{key}={format_value(text)}")["value"]
    for key_part in reversed(key.split(".")):
        value = {key_part: value}
    return value


def _rank_override(change: dict[str, Any]) -> int:
    """Return 0 for a kind of memory, 1 for what states memories, 2 for the settings of these."""
    memory, student = change.get("memory"), change.get("student")
    if isinstance(memory, dict) and "kind" in memory:
        return 0
    has_parts = isinstance(memory, dict) and "parts" in memory
    return 1 if has_parts or (isinstance(student, dict) and "layer_overrides" in student) else 2


def _merge_override(values: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """Return `values` with one `key=value`, moved into the part or the layers that it is about.

    `dmt distill associative memory.capacity=1000` changes the associative layers, although the
    memory of the other layers has no capacity; `dmt distill lookup memory.k=64` the first part of
    the sum that has a k.
    """
    memory = change.get("memory")
    if isinstance(memory, dict) and len(memory) == 1:
        leaf, value = next(iter(memory.items()))
        top = {"kind": FeaturalConfig.kind_name, **values.get("memory", {})}
        if leaf in field_types(get_memory_config_class(top["kind"], "memory.kind")):
            return _merge(values, change)
        if changed := _set_field(top, leaf, value):
            return {**values, "memory": changed}
        student = values.get("student", {})
        rules = student.get("layer_overrides", [])
        changes = [
            _set_field(rule.get("memory"), leaf, value) if isinstance(rule, dict) else None
            for rule in (rules if isinstance(rules, list) else ())
        ]
        if any(changes):
            rules = [
                {**rule, "memory": changed} if changed else rule
                for rule, changed in zip(rules, changes, strict=True)
            ]
            return {**values, "student": {**student, "layer_overrides": rules}}
    return _merge(values, change)


def _set_field(memory: Any, name: str, value: Any) -> dict[str, Any] | None:
    """Return settings of a memory with a field of its own, or of its first part that has it.

    None where neither has it, or where they are no settings, which is reported when they are built.
    """
    if not isinstance(memory, dict):
        return None
    try:
        config_class = get_memory_config_class(memory.get("kind"))
    except UserError:
        return None
    if name in field_types(config_class):
        return {**memory, name: value}
    if config_class is SumConfig:
        parts = memory.get("parts", [{"kind": part.kind} for part in SumConfig().parts])
        for index, part in enumerate(parts if isinstance(parts, list) else ()):
            kind = {"kind": FeaturalConfig.kind_name}
            if changed := _set_field(kind | part if isinstance(part, dict) else part, name, value):
                return {**memory, "parts": [*parts[:index], changed, *parts[index + 1 :]]}
    return None


def _merge(values: dict[str, Any], changes: dict[Any, Any]) -> dict[str, Any]:
    """Return the nested `values` with `changes`, whose keys are checked."""
    result = dict(values)
    names = [config_field.name for config_field in fields(Config)]
    for key, value in changes.items():
        if key not in names:
            if key in list_setting_names():
                group, _, leaf = key.partition(".")
                raise UserError(
                    f"{key} with a dot is for the command line; in a file write "
                    f"{group}: {{{leaf}: {format_value(value)}}}"
                )
            raise unknown_setting_error(str(key), names, list_setting_names())
        group_class = _get_group_class(key)
        if group_class is None:
            result[key] = value
            continue
        if not isinstance(value, dict):
            example = f"{key}.{fields(group_class)[0].name}"
            raise UserError(
                f"{key} is a group of settings such as {example}, got {format_value(value)}; "
                "--help lists them"
            )
        previous = result.get(key, {})
        if key == "memory":
            result[key] = _merge_memory(previous, value, "memory.")
        else:
            result[key] = _merge_group(group_class, previous, value, f"{key}.")
    return result


def _merge_group(
    config_class: type, previous: dict[str, Any], changes: dict[Any, Any], prefix: str
) -> dict[str, Any]:
    names = [config_field.name for config_field in fields(config_class)]
    for key in changes:
        if key not in names:
            siblings = [f"{prefix}{sibling}" for sibling in names]
            raise unknown_setting_error(f"{prefix}{key}", siblings, list_setting_names())
    return {**previous, **changes}


def _merge_memory(previous: dict[str, Any], changes: dict[Any, Any], prefix: str) -> dict[str, Any]:
    """Return the settings of a memory with `changes`, checked against the fields of its kind.

    Settings that an earlier source gave for another kind stay in the result, unused, so that they
    count again where the kind changes back.
    """
    kind = changes.get("kind", previous.get("kind", FeaturalConfig.kind_name))
    config_class = get_memory_config_class(kind, f"{prefix}kind")
    annotations = field_types(config_class)
    for key in changes:
        kinds = [name for name, cls in MEMORY_CONFIGS.items() if key in field_types(cls)]
        if key not in annotations and kinds:
            raise UnknownSettingError(
                f"{prefix}{key} is not a setting of {prefix}kind={kind} (it is one of "
                f"{', '.join(kinds)}); leave it out, or set {prefix}kind={kinds[0]}"
            )
    old_kind = previous.get("kind", FeaturalConfig.kind_name)
    if previous and old_kind != kind:
        old_annotations = field_types(get_memory_config_class(old_kind, f"{prefix}kind"))
        previous = {
            key: value
            for key, value in previous.items()
            if key not in annotations
            or key not in old_annotations
            or annotations[key] == old_annotations[key]
        }
    return {**_merge_group(config_class, previous, changes, prefix), "kind": kind}


def build_config(values: dict[str, Any]) -> Config:
    """Return the settings of nested dictionaries, as `dataclasses.asdict` makes them of a `Config`.

    Raises:
        UnknownSettingError: a key names no setting.
        UserError: a value is not accepted.
    """
    groups: dict[str, Any] = {}
    for name, value in values.items():
        group_class = _get_group_class(name)
        if name == "memory":
            groups[name] = _build_memory(value, "memory.")
        elif group_class is not None:
            groups[name] = _build(group_class, value, f"{name}.")
        else:
            groups[name] = value
    return _build(Config, groups, "")


def _build_memory(values: dict[str, Any], prefix: str) -> MemoryConfig:
    kind = values.get("kind", FeaturalConfig.kind_name)
    config_class = get_memory_config_class(kind, f"{prefix}kind")
    annotations = field_types(config_class)
    arguments = {
        config_field.name: values[config_field.name]
        for config_field in fields(config_class)
        if config_field.init and config_field.name in values
    }
    for name, value in arguments.items():
        if annotations[name] == list[MemoryConfig] and isinstance(value, list):
            arguments[name] = [
                _build_part(part, f"{prefix}{name}[{index}]") for index, part in enumerate(value)
            ]
    return _build(config_class, arguments, prefix)


def _build_part(values: Any, name: str) -> MemoryConfig:
    """Return the settings of a memory inside another."""
    if isinstance(values, MemoryConfig):
        return values
    if not isinstance(values, dict):
        raise UserError(
            f"{name} must be settings of a memory such as {{kind: ngram}}, got "
            f"{format_value(values)}"
        )
    return _build_memory(_merge_memory({}, values, f"{name}."), f"{name}.")


def _build(config_class: Any, values: dict[str, Any], prefix: str) -> Any:
    try:
        return config_class(**values)
    except ArgumentError as error:
        raise error.with_prefix(prefix) from None


def _wrap(error: UserError, prefix: str) -> UserError:
    """Return an error of the same class whose message begins with `prefix`."""
    error_class = UnknownSettingError if isinstance(error, UnknownSettingError) else UserError
    return error_class(f"{prefix}{error}")


def get_memory_config_class(kind: Any, name: str = "kind") -> type[MemoryConfig]:
    """Return the settings class of a kind of memory.

    Args:
        kind: a registered name, or `my_package.my_module:MyMemory`, which is imported.
        name: what the setting is called in an error.

    Raises:
        UserError: there is no such kind, or its module cannot be imported.
    """
    if isinstance(kind, str) and kind in MEMORY_CONFIGS:
        return MEMORY_CONFIGS[kind]
    if isinstance(kind, str) and ":" in kind:
        from dmt.memory.registry import get_memory_class  # imports torch

        if "" not in sys.path and os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # who names a module here may have it in this folder
        try:
            return get_memory_class(kind).config_class
        except UserError as error:
            raise UserError(f"{name}={format_value(kind)}: {error}") from None
    raise UserError(
        f"{name} must be one of {', '.join(MEMORY_CONFIGS)}, or a class such as "
        f"my_package.my_module:MyMemory, got {format_value(kind)}"
    )


def unknown_setting_error(
    name: str, siblings: Iterable[str], all_names: Iterable[str]
) -> UnknownSettingError:
    """Return the error for an unknown key, with the nearest of `siblings` or `all_names`."""
    siblings, all_names = list(siblings), list(all_names)
    leaf = name.rpartition(".")[2]
    if advice := ADVICE_BY_NAME.get(leaf):
        return UnknownSettingError(f"{format_value(name)} is not a setting; {advice}")
    suggestions = get_close_matches(name, siblings, 1, 0.8)
    suggestions = (
        suggestions
        or [candidate for candidate in all_names if candidate.rpartition(".")[2] == leaf]
        or get_close_matches(name, all_names, 3, 0.7)
    )
    hint = f"did you mean {' or '.join(suggestions)}?" if suggestions else "--help lists them"
    return UnknownSettingError(f"{format_value(name)} is not a setting; {hint}")


def list_setting_names() -> list[str]:
    """Return every setting and every group as it is typed, in the order of `--help`.

    The settings in `memory` are those of all built-in kinds.
    """
    names = []
    for config_field in fields(Config):
        names.append(config_field.name)
        if config_field.name == "memory":
            names += [f"memory.{name}" for name in _list_memory_settings()]
        elif (group_class := _get_group_class(config_field.name)) is not None:
            names += [f"{config_field.name}.{item.name}" for item in fields(group_class)]
    return names


@cache
def _list_memory_settings() -> dict[str, type[MemoryConfig]]:
    """Return every setting of the built-in memories, with the first kind that has it."""
    # The associative memory has all settings of the featural one, which are listed first.
    config_classes: list[type[MemoryConfig]] = [AssociativeConfig, *MEMORY_CONFIGS.values()]
    settings: dict[str, type[MemoryConfig]] = {}
    for config_class in config_classes:
        if config_class.__module__ != schema.__name__:  # registered by somebody else
            continue
        for item in fields(config_class):
            settings.setdefault(item.name, config_class)
    return settings


@cache
def _get_group_class(name: str) -> Any:
    """Return the dataclass of a group of settings; of `memory` that of the associative kind."""
    if name == "memory":
        return AssociativeConfig
    annotation = field_types(Config)[name]
    return annotation if is_dataclass(annotation) else None


def read_field_docs() -> dict[tuple[str, ...], str]:
    """Return the text under each field by (class, field), choices by (class, field, "choices")."""
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
    for cls in MEMORY_CONFIGS.values():
        for parent in reversed(cls.__mro__):
            docs |= {
                (cls.__name__, *key[1:]): text
                for key, text in list(docs.items())
                if key[0] == parent.__name__
            }
        docs[cls.__name__, "kind", "choices"] = ", ".join(MEMORY_CONFIGS)
    return docs


def describe_settings() -> str:
    """Return the list of settings for `--help`: name, default, choices and meaning."""
    docs = read_field_docs()
    lines = []
    for name in list_setting_names():
        group, _, leaf = name.rpartition(".")
        if not group and _get_group_class(name) is not None:
            continue
        config_class = _get_setting_class(name)
        default = FeaturalConfig.kind_name if name == "memory.kind" else _get_default(name)
        choices = docs.get((config_class.__name__, leaf, "choices"))
        value = "" if default is None else format_value(default)
        lines.append(f"{name}={value}{f'   [{choices}]' if choices else ''}")
        lines.append(f"    {docs[config_class.__name__, leaf]}")
    return "\n".join(lines)


def _get_default(name: str) -> Any:
    """Return the default of a setting; memories inside it as their kinds."""
    value = getattr(_get_setting_class(name)(), name.rpartition(".")[2])
    if isinstance(value, list):
        return [{"kind": v.kind} if isinstance(v, MemoryConfig) else v for v in value]
    return value


def _get_setting_class(name: str) -> Any:
    """Return the dataclass that has the setting `group.name`; of memories the first that does."""
    group, _, leaf = name.rpartition(".")
    if group == "memory":
        return _list_memory_settings()[leaf]
    return _get_group_class(group) if group else Config


def resolve_layer_memories(
    config: Config, num_layers: int, block_slots: int | None = None
) -> list[MemoryConfig]:
    """Return the memory settings of each of `num_layers` layers, overrides applied in order.

    Args:
        config: the run's settings.
        num_layers: transformer blocks of the teacher.
        block_slots: neurons in the teacher's feed-forward blocks, where known.

    Raises:
        UserError: an override has an unknown key, names a layer that does not exist, or
            contradicts itself.
    """
    values = [asdict(config.memory)] * num_layers
    memories = [config.memory] * num_layers
    for index, rule in enumerate(config.student.layer_overrides):
        name = f"student.layer_overrides[{index}]"
        if set(rule) != {"layers", "memory"} or not isinstance(rule["memory"], dict):
            raise UserError(
                f"{name} must be a rule such as {{layers: 0-1, memory: {{k: 64}}}}, got "
                f"{format_value(rule)}"
            )
        rule_layers = rule["layers"]
        selector = (
            ",".join(map(str, rule_layers)) if isinstance(rule_layers, list) else str(rule_layers)
        )
        resolved: dict[int, tuple[dict[str, Any], MemoryConfig]] = {}
        for layer in select_layers(selector, num_layers, f"{name}.layers"):
            previous = values[layer]
            if id(previous) not in resolved:
                resolved[id(previous)] = _apply_rule(
                    previous, rule["memory"], f"{name}.memory.", block_slots
                )
            values[layer], memories[layer] = resolved[id(previous)]
    check_shared_budget(memories, "memory.")
    return memories


def _apply_rule(
    previous: dict[str, Any], changes: dict[Any, Any], prefix: str, block_slots: int | None
) -> tuple[dict[str, Any], MemoryConfig]:
    values = _merge_memory(previous, changes, prefix)
    unused = ("mean_k",) if values.get("k") != "auto" and "mean_k" not in changes else ()
    memory = _build_memory(
        {name: value for name, value in values.items() if name not in unused}, prefix
    )
    _check_block(memory, block_slots, prefix)
    return values, memory


def _check_block(memory: MemoryConfig, block_slots: int | None, prefix: str) -> None:
    if block_slots is None:
        return
    try:
        memory.check_block(block_slots)
    except ArgumentError as error:
        raise error.with_prefix(prefix) from None


def select_layers(selector: str, num_layers: int, name: str) -> list[int]:
    """Return layer numbers, 0 the lowest.

    Args:
        selector: `all`, `last`, `3`, `0-2`, `2-`, or a comma-separated list of these.
        num_layers: layers of the model.
        name: what the selector is called in an error.

    Raises:
        UserError: it is none of these, or names a layer that does not exist.
    """
    selected: set[int] = set()
    for part in selector.replace(" ", "").replace("last", str(num_layers - 1)).split(","):
        first, separator, last = part.partition("-")
        try:
            low = 0 if part == "all" else int(first)
            high = num_layers - 1 if part == "all" or (separator and not last) else int(last or low)
        except ValueError:
            raise UserError(
                f"{name} must be `all`, `last`, a layer, a range such as 0-2 or 2-, or a list; got "
                f"{format_value(selector)}"
            ) from None
        if not 0 <= low <= high < num_layers:
            raise UserError(
                f"{name} must name layers in [0, {num_layers - 1}], got {format_value(selector)}"
            )
        selected.update(range(low, high + 1))
    return sorted(selected)


def check_shared_budget(memories: Sequence[MemoryConfig], prefix: str = "") -> None:
    """Check that layers with `k: auto`, which share one budget, agree on what it means.

    Args:
        memories: settings of each layer.
        prefix: stands before the names of arguments in an error.

    Raises:
        UserError: they differ in `mean_k`, `metric` or `selection`.
    """
    shared = [
        part
        for memory in memories
        for part in memory.list_parts()
        if part.has_slots and _get_k(part) == "auto"
    ]
    for setting in ("mean_k", "metric", "selection"):
        values = list(dict.fromkeys(getattr(memory, setting) for memory in shared))
        if len(values) > 1:
            raise UserError(
                f"{prefix}{setting} must be the same in all layers with {prefix}k=auto, which "
                f"share one budget, got {' and '.join(map(format_value, values))}; set {prefix}k "
                "to a number in the layers that differ"
            )


def _get_k(memory: MemoryConfig) -> Any:
    return getattr(memory, "k", None)


def check_config(config: Config) -> None:
    """Check what groups of settings say together, and against the teacher where it is local.

    Raises:
        UserError: settings contradict each other.
    """
    if config.trainer.run_name is not None:
        check_run_name(config.trainer.run_name)
    for name in (
        "trainer.log_dir",
        *(["logit_cache.dir"] if config.logit_cache.dir else []),
    ):
        _expand_setting_path(_get_setting(config, name), name)
    if config.knowledge.facts and config.logit_cache.dir:
        raise UserError(
            "knowledge.facts and logit_cache.dir exclude each other, since the names of subjects "
            "change at every step; leave one of them empty"
        )
    for corpus in config.data.corpora:
        _expand_setting_path(corpus, "data.corpora")
    if config.data.batch_size % config.trainer.devices:
        raise UserError(
            f"data.batch_size={config.data.batch_size} must be a multiple of "
            f"trainer.devices={config.trainer.devices}, which share it"
        )
    if config.trainer.devices > 1 and config.task in ("consolidate", "sleep"):
        raise UserError(
            f"trainer.devices must be 1 with task={config.task}, got {config.trainer.devices}; "
            "leave it out"
        )
    if config.task == "consolidate":
        _check_context(config)
    elif config.task == "distill":
        _check_distillation(config)


def _check_distillation(config: Config) -> None:
    stages = config.stages
    if stages.end_to_end_steps and not config.loss.term_weights():
        raise UserError(
            "every weight in loss is 0, so the end-to-end stage has nothing to learn; set loss.kl=1"
        )
    if not (stages.calibration_tokens or stages.layerwise_steps or stages.end_to_end_steps):
        raise UserError(
            "every stage is 0, nothing would happen; set for example stages.end_to_end_steps=100"
        )
    shape = read_teacher_shape(config.teacher)
    _check_block(config.memory, shape["slots"] if shape else None, "memory.")
    memories = resolve_layer_memories(
        config, *((shape["layers"], shape["slots"]) if shape else (MAX_TEACHER_LAYERS,))
    )
    _check_memories(config, memories)
    if config.logit_cache.dir:
        _check_logit_cache(
            config, any(isinstance(memory, AssociativeConfig) for memory in memories)
        )
    if shape and config.data.seq_len > shape["positions"]:
        raise UserError(
            f"data.seq_len={config.data.seq_len} is longer than the {shape['positions']} positions "
            f"of teacher={config.teacher}; set data.seq_len={shape['positions']} or less"
        )


def _check_memories(config: Config, memories: Sequence[MemoryConfig]) -> None:
    """Raise `UserError` where stages or losses do not fit the memories."""
    slot_memories = [
        part
        for memory in memories
        for part in memory.list_parts()
        if isinstance(part, FeaturalConfig) and part.has_slots
    ]
    if not config.stages.calibration_tokens and any(memory.k == "auto" for memory in slot_memories):
        raise UserError(
            "memory.k=auto is set by calibration, got stages.calibration_tokens=0; set memory.k to "
            "a number"
        )
    associative = [memory for memory in memories if isinstance(memory, AssociativeConfig)]
    if associative and not config.stages.end_to_end_steps:
        raise UserError(
            "memory.kind=associative stores rows in the end-to-end stage; set "
            "stages.end_to_end_steps"
        )
    learns_by_layer = any(
        memory.has_slots or not isinstance(memory, AssociativeConfig | DenseConfig)
        for memory in memories
    )
    if config.stages.layerwise_steps and associative and not learns_by_layer:
        raise UserError(
            "memory.base=none in every layer leaves nothing to learn layer by layer; set "
            "stages.layerwise_steps=0"
        )


def _check_context(config: Config) -> None:
    """Raise `UserError` where the context of a consolidation, or its target, contradicts itself."""
    context = config.context
    if (context.text is None) == (context.file is None):
        num_sources = "neither" if context.text is None else "both"
        raise UserError(
            "set one of context.text and context.file, which name the context to consolidate, got "
            f"{num_sources}"
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
            "context.objective=causal_lm has no teacher, and context.row_method=activation_delta "
            "needs one; set context.row_method=gradient, or context.objective=logits"
        )
    trains = context.target != "memory" or context.row_method == "trained"
    if trains and not config.stages.end_to_end_steps:
        raise UserError(
            f"context.target={context.target} is trained, got stages.end_to_end_steps=0; set it to "
            "200, for example"
        )


def _check_logit_cache(config: Config, has_rows: bool) -> None:
    """Raise `UserError` where a run needs more than the distributions in the logit cache."""
    cache_dir = config.logit_cache.dir
    unsupported = [
        f"loss.{term}"
        for term in LOSS_TERMS
        if term not in ("kl", "ce") and getattr(config.loss, term)
    ]
    if config.loss.extra:
        raise UserError(
            f"loss.extra needs more of the teacher than logit_cache.dir={cache_dir} stores; set "
            "loss.extra={}, or leave logit_cache.dir empty"
        )
    if unsupported:
        raise UserError(
            f"{' and '.join(unsupported)} {'needs' if len(unsupported) == 1 else 'need'} more of "
            f"the teacher than logit_cache.dir={cache_dir} stores; set "
            f"{' '.join(f'{name}=0' for name in unsupported)}, or leave logit_cache.dir empty"
        )
    if has_rows:
        raise UserError(
            "memory.kind=associative learns from the teacher's hidden states, which "
            f"logit_cache.dir={cache_dir} does not store; set memory.kind=featural, or leave "
            "logit_cache.dir empty"
        )
    if not config.loss.kl or not config.stages.end_to_end_steps:
        name = "stages.end_to_end_steps" if config.loss.kl else "loss.kl"
        raise UserError(
            f"logit_cache.dir={cache_dir} serves loss.kl in the end-to-end stage, got {name}=0; "
            "leave it empty"
        )


def read_teacher_shape(teacher: str) -> dict[str, int] | None:
    """Read layers, slots (feed-forward neurons) and positions from a teacher's config.json.

    Returns:
        None where the teacher is not on this machine; loading it says what is wrong with it.
    """
    if teacher == SMOLLM2:
        teacher_dir = get_smollm2_dir()
    else:
        shipped = {"embedded": EMBEDDED_TEACHER_DIR, "reader": READER_DIR}
        teacher_dir = shipped.get(teacher) or _expand_setting_path(teacher, "teacher")
    try:
        teacher_config = json.loads((teacher_dir / "config.json").read_text(encoding="utf-8"))
        if "n_layer" in teacher_config:
            shape = {
                "layers": teacher_config["n_layer"],
                "slots": teacher_config.get("n_inner") or 4 * teacher_config["n_embd"],
                "positions": teacher_config["n_positions"],
            }
        else:
            shape = {
                "layers": teacher_config["num_hidden_layers"],
                "slots": teacher_config["intermediate_size"],
                "positions": teacher_config["max_position_embeddings"],
            }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    is_valid = all(type(size) is int and size > 0 for size in shape.values())
    # With more layers it is no model, and nothing is made for each of them.
    return shape if is_valid and shape["layers"] <= MAX_TEACHER_LAYERS else None


def get_cache_dir() -> Path:
    """Return the folder of files shared by runs: `DMT_CACHE`, or `~/.cache/dmt`.

    Raises:
        UserError: this user has no home folder, as in some containers.
    """
    try:
        return Path(os.environ.get("DMT_CACHE") or Path.home() / ".cache" / "dmt")
    except RuntimeError:
        raise UserError(
            "this user has no home folder for downloaded models; set DMT_CACHE to a folder"
        ) from None


def get_smollm2_dir() -> Path:
    """Return the folder of SmolLM2, which need not exist yet."""
    return get_cache_dir() / SMOLLM2


def _read_config_file(path: Path) -> dict[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except PermissionError as error:
        raise UserError(
            f"config file {path} cannot be read ({error.strerror}); make it readable, or name "
            "another"
        ) from None
    except OSError as error:
        shipped_configs = ", ".join(
            sorted(str(config_path) for config_path in Path("configs").glob("*.yaml"))
        )
        raise UserError(
            f"cannot read config file {format_value(str(path))} ({error.strerror}); there are: "
            f"{shipped_configs or 'none here'}; a setting is written key=value"
        ) from None
    except ValueError:
        raise UserError(
            f"{format_value(str(path))} is not UTF-8 text; a config file is YAML such as "
            "`memory: {k: 64}`"
        ) from None
    if version_match := re.match(CONFIG_HEADER.format(r"(\S+)"), text):
        check_version(
            version_match[1],
            CONFIG_VERSION,
            f"{path}: settings of version",
            "write those that differ from the defaults into a new file (`dmt config --list`)",
        )
    values = _parse_yaml(text, str(path), is_file=True)
    if not isinstance(values, dict):
        raise UserError(
            f"{path} must hold settings such as `memory: {{k: 64}}`, got {format_value(values)}"
        )
    working_dir = _read_working_dir(path)
    if path.name == "run.json":
        values = _get_record_config(values, path)
    if working_dir is not None:
        _resolve_recorded_paths(values, working_dir)
    _resolve_context_paths(values, path)
    return values


def _read_working_dir(path: Path) -> Path | None:
    """Return the folder in which a run was started, for its `config.yaml` or `run.json`.

    None where `path` is of no run, or the run was started in the current folder.
    """
    if path.name not in ("config.yaml", "run.json"):
        return None
    try:
        record = json.loads(path.with_name("run.json").read_text(encoding="utf-8"))
        working_dir = (path.resolve().parent / record["working_dir"]).resolve()
        return None if working_dir.samefile(Path.cwd()) else working_dir
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _resolve_recorded_paths(values: dict[Any, Any], working_dir: Path) -> None:
    """Make the relative paths of a run absolute where they exist in the run's working folder.

    So a run can be resumed or repeated in any folder. `values`, the settings of the run, is changed
    in place.
    """

    def resolve(value: Any) -> Any:
        if isinstance(value, list):
            return [resolve(item) for item in value]
        if not isinstance(value, str) or not value or value in SHIPPED_NAMES:
            return value
        path = working_dir / value
        return str(path) if path.exists() else value

    for name in INPUT_PATHS:
        group_name, _, key = name.rpartition(".")
        group = values.get(group_name) if group_name else values
        if isinstance(group, dict) and key in group:
            group[key] = resolve(group[key])


def _resolve_context_paths(values: dict[Any, Any], config_path: Path) -> None:
    """Make the relative paths in `context` those of files beside the config file.

    A path that exists in the current folder stays as it is. So a config file and its texts can be
    used from any folder. `values`, the content of the file, is changed in place.
    """
    context = values.get("context")
    if not isinstance(context, dict):
        return
    for name in ("file", "questions"):
        path = context.get(name)
        if isinstance(path, str) and not Path(path).exists():
            neighbor = config_path.parent / path
            if neighbor.is_file():
                context[name] = str(neighbor)


def _get_record_config(record: dict[Any, Any], path: Path) -> dict[Any, Any]:
    """Return the settings in a run's `run.json`."""
    values = record.get("config")
    if not isinstance(values, dict):
        raise UserError(
            f"{path} holds no settings (an older dmt made it); give {path.parent / 'config.yaml'}"
        )
    return values


def _parse_yaml(text: str, source: str, is_file: bool = False) -> Any:
    """Parse a YAML file's text, or one `key=value`, into plain values."""
    try:
        parsed = OmegaConf.load(io.StringIO(text)) if is_file else OmegaConf.from_dotlist([text])
        return OmegaConf.to_container(parsed, resolve=False)
    except GrammarParseError:
        raise UserError(
            f"cannot read {source}: ${{...}} is not filled in here, write the value itself"
        ) from None
    except OSError:  # OmegaConf raises it for a file that holds, say, one number
        return text.strip()
    except (YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        location = f" line {mark.line + 1}" if is_file and mark else ""
        reason = (
            getattr(error, "problem", None) or " ".join(str(error).split()) or type(error).__name__
        )
        hint = "fix or quote it"
        if is_file and "\t" in text and "start any token" in reason:
            hint = "indent with spaces, not tabs"
        raise UserError(
            f"cannot read {source}{location}: not valid YAML ({format_value(reason)}); {hint}"
        ) from None


def _expand_setting_path(path: str, name: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"{name}={path} begins with a home folder that does not exist; write the path in full"
        ) from None


def _get_setting(config: Config, name: str) -> Any:
    return reduce(getattr, name.split("."), config)
