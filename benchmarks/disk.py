"""Slots in a file, their speed, memory and fidelity: `python -m benchmarks.disk [RUN OR STUDENT]`.

Prints four tables:

- `limit`: generation by a student of the shape of GPT-2 124M with random weights, whose values have
  four times the bytes that a memory cgroup allows its process; in turns with the same student in
  RAM, without a limit.
- `memory`: bytes of the weights of the 124M shape, computed and as /proc counts them, and their
  speed in a process that may use 0.6 of the bytes of the dense weights.
- `lookups`: a prompt of random tokens and more of them one by one, read by a student of the 124M
  shape whose feed-forward blocks are n-gram lookups: with its rows in the page cache, and with none
  there, with and without reading ahead.
- `kl`: KL to the teacher and bytes of a distilled embedded student (by default that of the newest
  run), by value dtype and by what stays on the disk.

`--quick` uses tiny shapes. Limits need root for the cgroup. The first table needs 8 GB on the disk
under `--scratch`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from benchmarks.tables import newest_student, table
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import dmt
from dmt.config import FeaturalConfig, NgramConfig
from dmt.data.corpora import load_corpus
from dmt.data.windows import select_first_windows, tokenize_corpus
from dmt.evaluation.metrics import measure_fidelity
from dmt.memory import NgramMemory
from dmt.memory.approximate_search import Int8Matrix
from dmt.memory.base import MemoryLayer
from dmt.memory.lookup_table import LookupTable
from dmt.memory.mmap_tensors import TensorSpec, make_spec, write_tensor_file
from dmt.models import external_tensors
from dmt.models.conversion import convert_blocks
from dmt.models.loading import load_teacher
from dmt.models.memories import get_featural_memories
from dmt.models.modeling import STUDENT_CLASSES
from dmt.paths import resolve_student_folder

SHAPES = {
    "124M": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "tiny": {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 512},
}
READ_SLOTS, NEW_TOKENS, CHUNK = 32, 32, 8_192
ROOT = Path(__file__).parents[1]
CGROUPS = Path("/sys/fs/cgroup/memory")
# Bytes that the child process may use; the values have four times as many.
LIMIT = 800_000_000
# A limited process may use this fraction of the bytes of the dense weights, in addition to those of
# the interpreter and to `OVERHEAD` bytes for activations.
MEMORY_FRACTION, OVERHEAD = 0.6, 40_000_000
TEST_TOKENS = 16_384
# Of a prompt and of its continuation, to read lookups.
PROMPT_TOKENS, READ_TOKENS = 64, 48


def measure(
    quick: bool = False, student: Path | None = None, scratch: Path | None = None, turns: int = 2
) -> list[dict[str, Any]]:
    """Return the lines of all tables; their key `table` names it."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        lines = [
            *measure_limited(Path(folder) / "large", quick, turns),
            *measure_memory(Path(folder) / "small", quick),
            *measure_lookups(Path(folder) / "lookups", quick, turns),
        ]
        return lines + (measure_kl(Path(folder) / "kl", student, quick) if student else [])


def measure_limited(folder: Path, quick: bool, turns: int) -> list[dict[str, Any]]:
    """Measure generation in RAM, on the disk, and in a quarter of the bytes of the values."""
    shape = SHAPES["tiny" if quick else "124M"]
    slots = 4_096 if quick else 4 * LIMIT // (4 * shape["n_embd"] * shape["n_layer"])
    large_student(folder, shape, slots)
    values = 4 * slots * shape["n_embd"] * shape["n_layer"]
    limit = 0 if quick else LIMIT
    runs_by_variant: dict[str, list[dict[str, Any]]] = {
        "in RAM": [],
        "on the disk": [],
        "on the disk, within the limit": [],
    }
    for _ in range(turns):
        runs_by_variant["in RAM"].append(run_child(folder, "ram"))
        runs_by_variant["on the disk"].append(run_child(folder, "disk"))
        drop_page_cache(folder / external_tensors.SLOTS_FILE)
        with cgroup(limit) as (group, error):
            if group is not None:
                runs_by_variant["on the disk, within the limit"].append(
                    run_child(folder, "disk", group)
                )
            elif error:
                print(f"not limited: {error}", file=sys.stderr)
    shutil.rmtree(folder)
    baseline = statistics.median(run["seconds"] for run in runs_by_variant["in RAM"])
    lines = []
    for name, runs in runs_by_variant.items():
        if runs:
            pairs = zip(runs, runs_by_variant["in RAM"], strict=True)
            seconds = statistics.median(run["seconds"] for run in runs)
            lines.append(
                {
                    "table": "limit",
                    "variant": name,
                    "values, MB": values / 1e6,
                    "limit, MB": limit / 1e6 if "limit" in name else "",
                    "ms a token": 1e3 * seconds,
                    "slow-down": seconds / baseline,
                    "slow-down by turn": " ".join(
                        f"{a['seconds'] / b['seconds']:.1f}" for a, b in pairs
                    ),
                    "major faults": statistics.median(run["faults"] for run in runs),
                    "anonymous, MB": runs[-1]["anonymous"] / 1e6,
                    "without the model, MB": runs[-1]["bare"] / 1e6,
                    "same tokens": runs[-1]["generated"]
                    == runs_by_variant["in RAM"][-1]["generated"],
                }
            )
    return lines


def large_student(folder: Path, shape: dict[str, int], count: int) -> None:
    """Write a student with `count` slots in each layer to the disk, in chunks."""
    width, layers = shape["n_embd"], shape["n_layer"]
    arguments = {
        "kind": "featural",
        "num_slots": count,
        "k": READ_SLOTS,
        "search": "int8",
        "offload": "slots",
        "activation": "block",
        "activation_function": "gelu_new",
    }
    classes = STUDENT_CLASSES["gpt2"]
    config = classes["AutoConfig"](
        **shape,
        memory={str(layer): arguments for layer in range(layers)},
        external_tensors="written below",
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = classes["AutoModelForCausalLM"](config)
    model.to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if name.endswith(
                ("ln_1.weight", "ln_2.weight", "ln_f.weight")
            ) else parameter.normal_(std=0.02)
    base = torch.randn(CHUNK, width) / width**0.5
    norms = base.norm(dim=-1).repeat(-(-count // CHUNK))[:count]
    codes = Int8Matrix(base)

    def roll_chunks(table: Tensor, layer: int) -> Iterator[Tensor]:
        for number, begin in enumerate(range(0, count, CHUNK)):
            rolled = table.roll(31 * number + 7 * layer, -1) if table.dim() == 2 else table
            yield rolled[: count - begin]

    specs = {}
    for layer, name in enumerate(external_tensors.find_external_modules(model)):
        for part in ("values", "keys"):
            specs[f"{name}.{part}"] = TensorSpec(
                torch.float32, (count, width), roll_chunks(base, layer + 100 * (part == "values"))
            )
        specs[f"{name}.key_codes"] = TensorSpec(
            torch.int8, (count, width), roll_chunks(codes.rows, layer)
        )
        specs[f"{name}.key_scales"] = TensorSpec(
            torch.float32, (count,), roll_chunks(codes.scales, layer)
        )
        specs[f"{name}.value_norms"] = make_spec(norms)
    embedding = external_tensors.position_embedding_path(model)
    specs[f"{embedding}.weight"] = make_spec(0.02 * torch.randn(config.n_positions, width))
    folder.mkdir(parents=True)
    config.external_tensors = model.config.external_tensors = write_tensor_file(
        folder / external_tensors.SLOTS_FILE, specs
    )
    external_tensors.attach_model_file(
        model, folder / external_tensors.SLOTS_FILE, model.config.external_tensors
    )
    model.save_pretrained(folder)


def drop_page_cache(file: Path) -> None:
    """Drop the pages of a file from the page cache."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def cgroup(limit: int) -> Iterator[tuple[Path | None, str]]:
    """Create a memory cgroup of `limit` bytes; yield it, or None and the reason."""
    group = CGROUPS / f"dmt-disk-{os.getpid()}"
    if not limit:
        yield None, ""
        return
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit))
    except OSError as error:
        yield (
            None,
            f"cannot create a memory cgroup (v1) in {CGROUPS} ({error.strerror}); it needs root",
        )
        return
    try:
        yield group, ""
    finally:
        group.rmdir()


def run_child(folder: Path, location: str, group: Path | None = None) -> dict[str, Any]:
    """Load the student in `folder` and generate in a new process; return its measurements."""
    join_group = f"echo $$ > {group}/cgroup.procs; " if group else ""
    command = f'{join_group}exec "$0" -m benchmarks.disk --child {location} "$1"'
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    command_line = ["sh", "-c", command, sys.executable, str(folder)]
    process = subprocess.run(
        command_line, capture_output=True, text=True, check=False, env=environment
    )
    if process.returncode:
        raise SystemExit(
            f"the child ended with {process.returncode}: {process.stderr.strip()[-300:]}"
        )
    return json.loads(process.stdout.splitlines()[-1])


def resident_bytes() -> dict[str, int]:
    """Return the resident bytes of this process: anonymous, and of files."""
    text = Path("/proc/self/status").read_text()
    return {
        name: 1024 * int(re.search(rf"Rss{name}:\s+(\d+)", text)[1]) for name in ("Anon", "File")
    }  # type: ignore[index]


def child_main(location: str, folder: Path) -> None:
    """Load a student, generate, and print measurements as JSON."""
    import resource

    torch.set_num_threads(1)
    bare = resident_bytes()
    model = AutoModelForCausalLM.from_pretrained(folder)
    if location == "ram":
        for memory in get_featural_memories(model).values():
            for name in memory.external_names:
                setattr(memory, name, getattr(memory, name).clone())
            if memory.mmap_tensors is not None and memory.mmap_tensors.key_codes is not None:
                memory.mmap_tensors.key_codes.rows = memory.mmap_tensors.key_codes.rows.clone()
    loaded = resident_bytes()
    prompt = torch.arange(8).unsqueeze(0)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        first_start = time.perf_counter()
        model.generate(prompt, max_new_tokens=1, **options)
        start, faults = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        generated = model.generate(
            prompt, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, **options
        )
    seconds = (time.perf_counter() - start) / NEW_TOKENS
    used = resident_bytes()
    print(
        json.dumps(
            {
                "seconds": seconds,
                "first": start - first_start,
                "faults": resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults,
                "generated": generated[0].tolist(),
                "bare": bare["Anon"],
                "anonymous": used["Anon"],
                "loaded": sum(loaded.values()) - sum(bare.values()),
                "used": sum(used.values()) - sum(bare.values()),
                "anonymous of the model": loaded["Anon"] - bare["Anon"],
            }
        )
    )


def measure_memory(folder: Path, quick: bool) -> list[dict[str, Any]]:
    """Measure the bytes of weights of the 124M shape, dense and with slots in RAM or in a file."""
    torch.manual_seed(0)
    config = GPT2Config(
        **SHAPES["tiny" if quick else "124M"], resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    dense = GPT2LMHeadModel(config).eval()
    dense.save_pretrained(folder / "dense")
    dense_bytes, lines = external_tensors.measure_bytes(dense)["ram"], []
    variants = [("dense", None)]
    for offload in ("none", "values", "slots"):
        for value_dtype in ("float32", "int8"):
            for skip_connection in (False, True):
                suffix = " with a skip connection" if skip_connection else ""
                name = f"offload={offload} value_dtype={value_dtype}{suffix}"
                variants.append(
                    (
                        name,
                        FeaturalConfig(
                            k=READ_SLOTS,
                            search="int8",
                            skip_connection=skip_connection,
                            metric="euclidean",
                            value_dtype=value_dtype,
                            offload=offload,
                        ),
                    )
                )
    for name, settings in variants[:1] + variants[-2:-1] if quick else variants:
        path = folder / "dense"
        sizes = {"ram": dense_bytes, "disk": 0}
        if settings is not None:
            path = folder / "student"
            convert_blocks(dense, [settings] * config.n_layer)[0].save_pretrained(path)
            sizes = external_tensors.measure_bytes(AutoModelForCausalLM.from_pretrained(path))
        result = run_child(path, "disk")
        limited_result: dict[str, Any] = {}
        for file in path.glob("*.safetensors"):
            drop_page_cache(file)  # otherwise its pages count for this process
        limit = (
            0
            if quick or "skip" in name or (settings is not None and settings.offload != "slots")
            else int(result["bare"] + OVERHEAD + MEMORY_FRACTION * dense_bytes)
        )
        with cgroup(limit) as (group, _):
            if group is not None:
                limited_result = run_child(path, "disk", group)
        lines.append(
            {
                "table": "memory",
                "variant": name,
                "weights in RAM, MB": sizes["ram"] / 1e6,
                "of dense": sizes["ram"] / dense_bytes,
                "left on the disk, MB": sizes["disk"] / 1e6,
                "resident after loading, MB": result["loaded"] / 1e6,
                "anonymous of these": result["anonymous of the model"] / 1e6,
                f"after {NEW_TOKENS} tokens": result["used"] / 1e6,
                "ms a token": 1e3 * result["seconds"],
                f"ms within {MEMORY_FRACTION} of dense": 1e3 * limited_result["seconds"]
                if limited_result
                else "",
                "major faults within it": limited_result["faults"] if limited_result else "",
            }
        )
        shutil.rmtree(folder / "student", ignore_errors=True)
    return lines


def measure_lookups(folder: Path, quick: bool, turns: int) -> list[dict[str, Any]]:
    """Measure a student of lookups, with rows in the page cache, and with none there."""
    torch.manual_seed(0)
    shape = SHAPES["tiny" if quick else "124M"]
    config = NgramConfig(offload="values", num_rows=1_024 if quick else 16_384)
    student = dmt.convert(GPT2LMHeadModel(GPT2Config(**shape)), config)
    with torch.no_grad():
        for module in student.modules():
            if isinstance(module, LookupTable):
                module.rows.normal_(std=0.02)
    student.save_pretrained(folder)
    del student
    variants = {
        "in the page cache": (False, NgramMemory.prefetch),
        "on the disk": (True, NgramMemory.prefetch),
        "on the disk, not read ahead": (True, MemoryLayer.prefetch),
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    try:
        for _ in range(turns):
            for name, (is_cold, NgramMemory.prefetch) in variants.items():
                runs[name].append(read_tokens(folder, is_cold))
    finally:
        NgramMemory.prefetch = variants["on the disk"][1]
    return [
        {"table": "lookups", "variant": name}
        | {
            column: statistics.median(measurement[column] for measurement in measurements)
            for column in measurements[0]
        }
        for name, measurements in runs.items()
    ]


def read_tokens(folder: Path, is_cold: bool) -> dict[str, Any]:
    """Read random tokens with a student that is loaded anew; return measurements."""
    import resource

    file = folder / external_tensors.SLOTS_FILE
    if is_cold:
        drop_page_cache(file)
    else:
        file.read_bytes()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.randint(model.config.vocab_size, (1, PROMPT_TOKENS + READ_TOKENS))
    faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_majflt, time.perf_counter()
    with torch.no_grad():
        prompt, *others = tokens.split([PROMPT_TOKENS, *[1] * READ_TOKENS], dim=1)
        cache = model(prompt, use_cache=True).past_key_values
        prompt_end = time.perf_counter()
        for token in others:
            model(token, past_key_values=cache, use_cache=True)
    return {
        "ms for the prompt": 1e3 * (prompt_end - start),
        "ms a token": 1e3 * (time.perf_counter() - prompt_end) / READ_TOKENS,
        "major faults": resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults,
    }


def measure_kl(folder: Path, student: Path, quick: bool) -> list[dict[str, Any]]:
    """Measure KL to the embedded teacher and bytes, by value dtype and what stays on the disk."""
    teacher, tokenizer = load_teacher("embedded")
    windows = select_first_windows(
        tokenize_corpus(load_corpus("speeches"), tokenizer, 256).test, 512 if quick else TEST_TOKENS
    )
    lines = []
    for offload in ("none", "values", "slots"):
        for value_dtype in ("float32", "float16", "int8"):
            model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).eval()
            changes = {"offload": offload, "value_dtype": value_dtype} | (
                {"search": "int8"} if offload == "slots" else {}
            )
            for layer, memory in get_featural_memories(model).items():
                arguments = model.config.memory[str(layer)]
                (arguments.get("base") or arguments).update(changes)
                for name, value in changes.items():
                    setattr(memory, name, value)
            path = folder / f"{offload}-{value_dtype}"
            model.save_pretrained(path)
            loaded = AutoModelForCausalLM.from_pretrained(path)
            metrics, sizes = (
                measure_fidelity(loaded, teacher, windows),
                external_tensors.measure_bytes(loaded),
            )
            files = [path / name for name in ("model.safetensors", external_tensors.SLOTS_FILE)]
            lines.append(
                {
                    "table": "kl",
                    "variant": f"offload={offload} value_dtype={value_dtype}",
                    "KL": f"{metrics.kl:.5f}",
                    "ppl_ratio": f"{metrics.ppl_ratio:.5f}",
                    "same top-1": f"{metrics.top1_agreement:.4f}",
                    "tokens": int(metrics.tokens),
                    "weights in RAM, MB": sizes["ram"] / 1e6,
                    "left on the disk, MB": sizes["disk"] / 1e6,
                    "files, MB": sum(file.stat().st_size for file in files if file.exists()) / 1e6,
                }
            )
    return lines


def figures(quick: bool = False) -> list[dict[str, Any]]:
    """Return all lines for `python -m benchmarks`, with the student of the newest run if any."""
    return measure(quick, newest_student())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "student",
        nargs="?",
        type=Path,
        help="a distilled embedded student (default: that of the newest run)",
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--scratch", type=Path, help="a folder with room for 8 GB")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--only", choices=("limit", "memory", "lookups", "kl"))
    parser.add_argument("--child", choices=("ram", "disk"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child_main(arguments.child, arguments.student)
        return
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        tables = {
            "limit": lambda: measure_limited(
                Path(scratch) / "large", arguments.quick, arguments.turns
            ),
            "memory": lambda: measure_memory(Path(scratch) / "small", arguments.quick),
            "lookups": lambda: measure_lookups(
                Path(scratch) / "lookups", arguments.quick, arguments.turns
            ),
            "kl": lambda: measure_kl(
                Path(scratch) / "kl", resolve_student_folder(arguments.student), arguments.quick
            ),
        }
        for name, measure_table in tables.items():
            if arguments.only in (None, name):
                print(table(measure_table()), flush=True)


if __name__ == "__main__":
    main()
