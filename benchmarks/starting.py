"""Measure the time to load libraries: `python -m benchmarks.starting [--turns 5]`.

New processes take turns with a plain import and with `dmt.signals.fast_imports`.
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
VARIANTS = {
    "plain import": "import dmt.tasks",
    "without garbage collection": (
        "from dmt import signals\nwith signals.fast_imports():\n import dmt.tasks"
    ),
}


def figures(turns: int = 5) -> list[Row]:
    """Return a row per variant: seconds of a process with start and end, and the ratio."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for turn in range(turns + 1):
        for name, code in VARIANTS.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], env=environment, check=True)
            if turn:  # the first reads files from the disk
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return [
        {
            "variant": name,
            "seconds": medians[name],
            "from": min(times),
            "to": max(times),
            "ratio": medians[name] / medians["plain import"],
        }
        for name, times in seconds.items()
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=5)
    print(table(figures(parser.parse_args().turns)))
