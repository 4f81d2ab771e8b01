"""The row store and row searches: writing, opening and searching beside other libraries.

    python -m benchmarks.store [--rows 1000,10000,100000,1000000] [--threads 1] [--peers]

Keys are inputs of the embedded teacher's second block on speeches, of unit length and width 128.
Writing and opening are measured at width 768 (a GPT-2's) with float16 values. Searches are for 256
queries, 32 rows each, from text that is not among the rows; recall is the share of the exact 32.
`--peers` creates an environment with usearch, hnswlib and memorizing-transformers-pytorch.
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
WIDTH = 768
PACKAGES = ["einops", "einops-exts", "filelock", "joblib", "usearch", "hnswlib"]
PEER_PACKAGES = ["memorizing-transformers-pytorch"]


def collect_hidden_states(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys `(count, 128)` of training text and queries `(QUERIES, 128)` of test text."""
    config = load_config(None, ["data.corpora=[speeches]"])
    teacher, tokenizer = load_teacher("embedded")
    data = TextDataModule(config, tokenizer, -(-count // 2048))
    data.setup()

    def collect(windows: torch.Tensor) -> torch.Tensor:
        block_inputs = [
            forward_teacher(teacher, batch, capture_blocks=True).block_inputs[LAYER].flatten(0, 1)
            for batch in windows.split(32)
        ]
        return torch.cat(block_inputs)

    keys = torch.cat([collect(tokens) for tokens in data.train_dataloader()])[:count]
    queries = collect(select_first_windows(data.corpora[0].test, 4096))
    mean = keys.mean(0)
    queries = queries[
        torch.randperm(len(queries), generator=torch.Generator().manual_seed(0))[:QUERIES]
    ]
    normalize = torch.nn.functional.normalize
    return normalize(keys - mean, dim=-1), normalize(queries - mean, dim=-1)


def measure_best_ms(call: Callable[[], object], repeats: int = 5) -> float:
    """Return the milliseconds of the fastest call, after one to warm up."""
    call()
    return 1e3 * min(_timed(call) for _ in range(repeats))


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure_writes(count: int = 100_000, batch: int = 5_000) -> None:
    """Print the rows per second written into SQLite, and the seconds to open them again."""
    rng = np.random.default_rng(0)
    keys, values = (rng.normal(size=(batch, WIDTH)).astype(np.float32) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "rows.db")
        with RowStore(path, "benchmark") as store:
            namespace = store.get_or_create_namespace("layer", WIDTH, WIDTH, "float16")
            scores = np.ones(batch, np.float32)

            def write_all() -> None:
                for step in range(count // batch):
                    rows = RowInsert(store.reserve_ids(batch), keys, values, scores)
                    store.commit("run", step, {namespace: StepChanges([rows])})

            seconds = _timed(write_all)
        print(
            f"written: {count / seconds:,.0f} rows per second, width {WIDTH}, {batch:,} per step",
            flush=True,
        )
        table = RowTable(WIDTH, WIDTH)
        with RowStore(path, read_only=True) as store:
            seconds = _timed(
                lambda: table.load_rows(store.scan(namespace), expected_rows=store.count(namespace))
            )
        size = Path(path).stat().st_size / 1e6
        print(f"opened: {len(table):,} rows in {seconds:.1f} s, {size:,.0f} MB on disk", flush=True)


def fill_table(keys: torch.Tensor, index: str) -> tuple[RowTable, float]:
    """Return rows with these keys, and the seconds until the first search returned."""
    rows = RowTable(keys.shape[1], 1, index=index)
    batch = RowInsert(
        np.arange(1, len(keys) + 1),
        keys.numpy(),
        np.zeros((len(keys), 1), np.float32),
        np.ones(len(keys), np.float32),
    )
    return rows, _timed(lambda: (rows.insert_rows(batch, 1), rows.search(keys[:2], K)))


def measure_recall(row_ids: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the share of the exact neighbors that the search returned."""
    return float((row_ids.unsqueeze(-1) == exact.unsqueeze(-2)).any(-1).float().mean())


def print_row(
    count: int, method: str, milliseconds: float, bare_ms: float, recall: float, seconds: float
) -> None:
    """Print a row of the table of searches."""
    cells = (
        f"{count:,}",
        method,
        f"{milliseconds:.1f}",
        f"{milliseconds / bare_ms:.2f}",
        f"{recall:.3f}",
        f"{seconds:.1f}",
    )
    print(f"| {' | '.join(cells)} |", flush=True)


def measure_searches(
    count: int, keys: torch.Tensor, queries: torch.Tensor, peers: Path | None
) -> None:
    """Print a row for each method to search `count` rows."""
    keys = keys[:count]
    exact = (2 * queries @ keys.t() - keys.square().sum(-1)).topk(K).indices
    bare_ms = measure_best_ms(lambda: (queries @ keys.t()).topk(K))
    print(f"| {count:,} | bare product and topk | {bare_ms:.1f} | 1.00 | 1.000 | |")
    for index in ("exact", "bf16", "flat", "ivf"):
        if index == "ivf" and count < 10_000:
            continue
        rows, fill_seconds = fill_table(keys, index)
        milliseconds = measure_best_ms(lambda rows=rows: rows.search(queries, K))  # type: ignore[misc]
        share = measure_recall(rows.search(queries, K).indices, exact)
        print_row(count, f"ours, {index}", milliseconds, bare_ms, share, fill_seconds)
    if peers is not None and count <= 100_000:
        with tempfile.TemporaryDirectory() as folder:
            for name, states in (("keys", keys), ("queries", queries), ("exact", exact)):
                np.save(f"{folder}/{name}.npy", states.numpy())
            script = Path(__file__).parent / "peer_stores.py"
            process = subprocess.run(
                [peers, str(script), folder, str(K)], capture_output=True, text=True, check=False
            )
        for line in process.stdout.splitlines():
            name, *figures = line.split("\t")
            milliseconds, share, fill_seconds = map(float, figures)
            print_row(count, name, milliseconds, bare_ms, share, fill_seconds)
        if process.returncode:
            print(f"a peer failed: {process.stderr.strip().splitlines()[-1]}")


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
    args = parser.parse_args()
    peers = (
        python_with("stores", PACKAGES, PEER_PACKAGES) if args.peers else None
    )  # before anything is timed
    silence_libraries()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    counts = [int(count) for count in args.rows.split(",")]
    measure_writes()
    keys, queries = collect_hidden_states(max(counts))
    print(
        f"{QUERIES} queries, {K} rows each, width {keys.shape[1]}, {args.threads} threads; "
        "times in milliseconds, best of 5"
    )
    print("| rows | method | ms | to bare | recall | seconds to fill |\n|---|---|---|---|---|---|")
    for count in counts:
        measure_searches(count, keys, queries, peers)


if __name__ == "__main__":
    main()
