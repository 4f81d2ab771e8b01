"""Time, recall and size of each search: `python -m benchmarks.many [--slots 10000,...] [--peers]`.

Keys are inputs of the embedded teacher's second block on speeches, of unit length and width 128;
beyond a million they repeat with noise of a fifth of their length. Queries come from other text,
256 at once and one alone; k = 32, relu weights, selection by contribution. Recall is the share of
the exact 32 slots that a search reads. Medians; the searches of one table are interleaved.

`--peers` compares with lucidrains' product-key-memory and peer-pytorch, with random keys of width
768, in a virtual environment: forward alone, and forward with backward.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.environments import python_with
from benchmarks.store import collect_hidden_states
from benchmarks.tables import Row, head, line, medians
from torch import nn

from dmt.memory import FeaturalMemory
from dmt.memory.featural import SEARCH_METHODS
from dmt.training.trainer import keep_freed_memory, silence_libraries

K, TOKENS = 32, 256
WIDE = 768
PEERS = {"product-key-memory": "4 heads of 32", "peer-pytorch": "8 heads of 16"}
SQUARES = (16_384, 1_000_000)
NOISE = 0.2
# More slots are not searched exactly for 256 tokens at once: the scores would fill gigabytes.
LARGEST_EXACT = 1_000_000


def make_memory(keys: torch.Tensor, slots: int, k: int = K, **changes: Any) -> FeaturalMemory:
    """Return a memory with these keys, repeated with noise if too few, and small random values."""
    width = keys.shape[1]
    # Allocate without values first: initializing ten million slots twice would take minutes.
    with torch.device("meta"):
        memory = FeaturalMemory(width, slots, k, activation="relu", **changes)
    memory = memory.to_empty(device="cpu").requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(1)
    for first in range(0, slots, len(keys)):
        part = memory.keys[first : first + len(keys)]
        part.copy_(keys[: len(part)])
        if first:
            part.add_(torch.randn(part.shape, generator=generator), alpha=NOISE / width**0.5)
    for bias in (memory.key_bias, memory.output_bias):
        bias.zero_()
    lengths = 0.5 + torch.rand(
        slots, generator=generator
    )  # values of different lengths; otherwise selection would be by score
    for first in range(0, slots, 65_536):
        part = memory.values[first : first + 65_536]
        part.copy_(nn.functional.normalize(torch.randn(part.shape, generator=generator), dim=-1))
        part.mul_(lengths[first : first + 65_536].unsqueeze(-1))
    return memory


def print_row(rows: list[Row]) -> None:
    """Print the newest of `rows`, and the header before the first."""
    print(
        (f"{head(rows[0])}\n" if len(rows) == 1 else "") + line(rows[-1]),
        flush=True,
    )


def index_bytes(memory: FeaturalMemory) -> int:
    """Return the bytes of a search index, without keys and values."""
    slots, width = memory.num_slots, memory.width
    return {
        "exact": 0,
        "int8": slots * (width + 4),
        "ivf": slots * (width + 9),
    }[memory.search]


def measure_searches(
    sizes: list[int], searches: tuple[str, ...] = SEARCH_METHODS, repeats: int = 5
) -> list[Row]:
    """Return a row for each size and search."""
    keys, queries = collect_hidden_states(min(max(sizes), 1_000_000))
    table_rows = []
    for slots in sizes:
        memory = make_memory(keys, slots)
        calls: dict[str, Callable[[], object]] = {}
        stats_by_search: dict[str, dict[str, Any]] = {}
        recall_queries = queries[: max(8, min(len(queries), 100_000_000 // slots))]
        for search in searches:
            view = make_memory(keys[:1], 1, 1, search=search)  # all searches share one table
            view.num_slots, view.k = slots, K
            for name in ("keys", "key_bias", "values"):
                getattr(view, name).data = getattr(memory, name).data
            start = time.perf_counter()
            with torch.no_grad():
                view(queries[:1])
            built = time.perf_counter() - start
            stats_by_search[search] = {
                "recall": view.measure_recall(recall_queries),
                "made in, s": built,
                "MB of index": index_bytes(view) / 1e6,
            }
            if search != "exact" or slots <= LARGEST_EXACT:
                calls[search] = lambda view=view: view(queries)
            calls[f"{search} alone"] = lambda view=view: view(queries[:1])
        with torch.no_grad():
            medians_by_name = medians(calls, repeats if slots < 1_000_000 else max(2, repeats // 2))
            ms = {name: 1e3 * seconds for name, seconds in medians_by_name.items()}
        for search, stats in stats_by_search.items():
            table_rows.append(
                {
                    "num_slots": f"{slots:,}",
                    "search": search,
                    "ms for 256": ms.get(search, float("nan")),
                    "ms for 1": ms[f"{search} alone"],
                    **stats,
                    "MB of slots": 8 * slots * memory.width / 1e6,
                }
            )
            print_row(table_rows)
        del memory, calls, view
    return table_rows


def time_memory(memory: FeaturalMemory, hidden: torch.Tensor, repeats: int) -> tuple[float, float]:
    """Return median milliseconds of a forward pass, and of one with its backward pass."""

    def backward() -> None:
        memory.zero_grad()
        memory(hidden).square().sum().backward()

    with torch.no_grad():
        forward = 1e3 * medians({"": lambda: memory(hidden)}, repeats)[""]
    memory.requires_grad_(True)
    return forward, 1e3 * medians({"": backward}, repeats)[""]


def make_row(slots: int, implementation: str, forward: float, backward: float) -> Row:
    """Return a row of `compare_peers`."""
    return {
        "num_slots": f"{slots:,}",
        "implementation": implementation,
        "forward, ms": forward,
        "with backward, ms": backward,
    }


def compare_peers(sizes: list[int], threads: int, repeats: int = 5) -> list[Row]:
    """Return a row for each size (a square number) and each search of ours or of a library."""
    python = python_with(
        "slots",
        ["einops", "einx"],
        [*PEERS, "colt5-attention", "local-attention", "hyper-connections"],
    )
    table_rows = []
    for slots in sizes:
        for peer in PEERS:
            command = [
                python,
                str(Path(__file__).parent / "peer_slots.py"),
                peer,
                *map(str, (slots, TOKENS, WIDE, threads)),
            ]
            process = subprocess.run(command, capture_output=True, text=True, check=False)
            if process.returncode:
                raise SystemExit(f"{peer} failed: {process.stderr.strip().splitlines()[-1]}")
            forward, backward = map(float, process.stdout.split())
            table_rows.append(make_row(slots, f"{peer}, {PEERS[peer]}", forward, backward))
            print_row(table_rows)
        keys = nn.functional.normalize(torch.randn(min(slots, 100_000), WIDE), dim=-1)
        hidden = torch.randn(TOKENS, WIDE)
        for search, k in (("ivf", 32), ("ivf", 128)):
            memory = make_memory(keys, slots, k, search=search)

            forward, backward = time_memory(memory, hidden, 2 if slots >= 1_000_000 else repeats)
            table_rows.append(make_row(slots, f"ours, {search}, k = {k}", forward, backward))
            print_row(table_rows)
            del memory
    return table_rows


def figures(quick: bool = False) -> list[Row]:
    """Measure searches of tables of ten thousand, a hundred thousand and a million slots."""
    silence_libraries()
    keep_freed_memory()
    with contextlib.redirect_stdout(sys.stderr):
        return measure_searches([2_000, 20_000] if quick else [10_000, 100_000, 1_000_000])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--slots",
        default="10000,100000,1000000",
        help="10000000 takes 20 GB and a quarter of an hour",
    )
    parser.add_argument("--searches", default=",".join(SEARCH_METHODS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--peers", action="store_true", help="other libraries, instead of the table of searches"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    silence_libraries()
    keep_freed_memory()
    if args.peers:
        compare_peers(list(SQUARES), args.threads)
        return
    measure_searches([int(size) for size in args.slots.split(",")], tuple(args.searches.split(",")))


if __name__ == "__main__":
    main()
