"""Where the default run's seconds go: `python -m benchmarks.where [CONFIG] [key=value ...] [--steps N]`.

A run of a few steps with clocks around its parts, in a folder that is thrown away: imports and set-up, the parts of a
training step, and what the processor does in one, by kind of operation (torch's profiler, five steps).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.tables import Row, table

KINDS = {
    "matrix products": ("mm", "linear", "mkldnn", "bmm", "addmv", "mv", "matmul"),
    "attention": ("attention", "softmax"),
    "choosing slots": ("topk", "ge", "gt", "nonzero", "scatter", "gather", "index", "embedding"),
    "copies": ("copy_", "clone", "cat", "fill_", "zero_", "contiguous", "resize"),
    "optimiser": ("_fused_adam", "_foreach", "lerp", "addcdiv", "addcmul"),
}
"""Kinds of operation by a part of their names, the first that fits; the rest is `other arithmetic`."""
PROFILED = 5
COMPARED, AROUND = "student and teacher compared", "Lightning, around the steps"


class Clocks:
    """Seconds spent in functions, by name, with those of other clocked functions inside taken out."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._inside: list[float] = []

    def around(self, holder: Any, name: str, told: str) -> None:
        """Clock `holder.name` under the name `told`."""
        inner: Callable[..., Any] = getattr(holder, name)

        def clocked(*given: Any, **named: Any) -> Any:
            self._inside.append(0.0)
            began = time.perf_counter()
            try:
                return inner(*given, **named)
            finally:
                taken = time.perf_counter() - began
                self.seconds[told].append(taken - self._inside.pop())
                if self._inside:
                    self._inside[-1] += taken

        setattr(holder, name, clocked)


def kind_of(operation: str) -> str:
    """Which of `KINDS` an operation of torch belongs to."""
    name = operation.removeprefix("aten::").removeprefix("mkldnn::")
    return next(
        (kind for kind, parts in KINDS.items() if any(part in name for part in parts)),
        "other arithmetic",
    )


def child(config: str, words: list[str], steps: int) -> dict[str, Any]:
    """Everything that is measured, in a process that has imported nothing yet."""
    began = time.perf_counter()
    from dmt.distillation import run as distil_run  # imports are a part of what is measured

    imports = time.perf_counter() - began
    import pytorch_lightning as pl
    import torch
    from torch.profiler import ProfilerActivity, profile

    from dmt import config_io
    from dmt.distillation import module
    from dmt.training import callbacks

    clocks = Clocks()
    for name, told in (
        ("load_teacher", "set-up: teacher"),
        ("transplant", "set-up: student"),
        ("measured", "set-up: timing threads and precision"),
        ("compare", COMPARED),
        ("fit", AROUND),
        ("measure", "end: test text"),
        ("_conclude", "end: saving, samples, report"),
    ):
        clocks.around(distil_run, name, told)
    clocks.around(distil_run.TextDataModule, "setup", "set-up: text and tokens")
    clocks.around(module.DistillationModule, "calibrate", "set-up: calibration")
    clocks.around(module.DistillationModule, "training_step", "step: rest")
    clocks.around(module.DistillationModule, "validation_step", "validation while training")
    clocks.around(module.DistillationModule, "manual_backward", "step: backward")
    clocks.around(module.DistillationModule, "clip_gradients", "step: clipping")
    clocks.around(module, "observe_teacher", "step: teacher")
    clocks.around(module, "observe", "step: student")
    clocks.around(module, "distillation_terms", "step: losses")
    clocks.around(module, "hold", "step: threshold")
    clocks.around(torch.optim.AdamW, "step", "step: optimiser")
    clocks.around(module.DistillationModule, "_write", "step: curves")
    clocks.around(
        torch.utils.data.dataloader._SingleProcessDataLoaderIter,
        "_next_data",
        "step: waiting for data",
    )
    clocks.around(pl.Trainer, "save_checkpoint", "checkpoints")
    for callback in (
        callbacks.SlotUsage,
        callbacks.SideBySideSamples,
        callbacks.ChartGroups,
        callbacks.StoredRowUsage,
    ):
        for hook in [name for name in vars(callback) if name.startswith("on_")]:
            clocks.around(callback, hook, f"{callback.__name__} for TensorBoard")
    kinds: dict[str, float] = defaultdict(float)
    plain = module.DistillationModule.training_step

    def profiled(self: Any, tokens: Any, batch_idx: int) -> None:
        if self.global_step < steps - PROFILED:
            plain(self, tokens, batch_idx)
            return
        with profile(activities=[ProfilerActivity.CPU]) as watched:
            plain(self, tokens, batch_idx)
        for event in watched.key_averages():
            kinds[kind_of(event.key)] += event.self_cpu_time_total / 1e6 / PROFILED

    module.DistillationModule.training_step = profiled  # type: ignore[method-assign]
    clocks.around(module.DistillationModule, "training_step", "profiler")
    with tempfile.TemporaryDirectory() as scratch:
        layerwise = steps // 4
        given = [
            f"trainer.log_dir={scratch}",
            "trainer.progress_bar=false",
            f"stages.layerwise_steps={layerwise}",
        ]
        given += [
            f"stages.end_to_end_steps={steps - layerwise}",
            f"trainer.validate_every={steps // 2}",
            *words,
        ]
        loaded = config_io.load_config(config, given)
        total = time.perf_counter()
        distil_run.run(loaded)
        total = time.perf_counter() - total
        used = json.loads(next(Path(scratch).glob("version_*/run.json")).read_text())
    step_count = len(clocks.seconds["step: rest"]) - PROFILED
    compared = clocks.seconds.pop(COMPARED)
    corpora = len(loaded.data.corpora)  # each is measured once before training and once after
    clocks.seconds["set-up: student before training, measured"] = compared[:corpora]
    clocks.seconds["end: test text"] += compared[corpora:]
    del clocks.seconds["profiler"]
    parts = {
        name: sum(each) for name, each in clocks.seconds.items() if not name.startswith("step: ")
    }
    inner = {
        name: statistics.median(each) * len(each) / max(1, step_count + PROFILED)
        for name, each in clocks.seconds.items()
        if name.startswith("step: ")
    }
    return {
        "imports": imports,
        "total": total,
        "parts": parts,
        "step": inner,
        "kinds": dict(kinds),
        "steps": steps,
        "threads": used["num_threads"],
        "precision": used["precision"],
    }


def rows(config: str, words: list[str], steps: int) -> list[Row]:
    """What `child` found, in a process of its own: seconds of a run's parts, milliseconds of a step's."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.where",
        "--child",
        config,
        *words,
        "--steps",
        str(steps),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr.strip().splitlines()[-1])
    found = json.loads(done.stdout.strip().splitlines()[-1])
    parts = found["parts"]
    outside = parts.pop(AROUND) / found["steps"]
    setup = {"imports": found["imports"]} | {
        name: taken for name, taken in parts.items() if name.startswith("set-up")
    }
    parts = (
        setup
        | {"imports and set-up, all": sum(setup.values())}
        | {n: s for n, s in parts.items() if n not in setup}
    )
    told = f"{found['threads']} threads, {found['precision']}"
    lines: list[Row] = [
        {"part of the run": name, "seconds": taken} for name, taken in parts.items()
    ]
    step = dict(sorted(found["step"].items(), key=lambda part: -part[1])) | {AROUND: outside}
    for title, seconds in (
        (f"part of a step, {told}", step),
        ("operations of a step", found["kinds"]),
    ):
        whole = sum(seconds.values())
        ordered = sorted(seconds.items(), key=lambda part: -part[1])
        lines += [
            {title: name.removeprefix("step: "), "ms": 1e3 * taken, "share": taken / whole}
            for name, taken in ordered
        ]
    return lines


def figures(quick: bool = False) -> list[Row]:
    """The default run, cut short."""
    return rows("configs/default.yaml", [], 12 if quick else 80)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", default="configs/default.yaml")
    parser.add_argument("words", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_intermixed_args()
    if given.child:
        print(json.dumps(child(given.config, given.words, given.steps)))
        return
    print(table(rows(given.config, given.words, given.steps)))


if __name__ == "__main__":
    main()
