"""What rows are worth to a student that is no longer trained: it reads text beside its teacher, without a gradient step.

    python benchmarks/reading.py [--steps 1400] [--seeds 0] [--threads 1] [--only "corpus it knows;corpus it does not"]

First the default run, with room for rows in its last layer that stay empty; then it reads training text, 2,048 tokens at a
time, and is measured on test text as its rows grow. `corpus it knows`: trained on speeches and biographies, reads more
speeches. `corpus it does not`: trained on biographies alone, reads speeches. Rows nearer than `--recombine` become one.
Takes about half an hour a part.
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
from dmt.models.conversion import get_associative_memories
from dmt.models.loading import load_teacher
from dmt.training.trainer import keep_freed_memory, silence_libraries

PARTS = {"corpus it knows": "[speeches,biographies]", "corpus it does not": "[biographies]"}
MARKS = [100, 300, 1_000, 3_000, 10_000, 30_000, 100_000]
READ = 1_000_000
"""Tokens that are read at most."""


def trained(corpora: str, steps: int, seed: int, threads: int, scratch: str) -> Any:
    """A student whose associative memories are empty; trained in the folder `scratch`, where there is none yet."""
    if there := sorted(Path(scratch).glob("version_*/student")):
        return AutoModelForCausalLM.from_pretrained(there[-1]).eval()
    words = [
        f"data.corpora={corpora}",
        f"seed={seed}",
        f"stages.end_to_end_steps={steps - 100}",
        "memory.write_start=1",
    ]
    words += [
        f"trainer.num_threads={threads}",
        "trainer.precision=bf16-mixed",
        "trainer.progress_bar=false",
    ]
    words += [
        f"trainer.log_dir={scratch}",
        "trainer.validate_every=0",
        f"data.test_tokens={TEST_TOKENS}",
    ]
    command = [
        sys.executable,
        str(ROOT / "distill.py"),
        str(ROOT / "configs" / "associative.yaml"),
        *words,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr.strip().splitlines()[-1])
    return AutoModelForCausalLM.from_pretrained(
        next(Path(scratch).glob("version_*/student"))
    ).eval()


def reading(part: str, seed: int, options: argparse.Namespace) -> None:
    """A line of the table each time there are so many rows."""
    teacher, tokenizer = load_teacher("embedded")
    # The order of text is drawn from the seed: with another one what is read is not what was seen last.
    data = TextDataModule(
        load_config(None, ["data.corpora=[speeches]", f"seed={seed + 1000}"]),
        tokenizer,
        READ // 2048,
    )
    data.setup()
    test = select_first_windows(data.corpora[0].test, TEST_TOKENS)
    if options.students:
        student = trained(
            PARTS[part],
            options.steps,
            seed,
            options.threads,
            f"{options.students}/{part} {seed}".replace(" ", "_"),
        )
    else:
        with tempfile.TemporaryDirectory() as scratch:
            student = trained(PARTS[part], options.steps, seed, options.threads, scratch)
    for memory in get_associative_memories(student).values():
        memory.insert_policy = InsertPolicy(options.novelty, options.recombine, MARKS[-1], 0.0)
    numbers = itertools.count(1)
    marks, tokens, began, alone = list(MARKS), 0, time.perf_counter(), None

    def measure(rows: int) -> None:
        nonlocal alone
        found = measure_fidelity(student, teacher, test, 8)
        alone = alone or found
        less = 1 - found.kl / alone.kl
        print(
            f"| {part} | {seed} | {rows:,} | {tokens:,} | {found.student_perplexity:.2f} | {found.ppl_ratio:.4f} "
            f"| {found.kl:.4f} | {less:.1%} | {time.perf_counter() - began:.0f} |",
            flush=True,
        )

    measure(0)
    for step, windows in enumerate(data.train_dataloader()):
        # The first rows one window at a time, so that there are marks for few rows too.
        for part_of_batch in windows.split(1 if step < 2 else len(windows)):
            propose_rows(student, teacher, part_of_batch)
            tokens += part_of_batch.numel()
            for memory in get_associative_memories(student).values():
                memory.commit_step(
                    step,
                    0.0,
                    lambda count: np.array([next(numbers) for _ in range(count)], np.int64),
                )
            rows = max(len(memory.rows) for memory in get_associative_memories(student).values())
            if marks and rows >= marks[0]:
                measure(rows)
                marks = [mark for mark in marks if mark > rows]
    measure(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--novelty", type=float, default=0.2)
    parser.add_argument("--recombine", type=float, default=0.45)
    parser.add_argument(
        "--students",
        default="",
        help="a folder in which trained students are kept for the next time",
    )
    parser.add_argument("--only", default=";".join(PARTS))
    options = parser.parse_args()
    silence_libraries()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    head = (
        "what is read | seed | rows | tokens read | perplexity | ratio | KL | less KL by | seconds"
    )
    print(f"| {head} |\n|{'---|' * (head.count('|') + 1)}")
    for part in options.only.split(";"):
        for seed in map(int, options.seeds.split(",")):
            reading(part, seed, options)


if __name__ == "__main__":
    main()
