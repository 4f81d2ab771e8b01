"""One process and two on the same batches: how far their curves are apart, and how long they take.

    python -m benchmarks.processes [--steps 1400] [--devices 2] [--threads 2] [--precision 32-true]
                                   [--config configs/default.yaml,configs/associative.yaml] [KEY=VALUE ...]

All share the same cores: one process has `--threads` threads, two have half of them each; in float32, or as `--precision` says.
A difference is of one logged number, above 1 as a share of it: of what training logs (losses, shares and counts of rows), and of
all, with every measure of validation text, whose windows processes share out.
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
UNTIL = (100, 200, 400, 700, 1_400)
Curve = dict[tuple[int, str], float]


def run(config: str, devices: int, steps: int, more: list[str]) -> tuple[Curve, dict[str, Any]]:
    """The curve of a run of `steps` steps, one in fourteen layer-wise, and its `run.json`; `more` words set what they like."""
    with tempfile.TemporaryDirectory() as scratch:
        words = [f"trainer.devices={devices}", f"trainer.log_dir={scratch}", *more]
        words += [
            "trainer.log_every=1",
            "trainer.validate_every=100",
            "trainer.progress_bar=false",
            "trainer.accelerator=cpu",
        ]
        words += [
            f"stages.layerwise_steps={steps // 14}",
            f"stages.end_to_end_steps={steps - steps // 14}",
        ]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}"]
        done = subprocess.run(
            [
                sys.executable,
                *(launcher if devices > 1 else []),
                str(ROOT / "distill.py"),
                str(ROOT / config),
                *words,
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{config}: {done.stderr.strip().splitlines()[-1]}")
        made = Path(scratch) / "version_0"
        with (made / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        curve = {
            (int(row["step"]), name): float(value)
            for row in rows
            for name, value in row.items()
            if value and name not in ("step", "epoch")
        }
        return curve, json.loads((made / "run.json").read_text())


def apart(first: Curve, second: Curve, until: int, training: bool = False) -> float:
    """The largest difference up to a step; `training` leaves out what is measured on validation text."""
    assert set(first) == set(second), "the same numbers are logged at the same steps"
    told = [at for at in first if at[0] < until and (not training or at[1].startswith(TRAINING))]
    return max(abs(first[at] - second[at]) / max(1.0, abs(first[at])) for at in told)


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
    parser.add_argument("more", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args()
    until = [step for step in UNTIL if step < given.steps] + [given.steps]
    columns = ["losses apart", *(f"anything until step {step}" for step in until)]
    print(f"| config | processes x threads | seconds to train | prose KL | {' | '.join(columns)} |")
    print(f"|---|---:|---:|---:|{'---:|' * len(columns)}", flush=True)
    for config in given.config.split(","):
        alone: Curve = {}
        for devices in (1, given.devices):
            threads = max(1, given.threads // devices)
            words = [
                f"trainer.num_threads={threads}",
                f"trainer.precision={given.precision}",
                *given.more,
            ]
            curve, found = run(config, devices, given.steps, words)
            alone = alone or curve
            numbers = [
                apart(alone, curve, given.steps, training=True),
                *(apart(alone, curve, step) for step in until),
            ]
            told = " | ".join(f"{number:.1e}" if devices > 1 else "" for number in numbers)
            figures = f"{found['seconds']['train']:.0f} | {found['fidelity']['speeches']['kl']:.5f}"
            print(f"| `{config}` | {devices} x {threads} | {figures} | {told} |", flush=True)


if __name__ == "__main__":
    main()
