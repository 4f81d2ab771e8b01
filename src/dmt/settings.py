"""From the words a person types to a checked `Config`, and back to a file that replays the run."""

from __future__ import annotations

import ast
import inspect
import json
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

import dmt.config as schema
from dmt.config import Config, MemoryConfig
from dmt.errors import UserError

EMBEDDED_TEACHER = Path(__file__).parent / "assets"


def load(file: str | Path | None = None, words: tuple[str, ...] | list[str] = ()) -> Config:
    """Defaults, then the differences in `file` (YAML), then `key=value` words; checked.

    Raises:
        UserError: a missing or malformed file, an unknown key, a wrong type, a bad choice or a contradiction.
    """
    merged = OmegaConf.structured(Config)
    if file is not None:
        merged = _merge(merged, _read(Path(file)), str(file))
    for word in words:
        key, equals, _ = word.partition("=")
        if not equals or not key:
            raise UserError(f"cannot read {word!r}: a setting is written key=value, as in memory.k=64; --help lists them")
        try:
            change = OmegaConf.from_dotlist([word])
        except (OmegaConfBaseException, YAMLError, ValueError) as error:
            raise UserError(f"cannot read {word!r}: {_first_line(error)}") from None
        merged = _merge(merged, change, word)
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config), "the schema is Config"
    check(config)
    return config


def save(config: Config, path: Path) -> None:
    """Write every setting as YAML; `load(path)` gives an equal `Config`."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")


def layer_memories(config: Config, layers: int) -> list[MemoryConfig]:
    """The memory settings of each of `layers` layers, rules applied in order.

    Raises:
        UserError: a rule has an unknown key, names a layer that is not there, or contradicts itself.
    """
    memories = [config.memory] * layers
    for number, rule in enumerate(config.student.rules):
        name = f"student.rules[{number}]"
        unknown = set(rule) - {"layers", "memory"}
        if unknown or "layers" not in rule:
            raise UserError(f"{name} needs exactly `layers` and `memory`, got {sorted(rule)}")
        for layer in select_layers(str(rule["layers"]), layers, f"{name}.layers"):
            base = OmegaConf.structured(memories[layer])
            change = rule.get("memory") or {}
            if not isinstance(change, dict):
                raise UserError(f"{name}.memory must be settings such as {{k: 64}}, got {change!r}")
            merged = _merge(base, OmegaConf.create(change), name, prefix=f"{name}.memory.")
            memories[layer] = OmegaConf.to_object(merged)  # type: ignore[assignment]
            _check_memory(memories[layer], f"{name}.memory", None)
    return memories


def select_layers(text: str, layers: int, name: str) -> list[int]:
    """Layer numbers from `all`, `3`, `0-2`, `2-` or a comma-separated list of these; 0 is the lowest."""
    chosen: set[int] = set()
    for part in text.replace(" ", "").split(","):
        first, dash, last = part.partition("-")
        try:
            low, high = (0, layers - 1) if part == "all" else (int(first), int(last or layers - 1) if dash else int(first))
        except ValueError:
            raise UserError(f"{name} must be `all`, a layer, a range such as 0-2 or 2-, or a list; got {text!r}") from None
        if not 0 <= low <= high < layers:
            raise UserError(f"{name} must name layers in [0, {layers - 1}], got {text!r}")
        chosen.update(range(low, high + 1))
    return sorted(chosen)


def check(config: Config) -> None:
    """Raise `UserError` for values out of range and settings that contradict each other."""
    at_least = {
        "data.block": 2, "data.batch": 1, "data.micro_batch": 1, "data.validation_tokens": 1, "data.test_tokens": 1,
        "loss.kl": 0, "loss.reverse_kl": 0, "loss.ce": 0, "loss.hidden": 0, "loss.block": 0, "loss.cosine": 0,
        "loss.chunk": 0, "stages.calibrate_tokens": 0, "stages.layerwise_steps": 0, "stages.end_to_end_steps": 0,
        "optim.warmup": 0, "optim.final_lr": 0, "optim.weight_decay": 0, "optim.clip": 0, "pretrain.width": 1,
        "pretrain.layers": 1, "pretrain.heads": 1, "pretrain.vocabulary": 257, "pretrain.steps": 1, "trainer.devices": 1,
        "trainer.threads": 0, "trainer.log_every": 1, "trainer.validate_every": 0, "trainer.checkpoint_every": 1, "seed": 0,
    }  # fmt: skip
    for name, least in at_least.items():
        if not _value(config, name) >= least:
            raise UserError(f"{name} must be at least {least}, got {_value(config, name)}")
    for name in ("loss.temperature", "stages.layerwise_lr", "stages.end_to_end_lr", "pretrain.lr"):
        if not 0 < _value(config, name) < float("inf"):
            raise UserError(f"{name} must be a positive number, got {_value(config, name)}")
    for name in ("optim.beta1", "optim.beta2"):
        if not 0 <= _value(config, name) < 1:
            raise UserError(f"{name} must be in [0, 1), got {_value(config, name)}")
    if not config.data.corpora:
        raise UserError("data.corpora is empty; name at least one of speeches, biographies, a file, a folder, hub:<dataset>")
    shares = config.data.shares
    if shares and (len(shares) != len(config.data.corpora) or min(shares) < 0 or not sum(shares) > 0):
        raise UserError(f"data.shares must be one number >= 0 for each of the {len(config.data.corpora)} data.corpora, got {shares}")
    if config.data.batch % (config.data.micro_batch * config.trainer.devices) and config.data.micro_batch < config.data.batch:
        raise UserError(
            f"data.batch={config.data.batch} must be a multiple of data.micro_batch={config.data.micro_batch} "
            f"times trainer.devices={config.trainer.devices}"
        )
    if config.data.batch % config.trainer.devices:
        raise UserError(f"data.batch={config.data.batch} must be a multiple of trainer.devices={config.trainer.devices}")
    if config.task == "pretrain":
        if config.pretrain.width % config.pretrain.heads:
            raise UserError(f"pretrain.width={config.pretrain.width} must be a multiple of pretrain.heads={config.pretrain.heads}")
        return
    weights = asdict(config.loss)
    if config.stages.end_to_end_steps and not any(weights[f.name] for f in fields(config.loss) if f.name not in ("temperature", "chunk")):
        raise UserError("every weight in loss is 0, so the end-to-end stage has nothing to learn; set loss.kl=1")
    if not (config.stages.calibrate_tokens or config.stages.layerwise_steps or config.stages.end_to_end_steps):
        raise UserError("every stage is 0, nothing would happen; set stages.end_to_end_steps, say")
    shape = teacher_shape(config.teacher)
    _check_memory(config.memory, "memory", shape and shape["slots"])
    if shape:
        for memory in layer_memories(config, shape["layers"]):
            _check_memory(memory, "memory", shape["slots"])
        if config.data.block > shape["positions"]:
            raise UserError(
                f"data.block={config.data.block} is longer than the {shape['positions']} positions of "
                f"teacher={config.teacher}; set data.block={shape['positions']} or less"
            )


def teacher_shape(source: str) -> dict[str, int] | None:
    """Layers, slots (feed-forward neurons) and positions from a teacher's config.json; None where it is on a hub."""
    file = (EMBEDDED_TEACHER if source == "embedded" else Path(source).expanduser()) / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        slots = found.get("n_inner") or 4 * found["n_embd"]
        return {"layers": found["n_layer"], "slots": slots, "positions": found["n_positions"]}
    except (OSError, ValueError, KeyError):
        return None  # loading the teacher says what is wrong with it


def describe() -> str:
    """The list of settings for `--help`: name, default and meaning, made from the schema's own docstrings."""
    notes = _field_notes()
    lines = []
    for group, value in ((f.name, getattr(Config(), f.name)) for f in fields(Config)):
        members = fields(value) if is_dataclass(value) else ()
        if not members:
            lines.append(f"{group}={_show(value)}\n    {notes['Config', group]}")
        for member in members:
            shown = f"{group}.{member.name}={_show(getattr(value, member.name))}"
            choices = notes.get((type(value).__name__, member.name, "choices"))
            lines.append(f"{shown}{f'   [{choices}]' if choices else ''}\n    {notes[type(value).__name__, member.name]}")
    return "\n".join(lines)


def _field_notes() -> dict[tuple[str, ...], str]:
    notes: dict[tuple[str, ...], str] = {}
    for node in ast.parse(inspect.getsource(schema)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for item, following in zip(node.body, node.body[1:], strict=False):
            if isinstance(item, ast.AnnAssign) and isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                assert isinstance(item.target, ast.Name), "settings are plain names"
                notes[node.name, item.target.id] = str(following.value.value)
                kind = ast.unparse(item.annotation)
                if kind.startswith("Literal["):
                    notes[node.name, item.target.id, "choices"] = ", ".join(ast.literal_eval(f"({kind[8:-1]},)"))
    return notes


def _check_memory(memory: MemoryConfig, name: str, block_slots: int | None) -> None:
    slots = memory.slots if memory.slots is not None else block_slots
    for setting in ("slots", "k", "heads"):
        given = getattr(memory, setting)
        if given is not None and given < 1:
            raise UserError(f"{name}.{setting} must be at least 1, got {given}")
    if slots is not None and memory.k is not None and memory.k > slots:
        raise UserError(f"{name}.k must be in [1, {name}.slots={slots}], got {memory.k}")
    for setting, number in (("slots", slots), ("k", memory.k)):
        if number is not None and number % memory.heads:
            raise UserError(f"{name}.{setting}={number} must be a multiple of {name}.heads={memory.heads}")
    if memory.ranking != "score" and memory.weighting in ("softmax", "distance"):
        raise UserError(
            f"{name}.ranking={memory.ranking} needs a weight per slot, which {name}.weighting={memory.weighting} has not; "
            f"set {name}.ranking=score"
        )
    if memory.gradient == "straight_through" and memory.weighting in ("softmax", "distance"):
        raise UserError(
            f"{name}.gradient=straight_through needs {name}.weighting=activation or relu, got {memory.weighting}"
        )
    if memory.init == "ff" and None not in (memory.slots, block_slots) and memory.slots != block_slots:
        raise UserError(
            f"{name}.slots={memory.slots} differs from the {block_slots} neurons of the teacher's blocks; "
            f"leave {name}.slots empty or set {name}.init=random"
        )


def _read(path: Path) -> DictConfig:
    try:
        found = OmegaConf.load(path)
    except OSError as error:
        shipped = sorted(str(p) for p in Path("configs").glob("*.yaml"))
        raise UserError(f"cannot read config file {path} ({error.strerror}); there are: {', '.join(shipped) or 'none here'}") from None
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {_first_line(error)}") from None
    if not isinstance(found, DictConfig):
        raise UserError(f"{path} must hold settings such as `memory: {{k: 64}}`, got a {type(found).__name__}")
    return found


def _merge(base: Any, change: Any, source: str, prefix: str = "") -> Any:
    try:
        return OmegaConf.merge(base, change)
    except OmegaConfBaseException as error:
        key = prefix + str(error.full_key or "")
        reason = str(error).splitlines()[0]
        if "not in '" in reason:
            _, hint, close = reason.partition("Did you mean: ")
            parent = key.rpartition(".")[0]
            suggestion = ", ".join(f"{parent}.{c.strip(chr(39) + '?. ')}" if parent else c.strip("'?. ") for c in close.split(",")) if hint else ""
            reason = f"is not a setting{f'; did you mean {suggestion}?' if suggestion else '; --help lists them'}"
        else:
            reason = f": {reason[0].lower()}{reason[1:]}"
        raise UserError(f"{key or 'settings'}{'' if reason.startswith(':') else ' '}{reason} (in {source})") from None


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _value(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _show(value: Any) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else json.dumps(value) if isinstance(value, list) else str(value)
