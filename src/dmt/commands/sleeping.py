"""`dmt sleep`: from a student with rows to one that knows without them."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from dmt import disk, settings
from dmt.commands.printing import Output, check_seed
from dmt.config import Config
from dmt.consolidation.sleep import Evening, Night, evening
from dmt.consolidation.sleep import sleep as sleep_through
from dmt.data.corpora import load_corpus
from dmt.distill.folder import check_writable, let_go_of_runs, new_run, write_record
from dmt.errors import UserError
from dmt.facts.opening import student_folder
from dmt.runs import RUNS
from dmt.stopping import Stopped, number_of

HEADINGS = ("", "evening", "morning")
LOGGED = 10
"""Steps from one figure of a curve to the next."""


def sleep(given: argparse.Namespace, out: Output) -> None:
    """Sleep, and tell what was learnt, what stayed and where the new student is."""
    if not 0 < given.lr <= 1:
        raise UserError(f"--lr must be in (0, 1], got {given.lr:g}")
    check_seed(given.seed)
    if given.least < 0:
        raise UserError(f"--least must be 0 or more, got {given.least}")
    folder = student_folder(given.student)
    config = _config(folder, given)
    output = None if given.output is None else Path(given.output).expanduser()
    check_writable(str(output.parent) if output else RUNS, "--output")
    with _alone(output) if output else nullcontext():
        _sleep(given, out, folder, config, output)


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Be the only night whose student goes to `output`, which is not there yet."""
    _check_free(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    lock = output.with_name(f".{output.name}.lock")
    held = disk.hold(lock, f"--output {output}: another dmt sleep is about to write it; wait for that, or name another folder")
    try:
        _check_free(output)
        yield
    finally:
        disk.let_go(held, lock)


def _sleep(given: argparse.Namespace, out: Output, folder: Path, config: Config, output: Path | None) -> None:
    before = evening(folder, given.tag, given.least)
    corpora = [load_corpus(source) for source in config.data.corpora]
    run = new_run(config) if output is None else None
    place = output or run / "student"  # type: ignore[operator]
    how = f"dmt sleep --student {folder} --steps {given.steps} --lr {given.lr:g} --seed {given.seed}"
    how += "".join(f" --{name} {value}" for name, value in (("tag", given.tag), ("least", given.least)) if value)
    how += f" --corpora {' '.join(given.corpora)}" if given.corpora else ""
    try:
        night = _through(given, out, before, config, corpora, run, place, how)
    except KeyboardInterrupt as stopped:
        line = f"stopped; {folder} is as it was and nothing of the night was kept; sleep again with: {how}"
        if (place / "config.json").is_file():
            line = f"stopped while it was measured; the new student is whole: {place}"
        raise Stopped(number_of(stopped), line) from None
    except Exception as error:
        if (found := disk.trouble(error)) is None or isinstance(error, UserError):
            raise
        raise UserError(f"{place}: {found[0]}; {found[1]}, then sleep again with: {how}; {folder} is as it was") from None
    finally:
        let_go_of_runs()
        if run is not None and not (place / "config.json").is_file():
            shutil.rmtree(run, ignore_errors=True)  # a run without a student is none
    out.table(HEADINGS, _rows(night), "")
    out.line(f"{night.seconds:.0f} s; student: {night.student}")
    out.data(asdict(night))


def _through(
    given: argparse.Namespace,
    out: Output,
    before: Evening,
    config: Config,
    corpora: list[Any],
    run: Path | None,
    place: Path,
    how: str,
) -> Night:
    """The night, and what it leaves in the folder of its run."""
    _plan(before, config, place, given, out)
    if run is not None:
        write_record(run, config, {"task": "sleep", "replay": how}, begins=True)
    with out.progress("sleeping", given.steps) as progress, _Curves(run) as curves:

        def heard(step: int, found: dict[str, float]) -> None:
            progress(1)
            curves(step, found)

        night = sleep_through(before, corpora, place, given.steps, given.lr, given.seed, out.note, heard)
    if run is not None:
        write_record(run, config, {"task": "sleep", "replay": how, "night": asdict(night)})
        disk.write(run / "report.md", _markdown(run, night, how))
    return night


def _config(folder: Path, given: argparse.Namespace) -> Config:
    """That of the run which made the student, where it is beside it: it says on what text."""
    there = folder.parent / "config.yaml"
    config = settings.load(there) if folder.name == "student" and there.is_file() else settings.load()
    config = replace(config, seed=given.seed, trainer=replace(config.trainer, log_dir=RUNS))
    return replace(config, data=replace(config.data, corpora=given.corpora, shares=[])) if given.corpora else config


def _check_free(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} is there already; name a folder that is not, or remove it")


def _plan(before: Evening, config: Config, place: Path, given: argparse.Namespace, out: Output) -> None:
    rows = sum(map(len, before.rows.values()))
    out.note(f"student    {before.folder}")
    out.note(f"to sleep   {len(before.facts):,} facts" + (f", {rows:,} rows of associative memory" if rows else ""))
    if awake := len(before.book.known) - len(before.facts):
        out.note(f"awake      {awake:,} facts stay rows")
    out.note(f"remembered {len(before.known):,} facts of earlier nights are gone through again")
    out.note(f"text       {', '.join(config.data.corpora)}")
    out.note(f"slots      of layers {', '.join(map(str, before.memories))}, {given.steps:,} steps")
    out.note(f"folder     {place}")


def _rows(night: Night) -> list[tuple[str, str, str]]:
    rows: list[tuple[str, str, str]] = []
    if night.facts:
        rows.append((f"{night.facts:,} facts that slept, recall", f"{night.recall_before:.3f}", f"{night.recall_after:.3f}"))
    if night.known:
        rows.append((f"{night.known:,} facts of earlier nights", f"{night.known_before:.3f}", f"{night.known_after:.3f}"))
    for layer, share in night.rows_kept.items():
        rows.append((f"what rows of layer {layer} say, share", "1.000", f"{share:.3f}"))
    rows.append(("rows", f"{night.rows + night.awake:,}", f"{night.awake:,}"))
    return rows + [(f"KL on held-out {corpus}, nats", "", f"{apart:.2e}") for corpus, apart in night.kl.items()]


def _markdown(run: Path, night: Night, how: str) -> str:
    lines = [f"# {run.name}: a night's sleep", "", f"| {' | '.join(HEADINGS)} |", "|---|---:|---:|"]
    lines += [f"| {' | '.join(row)} |" for row in _rows(night)]
    return "\n".join([*lines, "", f"{night.seconds:.0f} s. Again: `{how}`. What produced this: `run.json`.", ""])


class _Curves:
    """Figures of each step for TensorBoard, where there is a run."""

    def __init__(self, run: Path | None) -> None:
        self._board: Any = None if run is None else SummaryWriter(str(run))

    def __enter__(self) -> Callable[[int, dict[str, float]], None]:
        return self._note

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            self._board.close()

    def _note(self, step: int, found: dict[str, float]) -> None:
        if self._board is not None and step % LOGGED == 0:
            for name, value in found.items():
                self._board.add_scalar(f"sleep/{name}", value, step)
