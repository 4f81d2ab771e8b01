"""One step of distillation: a plain dense student, our student, and ours with a logit cache.

    python -m benchmarks.step [--quick] [--repeats 3] [--threads N] [--only PREFIX]

GPT-2 124M's shape with random weights, 8 windows of 256 random tokens, float32, AdamW, KL alone.
Every measurement runs in a new process, interleaved; medians over repeats. Peak is the highest
memory of the process in a step after the first, above its memory before a model was created and
above weights (also the teacher's), gradients and optimizer state. Variants that begin with `loss`
compute the loss alone, from hidden states to their gradients and those of the head, without a
model. `liger` needs `pip install --no-deps liger-kernel` (0.8.5 runs on a CPU without triton).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from dmt.config import (
    Config,
    DataConfig,
    FeaturalConfig,
    LogitCacheConfig,
    LossConfig,
    MemoryConfig,
    TrainerConfig,
)
from dmt.distillation.logit_cache import (
    open_logit_cache,
    pack_record,
    sample_distribution,
    unpack_records,
)
from dmt.distillation.losses import Batch, LossScales, compute_loss_terms
from dmt.memory.sparsity_budget import reset_counts
from dmt.models.calibration import calibrate_memories
from dmt.models.conversion import convert_blocks
from dmt.models.forward import ForwardOutputs, forward_teacher, forward_with_activations
from dmt.models.memories import get_featural_memories
from dmt.ops import use_onednn_linear
from dmt.training.trainer import keep_freed_memory

SHAPES = {
    "full": {
        "n_layer": 12,
        "n_embd": 768,
        "n_head": 12,
        "vocab_size": 50_257,
        "windows": 8,
        "block": 256,
    },
    "quick": {
        "n_layer": 2,
        "n_embd": 32,
        "n_head": 2,
        "vocab_size": 500,
        "windows": 4,
        "block": 32,
    },
}
CHUNK, MICRO = 256, 2  # `loss.chunk_size` and `data.micro_batch_size` of our variants
STEPS = (
    "dense",
    "dense, freed memory kept",
    "ours",
    "ours, k=32",
    "ours, cache",
    "ours, k=32, cache",
)
LOSSES = ("loss: dense", "loss: liger", "loss: ours", "loss: ours, cache")


def get_shape(name: str) -> tuple[GPT2Config, int, int]:
    """Return a config without dropout, the number of windows, and the tokens in a window."""
    shape = dict(SHAPES[name])
    windows, block = shape.pop("windows"), shape.pop("block")
    return (
        GPT2Config(**shape, n_positions=block, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0),
        windows,
        block,
    )


def make_tokens(name: str, windows: int, seed: int = 0) -> torch.Tensor:
    """Return random token ids `(windows, block)`."""
    config, _, block = get_shape(name)
    return torch.randint(
        0, config.vocab_size, (windows, block), generator=torch.Generator().manual_seed(seed)
    )


def make_settings(name: str, cache_dir: Path, chunk: int = CHUNK) -> Config:
    """Return the settings of the measured run."""
    config, windows, block = get_shape(name)
    data = DataConfig(seq_len=block, batch_size=windows)
    cache_config = LogitCacheConfig(dir=str(cache_dir), top_k=min(128, config.vocab_size))
    return replace(
        Config(),
        data=data,
        loss=LossConfig(hidden_mse=0, block_fvu=0, chunk_size=chunk),
        logit_cache=cache_config,
        trainer=TrainerConfig(progress_bar=False),
    )


def get_memory_config(variant: str, name: str) -> MemoryConfig:
    """Return the memory of a variant: the default, or with the same k for every token."""
    return FeaturalConfig(k=32 if name == "full" else 4) if "k=32" in variant else FeaturalConfig()


def prepare(name: str, folder: Path) -> None:
    """Save a teacher, students calibrated on random text, and a logit cache in `folder`."""
    torch.manual_seed(0)
    config, windows, _ = get_shape(name)
    teacher = GPT2LMHeadModel(config).eval().requires_grad_(False)
    for parameter in teacher.parameters():
        if parameter.dim() > 1:
            parameter.data *= 2  # logits of a new GPT-2 are nearly uniform
    torch.save(teacher.state_dict(), folder / "teacher.pt")
    for variant in ("ours", "ours, k=32"):
        use_onednn_linear(teacher)
        student, _ = convert_blocks(teacher, [get_memory_config(variant, name)] * config.n_layer)
        calibrate_memories(student, teacher, make_tokens(name, 4, seed=1))
        torch.save(student.state_dict(), folder / f"{variant}.pt")
    open_logit_cache(
        make_settings(name, folder), teacher, make_tokens(name, windows), range(windows)
    )


def measure(
    variant: str, name: str, folder: Path, steps: int, chunk: int, micro: int
) -> dict[str, float]:
    """Return seconds, peak in MB and loss of a step in this process, which must be new."""
    before = _status("VmRSS")
    step, state_bytes = (_build_loss if variant.startswith("loss") else _build_step)(
        variant, name, folder, chunk, micro
    )
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    if variant != "dense":
        keep_freed_memory()
    value = step()
    Path("/proc/self/clear_refs").write_text("5")
    seconds, cpu_seconds = [], []
    for _ in range(steps):
        start, cpu_start = time.perf_counter(), time.process_time()
        value = step()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    times = {"seconds": min(seconds), "processor": min(cpu_seconds)}
    return {
        **times,
        "peak": _status("VmHWM") - before - state_bytes() / 1e6,
        "state": state_bytes() / 1e6,
        "value": value,
    }


def _status(field: str) -> float:
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field)
    )
    return int(line.split()[1]) * 1024 / 1e6


def _bytes(tensors: Any) -> int:
    return sum(
        tensor.numel() * tensor.element_size() for tensor in {id(t): t for t in tensors}.values()
    )


def _build_step(
    variant: str, name: str, folder: Path, chunk: int, micro: int
) -> tuple[Callable[[], float], Callable[[], int]]:
    """Return a step that returns its loss, and a function that counts the bytes of its state.

    The state is weights, gradients and optimizer state.
    """
    config, windows, _ = get_shape(name)
    settings, tokens = make_settings(name, folder, chunk), make_tokens(name, windows)
    teacher: Any = GPT2LMHeadModel(config)
    teacher.load_state_dict(torch.load(folder / "teacher.pt", weights_only=True))
    teacher.eval().requires_grad_(False)
    student: Any
    if variant.startswith("dense"):
        student = GPT2LMHeadModel(config)
        student.load_state_dict(teacher.state_dict())
        for parameter in student.parameters():
            parameter.data *= 1.01
    else:
        use_onednn_linear(teacher)
        student, _ = convert_blocks(teacher, [get_memory_config(variant, name)] * config.n_layer)
        student.load_state_dict(
            torch.load(folder / f"{variant.removesuffix(', cache')}.pt", weights_only=True)
        )
        reset_counts(get_featural_memories(student).values())
    cache = (
        open_logit_cache(settings, teacher, tokens, range(windows))
        if variant.endswith("cache")
        else None
    )
    if cache is not None:
        teacher = None
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)

    def dense() -> float:
        optimizer.zero_grad(set_to_none=False)
        with torch.no_grad():
            teacher_logits = teacher(tokens).logits
        student_logits = student(tokens).logits
        loss = (
            F.kl_div(
                F.log_softmax(student_logits, -1), F.softmax(teacher_logits, -1), reduction="none"
            )
            .sum(-1)
            .mean()
        )
        loss.backward()
        optimizer.step()
        return loss.item()

    def ours() -> float:
        optimizer.zero_grad(set_to_none=False)
        total, scales = 0.0, LossScales(torch.ones(config.n_layer), torch.ones(()))
        for indices in torch.arange(windows).split(micro):
            part = tokens[indices]
            batch = Batch(part, torch.ones_like(part, dtype=torch.bool), float(tokens.numel()), 1.0)
            teacher_outputs = (
                forward_teacher(teacher, part) if cache is None else cache.read(indices)
            )
            terms = compute_loss_terms(
                forward_with_activations(student, part),
                teacher_outputs,
                batch,
                settings.loss,
                scales,
            )
            terms["kl"].backward()
            total += terms["kl"].item()
        optimizer.step()
        return total

    def state_bytes() -> int:
        models = [student, *([] if teacher is None else [teacher])]
        state = [
            v
            for param_state in optimizer.state.values()
            for v in param_state.values()
            if isinstance(v, torch.Tensor)
        ]
        grads = [p.grad for p in student.parameters() if p.grad is not None]
        return _bytes(
            [t for model in models for t in model.state_dict(keep_vars=True).values()]
            + state
            + grads
        )

    return dense if variant.startswith("dense") else ours, state_bytes


def _build_loss(
    variant: str, name: str, folder: Path, chunk: int, micro: int
) -> tuple[Callable[[], float], Callable[[], int]]:
    """Return the same for the loss alone, with gradients of hidden states and student head."""
    config, windows, block = get_shape(name)
    tokens = make_tokens(name, windows)
    generator = torch.Generator().manual_seed(2)
    heads = [torch.nn.Linear(config.n_embd, config.vocab_size, bias=False) for _ in range(2)]
    hidden = [torch.randn(windows * block, config.n_embd, generator=generator) for _ in range(2)]
    for head in heads:
        with torch.no_grad():
            head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * 0.1)
    student_hidden, teacher_hidden = hidden[0].requires_grad_(), hidden[1]
    heads[1].requires_grad_(False)
    settings = make_settings(name, folder, chunk)
    records: Any = None
    if variant.endswith("cache"):
        k, offsets = (
            settings.logit_cache.top_k,
            torch.rand(len(teacher_hidden), 1, generator=generator),
        )
        parts = zip(teacher_hidden.split(block), offsets.split(block), strict=True)
        with torch.no_grad():
            records = np.stack(
                [
                    pack_record(window, sample_distribution(heads[1](part), k, part_offsets))
                    for window, (part, part_offsets) in enumerate(parts)
                ]
            )
    batch = Batch.full_step(tokens)

    def loss() -> torch.Tensor:
        if variant == "loss: dense":
            student_logits, teacher_logits = heads[0](student_hidden), heads[1](teacher_hidden)
            return (
                F.kl_div(
                    F.log_softmax(student_logits, -1),
                    F.softmax(teacher_logits, -1),
                    reduction="none",
                )
                .sum(-1)
                .mean()
            )
        if variant == "loss: liger":
            from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

            fused = LigerFusedLinearJSDLoss(
                weight_hard_loss=0.0,
                weight_soft_loss=1.0,
                beta=0.0,
                compiled=False,
                chunk_size=chunk,
            )
            return fused(
                student_hidden, heads[0].weight, teacher_hidden, heads[1].weight, tokens.flatten()
            )
        shape = (windows, block, -1)
        teacher: Any = ForwardOutputs(teacher_hidden.view(shape), heads[1])
        if records is not None:
            teacher = unpack_records(records)
        scales = LossScales(torch.ones(1), torch.ones(()))
        return compute_loss_terms(
            ForwardOutputs(student_hidden.view(shape), heads[0]),
            teacher,
            batch,
            settings.loss,
            scales,
        )["kl"]

    def step() -> float:
        value = loss()
        value.backward()
        loss_value = value.item()
        for tensor in (student_hidden, heads[0].weight):
            tensor.grad.zero_()
        return loss_value

    def state_bytes() -> int:
        return _bytes(
            [
                student_hidden,
                teacher_hidden,
                *(head.weight for head in heads),
                student_hidden.grad,
                heads[0].weight.grad,
            ]
        )

    return step, state_bytes


def measure_variants(
    shape: str = "full",
    repeats: int = 3,
    threads: int | None = None,
    only: str = "",
    steps: int = 1,
    chunk: int = CHUNK,
    micro: int = MICRO,
    inside: bool = False,
) -> list[dict[str, Any]]:
    """Measure every variant and return a row for each.

    With `inside` everything runs in this process, which is quick, but peaks are meaningless.

    Returns:
        Rows of `variant`, `value`, the medians `seconds`, `processor` (of all threads) and `peak`
        (MB), their ratios to the plain variant, and all `repeats`.
    """
    results: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        common = [
            sys.executable,
            "-m",
            "benchmarks.step",
            "--shape",
            shape,
            "--folder",
            folder,
            "--chunk",
            str(chunk),
        ]
        common += [
            "--micro",
            str(micro),
            "--steps",
            str(steps),
            "--threads",
            str(threads or torch.get_num_threads()),
        ]
        variants = [variant for variant in (*STEPS, *LOSSES) if variant.startswith(only)]
        if any(variant in STEPS for variant in variants):
            if inside:
                prepare(shape, Path(folder))
            else:
                subprocess.run(
                    [*common, "--measure", "prepare"], check=True, stdout=subprocess.DEVNULL
                )
        for _ in range(repeats):
            for variant in variants:
                if inside:
                    if variant != "loss: liger" or importlib.util.find_spec("liger_kernel"):
                        results.setdefault(variant, []).append(
                            measure(variant, shape, Path(folder), steps, chunk, micro)
                        )
                    continue
                process = subprocess.run(
                    [*common, "--measure", variant], check=False, capture_output=True, text=True
                )
                if process.returncode == 0:
                    results.setdefault(variant, []).append(
                        json.loads(process.stdout.splitlines()[-1])
                    )
                    print(variant, results[variant][-1], file=sys.stderr, flush=True)
                else:
                    print(f"{variant}: {process.stderr.splitlines()[-1]}", file=sys.stderr)
    table = []
    for variant, repeats_of_variant in results.items():
        row = {
            name: statistics.median(result[name] for result in repeats_of_variant)
            for name in repeats_of_variant[0]
        }
        table.append({"variant": variant, **row, "repeats": repeats_of_variant})
    for row in table:
        baselines = {True: ["loss: dense"], False: ["dense", "dense, freed memory kept"]}[
            row["variant"].startswith("loss")
        ]
        plain = [other for other in table if other["variant"] in baselines]
        for name in (
            ("seconds", "processor", "peak") if plain else ()
        ):  # the better of the plain variants
            row[f"{name}_ratio"] = row[name] / min(other[name] for other in plain)
    return table


def figures(quick: bool = False) -> list[dict[str, Any]]:
    """Measure every variant, for `python -m benchmarks`."""
    variant_rows = (
        measure_variants("quick", repeats=1, inside=True) if quick else measure_variants()
    )
    return [
        {name: value for name, value in row.items() if name != "repeats"} for row in variant_rows
    ]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a tiny shape, once, in this process: to see that it runs",
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--steps",
        type=int,
        default=1,
        help="steps after the first of each process; the fastest counts",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="", help="prefix of the names of variants")
    parser.add_argument(
        "--chunk", type=int, default=CHUNK, help="loss.chunk_size; Liger's chunk_size too"
    )
    parser.add_argument("--micro", type=int, default=MICRO, help="data.micro_batch_size of ours")
    for hidden in ("--measure", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--shape", default="full", choices=SHAPES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measure == "prepare":
        prepare(args.shape, Path(args.folder))
    elif args.measure:
        torch.manual_seed(0)
        print(
            json.dumps(
                measure(
                    args.measure,
                    args.shape,
                    Path(args.folder),
                    args.steps,
                    args.chunk,
                    args.micro,
                )
            )
        )
    else:
        shape, repeats = ("quick", 1) if args.quick else (args.shape, args.repeats)
        variant_rows = measure_variants(
            shape,
            repeats,
            args.threads,
            args.only,
            args.steps,
            args.chunk,
            args.micro,
            inside=args.quick,
        )
        description = f"chunk {args.chunk}, micro-batch {args.micro}, {repeats} repeats"
        print(f"torch {torch.__version__}, {args.threads} threads, {description}")
        print(
            f"{'':26}{'seconds':>9}{'ratio':>7}{'of CPU':>9}{'ratio':>7}{'peak MB':>9}{'ratio':>7}"
            f"{'state MB':>9}{'value':>9}"
        )
        for row in variant_rows:
            ratios = [
                f"{row[name]:.2f}" if name in row else ""
                for name in ("seconds_ratio", "processor_ratio", "peak_ratio")
            ]
            print(
                f"{row['variant']:26}{row['seconds']:9.3f}{ratios[0]:>7}{row['processor']:9.3f}{ratios[1]:>7}{row['peak']:9.0f}{ratios[2]:>7}{row['state']:9.0f}"
                f"{row['value']:9.5f}"
            )


if __name__ == "__main__":
    main()
