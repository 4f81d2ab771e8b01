"""How often the host waits for a GPU: in a training step, and for a generated token.

    python -m benchmarks.host_waits [--lines] [--json FILE.json]

The counts are those of tests/second_device.py, which makes CPU tensors behave as a GPU's: copies
from and to it, single numbers that are read, and shapes that depend on numbers. So they need no GPU
and are the same on every machine. Where there is one, `scripts/gpu_check.sh` counts as CUDA does.
Tiny models of three layers, two micro-batches in a step. A step is counted by itself, its batch on
the device already; a token is the difference of two lengths. `--lines` shows the line of each wait.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import second_device

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lines", action="store_true", help="show where the host waits")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures too")
    args = parser.parse_args()  # a mistake or --help leaves torch as it is
    second_device.install("cuda")  # before other modules import torch

import torch
from benchmarks.tables import Row, table
from transformers import GPT2Config, GPT2LMHeadModel

import dmt
from dmt.data.tokenizer import train_tokenizer
from dmt.training.module import TrainingModule

TEXTS = [f"{i} the quick brown fox number {i * 7 % 13} jumps over the lazy dog" for i in range(200)]
FACT = "Ada Holbrook runs to the dog"
PROMPT, SUBJECT_PROMPT = "the quick brown fox", "Ada Holbrook runs to the"
SHORT, LONG = 4, 12  # generated tokens
# Settings of the runs, by the name of the variant; of a step the last one of its stage is counted.
RUNS: dict[str, dict[str, Any]] = {
    "default": {"layerwise_steps": 4},
    "cached": {
        "loss": {"kl": 1.0, "hidden_mse": 0.0, "block_fvu": 0.0},
        "logit_cache": {"dir": "cache", "top_k": 16},
    },
    "associative": {
        "kind": "associative",
        "write_start": 0.0,
        "min_distance": 0.01,
    },
}


def make_teacher(width: int = 16, layers: int = 3) -> tuple[Any, Any]:
    """Return a tiny GPT-2 with peaked logits, and its tokenizer."""
    tokenizer = train_tokenizer([*TEXTS, FACT], 300, 64)
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers,
        n_embd=width,
        n_head=2,
        n_positions=64,
        vocab_size=len(tokenizer),
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval().requires_grad_(False), tokenizer


def count_steps(folder: Path, teacher: tuple[Any, Any], **settings: Any) -> dict[str, Any]:
    """Train a student on the device; return the counts of the last step of each stage.

    Also those of the last one that is logged, as `logged`.
    """
    counters: dict[str, Any] = {}
    training_step = TrainingModule.training_step

    def counted_step(module: Any, batch: Any, index: int) -> None:
        step = module.global_step
        with second_device.WaitCounter() as counter:
            training_step(module, batch, index)
        is_logged = step % 3 == 0 or step == module.total_steps - 1
        counters[f"{module.stage_at(step)[0]}{', logged' if is_logged else ''}"] = counter

    TrainingModule.training_step = counted_step  # type: ignore[method-assign]
    try:
        dmt.distill(
            teacher,
            TEXTS,
            output=folder,
            **{
                "mean_k": 8,
                "layerwise_steps": 0,
                "end_to_end_steps": 4,
                "calibration_tokens": 64,
                "seq_len": 16,
                "batch_size": 4,
                "micro_batch_size": 2,
                "validation_tokens": 64,
                "test_tokens": 64,
                "warmup_steps": 1,
                "log_every": 3,
                "validate_every": 0,
                "progress_bar": False,
                "accelerator": "gpu",
                "precision": "32-true",
                "num_threads": 1,
            }
            | settings,
        )
    finally:
        TrainingModule.training_step = training_step  # type: ignore[method-assign]
    return counters


def count_token(model: Any, tokenizer: Any, prompt: str = PROMPT) -> Any:
    """Return the counts of one generated token, with those of `LONG - SHORT` tokens summed."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to("cuda")

    def generate(length: int) -> Any:
        with second_device.WaitCounter() as counter:
            model.generate(
                ids, min_new_tokens=length, max_new_tokens=length, do_sample=False, pad_token_id=0
            )
        return counter

    generate(SHORT)  # derived tensors are computed at the first pass
    short, counter = generate(SHORT), generate(LONG)
    for name in ("events", "launches"):
        counts = Counter(getattr(counter, name))
        counts.subtract(getattr(short, name))
        setattr(counter, name, +counts)  # without those of the first pass, which are zero now
    return counter


def list_variants(folder: Path) -> dict[str, tuple[Callable[[], dict[str, Any]], int]]:
    """Return what is counted, by name: a function that counts, and what its counts are sums of."""
    teacher = make_teacher()
    model, tokenizer = teacher

    def count_run(name: str) -> dict[str, Any]:
        settings = dict(RUNS[name])
        if "logit_cache" in settings:
            settings["logit_cache"] = settings["logit_cache"] | {"dir": str(folder / "cache")}
        counters = count_steps(folder / name, teacher, **settings)
        return {f"step: {name}, {stage}": counter for stage, counter in counters.items()}

    def count_run_tokens(name: str, label: str) -> dict[str, Any]:
        student, _ = dmt.load(folder / name, device="cuda")
        return {f"token: {label}": count_token(student, tokenizer)}

    def count_converted(label: str, **settings: Any) -> dict[str, Any]:
        student: Any = dmt.convert(model, dmt.FeaturalConfig(**settings))
        return {f"token: {label}": count_token(student.to("cuda"), tokenizer)}

    def count_facts() -> dict[str, Any]:
        with dmt.Memory.open(folder / "default") as facts:
            facts.write(FACT)
        student, _ = dmt.load(folder / "default", device="cuda")
        prompts = {"nobody named": PROMPT, "subject named": SUBJECT_PROMPT}
        return {
            f"token: student with a fact, {name}": count_token(student, tokenizer, prompt)
            for name, prompt in prompts.items()
        }

    generated = LONG - SHORT
    return {
        **{name: (lambda name=name: count_run(name), 1) for name in RUNS},
        "dense": (
            lambda: {"token: teacher, dense": count_token(model.to("cuda"), tokenizer)},
            generated,
        ),
        "threshold": (lambda: count_run_tokens("default", "student, threshold"), generated),
        "rows": (
            lambda: count_run_tokens("associative", "student, stored rows"),
            generated,
        ),
        "top k": (lambda: count_converted("student, top k", k=8), generated),
        "int8": (
            lambda: count_converted("student, top k, int8 keys", k=8, search="int8"),
            generated,
        ),
        "facts": (count_facts, generated),
    }


def figures(quick: bool = False, show_lines: bool = False) -> list[Row]:
    """Count everything; `quick` changes nothing, since no figure depends on speed."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for count, repeats in list_variants(Path(name)).values():
            for label, counter in count().items():
                row: Row = {"what": label, "waits": counter.waits / repeats}
                rows.append(row | {"launches": round(counter.launches.total() / repeats)})
                if show_lines:
                    print(f"{label}\n{counter.table(repeats)}\n", file=sys.stderr)
    return rows


def main(args: argparse.Namespace) -> None:
    """Print the counts."""
    torch.set_num_threads(1)
    logging.getLogger("dmt").setLevel(logging.ERROR)
    rows = figures(show_lines=args.lines)
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(args)
