"""A student without training reads text beside its teacher and stores rows: how much they help.

    python benchmarks/reading.py [--steps 1400] [--seeds 0] [--threads 1]
                                 [--only "known corpus;new corpus"]

A student is distilled with empty associative memory in its last layer. Then it reads training text,
2,048 tokens at a time, and is measured on test text as its rows grow. `known corpus`: distilled on
speeches and biographies, reads more speeches. `new corpus`: distilled on biographies alone, reads
speeches. Rows nearer than `--merge-distance` are merged. Takes about half an hour per corpus.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from runs import ROOT, TEST_TOKENS
from transformers import AutoModelForCausalLM

import dmt  # noqa: F401  registers the student
from dmt.config_io import load_config
from dmt.data.windows import TextDataModule, select_first_windows
from dmt.distillation.row_sync import propose_rows
from dmt.evaluation.metrics import measure_fidelity
from dmt.memory.insert_policy import InsertPolicy
from dmt.models.loading import load_teacher
from dmt.models.memories import get_associative_memories
from dmt.training.trainer import keep_freed_memory, silence_libraries

CORPORA = {"known corpus": "[speeches,biographies]", "new corpus": "[biographies]"}
ROW_COUNTS = [100, 300, 1_000, 3_000, 10_000, 30_000, 100_000]
COLUMNS = (
    "corpus",
    "seed",
    "rows",
    "tokens read",
    "perplexity",
    "ratio",
    "KL",
    "less KL by",
    "seconds",
)
MAX_TOKENS = 1_000_000  # tokens that are read at most


def load_or_train(corpora: str, steps: int, seed: int, threads: int, folder: str) -> Any:
    """Load the student in `folder`, or train one; its associative memories are empty."""
    if students := sorted(Path(folder).glob("version_*/student")):
        return AutoModelForCausalLM.from_pretrained(students[-1]).eval()
    overrides = [
        f"data.corpora={corpora}",
        f"seed={seed}",
        f"stages.end_to_end_steps={steps - 100}",
        "memory.write_start=1",
    ]
    overrides += [
        f"trainer.num_threads={threads}",
        "trainer.precision=bf16-mixed",
        "trainer.progress_bar=false",
    ]
    overrides += [
        f"trainer.log_dir={folder}",
        "trainer.validate_every=0",
        f"data.test_tokens={TEST_TOKENS}",
    ]
    command = [
        sys.executable,
        str(ROOT / "distill.py"),
        str(ROOT / "configs" / "associative.yaml"),
        *overrides,
    ]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise SystemExit(process.stderr.strip().splitlines()[-1])
    return AutoModelForCausalLM.from_pretrained(next(Path(folder).glob("version_*/student"))).eval()


def measure_reading(name: str, seed: int, args: argparse.Namespace) -> None:
    """Read text; print a row of the table at every count of `ROW_COUNTS`."""
    teacher, tokenizer = load_teacher("embedded")
    # The seed shuffles the text: another one than in training changes what is read.
    data = TextDataModule(
        load_config(None, ["data.corpora=[speeches]", f"seed={seed + 1000}"]),
        tokenizer,
        MAX_TOKENS // 2048,
    )
    data.setup()
    test = select_first_windows(data.corpora[0].test, TEST_TOKENS)
    if args.students:
        student = load_or_train(
            CORPORA[name],
            args.steps,
            seed,
            args.threads,
            f"{args.students}/{name} {seed}".replace(" ", "_"),
        )
    else:
        with tempfile.TemporaryDirectory() as folder:
            student = load_or_train(CORPORA[name], args.steps, seed, args.threads, folder)
    for memory in get_associative_memories(student).values():
        memory.insert_policy = InsertPolicy(
            args.min_distance, args.merge_distance, ROW_COUNTS[-1], 0.0
        )
    row_ids = itertools.count(1)
    remaining_counts, tokens, start, baseline = list(ROW_COUNTS), 0, time.perf_counter(), None

    def measure(rows: int) -> None:
        nonlocal baseline
        fidelity = measure_fidelity(student, teacher, test, 8)
        baseline = baseline or fidelity
        reduction = 1 - fidelity.kl / baseline.kl
        cells = (
            name,
            str(seed),
            f"{rows:,}",
            f"{tokens:,}",
            f"{fidelity.student_perplexity:.2f}",
            f"{fidelity.ppl_ratio:.4f}",
            f"{fidelity.kl:.4f}",
            f"{reduction:.1%}",
            f"{time.perf_counter() - start:.0f}",
        )
        print(f"| {' | '.join(cells)} |", flush=True)

    measure(0)
    for step, windows in enumerate(data.train_dataloader()):
        # The first windows one at a time, to measure small numbers of rows too.
        for part in windows.split(1 if step < 2 else len(windows)):
            propose_rows(student, teacher, part)
            tokens += part.numel()
            for memory in get_associative_memories(student).values():
                memory.commit_step(
                    step,
                    0.0,
                    lambda count: np.array([next(row_ids) for _ in range(count)], np.int64),
                )
            rows = max(len(memory.rows) for memory in get_associative_memories(student).values())
            if remaining_counts and rows >= remaining_counts[0]:
                measure(rows)
                remaining_counts = [count for count in remaining_counts if count > rows]
    measure(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--min-distance", type=float, default=0.2)
    parser.add_argument("--merge-distance", type=float, default=0.45)
    parser.add_argument(
        "--students",
        default="",
        help="folder of trained students, which are reused",
    )
    parser.add_argument("--only", default=";".join(CORPORA))
    args = parser.parse_args()
    silence_libraries()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name in args.only.split(";"):
        for seed in map(int, args.seeds.split(",")):
            measure_reading(name, seed, args)


if __name__ == "__main__":
    main()
