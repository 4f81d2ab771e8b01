"""What the benchmarks of fidelity share: one run of `distill.py` with settings, in a folder of its own, and its figures."""

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
TEST_TOKENS = 16_384
"""Tokens of each corpus on which the variants of a table are compared, the first of its test text."""
HEAD = "prose ratio | prose KL | prose top-1 | facts ratio | facts KL | recall | slots read | dead | seconds"


def distil(
    words: tuple[str, ...],
    steps: int,
    seed: int,
    threads: int,
    config: str = "configs/default.yaml",
) -> dict[str, Any]:
    """Figures, as in `run.json`, of a run of `steps` steps over all stages; the layer-wise stage keeps its length."""
    chosen = load_config(ROOT / config, words).stages
    layerwise = min(chosen.layerwise_steps, steps // 2)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        given = [
            f"seed={seed}",
            f"trainer.num_threads={threads}",
            "trainer.progress_bar=false",
            f"trainer.log_dir={scratch}",
        ]
        given += [
            "trainer.precision=bf16-mixed",
            "trainer.validate_every=0",
        ]
        given += [
            *words,
            f"stages.layerwise_steps={layerwise}",
            f"stages.end_to_end_steps={steps - layerwise}",
        ]
        command = [sys.executable, str(ROOT / "distill.py"), str(ROOT / config), *given]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(words)}: {done.stderr.strip().splitlines()[-1]}")
        found = json.loads(next(Path(scratch).glob("version_*/run.json")).read_text())
    return {**found, "wall": time.perf_counter() - began}


def cells(found: dict[str, Any]) -> str:
    """A run's figures in the order of `HEAD`."""
    prose, facts = found["fidelity"]["speeches"], found["fidelity"]["biographies"]
    used = found.get("slots", {}).values()
    read = f"{sum(u['active_per_token'] for u in used) / len(used):.1f}" if used else ""
    dead = f"{sum(u['dead'] for u in used):.0f}" if used else ""
    numbers = [
        f"{prose['ppl_ratio']:.4f}",
        f"{prose['kl']:.4f}",
        f"{prose['top1_agreement']:.4f}",
        f"{facts['ppl_ratio']:.4f}",
        f"{facts['kl']:.4f}",
    ]
    return " | ".join(
        [*numbers, f"{facts['recall']['student']:.4f}", read, dead, f"{found['wall']:.0f}"]
    )


def table(
    variants: dict[str, tuple[str, ...]],
    steps: int,
    seeds: list[int],
    threads: int,
    side_by_side: int,
) -> None:
    """Run every variant with every seed, `side_by_side` at a time, and print a row for each as it is done."""
    print(f"| variant | settings | seed | {HEAD} |\n|{'---|' * (HEAD.count('|') + 4)}")

    def one(job: tuple[str, tuple[str, ...], int]) -> None:
        name, words, seed = job
        found = distil((f"data.test_tokens={TEST_TOKENS}", *words), steps, seed, threads)
        print(f"| {name} | `{' '.join(words) or '-'}` | {seed} | {cells(found)} |", flush=True)

    jobs = [(name, words, seed) for name, words in variants.items() for seed in seeds]
    with ThreadPoolExecutor(side_by_side) as pool:
        list(pool.map(one, jobs))
