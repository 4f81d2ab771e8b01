"""Choose the number of threads and the precision of a run by timing a step, once per machine."""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dmt import files
from dmt.config import Config, TrainerConfig
from dmt.config_io import get_cache_dir
from dmt.errors import UserError
from dmt.ops import read_cpu_field
from dmt.training.launch import broadcast_config
from dmt.training.trainer import select_device, use_training_kernels

TIMED_WINDOWS = 4  # windows of a timed step; enough to tell how long a larger one takes
TIMED_STEPS = 3  # the fastest of them counts
AUTOTUNE_FILE, AUTOTUNE_VERSION = "autotune.json", 3
TUNED_FIELDS = ("precision",)
BUSY_LOAD = 0.75  # runnable processes per core from which on a timing is not kept for good
MIN_BF16_GAIN = 0.85  # bf16 has to take at most this share of the time to be chosen


def autotune(config: Config, model: PreTrainedModel, windows: Tensor) -> Config:
    """Decide `trainer.num_threads` and `trainer.precision` by timing a training step.

    One thread can be much faster than two for tiny models, or slower; bf16 is twice as fast on
    some processors and emulated on others. The run's config holds the decision, so a replay or a
    resume computes the same. `autotune.json` in the cache folder (`DMT_CACHE`, by default
    `~/.cache/dmt`) holds it too, so that the same command on the same machine gives the same
    digits. Digits depend on the precision, so one decision holds for any number of threads and
    processes. A decision made on a busy machine is made again once the machine is idle.

    Args:
        config: Settings, in which `auto` and 0 stand for what is to be decided.
        model: The model to train; nothing in it changes.
        windows: Token ids of a micro-batch `(windows, tokens)`.

    Returns:
        The settings with the decision. torch's number of threads is set.
    """
    trainer = config.trainer
    if select_device(config).type != "cpu":
        trainer = replace(
            _list_candidates(trainer, on_cpu=False)[-1],
            num_threads=trainer.num_threads or _get_threads_per_process(trainer),
        )
    elif not trainer.num_threads or len(_list_candidates(trainer, on_cpu=True)) > 1:
        trainer = _tune_on_cpu(config, model, windows)
    trainer = broadcast_config(trainer)
    torch.set_num_threads(trainer.num_threads)
    return replace(config, trainer=trainer)


def _tune_on_cpu(config: Config, model: PreTrainedModel, windows: Tensor) -> TrainerConfig:
    trainer, devices = config.trainer, str(config.trainer.devices)
    key, decisions = _compute_decision_key(config, model, windows), _read_decisions()
    decision = _check_decision(decisions.get(key))
    known_counts = {} if decision is None else decision["num_threads"]
    num_threads = (
        trainer.num_threads or known_counts.get(devices) or _choose_threads(trainer, model, windows)
    )
    is_idle = is_machine_idle()
    thread_counts = {} if trainer.num_threads else {devices: num_threads}
    trainer = replace(trainer, num_threads=num_threads)
    if decision is None:
        trainer = _choose_fastest(config, trainer, model, windows)
        new_decision = {name: getattr(trainer, name) for name in TUNED_FIELDS} | {
            "num_threads": thread_counts,
            "idle": is_idle,
        }
    else:
        trainer = replace(trainer, **{name: decision[name] for name in TUNED_FIELDS})
        new_decision = decision | {"num_threads": known_counts | thread_counts}
    if new_decision != decision:
        _write_decisions(decisions | {key: new_decision})
    return trainer


def is_machine_idle() -> bool:
    """Return whether little else runs, so that a timing is about the machine."""
    try:
        return os.getloadavg()[0] < BUSY_LOAD * (os.cpu_count() or 1)
    except (OSError, AttributeError):  # this system does not tell
        return True


def get_autotune_path() -> Path:
    """Return the file that holds the decisions of this machine."""
    return get_cache_dir() / AUTOTUNE_FILE


def _compute_decision_key(config: Config, model: PreTrainedModel, windows: Tensor) -> str:
    """Return a digest of what a decision holds for: machine, torch, model, batch, what is open."""
    device = select_device(config)
    values = {
        **{name: getattr(config.trainer, name) for name in TUNED_FIELDS},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "processor": read_cpu_field(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "windows": list(windows.shape),
        "tensors": [(name, list(p.shape)) for name, p in model.named_parameters()],
        "memory": str(getattr(model.config, "memory", None)),
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def _read_decisions() -> dict[str, Any]:
    """Return the decisions made on this machine, or none if the file cannot be read."""
    try:
        document = json.loads(get_autotune_path().read_text(encoding="utf-8"))
        return dict(document["decisions"]) if document["format"] == AUTOTUNE_VERSION else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _check_decision(decision: Any) -> dict[str, Any] | None:
    """Return an earlier decision if it is valid and still holds."""
    if (
        not isinstance(decision, dict)
        or set(decision) != {*TUNED_FIELDS, "num_threads", "idle"}
        or not isinstance(decision["num_threads"], dict)
    ):
        return None
    if not decision["idle"] and is_machine_idle():  # made on a busy machine, which is idle now
        return None
    counts = decision["num_threads"].values()
    is_valid = all(type(count) is int and count > 0 for count in counts)
    return decision if is_valid and decision["precision"] in ("32-true", "bf16-mixed") else None


def _write_decisions(decisions: dict[str, Any]) -> None:
    """Save decisions; if they cannot be saved the next run times again."""
    document = {"format": AUTOTUNE_VERSION, "decisions": decisions}
    with suppress(OSError, UserError):  # UserError: there is no home folder
        path = get_autotune_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        files.atomic_write(path, json.dumps(document, indent=1) + "\n")


def _get_threads_per_process(trainer: TrainerConfig) -> int:
    return max(1, torch.get_num_threads() // trainer.devices)


def _choose_threads(trainer: TrainerConfig, model: PreTrainedModel, windows: Tensor) -> int:
    """Return one thread or one per core, whichever takes a step faster."""
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
    """Return the candidate whose steps are fastest; each process times for itself."""
    candidates = _list_candidates(trainer, on_cpu=True)
    if len(candidates) == 1:
        return candidates[0]
    best_seconds = [float("inf")] * len(candidates)
    for _ in range(2):  # in turns, so that other processes do not slow down one candidate alone
        for index, candidate in enumerate(candidates):
            with use_training_kernels(replace(config, trainer=candidate), model):
                seconds = _time_training_step(
                    model,
                    windows,
                    candidate.num_threads,
                    use_bf16=candidate.precision == "bf16-mixed",
                )
            best_seconds[index] = min(best_seconds[index], seconds)
    costs = [
        seconds / (1 if candidate.precision == "32-true" else MIN_BF16_GAIN)
        for candidate, seconds in zip(candidates, best_seconds, strict=True)
    ]
    return candidates[costs.index(min(costs))]


def _list_candidates(trainer: TrainerConfig, on_cpu: bool) -> list[TrainerConfig]:
    """Return what `auto` may stand for; without timing the last one is the best."""
    if trainer.precision != "auto":
        return [trainer]
    # Old GPUs emulate bfloat16, which is slower than float32.
    has_bf16 = on_cpu or (
        torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    full = replace(trainer, precision="32-true")
    return [full, replace(trainer, precision="bf16-mixed")] if has_bf16 else [full]


def _time_training_step(
    model: PreTrainedModel, windows: Tensor, threads: int, use_bf16: bool
) -> float:
    """Return the seconds of the fastest of a few forward and backward passes."""
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
