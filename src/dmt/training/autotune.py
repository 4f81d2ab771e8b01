"""Autotune the number of threads and the precision of a run, once per machine."""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dmt import files
from dmt.config import Config, TrainerConfig
from dmt.config_io import get_cache_dir
from dmt.ops import read_cpu_field
from dmt.training.launch import broadcast_config
from dmt.training.trainer import select_device, use_training_kernels

TIMED_WINDOWS = 4
"""Of a large piece of a step so many are enough to tell how long it takes."""
TIMED_STEPS = 3
"""Steps by which a way to compute is judged, the fastest of them."""
TIMINGS_FORMAT = 2
TUNED_FIELDS = ("precision",)
BUSY_LOAD = 0.75
"""Programs waiting for each core, of late, from which on a machine is too busy for what is timed to be kept for good."""


def autotune(config: Config, model: PreTrainedModel, windows: Tensor) -> Config:
    """`config` with `trainer.num_threads` and `.precision` decided by timing a training step, and threads set.

    For tiny models one thread can beat two by far, or lose; half precision is twice as fast on some processors and
    emulated on others. What was decided stands in the run's config, so a replay or a resume computes the same; and in
    `timings.json` under `DMT_CACHE` (`~/.cache/dmt`), so that the same command on the same machine computes the same, too:
    what is timed twice may come out twice, and then no digit would be equal. Digits depend on the precision, so
    it is decided once for any number of threads and processes. What was decided on a busy machine holds until it is quiet.
    """
    trainer = config.trainer
    if select_device(config).type != "cpu":
        trainer = replace(
            _list_candidates(trainer, on_cpu=False)[-1],
            num_threads=trainer.num_threads or _get_threads_per_process(trainer),
        )
    elif (
        not trainer.num_threads or len(_list_candidates(trainer, on_cpu=True)) > 1
    ):  # else nothing is left open
        key, decisions, devices = (
            _compute_decision_key(config, model, windows),
            _read_decisions(),
            str(trainer.devices),
        )
        decision = _check_decision(decisions.get(key))
        threads = (
            trainer.num_threads
            or (decision or {"threads": {}})["threads"].get(devices)
            or _choose_threads(trainer, model, windows)
        )
        is_idle, thread_counts = (
            is_machine_idle(),
            {} if trainer.num_threads else {devices: threads},
        )
        trainer = replace(trainer, num_threads=threads)
        if decision is None:
            trainer = _choose_fastest(config, trainer, model, windows)
            new_decision = {name: getattr(trainer, name) for name in TUNED_FIELDS} | {
                "threads": thread_counts,
                "quiet": is_idle,
            }
        else:
            trainer = replace(trainer, **{name: decision[name] for name in TUNED_FIELDS})
            new_decision = decision | {"threads": decision["threads"] | thread_counts}
        if new_decision != decision:
            _write_decisions(decisions | {key: new_decision})
    trainer = broadcast_config(trainer)
    torch.set_num_threads(trainer.num_threads)
    return replace(config, trainer=trainer)


def is_machine_idle() -> bool:
    """Whether little else is going on, so that timing tells of the machine and not of others' work."""
    try:
        return os.getloadavg()[0] < BUSY_LOAD * (os.cpu_count() or 1)
    except OSError:  # this system does not tell
        return True


def get_timings_path() -> Path:
    """Where it is written down what was decided."""
    return get_cache_dir() / "timings.json"


def _compute_decision_key(config: Config, model: PreTrainedModel, windows: Tensor) -> str:
    """What a decision holds for, as a digest: the machine, torch, the model's tensors, the batch, and what was left open."""
    key_values: dict[str, Any] = {
        name: value for name, value in asdict(config.trainer).items() if name in TUNED_FIELDS
    }
    device = select_device(config)
    key_values |= {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
    }
    key_values |= {
        "processor": read_cpu_field(),
        "cores": os.cpu_count(),
        "threads there": torch.get_num_threads(),
    }
    key_values |= {
        "windows": list(windows.shape),
        "tensors": [(name, list(p.shape)) for name, p in model.named_parameters()],
    }
    key_values |= {"memory": str(getattr(model.config, "memory", None))}
    return hashlib.sha256(json.dumps(key_values, sort_keys=True).encode()).hexdigest()[:32]


def _read_decisions() -> dict[str, Any]:
    """What has been decided on this machine; nothing where that cannot be read."""
    try:
        document = json.loads(get_timings_path().read_text(encoding="utf-8"))
        return dict(document["decided"]) if document["format"] == TIMINGS_FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _check_decision(decision: Any) -> dict[str, Any] | None:
    """What was decided before, where that is something that could be decided, and holds still."""
    if (
        not isinstance(decision, dict)
        or set(decision) != {*TUNED_FIELDS, "threads", "quiet"}
        or not isinstance(decision["threads"], dict)
    ):
        return None
    if not decision["quiet"] and is_machine_idle():  # others were in the way then, and are not now
        return None
    is_valid = all(type(count) is int and count > 0 for count in decision["threads"].values())
    is_valid = is_valid and decision["precision"] in ("32-true", "bf16-mixed")
    return decision if is_valid else None


def _write_decisions(decisions: dict[str, Any]) -> None:
    """Write down what is known, whole or not at all; a place that cannot be written costs the next run its seconds."""
    path = get_timings_path()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.atomic_write(
            path, json.dumps({"format": TIMINGS_FORMAT, "decided": decisions}, indent=1) + "\n"
        )


def _get_threads_per_process(trainer: TrainerConfig) -> int:
    """So many threads each process may have."""
    return max(1, torch.get_num_threads() // trainer.devices)


def _choose_threads(trainer: TrainerConfig, model: PreTrainedModel, windows: Tensor) -> int:
    """One thread or one for each core: what takes a step faster."""
    if _get_threads_per_process(trainer) == 1:
        return 1
    seconds_by_count = {
        count: _time_training_step(model, windows, count, use_bf16=False)
        for count in (1, _get_threads_per_process(trainer))
    }
    return min(seconds_by_count, key=seconds_by_count.__getitem__)


def _choose_fastest(
    config: Config, trainer: TrainerConfig, model: PreTrainedModel, windows: Tensor
) -> TrainerConfig:
    """The fastest way, by steps that are taken and forgotten; of several processes each for itself."""
    candidates = _list_candidates(trainer, on_cpu=True)
    if len(candidates) == 1:
        return candidates[0]
    best_seconds = [float("inf")] * len(candidates)
    for _ in range(2):  # in turn, so that another program's work does not fall on one way alone
        for index, candidate in enumerate(candidates):
            with use_training_kernels(replace(config, trainer=candidate), model):
                seconds = _time_training_step(
                    model,
                    windows,
                    candidate.num_threads,
                    use_bf16=candidate.precision == "bf16-mixed",
                )
            best_seconds[index] = min(best_seconds[index], seconds)
    # Half precision has to be clearly faster to be taken.
    costs = [
        seconds / (1 if candidate.precision == "32-true" else 0.85)
        for candidate, seconds in zip(candidates, best_seconds, strict=True)
    ]
    return candidates[costs.index(min(costs))]


def _list_candidates(trainer: TrainerConfig, on_cpu: bool) -> list[TrainerConfig]:
    """What `auto` may stand for, the best last where it is not timed."""
    has_bf16 = on_cpu or (torch.cuda.is_available() and torch.cuda.is_bf16_supported())
    candidates = (
        [replace(trainer, precision="32-true")] if trainer.precision == "auto" else [trainer]
    )
    if trainer.precision == "auto" and has_bf16:
        candidates.append(replace(trainer, precision="bf16-mixed"))
    return candidates


def _time_training_step(
    model: PreTrainedModel, windows: Tensor, threads: int, use_bf16: bool
) -> float:
    torch.set_num_threads(threads)
    best_seconds = float("inf")
    parameters = [p for p in model.parameters() if p.requires_grad]
    for _ in range(TIMED_STEPS):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=use_bf16):
            loss = model(windows, use_cache=False).logits.float().logsumexp(-1).sum()
        torch.autograd.grad(loss, parameters, allow_unused=True)
        best_seconds = min(best_seconds, time.perf_counter() - start)
    return best_seconds
