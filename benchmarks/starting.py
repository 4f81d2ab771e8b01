"""Seconds from a command to its first work: `python -m benchmarks.starting [--turns 5]`.

Libraries are loaded by new processes that take turns: as Python does it, and as `dmt.signals.fast_imports` does it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.tables import Row, table

SOURCE = Path(__file__).parents[1] / "src"
WAYS = {
    "plain import": "import dmt.tasks",
    "collector at rest": "from dmt import signals\nwith signals.fast_imports():\n import dmt.tasks",
}


def figures(turns: int = 5) -> list[Row]:
    """A row for each way: seconds of a process, its own start and end included, and the ratio to the first."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    taken: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(turns + 1):
        for name, code in WAYS.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], env=environment, check=True)
            if turn:  # the first reads files from the disk
                taken[name].append(time.perf_counter() - began)
    middle = {name: statistics.median(each) for name, each in taken.items()}
    return [
        {
            "way": name,
            "seconds": middle[name],
            "from": min(each),
            "to": max(each),
            "ppl_ratio": middle[name] / middle["plain import"],
        }
        for name, each in taken.items()
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=5)
    print(table(figures(parser.parse_args().turns)))
