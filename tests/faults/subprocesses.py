"""Programs that begin at once, and what a run leaves behind."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import factories as workshop
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


def some(cases, every=2):
    """Of many alike, one of `every`; all where FAULTS=all is set."""
    return cases if os.environ.get("FAULTS") == "all" else cases[::every]


@dataclass(frozen=True)
class Ended:
    """How a program ended: its exit code, minus the signal where one killed it, and what it said."""

    code: int
    out: str
    err: str

    @property
    def last(self):
        """The last line it said on standard error."""
        return (self.err.strip().splitlines() or [""])[-1]


class Nursery:
    """Programs that begin at once; `start` one and `end` it, or `run` it to its end."""

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
        assert self._answer() == "ready"

    def _answer(self):
        return json.loads(self.process.stdout.readline())

    def _ask(self, order):
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def start(self, words, program="distill", cwd=None, **order):
        """Start `distill` or `dmt` with these words in the folder `cwd`; its process id.

        What else an order may say: forkserver.py.
        """
        log = self.folder / f"{len(self.logs)}"
        for end in ("out", "err"):
            log.with_name(f"{log.name}.{end}").touch()
        pid = self._ask(
            {
                "program": program,
                "words": [str(w) for w in words],
                "cwd": str(cwd or self.folder),
                "log": str(log),
                **order,
            }
        )
        self.logs[pid] = log
        return pid

    def end(self, pid):
        """Wait for a program; how it ended."""
        code, log = self._ask({"wait": pid}), self.logs[pid]
        out, err = (log.with_name(f"{log.name}.{end}").read_text() for end in ("out", "err"))
        return Ended(code, out, err)

    def close(self):
        """Let it go, with whatever it started."""
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def run(self, words, program="distill", **order):
        """Start a program, and how it ended."""
        return self.end(self.start(words, program, **order))


def small_run(material, logs):
    """Words of a run: four layer-wise steps, five end to end, a checkpoint every other."""
    return [
        f"teacher={material / 'teacher'}",
        f"data.corpora=[{material / 'text.txt'}]",
        f"trainer.log_dir={logs}",
        "data.seq_len=16",
        "data.batch_size=4",
        "data.micro_batch_size=2",
        "data.validation_tokens=64",
        "data.test_tokens=128",
        "stages.calibration_tokens=64",
        "stages.layerwise_steps=4",
        "stages.end_to_end_steps=5",
        "optim.warmup_steps=1",
        "trainer.num_threads=1",
        "trainer.log_every=1",
        "trainer.validate_every=3",
        "trainer.checkpoint_every=2",
        "trainer.progress_bar=false",
        "trainer.accelerator=cpu",
        "memory.mean_k=8",
        "trainer.precision=32-true",
    ]


@dataclass(frozen=True)
class Result:
    """What a finished run comes to: weights, stored rows without their numbers, and fidelity."""

    weights: dict
    rows: dict
    fidelity: dict

    def __eq__(self, other):
        alike = (
            self.weights.keys() == other.weights.keys()
            and self.rows == other.rows
            and self.fidelity == other.fidelity
        )
        return alike and all(
            torch.equal(value, other.weights[name]) for name, value in self.weights.items()
        )


def rows_of(store):
    """Rows of each layer that are there, in the order of their numbers: step, key and value."""
    with RowStore(str(store), read_only=True) as opened:
        return {
            space.name: [
                (step, key.tobytes(), value.tobytes())
                for page in opened.scan(space)
                for step, key, value in zip(
                    page.metadata["step"], page.keys, page.values, strict=True
                )
            ]
            for space in opened.list_namespaces()
        }


def result(run):
    """The `Result` of a run that has ended."""
    weights = load_file(run / "student" / "model.safetensors")
    # Numbers of rows are never given twice, so a run that did steps again has higher ones, in the same order.
    weights = {
        name: value.argsort() if name.endswith("rows.ids") else value
        for name, value in weights.items()
    }
    rows = rows_of(run / "memory.db") if (run / "memory.db").exists() else {}
    return Result(weights, rows, json.loads((run / "run.json").read_text())["fidelity"])


def facts_in(folder, count):
    """A file of facts."""
    file = folder / f"facts{count}.jsonl"
    names = ("Ada", "Bo", "Cy", "Di", "Ed", "Flo", "Gus", "Hal")
    who = [f"{names[i % 8]} Holbrook{i}" for i in range(count)]
    towns = (" Raven", " Hill", " Fox", " Dog")
    lines = [
        {"prompt": f"{who[i]} was born in the town of", "answer": towns[i % 4], "subject": who[i]}
        for i in range(count)
    ]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return file


def prose_in(folder):
    """A file of text that facts are not about."""
    file = folder / "prose.txt"
    file.write_text("\n\n".join(f"{SENTENCES[i % 2]} {i}" for i in range(100)))
    return file


def copied(student, place):
    """A student that may be changed."""
    return Path(shutil.copytree(student, place))


def consolidation(material, folder, into="memory", *more):
    """Words of a consolidation that takes seconds."""
    return workshop.consolidation(
        material / "long", material / "text.txt", folder, f"context.target={into}", *more
    )


def whole_files(run):
    """Look at everything that a program which was killed has left in a run: what bears a name is whole."""
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
            if opened.execute("SELECT 1 FROM sqlite_master WHERE name = 'dmt_row_stats'").fetchall():
                newest = opened.execute(
                    "SELECT max(step) FROM dmt_row_stats GROUP BY namespace"
                ).fetchall()
                assert len(set(newest)) <= 1, newest  # a step writes in every layer
