"""From the words a person types to a checked `Config`, and back to a file that replays the run."""

from __future__ import annotations

import io
import json
import os
import re
from dataclasses import asdict, is_dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException
from yaml import YAMLError

from dmt import disk
from dmt.config import LOSS_TERMS, Config
from dmt.errors import UserError
from dmt.layers import check_memory, has_slots, layer_memories
from dmt.runs import check_name
from dmt.versions import CONFIG, check_version
from dmt.wording import changed, field_notes, names, shown, unknown

EMBEDDED_TEACHER = Path(__file__).parent / "assets"
READER = EMBEDDED_TEACHER / "reader"
"""Goes on from the embedded teacher: configs/reader.yaml."""
SMOLLM2 = "smollm2"
"""Name of the teacher that `python -m dmt.models.smollm2` fetches."""
HEADER = "# Settings of dmt, version {}\n"
"""First line of a run's settings; files without one are of version 1."""
UNKNOWN_LAYERS = 1_000
"""Layers a teacher may have whose config.json is not here to be asked."""


def load(file: str | Path | None = None, words: tuple[str, ...] | list[str] = ()) -> Config:
    """Defaults, then the differences in `file` (YAML, or the `run.json` of a run), then `key=value` words; checked.

    Raises:
        UserError: a missing or malformed file, an unknown key, a wrong type, a bad choice or a contradiction.
    """
    config = Config()
    if file is not None:
        found = _read(Path(file))
        try:
            config = changed(config, found)
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UserError(f"cannot read {shown(word)}: a setting is written key=value, as in memory.k=64; --help lists them")
        if key not in names():
            raise unknown(key, [name for name in names() if name.rpartition(".")[0] == key.rpartition(".")[0]], names())
        value = _parse(f"value={text}", f"{key}={shown(text)}")["value"]
        for part in reversed(key.split(".")):
            value = {part: value}
        config = changed(config, value)
    check(config)
    return config


def save(config: Config, path: Path) -> None:
    """Write every setting as YAML; `load(path)` gives an equal `Config`."""
    disk.write(path, HEADER.format(CONFIG) + OmegaConf.to_yaml(OmegaConf.create(asdict(config))))


def check(config: Config) -> None:
    """Raise `UserError` for values out of range and settings that contradict each other."""
    at_least = {
        "data.block": 2, "data.batch": 1, "data.micro_batch": 1, "data.validation_tokens": 1, "data.test_tokens": 1,
        "loss.kl": 0, "loss.reverse_kl": 0, "loss.ce": 0, "loss.hidden": 0, "loss.block": 0, "loss.cosine": 0,
        "loss.revive": 0, "loss.revive_after": 1, "loss.chunk": 0, "stages.calibrate_tokens": 0, "stages.layerwise_steps": 0,
        "stages.end_to_end_steps": 0, "stages.k_start": 1, "optim.values_lr": 0, "store.flush_every": 1,
        "optim.warmup": 0, "optim.final_lr": 0, "optim.weight_decay": 0, "optim.clip": 0, "pretrain.width": 1,
        "pretrain.layers": 1, "pretrain.heads": 1, "pretrain.vocabulary": 257, "pretrain.steps": 1, "trainer.devices": 1,
        "trainer.threads": 0, "trainer.log_every": 1, "trainer.validate_every": 0, "trainer.checkpoint_every": 1, "seed": 0,
        "cache.kept": 16, "context.rank": 1, "context.tokens": 1, "context.samples": 1, "context.fresh_every": 1,
        "context.keep": 0, "context.asked": 0, "context.capacity": 1,
    }  # fmt: skip
    for name, least in at_least.items():
        if not _value(config, name) >= least:
            raise UserError(f"{name} must be at least {least}, got {_value(config, name)}")
    for name in ("loss.temperature", "stages.layerwise_lr", "stages.end_to_end_lr", "pretrain.lr", "context.temperature"):
        if not _value(config, name) > 0:
            raise UserError(f"{name} must be a positive number, got {_value(config, name)}")
    at_most = {  # beyond these a machine would be busy for ever, or out of memory, before it could say why
        "data.block": 2**20, "data.batch": 2**20, "data.micro_batch": 2**20, "stages.calibrate_tokens": 2**24,
        "stages.layerwise_steps": 2**31, "stages.end_to_end_steps": 2**31,
        "context.rank": 2**14, "context.samples": 2**16, "context.asked": 2**10, "context.tokens": 2**16,
        "pretrain.width": 2**16, "pretrain.layers": 2**10, "pretrain.heads": 2**10, "pretrain.vocabulary": 2**20,
        "pretrain.steps": 2**31, "trainer.threads": 2**10, "trainer.devices": 2**8, "seed": 2**32 - 1,
    }  # fmt: skip
    for name, most in at_most.items():
        if (_value(config, name) or 0) > most:
            raise UserError(f"{name} must be in [{at_least.get(name, 1)}, {most}], got {_value(config, name)}")
    if config.optim.final_lr > 1:
        raise UserError(f"optim.final_lr must be in [0, 1], a share of the peak, got {config.optim.final_lr}")
    for name in ("optim.beta1", "optim.beta2"):
        if not 0 <= _value(config, name) < 1:
            raise UserError(f"{name} must be in [0, 1), got {_value(config, name)}")
    if not config.data.corpora:
        raise UserError("data.corpora is empty; name at least one of speeches, biographies, a file, a folder, hub:<dataset>")
    if config.trainer.name is not None:
        check_name(config.trainer.name)
    for name in ("trainer.log_dir", "pretrain.output", *(["cache.place"] if config.cache.place else [])):
        _home(_value(config, name), name)
    for corpus in config.data.corpora:
        _home(corpus, "data.corpora")
    shares = config.data.shares
    if shares and (len(shares) != len(config.data.corpora) or min(shares) < 0 or not sum(shares) > 0):
        raise UserError(
            f"data.shares must be one number >= 0 for each of the {len(config.data.corpora)} data.corpora, got {shown(shares)}"
        )
    if config.data.batch % config.trainer.devices:
        raise UserError(
            f"data.batch={config.data.batch} must be a multiple of trainer.devices={config.trainer.devices}, which share it out"
        )
    if config.trainer.devices > 1 and config.task == "consolidate":
        raise UserError(f"trainer.devices must be 1 with task=consolidate, got {config.trainer.devices}; leave it out")
    if config.task == "pretrain":
        if config.pretrain.width % config.pretrain.heads:
            raise UserError(f"pretrain.width={config.pretrain.width} must be a multiple of pretrain.heads={config.pretrain.heads}")
        return
    if config.task == "consolidate":
        _check_context(config)
        return
    if config.stages.end_to_end_steps and not any(getattr(config.loss, term) for term in LOSS_TERMS):
        raise UserError("every weight in loss is 0, so the end-to-end stage has nothing to learn; set loss.kl=1")
    if not (config.stages.calibrate_tokens or config.stages.layerwise_steps or config.stages.end_to_end_steps):
        raise UserError("every stage is 0, nothing would happen; set stages.end_to_end_steps, say")
    shape = teacher_shape(config.teacher)
    check_memory(config.memory, "memory", shape["slots"] if shape else None)
    memories = layer_memories(config, *((shape["layers"], shape["slots"]) if shape else (UNKNOWN_LAYERS,)))
    if not config.stages.calibrate_tokens and any(has_slots(memory) and memory.k == "auto" for memory in memories):
        raise UserError("memory.k=auto is settled by calibration, got stages.calibrate_tokens=0; set memory.k to a number")
    rows = [memory for memory in memories if memory.kind == "associative"]
    if rows and not config.stages.end_to_end_steps:
        raise UserError("memory.kind=associative is written to in the end-to-end stage; set stages.end_to_end_steps")
    if config.stages.layerwise_steps and not any(map(has_slots, memories)) and rows:
        raise UserError("memory.base=none in every layer has nothing to learn layer by layer; set stages.layerwise_steps=0")
    if config.loss.revive and any(memory.weighting in ("softmax", "distance") for memory in memories if has_slots(memory)):
        raise UserError("loss.revive needs a weight per slot; set memory.weighting=activation or relu, or loss.revive=0")
    if config.loss.revive and any(memory.projections for memory in memories if has_slots(memory)):
        raise UserError(
            "loss.revive would move projections, which living slots share; set memory.projections=false or loss.revive=0"
        )
    if config.cache.place:
        _check_cache(config, bool(rows))
    if shape and config.data.block > shape["positions"]:
        raise UserError(
            f"data.block={config.data.block} is longer than the {shape['positions']} positions of "
            f"teacher={config.teacher}; set data.block={shape['positions']} or less"
        )


def _check_context(config: Config) -> None:
    """Raise `UserError` where what is to be consolidated, or where it is to go, contradicts itself."""
    context = config.context
    if (context.text is None) == (context.file is None):
        given = "neither" if context.text is None else "both"
        raise UserError(f"one of context.text and context.file names what is to be consolidated, got {given}")
    for name in ("file", "questions"):
        if getattr(context, name) is not None:
            _home(getattr(context, name), f"context.{name}")
    if context.into == "memory" and context.write == "difference" and context.objective == "causal_lm":
        raise UserError(
            "context.objective=causal_lm has no teacher, and context.write=difference is what a teacher makes of the context; "
            "set context.write=gradient, or context.objective=logits"
        )
    if (context.into != "memory" or context.write == "trained") and not config.stages.end_to_end_steps:
        raise UserError(f"context.into={context.into} is trained, got stages.end_to_end_steps=0; set it to 200, say")


def _check_cache(config: Config, rows: bool) -> None:
    """Raise `UserError` where a run asks for more than the teacher's distributions and for its cache."""
    beyond = [f"loss.{term}" for term in LOSS_TERMS if term not in ("kl", "ce") and getattr(config.loss, term)]
    if beyond:
        raise UserError(
            f"{' and '.join(beyond)} {'needs' if len(beyond) == 1 else 'need'} more of the teacher than cache.place="
            f"{config.cache.place} keeps; set {' '.join(f'{name}=0' for name in beyond)}, or leave cache.place empty"
        )
    if rows:
        raise UserError(
            f"memory.kind=associative is taught by the teacher's states, which cache.place={config.cache.place} does not keep; "
            "set memory.kind=featural, or leave cache.place empty"
        )
    if not config.loss.kl or not config.stages.end_to_end_steps:
        name = "stages.end_to_end_steps" if config.loss.kl else "loss.kl"
        raise UserError(f"cache.place={config.cache.place} serves loss.kl in the end-to-end stage, got {name}=0; leave it empty")


def teacher_shape(source: str) -> dict[str, int] | None:
    """Layers, slots (feed-forward neurons) and positions from a teacher's config.json; None where it is on a hub."""
    known = {"embedded": EMBEDDED_TEACHER, "reader": READER, SMOLLM2: cached_smollm2()}
    file = (known[source] if source in known else _home(source, "teacher")) / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if "n_layer" in found:
            slots = found.get("n_inner") or 4 * found["n_embd"]
            shape = {"layers": found["n_layer"], "slots": slots, "positions": found["n_positions"]}
        else:
            names = {"layers": "num_hidden_layers", "slots": "intermediate_size", "positions": "max_position_embeddings"}
            shape = {name: found[key] for name, key in names.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # loading the teacher says what is wrong with it
    whole = all(type(size) is int and size > 0 for size in shape.values())
    return shape if whole and shape["layers"] <= UNKNOWN_LAYERS else None  # more are no model's: nothing is made for each of them


def cache_folder() -> Path:
    """What outlives runs, outside the repository: `DMT_CACHE`, or `~/.cache/dmt`."""
    return Path(os.environ.get("DMT_CACHE") or Path.home() / ".cache" / "dmt")


def cached_smollm2() -> Path:
    """Where SmolLM2 is kept once it is fetched."""
    return cache_folder() / SMOLLM2


def describe() -> str:
    """The list of settings for `--help`: name, default and meaning, made from the schema's own docstrings."""
    notes = field_notes()
    lines = []
    for name in names():
        group, _, field = name.rpartition(".")
        owner, default = type(_value(Config(), group) if group else Config()).__name__, _value(Config(), name)
        if is_dataclass(default):
            continue
        choices = notes.get((owner, field, "choices"))
        lines.append(f"{name}={'' if default is None else shown(default)}{f'   [{choices}]' if choices else ''}")
        lines.append(f"    {notes[owner, field]}")
    return "\n".join(lines)


def _read(path: Path) -> dict[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except PermissionError as error:
        raise UserError(f"config file {path} cannot be read ({error.strerror}); make it readable, or name another") from None
    except OSError as error:
        shipped = ", ".join(sorted(str(p) for p in Path("configs").glob("*.yaml")))
        raise UserError(
            f"cannot read config file {shown(str(path))} ({error.strerror}); there are: {shipped or 'none here'}; "
            "a setting is written key=value"
        ) from None
    except ValueError:
        raise UserError(f"{shown(str(path))} is not UTF-8 text; a config file is YAML such as `memory: {{k: 64}}`") from None
    if told := re.match(HEADER.format(r"(\S+)"), text):
        check_version(told[1], CONFIG, f"{path}: settings of version", "write those that differ from the defaults into a new file")
    found = _parse(text, str(path), file=True)
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold settings such as `memory: {{k: 64}}`, got {shown(found)}")
    return _of_record(found, path) if path.name == "run.json" else found


def _of_record(record: dict[Any, Any], path: Path) -> dict[Any, Any]:
    """The settings of the run that a `run.json` tells of."""
    found = record.get("config")
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no settings (an older dmt made it); give {path.parent / 'config.yaml'}")
    return found


def _parse(text: str, source: str, file: bool = False) -> Any:
    """Plain values from a YAML file's text, or from one dotted word."""
    try:
        found = OmegaConf.load(io.StringIO(text)) if file else OmegaConf.from_dotlist([text])
        return OmegaConf.to_container(found, resolve=False)
    except GrammarParseError:
        raise UserError(f"cannot read {source}: ${{...}} is not filled in here, write the value itself") from None
    except OSError:  # OmegaConf's word for a file that holds one number, say
        return text.strip()
    except (YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if file and mark else ""
        reason = getattr(error, "problem", None) or " ".join(str(error).split()) or type(error).__name__
        tab = "; indent with spaces, not tabs" if file and "\t" in text and "start any token" in reason else ""
        raise UserError(f"cannot read {source}{line}: not valid YAML ({shown(reason)}){tab or '; mend or quote it'}") from None


def _home(path: str, name: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{name}={path} begins with a home folder that is not there; write the path in full") from None


def _value(config: Config, name: str) -> Any:
    return reduce(getattr, name.split("."), config)
