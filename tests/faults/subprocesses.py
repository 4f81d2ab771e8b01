"""Programs that start without loading libraries again, and readers of what runs leave behind."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import conftest
import factories
import torch
from conftest import SENTENCES
from safetensors.torch import load_file

from dmt import config_io
from dmt.models.loading import load
from dmt.store import RowStore
from dmt.training.checkpoints import is_intact

HERE = Path(__file__).parent
ROWS = [
    "memory.kind=associative",
    "memory.write_start=0.2",
    "memory.min_distance=0.05",
    "memory.capacity=24",
    "store.flush_every=2",
]


def sample_cases(cases, every=2):
    """Return one of `every` cases, or all of them if FAULTS=all is set."""
    return cases if os.environ.get("FAULTS") == "all" else cases[::every]


@dataclass(frozen=True)
class Ending:
    """How a program ended: exit code (minus the signal that killed it), stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def last_line(self):
        """The last line of stderr."""
        return (self.err.strip().splitlines() or [""])[-1]


class Launcher:
    """Start programs as forks of a server that has loaded the libraries."""

    def __init__(self, folder):
        self.folder, self.logs = folder, {}
        paths = os.pathsep.join([str(HERE), str(HERE.parents[1] / "src")])
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "forkserver.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": paths,
                "OMP_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
            },
        )
        assert self._receive() == "ready"

    def _receive(self):
        return json.loads(self.process.stdout.readline())

    def _send(self, order):
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self._receive()

    def start(self, args, program="distill", cwd=None, **order):
        """Start `distill` or `dmt` with `args` in the folder `cwd`; return its process id.

        forkserver.py explains the other keys of an order.
        """
        log = self.folder / f"{len(self.logs)}"
        for end in ("out", "err"):
            log.with_name(f"{log.name}.{end}").touch()
        pid = self._send(
            {
                "program": program,
                "args": [str(arg) for arg in args],
                "cwd": str(cwd or self.folder),
                "log": str(log),
                **order,
            }
        )
        self.logs[pid] = log
        return pid

    def wait(self, pid):
        """Wait for a program; return its `Ending`."""
        code, log = self._send({"wait": pid}), self.logs[pid]
        out, err = (log.with_name(f"{log.name}.{end}").read_text() for end in ("out", "err"))
        return Ending(code, out, err)

    def close(self):
        """Stop the server."""
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def run(self, args, program="distill", **order):
        """Run a program to its end; return its `Ending`."""
        return self.wait(self.start(args, program, **order))


def small_run_args(input_dir, logs):
    """Return arguments of a small run on the inputs of these tests."""
    return conftest.small_run_args(input_dir / "teacher", input_dir / "text.txt", logs)


@dataclass(frozen=True)
class RunResult:
    """The results of a finished run: weights with the ids of rows, stored rows, and fidelity."""

    weights: dict
    rows: dict
    fidelity: dict

    def __eq__(self, other):
        is_same = (
            self.weights.keys() == other.weights.keys()
            and self.rows == other.rows
            and self.fidelity == other.fidelity
        )
        return is_same and all(
            torch.equal(value, other.weights[name]) for name, value in self.weights.items()
        )


def read_rows(store):
    """Return step, key and value of the active rows of each layer, in the order of their ids."""
    with RowStore(str(store), read_only=True) as opened:
        return {
            namespace.name: [
                (step, key.tobytes(), value.tobytes())
                for batch in opened.scan(namespace)
                for step, key, value in zip(
                    batch.metadata["step"], batch.keys, batch.values, strict=True
                )
            ]
            for namespace in opened.list_namespaces()
        }


def read_result(run):
    """Return the `RunResult` of a finished run."""
    weights = load_file(run / "student" / "model.safetensors")
    rows = read_rows(run / "memory.db") if (run / "memory.db").exists() else {}
    return RunResult(weights, rows, json.loads((run / "run.json").read_text())["fidelity"])


def write_facts_file(folder, count):
    """Write a file of `count` facts."""
    file = folder / f"facts{count}.jsonl"
    names = ("Ada", "Bo", "Cy", "Di", "Ed", "Flo", "Gus", "Hal")
    subjects = [f"{names[i % 8]} Holbrook{i}" for i in range(count)]
    towns = (" Raven", " Hill", " Fox", " Dog")
    lines = [
        {
            "prompt": f"{subjects[i]} was born in the town of",
            "answer": towns[i % 4],
            "subject": subjects[i],
        }
        for i in range(count)
    ]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return file


def write_prose_file(folder):
    """Write a file of text that contains no fact."""
    file = folder / "prose.txt"
    file.write_text("\n\n".join(f"{SENTENCES[i % 2]} {i}" for i in range(100)))
    return file


def copy_folder(source, target):
    """Copy a folder, such as a student that the test changes."""
    return Path(shutil.copytree(source, target))


def consolidation_args(input_dir, folder, target="memory", *more):
    """Return arguments of a consolidation that takes seconds."""
    return factories.consolidation(
        input_dir / "long", input_dir / "text.txt", folder, f"context.target={target}", *more
    )


def assert_files_intact(run):
    """Check that every file with a final name in a run that was killed is complete."""
    for checkpoint in (run / "checkpoints").glob("*.ckpt"):
        assert is_intact(checkpoint), checkpoint
    if (run / "config.yaml").exists():
        config_io.load_config(run / "config.yaml")
    if (run / "run.json").exists():
        json.loads((run / "run.json").read_text())
    if (run / "student").exists():
        load(run / "student")
    if (run / "memory.db").exists():
        with closing(sqlite3.connect(run / "memory.db")) as opened:
            assert opened.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            if opened.execute(
                "SELECT 1 FROM sqlite_master WHERE name = 'dmt_row_stats'"
            ).fetchall():
                newest = opened.execute(
                    "SELECT max(step) FROM dmt_row_stats GROUP BY namespace"
                ).fetchall()
                assert len(set(newest)) <= 1, newest  # a step writes in every layer
