"""Stored rows: how fast they are written, opened and found, beside a bare product and other libraries, on the same rows.

    python -m benchmarks.store [--rows 1000,10000,100000,1000000] [--threads 1] [--peers]

Rows are real: keys are what the embedded teacher's second block is given on speeches, of unit length, 128 wide. Writing and
opening are measured at 768 wide (a GPT-2's), values float16. Search is for 256 queries, 32 rows each, from text that is not
among the rows; recall is the share of the exact 32. `--peers` makes an environment of its own with usearch, hnswlib and
memorizing-transformers-pytorch.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from benchmarks.environments import python_with

from dmt.config_io import load_config
from dmt.data.windows import TextDataModule, select_first_windows
from dmt.memory.row_table import RowTable
from dmt.models.forward import forward_teacher
from dmt.models.loading import load_teacher
from dmt.store import RowStore
from dmt.store.records import RowInsert, StepChanges
from dmt.training.trainer import keep_freed_memory, silence_libraries

LAYER, QUERIES, K = 1, 256, 32
WIDE = 768
NEEDED = ["einops", "einops-exts", "filelock", "joblib", "usearch", "hnswlib"]
PEERS = ["memorizing-transformers-pytorch"]


def hidden_states(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys `(count, 128)` from training text and queries `(QUERIES, 128)` from test text."""
    config = load_config(None, ["data.corpora=[speeches]"])
    teacher, tokenizer = load_teacher("embedded")
    data = TextDataModule(config, tokenizer, -(-count // 2048))
    data.setup()

    def states(windows: torch.Tensor) -> torch.Tensor:
        given = [
            forward_teacher(teacher, part, capture_blocks=True).block_inputs[LAYER].flatten(0, 1)
            for part in windows.split(32)
        ]
        return torch.cat(given)

    keys = torch.cat([states(tokens) for tokens in data.train_dataloader()])[:count]
    queries = states(select_first_windows(data.corpora[0].test, 4096))
    mean = keys.mean(0)
    queries = queries[
        torch.randperm(len(queries), generator=torch.Generator().manual_seed(0))[:QUERIES]
    ]
    return (torch.nn.functional.normalize(states - mean, dim=-1) for states in (keys, queries))  # type: ignore[return-value]


def best_ms(call: Callable[[], object], repeats: int = 5) -> float:
    """Milliseconds of the fastest of some calls, after one to warm up."""
    call()
    return 1e3 * min(_timed(call) for _ in range(repeats))


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def writing(count: int = 100_000, batch: int = 5_000) -> None:
    """Rows a second into SQLite, and seconds to open them again."""
    drawn = np.random.default_rng(0)
    keys, values = (drawn.normal(size=(batch, WIDE)).astype(np.float32) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        place = str(Path(folder) / "rows.db")
        with RowStore(place, "benchmark") as store:
            space = store.get_or_create_namespace("layer", WIDE, WIDE, "float16")
            heat = np.ones(batch, np.float32)
            seconds = _timed(
                lambda: [
                    store.commit(
                        "run",
                        step,
                        {
                            space: StepChanges(
                                [RowInsert(store.reserve_ids(batch), keys, values, heat)]
                            )
                        },
                    )
                    for step in range(count // batch)
                ]
            )
        print(
            f"written: {count / seconds:,.0f} rows a second, {WIDE} wide, in steps of {batch:,}",
            flush=True,
        )
        rows = RowTable(WIDE, WIDE)
        with RowStore(place, read_only=True) as store:
            seconds = _timed(
                lambda: rows.load_rows(store.scan(space), expected_rows=store.count(space))
            )
        size = Path(place).stat().st_size / 1e6
        print(f"opened: {len(rows):,} rows in {seconds:.1f} s, {size:,.0f} MB on disk", flush=True)


def filled(keys: torch.Tensor, index: str) -> tuple[RowTable, float]:
    """Rows with these keys, and the seconds that it took until the first search came back."""
    rows = RowTable(keys.shape[1], 1, index=index)
    part = RowInsert(
        np.arange(1, len(keys) + 1),
        keys.numpy(),
        np.zeros((len(keys), 1), np.float32),
        np.ones(len(keys), np.float32),
    )
    return rows, _timed(lambda: (rows.insert_rows(part, 1), rows.search(keys[:2], K)))


def recall(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Share of the exact places that were found."""
    return float((found.unsqueeze(-1) == exact.unsqueeze(-2)).any(-1).float().mean())


def searching(count: int, keys: torch.Tensor, queries: torch.Tensor, peers: Path | None) -> None:
    """One row for each way to search `count` rows."""
    keys = keys[:count]
    exact = (2 * queries @ keys.t() - keys.square().sum(-1)).topk(K).indices
    bare = best_ms(lambda: (queries @ keys.t()).topk(K))
    print(f"| {count:,} | bare product and topk | {bare:.1f} | 1.00 | 1.000 | |")
    for index in ("exact", "bf16", "flat", "ivf"):
        if index == "ivf" and count < 10_000:
            continue
        rows, made = filled(keys, index)
        taken = best_ms(lambda rows=rows: rows.search(queries, K))  # type: ignore[misc]
        hit = recall(rows.search(queries, K).indices, exact)
        print(
            f"| {count:,} | ours, {index} | {taken:.1f} | {taken / bare:.2f} | {hit:.3f} | {made:.1f} |",
            flush=True,
        )
    if peers is not None and count <= 100_000:
        with tempfile.TemporaryDirectory() as folder:
            for name, states in (("keys", keys), ("queries", queries), ("exact", exact)):
                np.save(f"{folder}/{name}.npy", states.numpy())
            script = Path(__file__).parent / "peer_stores.py"
            done = subprocess.run(
                [peers, str(script), folder, str(K)], capture_output=True, text=True, check=False
            )
        for line in done.stdout.splitlines():
            name, taken, hit, made = line.split("\t")
            print(
                f"| {count:,} | {name} | {float(taken):.1f} | {float(taken) / bare:.2f} | {float(hit):.3f} | {float(made):.1f} |"
            )
        if done.returncode:
            print(f"a peer failed: {done.stderr.strip().splitlines()[-1]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="1000,10000,100000,1000000")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--peers",
        action="store_true",
        help="compare with other libraries, installed for the purpose",
    )
    options = parser.parse_args()
    peers = python_with("stores", NEEDED, PEERS) if options.peers else None  # before any clock runs
    silence_libraries()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    counts = [int(count) for count in options.rows.split(",")]
    writing()
    keys, queries = hidden_states(max(counts))
    print(
        f"{QUERIES} queries, {K} rows each, {keys.shape[1]} wide, {options.threads} threads; times in milliseconds, best of 5"
    )
    print("| rows | way | ms | to bare | recall | seconds to fill |\n|---|---|---|---|---|---|")
    for count in counts:
        searching(count, keys, queries, peers)


if __name__ == "__main__":
    main()
