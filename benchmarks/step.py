"""One step of distillation: a dense student written the obvious way, ours, and ours with the teacher's answers on disk.

    python -m benchmarks.step [--quick] [--repeats 3] [--threads N] [--only WORD]

GPT-2 124M's shape with random weights, 8 windows of 256 random tokens, float32, AdamW, KL alone. Every measurement is a
process of its own, in turns; medians over repeats. Peak is the process's high-water mark during a step after the first,
above what it had before a model was made and above weights (the teacher's too), gradients and the optimiser's state. The
lines that begin with `loss` are the loss alone, from given hidden states to gradients in them and in the head, without a model.
`liger` needs `pip install --no-deps liger-kernel` (0.8.5 imports and runs on a CPU without triton).
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
from dmt.distillation.calibration import calibrate_memories
from dmt.distillation.logit_cache import (
    open_logit_cache,
    pack_record,
    sample_distribution,
    unpack_records,
)
from dmt.distillation.losses import Batch, LossScales, compute_loss_terms
from dmt.memory.sparsity_budget import reset_counts
from dmt.models.conversion import convert_blocks, get_featural_memories
from dmt.models.forward import ForwardOutputs, forward_teacher, forward_with_activations
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
CHUNK, MICRO = 256, 2
"""`loss.chunk_size` and `data.micro_batch_size` of our lines."""
STEPS = (
    "dense",
    "dense, freed memory kept",
    "ours",
    "ours, k=32",
    "ours, cache",
    "ours, k=32, cache",
)
LOSSES = ("loss: dense", "loss: liger", "loss: ours", "loss: ours, cache")


def shape_of(name: str) -> tuple[GPT2Config, int, int]:
    """A config without dropout, windows and tokens in a window."""
    shape = dict(SHAPES[name])
    windows, block = shape.pop("windows"), shape.pop("block")
    return (
        GPT2Config(**shape, n_positions=block, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0),
        windows,
        block,
    )


def tokens_of(name: str, windows: int, seed: int = 0) -> torch.Tensor:
    """Random token ids `(windows, block)`."""
    config, _, block = shape_of(name)
    return torch.randint(
        0, config.vocab_size, (windows, block), generator=torch.Generator().manual_seed(seed)
    )


def settings_of(name: str, place: Path, chunk: int = CHUNK) -> Config:
    """The run that is measured."""
    config, windows, block = shape_of(name)
    data = DataConfig(seq_len=block, batch_size=windows)
    kept = LogitCacheConfig(dir=str(place), top_k=min(128, config.vocab_size))
    return replace(
        Config(),
        data=data,
        loss=LossConfig(hidden_mse=0, block_fvu=0, chunk_size=chunk),
        logit_cache=kept,
        trainer=TrainerConfig(progress_bar=False),
    )


def memory_of(way: str, name: str) -> MemoryConfig:
    """The memory of a line: the default's, or the same few slots for every token."""
    return FeaturalConfig(k=32 if name == "full" else 4) if "k=32" in way else FeaturalConfig()


def prepare(name: str, folder: Path) -> None:
    """A teacher, students calibrated on random text, and a cache, all in `folder`."""
    torch.manual_seed(0)
    config, windows, _ = shape_of(name)
    teacher = GPT2LMHeadModel(config).eval().requires_grad_(False)
    for parameter in teacher.parameters():
        if parameter.dim() > 1:
            parameter.data *= 2  # a fresh GPT-2 says nearly the same of every token
    torch.save(teacher.state_dict(), folder / "teacher.pt")
    for way in ("ours", "ours, k=32"):
        use_onednn_linear(teacher)
        student, _ = convert_blocks(teacher, [memory_of(way, name)] * config.n_layer)
        calibrate_memories(student, teacher, tokens_of(name, 4, seed=1))
        torch.save(student.state_dict(), folder / f"{way}.pt")
    open_logit_cache(settings_of(name, folder), teacher, tokens_of(name, windows), range(windows))


def measure(
    way: str, name: str, folder: Path, steps: int, chunk: int, micro: int
) -> dict[str, float]:
    """Seconds of a step and peak in MB, of this process, which must be fresh; for a loss its value too."""
    before = _status("VmRSS")
    step, held = (_loss if way.startswith("loss") else _step)(way, name, folder, chunk, micro)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    if way != "dense":
        keep_freed_memory()
    value = step()
    Path("/proc/self/clear_refs").write_text("5")
    seconds, processor = [], []
    for _ in range(steps):
        began, used = time.perf_counter(), time.process_time()
        value = step()
        seconds.append(time.perf_counter() - began)
        processor.append(time.process_time() - used)
    times = {"seconds": min(seconds), "processor": min(processor)}
    return {
        **times,
        "peak": _status("VmHWM") - before - held() / 1e6,
        "held": held() / 1e6,
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


def _step(
    way: str, name: str, folder: Path, chunk: int, micro: int
) -> tuple[Callable[[], float], Callable[[], int]]:
    """A step that gives its loss, and how many bytes weights, gradients and optimiser state take after one."""
    config, windows, _ = shape_of(name)
    settings, tokens = settings_of(name, folder, chunk), tokens_of(name, windows)
    teacher: Any = GPT2LMHeadModel(config)
    teacher.load_state_dict(torch.load(folder / "teacher.pt", weights_only=True))
    teacher.eval().requires_grad_(False)
    student: Any
    if way.startswith("dense"):
        student = GPT2LMHeadModel(config)
        student.load_state_dict(teacher.state_dict())
        for parameter in student.parameters():
            parameter.data *= 1.01
    else:
        use_onednn_linear(teacher)
        student, _ = convert_blocks(teacher, [memory_of(way, name)] * config.n_layer)
        student.load_state_dict(
            torch.load(folder / f"{way.removesuffix(', cache')}.pt", weights_only=True)
        )
        reset_counts(get_featural_memories(student).values())
    cache = (
        open_logit_cache(settings, teacher, tokens, range(windows))
        if way.endswith("cache")
        else None
    )
    if cache is not None:
        teacher = None
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)

    def dense() -> float:
        optimizer.zero_grad(set_to_none=False)
        with torch.no_grad():
            wanted = teacher(tokens).logits
        given = student(tokens).logits
        loss = (
            F.kl_div(F.log_softmax(given, -1), F.softmax(wanted, -1), reduction="none")
            .sum(-1)
            .mean()
        )
        loss.backward()
        optimizer.step()
        return loss.item()

    def ours() -> float:
        optimizer.zero_grad(set_to_none=False)
        total, scales = 0.0, LossScales(torch.ones(config.n_layer), torch.ones(()))
        for rows in torch.arange(windows).split(micro):
            part = tokens[rows]
            batch = Batch(part, torch.ones_like(part, dtype=torch.bool), float(tokens.numel()), 1.0)
            wanted = forward_teacher(teacher, part) if cache is None else cache.read(rows)
            terms = compute_loss_terms(
                forward_with_activations(student, part), wanted, batch, settings.loss, scales
            )
            terms["kl"].backward()
            total += terms["kl"].item()
        optimizer.step()
        return total

    def held() -> int:
        models = [student, *([] if teacher is None else [teacher])]
        state = [
            v
            for each in optimizer.state.values()
            for v in each.values()
            if isinstance(v, torch.Tensor)
        ]
        grads = [p.grad for p in student.parameters() if p.grad is not None]
        return _bytes(
            [t for model in models for t in model.state_dict(keep_vars=True).values()]
            + state
            + grads
        )

    return dense if way.startswith("dense") else ours, held


def _loss(
    way: str, name: str, folder: Path, chunk: int, micro: int
) -> tuple[Callable[[], float], Callable[[], int]]:
    """The loss alone, from hidden states to gradients in them and in the student's head."""
    config, windows, block = shape_of(name)
    tokens = tokens_of(name, windows)
    generator = torch.Generator().manual_seed(2)
    heads = [torch.nn.Linear(config.n_embd, config.vocab_size, bias=False) for _ in range(2)]
    hidden = [torch.randn(windows * block, config.n_embd, generator=generator) for _ in range(2)]
    for head in heads:
        with torch.no_grad():
            head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * 0.1)
    mine, theirs = hidden[0].requires_grad_(), hidden[1]
    heads[1].requires_grad_(False)
    settings = settings_of(name, folder, chunk)
    records: Any = None
    if way.endswith("cache"):
        k, offsets = settings.logit_cache.top_k, torch.rand(len(theirs), 1, generator=generator)
        parts = zip(theirs.split(block), offsets.split(block), strict=True)
        with torch.no_grad():
            records = np.stack(
                [
                    pack_record(window, sample_distribution(heads[1](part), k, part_offsets))
                    for window, (part, part_offsets) in enumerate(parts)
                ]
            )
    batch = Batch.full_step(tokens)

    def loss() -> torch.Tensor:
        if way == "loss: dense":
            given, wanted = heads[0](mine), heads[1](theirs)
            return (
                F.kl_div(F.log_softmax(given, -1), F.softmax(wanted, -1), reduction="none")
                .sum(-1)
                .mean()
            )
        if way == "loss: liger":
            from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

            fused = LigerFusedLinearJSDLoss(
                weight_hard_loss=0.0,
                weight_soft_loss=1.0,
                beta=0.0,
                compiled=False,
                chunk_size=chunk,
            )
            return fused(mine, heads[0].weight, theirs, heads[1].weight, tokens.flatten())
        shape = (windows, block, -1)
        teacher: Any = ForwardOutputs(theirs.view(shape), heads[1])
        if records is not None:
            teacher = unpack_records(records)
        scales = LossScales(torch.ones(1), torch.ones(()))
        return compute_loss_terms(
            ForwardOutputs(mine.view(shape), heads[0]), teacher, batch, settings.loss, scales
        )["kl"]

    def step() -> float:
        value = loss()
        value.backward()
        found = value.item()
        for given in (mine, heads[0].weight):
            given.grad.zero_()
        return found

    def held() -> int:
        return _bytes(
            [mine, theirs, *(head.weight for head in heads), mine.grad, heads[0].weight.grad]
        )

    return step, held


def rows(
    shape: str = "full",
    repeats: int = 3,
    threads: int | None = None,
    only: str = "",
    steps: int = 1,
    chunk: int = CHUNK,
    micro: int = MICRO,
    inside: bool = False,
) -> list[dict[str, Any]]:
    """One dict a line: `way`, `value`, medians `seconds`, `processor` (of all threads) and `peak` (MB), all `repeats`, and ratios.

    With `inside` everything is run in this process: quick, and peaks mean nothing.
    """
    found: dict[str, list[dict[str, float]]] = {}
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
        ways = [way for way in (*STEPS, *LOSSES) if way.startswith(only)]
        if any(way in STEPS for way in ways):
            if inside:
                prepare(shape, Path(folder))
            else:
                subprocess.run(
                    [*common, "--measure", "prepare"], check=True, stdout=subprocess.DEVNULL
                )
        for _ in range(repeats):
            for way in ways:
                if inside:
                    if way != "loss: liger" or importlib.util.find_spec("liger_kernel"):
                        found.setdefault(way, []).append(
                            measure(way, shape, Path(folder), steps, chunk, micro)
                        )
                    continue
                told = subprocess.run(
                    [*common, "--measure", way], check=False, capture_output=True, text=True
                )
                if told.returncode == 0:
                    found.setdefault(way, []).append(json.loads(told.stdout.splitlines()[-1]))
                    print(way, found[way][-1], file=sys.stderr, flush=True)
                else:
                    print(f"{way}: {told.stderr.splitlines()[-1]}", file=sys.stderr)
    table = []
    for way, each in found.items():
        row = {name: statistics.median(one[name] for one in each) for name in each[0]}
        table.append({"way": way, **row, "repeats": each})
    for row in table:
        beside = {True: ["loss: dense"], False: ["dense", "dense, freed memory kept"]}[
            row["way"].startswith("loss")
        ]
        plain = [other for other in table if other["way"] in beside]
        for name in (
            ("seconds", "processor", "peak") if plain else ()
        ):  # the better of the two ways to run the obvious one
            row[f"{name}_ratio"] = row[name] / min(other[name] for other in plain)
    return table


def figures(quick: bool = False) -> list[dict[str, Any]]:
    """Every line, for `python -m benchmarks`."""
    found = rows("quick", repeats=1, inside=True) if quick else rows()
    return [{name: value for name, value in row.items() if name != "repeats"} for row in found]


def main() -> None:
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
    parser.add_argument("--only", default="", help="lines that begin with this")
    parser.add_argument(
        "--chunk", type=int, default=CHUNK, help="loss.chunk_size; Liger's chunk_size too"
    )
    parser.add_argument("--micro", type=int, default=MICRO, help="data.micro_batch_size of ours")
    for hidden in ("--measure", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--shape", default="full", choices=SHAPES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.measure == "prepare":
        prepare(given.shape, Path(given.folder))
    elif given.measure:
        torch.manual_seed(0)
        print(
            json.dumps(
                measure(
                    given.measure,
                    given.shape,
                    Path(given.folder),
                    given.steps,
                    given.chunk,
                    given.micro,
                )
            )
        )
    else:
        shape, repeats = ("quick", 1) if given.quick else (given.shape, given.repeats)
        found = rows(
            shape,
            repeats,
            given.threads,
            given.only,
            given.steps,
            given.chunk,
            given.micro,
            inside=given.quick,
        )
        how = f"chunk {given.chunk}, micro-batch {given.micro}, {repeats} repeats"
        print(f"torch {torch.__version__}, {given.threads} threads, {how}")
        print(
            f"{'':26}{'seconds':>9}{'ratio':>7}{'of CPU':>9}{'ratio':>7}{'peak MB':>9}{'ratio':>7}{'held MB':>9}{'value':>9}"
        )
        for row in found:
            ratios = [
                f"{row[name]:.2f}" if name in row else ""
                for name in ("seconds_ratio", "processor_ratio", "peak_ratio")
            ]
            print(
                f"{row['way']:26}{row['seconds']:9.3f}{ratios[0]:>7}{row['processor']:9.3f}{ratios[1]:>7}{row['peak']:9.0f}{ratios[2]:>7}{row['held']:9.0f}"
                f"{row['value']:9.5f}"
            )


if __name__ == "__main__":
    main()
