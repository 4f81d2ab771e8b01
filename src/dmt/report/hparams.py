"""HParams for TensorBoard: the settings of a run with the results they led to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dmt.config import Config
from dmt.errors import format_value
from dmt.report.results import collect_metrics

# Groups of settings in HParams, by task.
SETTING_GROUPS = {
    "distill": ("student", "memory", "data", "loss", "stages", "optim", "knowledge"),
    "consolidate": ("context", "stages", "loss"),
}
DEFAULT_GROUPS = SETTING_GROUPS["distill"]

Setting = bool | int | float | str


def flatten_settings(config: Config, groups: Iterable[str]) -> dict[str, Setting]:
    """Return settings by dotted name, those that are not the defaults first.

    Lists become text, and what is left empty becomes `default`.

    Args:
        config: the settings.
        groups: the groups of settings to include, beside `teacher` and `seed`.
    """
    groups = tuple(groups)
    values, defaults = _flatten(config, groups), _default_settings(config, groups)
    changed = [name for name, value in values.items() if value != defaults.get(name)]
    return {name: values[name] for name in dict.fromkeys([*changed, *values])}


def find_changed_settings(config: Config) -> dict[str, str]:
    """Return the settings of the model and its training that are not the defaults, as text."""
    groups = SETTING_GROUPS.get(getattr(config, "task", "distill"), DEFAULT_GROUPS)
    values, defaults = _flatten(config, groups), _default_settings(config, groups)
    return {
        name: format_value(value)
        for name, value in values.items()
        if value != defaults.get(name) and name not in ("teacher", "seed")
    }


def log_hparams(
    config: Config,
    run_dir: Path,
    record: Mapping[str, Any],
    groups: Iterable[str],
    steps: int,
) -> None:
    """Write settings and results as HParams, once, at the step after which they were measured.

    Args:
        config: the settings.
        run_dir: folder of the run.
        record: the results of the run.
        groups: groups of settings to include.
        steps: number of steps before the measurement.
    """
    from torch.utils.tensorboard import SummaryWriter

    settings = flatten_settings(config, groups)
    if slot_usage := record.get("slots"):
        settings |= {
            f"memory.{name}": max(layer[name] for layer in slot_usage.values())
            for name in ("k", "num_slots")
        }
    metrics = {
        f"hparam/{key.replace('/', '_')}": value
        for key, value in collect_metrics(record).items()
        if not key.startswith("seconds/") and key != "num_slots"
    }
    with SummaryWriter(str(run_dir)) as writer:
        writer.add_hparams(settings, metrics, run_name=".", global_step=steps)


def _default_settings(config: Config, groups: Iterable[str]) -> dict[str, Setting]:
    """Return the defaults; those of the chosen kind of memory, which is none itself."""
    defaults = Config()
    sections = {group: type(getattr(config, group))() for group in groups}
    values = _flatten(replace(defaults, **sections), groups)
    if "memory" in sections:
        values["memory.kind"] = defaults.memory.kind
    return values


def _flatten(config: Config, groups: Iterable[str]) -> dict[str, Setting]:
    values: dict[str, Setting] = {"teacher": config.teacher, "seed": config.seed}
    for group in groups:
        for name, value in asdict(getattr(config, group)).items():
            if value is None:
                values[f"{group}.{name}"] = "default"
            elif isinstance(value, bool | int | float | str):
                values[f"{group}.{name}"] = value
            else:
                values[f"{group}.{name}"] = format_value(value)
    return values
