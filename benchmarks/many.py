"""Many slots: `python -m benchmarks.many [--slots 10000,...] [--peers]`. Time, recall and bytes of each search as tables grow.

Keys are real: what the embedded teacher's second block is given on speeches, of unit length and 128 wide; past a million
each is there ten times over with noise a fifth of its length. Queries come from text that is not among them, 256 at once
and one alone; k = 32, weights relu, ranked by contribution. Recall is the share of the exact 32 that are read. A table is
made from the exact keys. Medians; the searches of one table take turns.

`--peers` measures lucidrains' product-key-memory and peer-pytorch beside ours, 768 wide, random keys as they have, in an
environment of its own: forward alone and forward with backward.
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
from benchmarks.store import hidden_states
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
LARGEST_EXACT = 1_000_000
"""Slots up to which the exact search of 256 tokens at once is timed: their scores fill a gigabyte."""


def filled(keys: torch.Tensor, slots: int, k: int = K, **changes: Any) -> FeaturalMemory:
    """A memory of so many slots with these keys, repeated with noise where there are not enough, and small random values."""
    width = keys.shape[1]
    # Made without numbers first: initialising ten million slots twice would take minutes.
    with torch.device("meta"):
        memory = FeaturalMemory(width, slots, k, activation="relu", **changes)
    memory = memory.to_empty(device="cpu").requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(1)
    for first in range(0, slots, len(keys)):
        part = memory.keys[first : first + len(keys)]
        part.copy_(keys[: len(part)])
        if first:
            part.add_(torch.randn(part.shape, generator=generator), alpha=NOISE / width**0.5)
    for zero in (memory.key_bias, memory.output_bias):
        zero.zero_()
    lengths = 0.5 + torch.rand(
        slots, generator=generator
    )  # values of unlike lengths, or ranking would be by score
    for first in range(0, slots, 65_536):
        part = memory.values[first : first + 65_536]
        part.copy_(nn.functional.normalize(torch.randn(part.shape, generator=generator), dim=-1))
        part.mul_(lengths[first : first + 65_536].unsqueeze(-1))
    return memory


def tell(rows: list[Row]) -> None:
    """Print the newest of `rows`, and the head before the first."""
    print((f"{head(rows[0])}\n" if len(rows) == 1 else "") + line(rows[-1]), flush=True)


def index_bytes(memory: FeaturalMemory) -> int:
    """What a search keeps beside keys and values."""
    slots, width = memory.num_slots, memory.width
    return {
        "exact": 0,
        "int8": slots * (width + 4),
        "ivf": slots * (width + 9),
    }[memory.search]


def rows(
    sizes: list[int], searches: tuple[str, ...] = SEARCH_METHODS, repeats: int = 5
) -> list[Row]:
    """A row for each size and search."""
    keys, queries = hidden_states(min(max(sizes), 1_000_000))
    found = []
    for slots in sizes:
        memory = filled(keys, slots)
        calls: dict[str, Callable[[], object]] = {}
        facts: dict[str, dict[str, Any]] = {}
        few = queries[: max(8, min(len(queries), 100_000_000 // slots))]
        for search in searches:
            view = filled(keys[:1], 1, 1, search=search)  # one table, as many ways to search it
            view.num_slots, view.k = slots, K
            for name in ("keys", "key_bias", "values"):
                getattr(view, name).data = getattr(memory, name).data
            began = time.perf_counter()
            with torch.no_grad():
                view(queries[:1])
            built = time.perf_counter() - began
            facts[search] = {
                "recall": view.measure_recall(few),
                "made in, s": built,
                "MB beside": index_bytes(view) / 1e6,
            }
            if search != "exact" or slots <= LARGEST_EXACT:
                calls[search] = lambda view=view: view(queries)
            calls[f"{search} alone"] = lambda view=view: view(queries[:1])
        with torch.no_grad():
            taken = medians(calls, repeats if slots < 1_000_000 else max(2, repeats // 2))
            ms = {name: 1e3 * seconds for name, seconds in taken.items()}
        for search, told in facts.items():
            found.append(
                {
                    "num_slots": f"{slots:,}",
                    "search": search,
                    "ms for 256": ms.get(search, float("nan")),
                    "ms for 1": ms[f"{search} alone"],
                    **told,
                    "MB of slots": 8 * slots * memory.width / 1e6,
                }
            )
            tell(found)
        del memory, calls, view
    return found


def both_ways(memory: FeaturalMemory, hidden: torch.Tensor, repeats: int) -> tuple[float, float]:
    """Median milliseconds of a forward pass, and of one with its backward pass."""

    def back() -> None:
        memory.zero_grad()
        memory(hidden).square().sum().backward()

    with torch.no_grad():
        forward = 1e3 * medians({"": lambda: memory(hidden)}, repeats)[""]
    memory.requires_grad_(True)
    return forward, 1e3 * medians({"": back}, repeats)[""]


def against(slots: int, what: str, forward: float, back: float) -> Row:
    """A line of `beside`."""
    return {
        "num_slots": f"{slots:,}",
        "what": what,
        "forward, ms": forward,
        "with backward, ms": back,
    }


def beside(sizes: list[int], threads: int, repeats: int = 5) -> list[Row]:
    """A row for each size (squares), search of ours and library: 768 wide, random keys, milliseconds."""
    python = python_with(
        "slots",
        ["einops", "einx"],
        [*PEERS, "colt5-attention", "local-attention", "hyper-connections"],
    )
    found = []
    for slots in sizes:
        for peer in PEERS:
            words = [
                python,
                str(Path(__file__).parent / "peer_slots.py"),
                peer,
                *map(str, (slots, TOKENS, WIDE, threads)),
            ]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{peer} failed: {done.stderr.strip().splitlines()[-1]}")
            forward, both = map(float, done.stdout.split())
            found.append(
                {
                    "num_slots": f"{slots:,}",
                    "what": f"{peer}, {PEERS[peer]}",
                    "forward, ms": forward,
                    "with backward, ms": both,
                }
            )
            tell(found)
        keys = nn.functional.normalize(torch.randn(min(slots, 100_000), WIDE), dim=-1)
        hidden = torch.randn(TOKENS, WIDE)
        for search, k in (("ivf", 32), ("ivf", 128)):
            memory = filled(keys, slots, k, search=search)

            forward, back = both_ways(memory, hidden, 2 if slots >= 1_000_000 else repeats)
            found.append(
                {
                    "num_slots": f"{slots:,}",
                    "what": f"ours, {search}, k = {k}",
                    "forward, ms": forward,
                    "with backward, ms": back,
                }
            )
            tell(found)
            del memory
    return found


def figures(quick: bool = False) -> list[Row]:
    """The searches of tables of ten thousand, a hundred thousand and a million slots."""
    silence_libraries()
    keep_freed_memory()
    with contextlib.redirect_stdout(sys.stderr):
        return rows([2_000, 20_000] if quick else [10_000, 100_000, 1_000_000])


def main() -> None:
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
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    silence_libraries()
    keep_freed_memory()
    if given.peers:
        beside(list(SQUARES), given.threads)
        return
    rows([int(size) for size in given.slots.split(",")], tuple(given.searches.split(",")))


if __name__ == "__main__":
    main()
