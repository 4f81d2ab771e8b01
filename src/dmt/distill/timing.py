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

STEPS_TIMED = 3
"""Steps by which a way to compute is judged, the fastest of them."""
FORMAT = 1
DECIDED = ("threads", "precision", "attention")
BUSY = 0.75
"""Programs waiting for each core, of late, from which on a machine is too busy for what is timed to be kept for good."""


def measured(config: Config, model: PreTrainedModel, windows: Tensor) -> Config:
    """`config` with `trainer.threads`, `.precision` and `.attention` decided by timing a training step, and threads set.

    For tiny models one thread can beat two by far, or lose; half precision is twice as fast on some processors and
    emulated on others. What was decided stands in the run's config, so a replay or a resume computes the same; and in
    `timings.json` under `DMT_CACHE` (`~/.cache/dmt`), so that the same command on the same machine computes the same, too:
    what is timed twice may come out twice, and then no digit would be equal. What was decided on a busy machine holds until
    it is quiet.
    """
    on_cpu = compute_device(config).type == "cpu"
    if not on_cpu or (config.trainer.threads and len(_ways(config.trainer, on_cpu)) == 1):
        trainer = _timed(config, model, windows)  # nothing is left open that would be timed
    else:
        key, known = _about(config, model, windows), _known()
        before = _remembered(known.get(key), config.trainer)
        trainer = before or _timed(config, model, windows)
        if before is None:
            _remember(known | {key: {name: getattr(trainer, name) for name in DECIDED} | {"quiet": quiet()}})
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
    asked: dict[str, Any] = {name: value for name, value in asdict(config.trainer).items() if name in (*DECIDED, "devices")}
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


def _remembered(decided: Any, trainer: TrainerConfig) -> TrainerConfig | None:
    """`trainer` as it was decided before, where that is something that could be decided."""
    if not isinstance(decided, dict) or set(decided) != {*DECIDED, "quiet"}:
        return None
    if not decided["quiet"] and quiet():  # others were in the way then, and are not now
        return None
    threads, precision, attention = (decided[name] for name in DECIDED)
    right = type(threads) is int and threads > 0 and precision in ("32-true", "bf16-mixed") and attention in ("sdpa", "batched")
    return replace(trainer, threads=threads, precision=precision, attention=attention) if right else None


def _remember(decided: dict[str, Any]) -> None:
    """Write down what is known, whole or not at all; a place that cannot be written costs the next run its seconds."""
    file = timings()
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        disk.write(file, json.dumps({"format": FORMAT, "decided": decided}, indent=1) + "\n")


def _timed(config: Config, model: PreTrainedModel, windows: Tensor) -> TrainerConfig:
    """The fastest way, by steps that are taken and forgotten; of several processes each for itself."""
    trainer, on_cpu = config.trainer, compute_device(config).type == "cpu"
    cores = max(1, torch.get_num_threads() // trainer.devices)
    if not trainer.threads:
        timed = {count: _step_seconds(model, windows, count, half=False) for count in ({1, cores} if on_cpu else ())}
        trainer = replace(trainer, threads=min(timed, key=timed.__getitem__, default=cores))
    ways = _ways(trainer, on_cpu)
    if len(ways) == 1 or not on_cpu:
        return ways[-1]
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
