"""Run every benchmark of speed, one table after the other: `python -m benchmarks`.

    python -m benchmarks [--only decode,step] [--quick] [--threads N] [--out FILE.json]
    python -m benchmarks --compare BEFORE.json AFTER.json

Prints the tables with machine, versions and commit, and writes them as JSON, by default to
`lightning_logs/benchmarks/COMMIT.json`; `--compare` shows how the figures of two such files differ.
Each table is measured in a new process. `--quick` uses tiny shapes and only shows that everything
runs; its figures are meaningless. All tables take about half an hour on two cores. Each benchmark
also runs alone with more options, for example `python -m benchmarks.decode`.
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
    "memory": "one memory and the dense block it replaces",
    "decode": "generation, and transformers' dense GPT-2",
    "step": "one step of distillation, a dense student's, and the loss against Liger's",
    "many": "searches as tables grow",
    "disk": "values and slots on disk",
    "where": "seconds of the default run by part",
}


def run_table(name: str, quick: bool, threads: int | None) -> list[Row]:
    """Return the rows of one benchmark, measured in a new process."""
    command = [sys.executable, "-m", "benchmarks", "--child", name, *(["--quick"] if quick else [])]
    command += ["--threads", str(threads)] if threads else []
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if process.returncode:
        raise SystemExit(
            f"error: {name} ended with {process.returncode}; python -m benchmarks.{name} shows more"
        )
    return json.loads(process.stdout.splitlines()[-1])


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(TABLES), help=f"some of {', '.join(TABLES)}")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--threads", type=int, help="number of threads (default: torch's)")
    parser.add_argument("--out", type=Path, help="file for the figures")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"), help="two such files"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    """Run the command line."""
    parser = build_parser()
    args = parser.parse_args()
    if args.child:
        import torch

        if args.threads:
            torch.set_num_threads(args.threads)
        print(json.dumps(importlib.import_module(f"benchmarks.{args.child}").figures(args.quick)))
        return
    if args.compare:
        print_comparison(*args.compare)
        return
    names = args.only.split(",")
    if unknown := [name for name in names if name not in TABLES]:
        parser.error(f"--only {unknown[0]}: there are {', '.join(TABLES)}")
    environment = machine()
    commit = environment["commit"].replace("+", "-")
    path = args.out or Path("lightning_logs") / "benchmarks" / f"{commit}.json"
    print(", ".join(f"{name} {value}" for name, value in environment.items()))
    tables: dict[str, list[Row]] = {}
    for name in names:
        print(f"\n## {name}: {TABLES[name]}\n", flush=True)
        tables[name] = run_table(name, args.quick, args.threads)
        print(table(tables[name]), flush=True)
        write(path, tables, environment)
    print(f"\nthe figures are in {path}; python -m benchmarks --compare {path} OTHER.json")


def print_comparison(before_path: Path, after_path: Path) -> None:
    """Print the figures that two files share, those that changed most first."""
    before, after = read(before_path), read(after_path)
    for path, figures in ((before_path, before), (after_path, after)):
        environment = ", ".join(f"{name} {value}" for name, value in figures["machine"].items())
        print(f"{path}: {environment}")
    print(table(compared(before, after)) or "no figure is in both")


if __name__ == "__main__":
    main()
