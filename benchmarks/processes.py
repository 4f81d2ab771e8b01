"""One process and two on the same batches: how far their curves are apart, and how long they take.

    python -m benchmarks.processes [--steps 400] [--devices 2] [--config configs/default.yaml,configs/associative.yaml]

Each process computes with one thread in float32, so that two have twice the cores. A difference is of one logged number (losses,
every measure of validation text, shares and counts of rows), above 1 as a share of it.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
UNTIL = (100, 200, 400, 700, 1_400)
Curve = dict[tuple[int, str], float]


def run(config: str, devices: int, steps: int) -> tuple[Curve, dict[str, Any]]:
    """The curve of a run of `steps` steps, one in fourteen layer-wise, and its `run.json`."""
    with tempfile.TemporaryDirectory() as scratch:
        words = [f"trainer.devices={devices}", f"trainer.log_dir={scratch}", "trainer.threads=1", "trainer.precision=32-true"]
        words += ["trainer.log_every=1", "trainer.validate_every=100", "trainer.progress=false", "trainer.accelerator=cpu"]
        words += [f"stages.layerwise_steps={steps // 14}", f"stages.end_to_end_steps={steps - steps // 14}"]
        done = subprocess.run(
            [sys.executable, str(ROOT / "distill.py"), str(ROOT / config), *words], capture_output=True, text=True, check=False
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


def apart(first: Curve, second: Curve, until: int) -> float:
    """The largest difference up to a step."""
    assert set(first) == set(second), "the same numbers are logged at the same steps"
    return max(abs(first[at] - second[at]) / max(1.0, abs(first[at])) for at in first if at[0] < until)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--config", default="configs/default.yaml,configs/associative.yaml")
    given = parser.parse_args()
    until = [step for step in UNTIL if step < given.steps] + [given.steps]
    print(f"| config | processes | seconds to train | prose KL | {' | '.join(f'apart until step {step}' for step in until)} |")
    print(f"|---|---:|---:|---:|{'---:|' * len(until)}", flush=True)
    for config in given.config.split(","):
        alone: Curve = {}
        for devices in (1, given.devices):
            curve, found = run(config, devices, given.steps)
            alone = alone or curve
            numbers = [f"{apart(alone, curve, step):.1e}" if devices > 1 else "" for step in until]
            figures = f"{found['seconds']['train']:.0f} | {found['fidelity']['speeches']['kl']:.5f}"
            print(f"| `{config}` | {devices} | {figures} | {' | '.join(numbers)} |", flush=True)


if __name__ == "__main__":
    main()
