"""Profile the default run: `python -m benchmarks.where [CONFIG] [key=value ...] [--steps N]`.

Times the parts of a short run in a temporary folder: imports and set-up, the parts of a training
step, and the operations of a step by kind (torch's profiler, five steps).
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

# Kinds of operation by parts of their names. The first kind that matches counts; others are
# `other arithmetic`.
KINDS = {
    "matrix products": ("mm", "linear", "mkldnn", "bmm", "addmv", "mv", "matmul"),
    "attention": ("attention", "softmax"),
    "choosing slots": ("topk", "ge", "gt", "nonzero", "scatter", "gather", "index", "embedding"),
    "copies": ("copy_", "clone", "cat", "fill_", "zero_", "contiguous", "resize"),
    "optimizer": ("_fused_adam", "_foreach", "lerp", "addcdiv", "addcmul"),
}
PROFILED_STEPS = 5
FIDELITY, LIGHTNING = "fidelity", "Lightning, outside the steps"


class Clocks:
    """Seconds spent in functions by label, without those of clocked functions they call."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._inside: list[float] = []

    def around(self, owner: Any, name: str, label: str) -> None:
        """Clock the function `name` of a module or class under a label."""
        original: Callable[..., Any] = getattr(owner, name)

        def clocked(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                elapsed = time.perf_counter() - start
                self.seconds[label].append(elapsed - self._inside.pop())
                if self._inside:
                    self._inside[-1] += elapsed

        setattr(owner, name, clocked)


def kind_of(operation: str) -> str:
    """Return the kind of an operation of torch."""
    name = operation.removeprefix("aten::").removeprefix("mkldnn::")
    return next(
        (kind for kind, parts in KINDS.items() if any(part in name for part in parts)),
        "other arithmetic",
    )


def measure_in_this_process(config: str, overrides: list[str], steps: int) -> dict[str, Any]:
    """Run a distillation with clocks; the process must not have imported dmt's libraries."""
    start = time.perf_counter()
    from dmt.distillation import run as distillation_run  # importing is measured too

    imports = time.perf_counter() - start
    import pytorch_lightning as pl
    import torch
    from torch.profiler import ProfilerActivity, profile

    from dmt import config_io
    from dmt.distillation import module
    from dmt.tasks import run_task
    from dmt.training import callbacks
    from dmt.training import module as training_module

    clocks = Clocks()
    for name, label in (
        ("load_teacher", "set-up: teacher"),
        ("convert_blocks", "set-up: student"),
        ("autotune", "set-up: timing threads and precision"),
        ("measure_fidelity", FIDELITY),
        ("fit", LIGHTNING),
        ("evaluate_student", "end: test text"),
    ):
        clocks.around(distillation_run, name, label)
    clocks.around(distillation_run._Run, "finish", "end: saving, samples, report")
    clocks.around(distillation_run.TextDataModule, "setup", "set-up: text and tokens")
    clocks.around(module.DistillationModule, "calibrate", "set-up: calibration")
    clocks.around(module.DistillationModule, "training_step", "step: rest")
    clocks.around(module.DistillationModule, "validation_step", "validation while training")
    clocks.around(module.DistillationModule, "manual_backward", "step: backward")
    clocks.around(training_module, "clip_gradients", "step: clipping")
    clocks.around(module, "forward_teacher", "step: teacher")
    clocks.around(module, "forward_with_activations", "step: student")
    clocks.around(module, "compute_loss_terms", "step: losses")
    clocks.around(module, "update_threshold", "step: threshold")
    clocks.around(torch.optim.AdamW, "step", "step: optimizer")
    clocks.around(module.DistillationModule, "log_metrics", "step: curves")
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
    training_step = module.DistillationModule.training_step

    def profiled(self: Any, tokens: Any, batch_idx: int) -> None:
        if self.global_step < steps - PROFILED_STEPS:
            training_step(self, tokens, batch_idx)
            return
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            training_step(self, tokens, batch_idx)
        for event in profiler.key_averages():
            kinds[kind_of(event.key)] += event.self_cpu_time_total / 1e6 / PROFILED_STEPS

    module.DistillationModule.training_step = profiled  # type: ignore[method-assign]
    clocks.around(module.DistillationModule, "training_step", "profiler")
    with tempfile.TemporaryDirectory() as scratch:
        layerwise = steps // 4
        args = [
            f"trainer.log_dir={scratch}",
            "trainer.progress_bar=false",
            f"stages.layerwise_steps={layerwise}",
        ]
        args += [
            f"stages.end_to_end_steps={steps - layerwise}",
            f"trainer.validate_every={steps // 2}",
            *overrides,
        ]
        loaded = config_io.load_config(config, args)
        total = time.perf_counter()
        run_task(loaded)
        total = time.perf_counter() - total
        record = json.loads(next(Path(scratch).glob("version_*/run.json")).read_text())
    step_count = len(clocks.seconds["step: rest"]) - PROFILED_STEPS
    compared = clocks.seconds.pop(FIDELITY)
    corpora = len(loaded.data.corpora)  # measured once before training and once after
    clocks.seconds["set-up: fidelity before training"] = compared[:corpora]
    clocks.seconds["end: test text"] += compared[corpora:]
    del clocks.seconds["profiler"]
    parts = {
        name: sum(seconds)
        for name, seconds in clocks.seconds.items()
        if not name.startswith("step: ")
    }
    step_parts = {
        name: statistics.median(seconds) * len(seconds) / max(1, step_count + PROFILED_STEPS)
        for name, seconds in clocks.seconds.items()
        if name.startswith("step: ")
    }
    return {
        "imports": imports,
        "total": total,
        "parts": parts,
        "step": step_parts,
        "kinds": dict(kinds),
        "steps": steps,
        "threads": record["num_threads"],
        "precision": record["precision"],
    }


def measure(config: str, overrides: list[str], steps: int) -> list[Row]:
    """Measure in a new process: seconds of the parts of a run, milliseconds of those of a step."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.where",
        "--child",
        config,
        *overrides,
        "--steps",
        str(steps),
    ]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise SystemExit(process.stderr.strip().splitlines()[-1])
    result = json.loads(process.stdout.strip().splitlines()[-1])
    parts = result["parts"]
    outside = parts.pop(LIGHTNING) / result["steps"]
    setup = {"imports": result["imports"]} | {
        name: elapsed for name, elapsed in parts.items() if name.startswith("set-up")
    }
    parts = (
        setup
        | {"imports and set-up, all": sum(setup.values())}
        | {n: s for n, s in parts.items() if n not in setup}
    )
    setup_text = f"{result['threads']} threads, {result['precision']}"
    lines: list[Row] = [
        {"part of the run": name, "seconds": elapsed} for name, elapsed in parts.items()
    ]
    step = dict(sorted(result["step"].items(), key=lambda part: -part[1])) | {LIGHTNING: outside}
    for title, seconds in (
        (f"part of a step, {setup_text}", step),
        ("operations of a step", result["kinds"]),
    ):
        total = sum(seconds.values())
        ordered = sorted(seconds.items(), key=lambda part: -part[1])
        lines += [
            {title: name.removeprefix("step: "), "ms": 1e3 * elapsed, "share": elapsed / total}
            for name, elapsed in ordered
        ]
    return lines


def figures(quick: bool = False) -> list[Row]:
    """Measure a short default run."""
    return measure("configs/default.yaml", [], 12 if quick else 80)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", default="configs/default.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    if args.child:
        print(json.dumps(measure_in_this_process(args.config, args.overrides, args.steps)))
        return
    print(table(measure(args.config, args.overrides, args.steps)))


if __name__ == "__main__":
    main()
