"""Slots in a file: what they cost in speed, memory and fidelity, `python -m benchmarks.disk [RUN OR STUDENT]`.

Three tables. `limit`: a student of GPT-2 124M's shape (random weights: speed does not depend on what they say) whose values
alone are four times the memory that a process may use, as a memory cgroup counts it, generates; beside it the same student in
RAM, without a limit, in turns. `memory`: bytes that the weights of 124M hold, computed and as /proc counts them, and how fast
they are where a process may use .6 of what the dense ones weigh. `kl`: of a distilled embedded student (of the newest run where
none is named), the distance to its teacher and the bytes, by type of values and by what is left on the disk. `--quick` takes tiny
shapes. Limits need root for the cgroup; the first table 8 GB on the disk under `--scratch`.
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

import dmt  # noqa: F401  registers the student
from dmt.config import FeaturalConfig
from dmt.data.corpora import load_corpus
from dmt.data.windows import select_first_windows, tokenize_corpus
from dmt.evaluation.metrics import measure_fidelity
from dmt.memory.approximate_search import Int8Matrix
from dmt.memory.mmap_tensors import TensorSpec, make_spec, write_tensor_file
from dmt.models import external_tensors
from dmt.models.conversion import convert_blocks, get_featural_memories
from dmt.models.loading import load_teacher, resolve_student_folder
from dmt.models.modeling import STUDENT_CLASSES

SHAPES = {
    "124M": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "tiny": {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 512},
}
K, NEW, PIECE = 32, 32, 8_192
ROOT = Path(__file__).parents[1]
CGROUPS = Path("/sys/fs/cgroup/memory")
LIMIT = 800_000_000
"""Bytes that the child may use; the values have four times as many."""
SHARE, OVERHEAD = 0.6, 40_000_000
"""Of the dense weights' bytes, what a process is allowed beside the interpreter's own; bytes for what it computes with."""
TEST_TOKENS = 16_384


def rows(
    quick: bool = False, student: Path | None = None, scratch: Path | None = None, turns: int = 2
) -> list[dict[str, Any]]:
    """Every line of the three tables; `table` says which."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        found = limited(Path(folder) / "large", quick, turns) + memory(
            Path(folder) / "small", quick
        )
        return found + (fidelity(Path(folder) / "kl", student, quick) if student else [])


def limited(folder: Path, quick: bool, turns: int) -> list[dict[str, Any]]:
    """Generation within a quarter of the values' size, and in RAM."""
    shape = SHAPES["tiny" if quick else "124M"]
    slots_each = 4_096 if quick else 4 * LIMIT // (4 * shape["n_embd"] * shape["n_layer"])
    large_student(folder, shape, slots_each)
    values = 4 * slots_each * shape["n_embd"] * shape["n_layer"]
    limit = 0 if quick else LIMIT
    told: dict[str, list[dict[str, Any]]] = {
        "in RAM": [],
        "on the disk": [],
        "on the disk, within the limit": [],
    }
    for _ in range(turns):
        told["in RAM"].append(child(folder, "ram"))
        told["on the disk"].append(child(folder, "disk"))
        forget(folder / external_tensors.SLOTS_FILE)
        with cgroup(limit) as (group, why):
            if group is not None:
                told["on the disk, within the limit"].append(child(folder, "disk", group))
            elif why:
                print(f"not limited: {why}", file=sys.stderr)
    shutil.rmtree(folder)
    best = statistics.median(each["seconds"] for each in told["in RAM"])
    made = []
    for name, runs in told.items():
        if runs:
            pairs = zip(runs, told["in RAM"], strict=True)
            seconds = statistics.median(each["seconds"] for each in runs)
            made.append(
                {
                    "table": "limit",
                    "variant": name,
                    "values, MB": values / 1e6,
                    "limit, MB": limit / 1e6 if "limit" in name else "",
                    "ms a token": 1e3 * seconds,
                    "slow-down": seconds / best,
                    "slow-down by turn": " ".join(
                        f"{a['seconds'] / b['seconds']:.1f}" for a, b in pairs
                    ),
                    "major faults": statistics.median(each["faults"] for each in runs),
                    "anonymous, MB": runs[-1]["anonymous"] / 1e6,
                    "without the model, MB": runs[-1]["bare"] / 1e6,
                    "same tokens": runs[-1]["said"] == told["in RAM"][-1]["said"],
                }
            )
    return made


def large_student(folder: Path, shape: dict[str, int], count: int) -> None:
    """A student with `count` slots a layer on the disk, made in pieces."""
    width, layers = shape["n_embd"], shape["n_layer"]
    arguments = {
        "kind": "featural",
        "num_slots": count,
        "k": K,
        "search": "int8",
        "offload": "slots",
        "activation": "block",
        "activation_function": "gelu_new",
    }
    config_class, model_class = STUDENT_CLASSES["gpt2"]
    config = config_class(
        **shape,
        memory={str(layer): arguments for layer in range(layers)},
        external_tensors="written below",
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = model_class(config)
    model.to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if name.endswith(
                ("ln_1.weight", "ln_2.weight", "ln_f.weight")
            ) else parameter.normal_(std=0.02)
    base = torch.randn(PIECE, width) / width**0.5
    norms = base.norm(dim=-1).repeat(-(-count // PIECE))[:count]
    codes = Int8Matrix(base)

    def pieces(of: Tensor, layer: int) -> Iterator[Tensor]:
        for number, begin in enumerate(range(0, count, PIECE)):
            turned = of.roll(31 * number + 7 * layer, -1) if of.dim() == 2 else of
            yield turned[: count - begin]

    tables = {}
    for layer, name in enumerate(external_tensors.find_mmap_memories(model)):
        for part in ("values", "keys"):
            tables[f"{name}.{part}"] = TensorSpec(
                torch.float32, (count, width), pieces(base, layer + 100 * (part == "values"))
            )
        tables[f"{name}.key_codes"] = TensorSpec(
            torch.int8, (count, width), pieces(codes.rows, layer)
        )
        tables[f"{name}.key_scales"] = TensorSpec(
            torch.float32, (count,), pieces(codes.scales, layer)
        )
        tables[f"{name}.value_norms"] = make_spec(norms)
    place = external_tensors.position_embedding_path(model)
    tables[f"{place}.weight"] = make_spec(0.02 * torch.randn(config.n_positions, width))
    folder.mkdir(parents=True)
    config.external_tensors = model.config.external_tensors = write_tensor_file(
        folder / external_tensors.SLOTS_FILE, tables
    )
    external_tensors.attach_model_file(
        model, folder / external_tensors.SLOTS_FILE, model.config.external_tensors
    )
    model.save_pretrained(folder)


def forget(file: Path) -> None:
    """Let the system drop what it holds of a file."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def cgroup(limit: int) -> Iterator[tuple[Path | None, str]]:
    """A memory cgroup with so many bytes, or why there is none."""
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
            f"a memory cgroup (version 1) cannot be made in {CGROUPS} ({error.strerror}); it takes root",
        )
        return
    try:
        yield group, ""
    finally:
        group.rmdir()


def child(folder: Path, way: str, group: Path | None = None) -> dict[str, Any]:
    """What a process of its own says about loading the student in `folder` and generating from it."""
    enter = f"echo $$ > {group}/cgroup.procs; " if group else ""
    command = f'{enter}exec "$0" -m benchmarks.disk --child {way} "$1"'
    where = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    words = ["sh", "-c", command, sys.executable, str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=where)
    if done.returncode:
        raise SystemExit(f"the child ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])


def resident() -> dict[str, int]:
    """Bytes of this process that are in memory: anonymous, and of files."""
    text = Path("/proc/self/status").read_text()
    return {
        name: 1024 * int(re.search(rf"Rss{name}:\s+(\d+)", text)[1]) for name in ("Anon", "File")
    }  # type: ignore[index]


def be_child(way: str, folder: Path) -> None:
    """Load, generate, tell."""
    import resource

    torch.set_num_threads(1)
    bare = resident()
    model = AutoModelForCausalLM.from_pretrained(folder)
    if way == "ram":
        for memory in get_featural_memories(model).values():
            for name in memory.external_names:
                setattr(memory, name, getattr(memory, name).clone())
            if memory.mmap_tensors is not None and memory.mmap_tensors.key_codes is not None:
                memory.mmap_tensors.key_codes.rows = memory.mmap_tensors.key_codes.rows.clone()
    loaded = resident()
    prompt = torch.arange(8).unsqueeze(0)
    how = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        first = time.perf_counter()
        model.generate(prompt, max_new_tokens=1, **how)
        began, faults = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        said = model.generate(prompt, max_new_tokens=NEW, min_new_tokens=NEW, **how)
    seconds = (time.perf_counter() - began) / NEW
    used = resident()
    print(
        json.dumps(
            {
                "seconds": seconds,
                "first": began - first,
                "faults": resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults,
                "said": said[0].tolist(),
                "bare": bare["Anon"],
                "anonymous": used["Anon"],
                "loaded": sum(loaded.values()) - sum(bare.values()),
                "used": sum(used.values()) - sum(bare.values()),
                "anonymous of the model": loaded["Anon"] - bare["Anon"],
            }
        )
    )


def memory(folder: Path, quick: bool) -> list[dict[str, Any]]:
    """What the weights hold of the 124M shape, dense and with slots in RAM or in a file."""
    torch.manual_seed(0)
    config = GPT2Config(
        **SHAPES["tiny" if quick else "124M"], resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    dense = GPT2LMHeadModel(config).eval()
    dense.save_pretrained(folder / "dense")
    whole_bytes, made = external_tensors.measure_bytes(dense)["ram"], []
    ways = [("dense", None)]
    for disk in ("none", "values", "slots"):
        for kind in ("float32", "int8"):
            for linear in (False, True):
                name = (
                    f"offload={disk} value_dtype={kind}{' with the linear map' if linear else ''}"
                )
                ways.append(
                    (
                        name,
                        FeaturalConfig(
                            k=K,
                            search="int8",
                            skip_connection=linear,
                            metric="euclidean",
                            value_dtype=kind,
                            offload=disk,
                        ),
                    )
                )
    for name, settings in ways[:1] + ways[-2:-1] if quick else ways:
        place = folder / "dense"
        held = {"ram": whole_bytes, "disk": 0}
        if settings is not None:
            place = folder / "student"
            convert_blocks(dense, [settings] * config.n_layer)[0].save_pretrained(place)
            held = external_tensors.measure_bytes(AutoModelForCausalLM.from_pretrained(place))
        told = child(place, "disk")
        tight: dict[str, Any] = {}
        for file in place.glob("*.safetensors"):
            forget(file)  # else its pages count as another's
        room = (
            0
            if quick or "linear" in name or (settings is not None and settings.offload != "slots")
            else int(told["bare"] + OVERHEAD + SHARE * whole_bytes)
        )
        with cgroup(room) as (group, _):
            if group is not None:
                tight = child(place, "disk", group)
        made.append(
            {
                "table": "memory",
                "variant": name,
                "weights in RAM, MB": held["ram"] / 1e6,
                "of dense": held["ram"] / whole_bytes,
                "left on the disk, MB": held["disk"] / 1e6,
                "resident after loading, MB": told["loaded"] / 1e6,
                "anonymous of these": told["anonymous of the model"] / 1e6,
                f"after {NEW} tokens": told["used"] / 1e6,
                "ms a token": 1e3 * told["seconds"],
                f"ms within {SHARE} of dense": 1e3 * tight["seconds"] if tight else "",
                "faults there": tight["faults"] if tight else "",
            }
        )
        shutil.rmtree(folder / "student", ignore_errors=True)
    return made


def fidelity(folder: Path, student: Path, quick: bool) -> list[dict[str, Any]]:
    """KL to the embedded teacher and bytes of a distilled student, by type of values and what is left on the disk."""
    teacher, tokenizer = load_teacher("embedded")
    windows = select_first_windows(
        tokenize_corpus(load_corpus("speeches"), tokenizer, 256).test, 512 if quick else TEST_TOKENS
    )
    made = []
    for disk in ("none", "values", "slots"):
        for kind in ("float32", "float16", "int8"):
            model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).eval()
            changes = {"offload": disk, "value_dtype": kind} | (
                {"search": "int8"} if disk == "slots" else {}
            )
            for layer, memory in get_featural_memories(model).items():
                told = model.config.memory[str(layer)]
                (told.get("base") or told).update(changes)
                for name, value in changes.items():
                    setattr(memory, name, value)
            place = folder / f"{disk}-{kind}"
            model.save_pretrained(place)
            loaded = AutoModelForCausalLM.from_pretrained(place)
            tally, held = (
                measure_fidelity(loaded, teacher, windows),
                external_tensors.measure_bytes(loaded),
            )
            files = [place / name for name in ("model.safetensors", external_tensors.SLOTS_FILE)]
            made.append(
                {
                    "table": "kl",
                    "variant": f"offload={disk} value_dtype={kind}",
                    "KL": f"{tally.kl:.5f}",
                    "ppl_ratio": f"{tally.ppl_ratio:.5f}",
                    "same top-1": f"{tally.top1_agreement:.4f}",
                    "tokens": int(tally.tokens),
                    "weights in RAM, MB": held["ram"] / 1e6,
                    "left on the disk, MB": held["disk"] / 1e6,
                    "files, MB": sum(file.stat().st_size for file in files if file.exists()) / 1e6,
                }
            )
    return made


def figures(quick: bool = False) -> list[dict[str, Any]]:
    """Every line, for `python -m benchmarks`; the newest run's student, where there is one."""
    return rows(quick, newest_student())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "student",
        nargs="?",
        type=Path,
        help="a distilled embedded student; the newest run's where left out",
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--scratch", type=Path, help="a folder with room for 8 GB")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--only", choices=("limit", "memory", "kl"))
    parser.add_argument("--child", choices=("ram", "disk"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        be_child(given.child, given.student)
        return
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        parts = {
            "limit": lambda: limited(Path(scratch) / "large", given.quick, given.turns),
            "memory": lambda: memory(Path(scratch) / "small", given.quick),
            "kl": lambda: fidelity(
                Path(scratch) / "kl", resolve_student_folder(given.student), given.quick
            ),
        }
        for name, part in parts.items():
            if given.only in (None, name):
                print(table(part()), flush=True)


if __name__ == "__main__":
    main()
