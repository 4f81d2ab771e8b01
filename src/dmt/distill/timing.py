"""With how many threads, in which precision and with what attention a run computes: timed once on a machine, then known."""

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

from dmt import disk
from dmt.config import Config, TrainerConfig
from dmt.distill.fitting import compute_device, computing
from dmt.distill.processes import as_the_first
from dmt.memory.products import processor
from dmt.settings import cache_folder

WINDOWS = 4
"""Of a large piece of a step so many are enough to tell how long it takes."""
STEPS_TIMED = 3
"""Steps by which a way to compute is judged, the fastest of them."""
FORMAT = 2
WAY = ("precision", "attention")
BUSY = 0.75
"""Programs waiting for each core, of late, from which on a machine is too busy for what is timed to be kept for good."""


def measured(config: Config, model: PreTrainedModel, windows: Tensor) -> Config:
    """`config` with `trainer.threads`, `.precision` and `.attention` decided by timing a training step, and threads set.

    For tiny models one thread can beat two by far, or lose; half precision is twice as fast on some processors and
    emulated on others. What was decided stands in the run's config, so a replay or a resume computes the same; and in
    `timings.json` under `DMT_CACHE` (`~/.cache/dmt`), so that the same command on the same machine computes the same, too:
    what is timed twice may come out twice, and then no digit would be equal. Digits depend on precision and attention, so
    these are decided once for any number of threads and processes. What was decided on a busy machine holds until it is quiet.
    """
    trainer = config.trainer
    if compute_device(config).type != "cpu":
        trainer = replace(_ways(trainer, on_cpu=False)[-1], threads=trainer.threads or _cores(trainer))
    elif not trainer.threads or len(_ways(trainer, on_cpu=True)) > 1:  # else nothing is left open
        key, known, devices = _about(config, model, windows), _known(), str(trainer.devices)
        before = _remembered(known.get(key))
        threads = trainer.threads or (before or {"threads": {}})["threads"].get(devices) or _threads(trainer, model, windows)
        calm, counts = quiet(), {} if trainer.threads else {devices: threads}
        trainer = replace(trainer, threads=threads)
        if before is None:
            trainer = _way(config, trainer, model, windows)
            made = {name: getattr(trainer, name) for name in WAY} | {"threads": counts, "quiet": calm}
        else:
            trainer = replace(trainer, **{name: before[name] for name in WAY})
            made = before | {"threads": before["threads"] | counts}
        if made != before:
            _remember(known | {key: made})
    trainer = as_the_first(trainer)
    torch.set_num_threads(trainer.threads)
    return replace(config, trainer=trainer)


def quiet() -> bool:
    """Whether little else is going on, so that timing tells of the machine and not of others' work."""
    try:
        return os.getloadavg()[0] < BUSY * (os.cpu_count() or 1)
    except OSError:  # this system does not tell
        return True


def timings() -> Path:
    """Where it is written down what was decided."""
    return cache_folder() / "timings.json"


def _about(config: Config, model: PreTrainedModel, windows: Tensor) -> str:
    """What a decision holds for, as a digest: the machine, torch, the model's tensors, the batch, and what was left open."""
    asked: dict[str, Any] = {name: value for name, value in asdict(config.trainer).items() if name in WAY}
    device = compute_device(config)
    asked |= {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type, "torch": torch.__version__}
    asked |= {"processor": processor(), "cores": os.cpu_count(), "threads there": torch.get_num_threads()}
    asked |= {"windows": list(windows.shape), "tensors": [(name, list(p.shape)) for name, p in model.named_parameters()]}
    asked |= {"memory": str(getattr(model.config, "memory", None))}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]


def _known() -> dict[str, Any]:
    """What has been decided on this machine; nothing where that cannot be read."""
    try:
        found = json.loads(timings().read_text(encoding="utf-8"))
        return dict(found["decided"]) if found["format"] == FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _remembered(decided: Any) -> dict[str, Any] | None:
    """What was decided before, where that is something that could be decided, and holds still."""
    if not isinstance(decided, dict) or set(decided) != {*WAY, "threads", "quiet"} or not isinstance(decided["threads"], dict):
        return None
    if not decided["quiet"] and quiet():  # others were in the way then, and are not now
        return None
    right = all(type(count) is int and count > 0 for count in decided["threads"].values())
    right = right and decided["precision"] in ("32-true", "bf16-mixed") and decided["attention"] in ("sdpa", "batched")
    return decided if right else None


def _remember(decided: dict[str, Any]) -> None:
    """Write down what is known, whole or not at all; a place that cannot be written costs the next run its seconds."""
    file = timings()
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        disk.write(file, json.dumps({"format": FORMAT, "decided": decided}, indent=1) + "\n")


def _cores(trainer: TrainerConfig) -> int:
    """So many threads each process may have."""
    return max(1, torch.get_num_threads() // trainer.devices)


def _threads(trainer: TrainerConfig, model: PreTrainedModel, windows: Tensor) -> int:
    """One thread or one for each core: what takes a step faster."""
    if _cores(trainer) == 1:
        return 1
    timed = {count: _step_seconds(model, windows, count, half=False) for count in (1, _cores(trainer))}
    return min(timed, key=timed.__getitem__)


def _way(config: Config, trainer: TrainerConfig, model: PreTrainedModel, windows: Tensor) -> TrainerConfig:
    """The fastest way, by steps that are taken and forgotten; of several processes each for itself."""
    ways = _ways(trainer, on_cpu=True)
    if len(ways) == 1:
        return ways[0]
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(2):  # in turn, so that another program's work does not fall on one way alone
        for way in ways:
            with computing(replace(config, trainer=way), model):
                taken = _step_seconds(model, windows, way.threads, half=way.precision == "bf16-mixed")
            best[way] = min(best[way], taken)
    # Half precision has to be clearly faster to be taken.
    return min(ways, key=lambda way: best[way] / (1 if way.precision == "32-true" else 0.85))


def _ways(trainer: TrainerConfig, on_cpu: bool) -> list[TrainerConfig]:
    """What `auto` may stand for, the best last where it is not timed."""
    half = on_cpu or (torch.cuda.is_available() and torch.cuda.is_bf16_supported())
    ways = [replace(trainer, precision="32-true")] if trainer.precision == "auto" else [trainer]
    if trainer.precision == "auto" and half:
        ways.append(replace(trainer, precision="bf16-mixed"))
    if trainer.attention != "auto":
        return ways
    plain = [replace(way, attention="sdpa") for way in ways]
    # Half precision is judged with the attention it would be trained with: torch's own is slow there on a CPU.
    batched = [replace(way, attention="batched") for way in ways if on_cpu and way.precision == "bf16-mixed"]
    return [*plain, *batched]


def _step_seconds(model: PreTrainedModel, windows: Tensor, threads: int, half: bool) -> float:
    torch.set_num_threads(threads)
    best = float("inf")
    learnt = [p for p in model.parameters() if p.requires_grad]
    for _ in range(STEPS_TIMED):
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(windows, use_cache=False).logits.float().logsumexp(-1).sum()
        torch.autograd.grad(loss, learnt, allow_unused=True)
        best = min(best, time.perf_counter() - began)
    return best
