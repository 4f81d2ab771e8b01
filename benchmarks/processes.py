"""Compare one process with two on the same batches: differences of their curves, and times.

    python -m benchmarks.processes [--steps 1400] [--devices 2] [--threads 2]
        [--precision 32-true] [--config configs/default.yaml,configs/associative.yaml]
        [KEY=VALUE ...]

All share the same cores: one process has `--threads` threads, two have half of them each. A
difference is the largest one of a logged number, relative above 1. The first column takes only
what training logs (losses, shares and counts of rows), the others take measures of validation
text too, whose windows the processes share.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TRAINING = ("train/", "lr")
COMPARED_STEPS = (100, 200, 400, 700, 1_400)
Curve = dict[tuple[int, str], float]


def run(config: str, devices: int, steps: int, settings: list[str]) -> tuple[Curve, dict[str, Any]]:
    """Train `steps` steps, one in fourteen layer-wise; return the curve and `run.json`."""
    with tempfile.TemporaryDirectory() as scratch:
        args = [f"trainer.devices={devices}", f"trainer.log_dir={scratch}", *settings]
        args += [
            "trainer.log_every=1",
            "trainer.validate_every=100",
            "trainer.progress_bar=false",
            "trainer.accelerator=cpu",
        ]
        args += [
            f"stages.layerwise_steps={steps // 14}",
            f"stages.end_to_end_steps={steps - steps // 14}",
        ]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}"]
        process = subprocess.run(
            [
                sys.executable,
                *(launcher if devices > 1 else []),
                str(ROOT / "distill.py"),
                str(ROOT / config),
                *args,
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if process.returncode:
            raise SystemExit(f"{config}: {process.stderr.strip().splitlines()[-1]}")
        run_dir = Path(scratch) / "version_0"
        with (run_dir / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        curve = {
            (int(row["step"]), name): float(value)
            for row in rows
            for name, value in row.items()
            if value and name not in ("step", "epoch")
        }
        return curve, json.loads((run_dir / "run.json").read_text())


def largest_difference(
    first: Curve, second: Curve, last_step: int, only_training: bool = False
) -> float:
    """Return the largest difference before a step, with or without validation metrics."""
    assert set(first) == set(second), "the same numbers are logged at the same steps"
    points = [
        (step, name)
        for step, name in first
        if step < last_step and (not only_training or name.startswith(TRAINING))
    ]
    return max(abs(first[key] - second[key]) / max(1.0, abs(first[key])) for key in points)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1_400)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="of all processes together"
    )
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--config", default="configs/default.yaml,configs/associative.yaml")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_args()
    last_steps = [step for step in COMPARED_STEPS if step < args.steps] + [args.steps]
    columns = ["difference in training", *(f"difference until step {step}" for step in last_steps)]
    print(f"| config | processes x threads | seconds to train | prose KL | {' | '.join(columns)} |")
    print(f"|---|---:|---:|---:|{'---:|' * len(columns)}", flush=True)
    for config in args.config.split(","):
        reference: Curve = {}
        for devices in (1, args.devices):
            threads = max(1, args.threads // devices)
            settings = [
                f"trainer.num_threads={threads}",
                f"trainer.precision={args.precision}",
                *args.settings,
            ]
            curve, record = run(config, devices, args.steps, settings)
            reference = reference or curve
            numbers = [
                largest_difference(reference, curve, args.steps, only_training=True),
                *(largest_difference(reference, curve, step) for step in last_steps),
            ]
            differences = " | ".join(f"{number:.1e}" if devices > 1 else "" for number in numbers)
            figures = (
                f"{record['seconds']['train']:.0f} | {record['fidelity']['speeches']['kl']:.5f}"
            )
            print(f"| `{config}` | {devices} x {threads} | {figures} | {differences} |", flush=True)


if __name__ == "__main__":
    main()
