"""Shared by the benchmarks of fidelity: run `distill.py` and format its results."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dmt.config_io import load_config

ROOT = Path(__file__).parents[1]
TEST_TOKENS = 16_384  # of each corpus, the first of its test text
HEAD = (
    "prose ratio | prose KL | prose top-1 | facts ratio | facts KL | recall | slots read | dead"
    " | seconds"
)


def distill(
    settings: tuple[str, ...],
    steps: int,
    seed: int,
    threads: int,
    config: str = "configs/default.yaml",
) -> dict[str, Any]:
    """Run `steps` steps over all stages and return the content of `run.json`.

    The layer-wise stage keeps its length, up to half of the steps.
    """
    chosen = load_config(ROOT / config, settings).stages
    layerwise = min(chosen.layerwise_steps, steps // 2)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        args = [
            f"seed={seed}",
            f"trainer.num_threads={threads}",
            "trainer.progress_bar=false",
            f"trainer.log_dir={scratch}",
        ]
        args += [
            "trainer.precision=bf16-mixed",
            "trainer.validate_every=0",
        ]
        args += [
            *settings,
            f"stages.layerwise_steps={layerwise}",
            f"stages.end_to_end_steps={steps - layerwise}",
        ]
        command = [sys.executable, str(ROOT / "distill.py"), str(ROOT / config), *args]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if process.returncode:
            raise SystemExit(f"{' '.join(settings)}: {process.stderr.strip().splitlines()[-1]}")
        record = json.loads(next(Path(scratch).glob("version_*/run.json")).read_text())
    return {**record, "wall": time.perf_counter() - start}


def cells(record: dict[str, Any]) -> str:
    """Format the results of a run in the order of `HEAD`."""
    prose, facts = record["fidelity"]["speeches"], record["fidelity"]["biographies"]
    slots = record.get("slots", {}).values()
    read = f"{sum(u['active_per_token'] for u in slots) / len(slots):.1f}" if slots else ""
    dead = f"{sum(u['dead'] for u in slots):.0f}" if slots else ""
    numbers = [
        f"{prose['ppl_ratio']:.4f}",
        f"{prose['kl']:.4f}",
        f"{prose['top1_agreement']:.4f}",
        f"{facts['ppl_ratio']:.4f}",
        f"{facts['kl']:.4f}",
    ]
    return " | ".join(
        [*numbers, f"{facts['recall']['student']:.4f}", read, dead, f"{record['wall']:.0f}"]
    )


def table(
    variants: dict[str, tuple[str, ...]],
    steps: int,
    seeds: list[int],
    threads: int,
    side_by_side: int,
) -> None:
    """Run every variant with every seed, `side_by_side` at a time, and print a row for each."""
    print(f"| variant | settings | seed | {HEAD} |\n|{'---|' * (HEAD.count('|') + 4)}")

    def run_variant(job: tuple[str, tuple[str, ...], int]) -> None:
        name, settings, seed = job
        record = distill((f"data.test_tokens={TEST_TOKENS}", *settings), steps, seed, threads)
        print(f"| {name} | `{' '.join(settings) or '-'}` | {seed} | {cells(record)} |", flush=True)

    jobs = [(name, settings, seed) for name, settings in variants.items() for seed in seeds]
    with ThreadPoolExecutor(side_by_side) as pool:
        list(pool.map(run_variant, jobs))
