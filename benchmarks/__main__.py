"""Every benchmark of speed, one table after the other: `python -m benchmarks`.

    python -m benchmarks [--only decode,step] [--quick] [--threads N] [--out FILE.json]
    python -m benchmarks --compare BEFORE.json AFTER.json

Prints the tables with machine, versions and commit, and writes the same as JSON, by default to
`lightning_logs/benchmarks/COMMIT.json`; `--compare` tells two such files apart, figure by figure. Each table is made by a
process of its own. `--quick` takes tiny shapes: to see that everything runs, not for its figures. All of it takes about
half an hour on two cores; each also runs alone, `python -m benchmarks.decode` say, with more to choose.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.tables import Row, compared, machine, read, table, write

TABLES = {
    "products": "matrix products by torch's two libraries",
    "memory": "one memory beside the dense block it replaces",
    "decode": "generation beside transformers' dense GPT-2",
    "step": "one step of distillation beside a dense student's, and the loss beside Liger's",
    "many": "searches as tables grow",
    "disk": "values and slots on disk",
    "where": "where the default run's seconds go",
}


def one(name: str, quick: bool, threads: int | None) -> list[Row]:
    """The rows of one benchmark, from a process of its own."""
    words = [sys.executable, "-m", "benchmarks", "--child", name, *(["--quick"] if quick else [])]
    words += ["--threads", str(threads)] if threads else []
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"error: {name} ended with {done.returncode}; python -m benchmarks.{name} shows more"
        )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(TABLES), help=f"some of {', '.join(TABLES)}")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--threads", type=int, help="as many as torch takes, if not given")
    parser.add_argument("--out", type=Path, help="the file of figures")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"), help="two such files"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        import torch

        if given.threads:
            torch.set_num_threads(given.threads)
        print(json.dumps(importlib.import_module(f"benchmarks.{given.child}").figures(given.quick)))
        return
    if given.compare:
        before, after = map(read, given.compare)
        for told, place in ((before, given.compare[0]), (after, given.compare[1])):
            print(
                f"{place}: "
                + ", ".join(f"{name} {value}" for name, value in told["machine"].items())
            )
        print(table(compared(before, after)) or "no figure is in both")
        return
    chosen = given.only.split(",")
    if odd := [name for name in chosen if name not in TABLES]:
        parser.error(f"--only {odd[0]}: there are {', '.join(TABLES)}")
    where = machine()
    place = (
        given.out
        or Path("lightning_logs") / "benchmarks" / f"{where['commit'].replace('+', '-')}.json"
    )
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    made: dict[str, list[Row]] = {}
    for name in chosen:
        print(f"\n## {name}: {TABLES[name]}\n", flush=True)
        made[name] = one(name, given.quick, given.threads)
        print(table(made[name]), flush=True)
        write(
            place, made, where
        )  # after each, so that a benchmark that fails costs none of those before
    print(f"\nthe figures are in {place}; python -m benchmarks --compare {place} OTHER.json")


if __name__ == "__main__":
    main()
