"""Several processes that train one student: started here or by torchrun, of one mind about what they do."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from dmt import settings
from dmt.config import Config, TrainerConfig
from dmt.errors import UserError
from dmt.memory.together import gathered_words, several

Made = TypeVar("Made")

PATIENCE = 20.0
"""Seconds that processes which have nothing more to do are given to end."""
CHILD = "import sys; from dmt.main import main; sys.exit(main(sys.argv[1:]))"
RANK, PLACES = "RANK", ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
LOOPBACK = "GLOO_SOCKET_IFNAME"
MEET = "DMT_MEET"
"""Environment variable with the file by which processes that were started here find each other."""


def rank() -> int:
    """Number of this process among those that train together; the first, 0, alone speaks and writes."""
    return int(os.environ.get(RANK, 0))


def counted(config: Config) -> Config:
    """`config` with as many `trainer.devices` as torchrun started processes, where it did.

    Raises:
        UserError: another number was asked for, or they are on several machines.
    """
    started, here = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if MEET in os.environ or started == 1:
        return config
    if started != here:
        raise UserError(f"torchrun started {started} processes on several machines; dmt trains on one: give --nnodes=1")
    if config.trainer.devices not in (1, started):
        raise UserError(
            f"trainer.devices={config.trainer.devices}, but torchrun started {started} processes; leave trainer.devices out, or "
            f"give torchrun --nproc-per-node={config.trainer.devices}"
        )
    config = replace(config, trainer=replace(config.trainer, devices=started))
    settings.check(config)
    return config


@contextmanager
def joined(config: Config, folder: Path | None) -> Iterator[None]:
    """Be one of `trainer.devices` processes within: this one starts the others, unless torchrun has started all.

    The others are given the same config, or the folder to go on in; they say nothing, and what is wrong with them is said here.
    They meet by a file and talk through the loopback interface, so nothing listens where another machine could reach it.

    Raises:
        UserError: one of the others ended before its work was done.
    """
    count = config.trainer.devices
    if count == 1:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="dmt-") as place:
        others: list[subprocess.Popen[bytes]] = []
        before = dict(os.environ)
        try:
            if MEET in os.environ:
                threading.Thread(target=_end_with_the_first, daemon=True).start()
            if RANK not in os.environ:
                _take_places(count, Path(place))
                others = [_start(config, folder, number, Path(place)) for number in range(1, count)]
                _await(others)
            with _connected():
                yield
            _wait(others)
        except (RuntimeError, ValueError) as error:
            _wait(others)
            if failed := [number for number, other in enumerate(others, 1) if other.returncode]:
                raise UserError(_what_became_of(failed[0], count, Path(place))) from error
            raise
        finally:
            for other in others:
                other.kill()  # which does nothing to those that have ended
                other.wait()
                other.stdin.close()  # type: ignore[union-attr]
            os.environ.clear()
            os.environ.update(before)


def _take_places(count: int, place: Path) -> None:
    """Be the first of `count` processes, to Lightning too."""
    os.environ.update(zip(PLACES, ("0", "0", str(count), str(count)), strict=True))
    os.environ.setdefault(LOOPBACK, "lo0" if sys.platform == "darwin" else "lo")
    os.environ[MEET] = str(place / "meet")


def _start(config: Config, folder: Path | None, number: int, place: Path) -> subprocess.Popen[bytes]:
    """Another process for the same work; what it says goes to a file. Ctrl-C is for the first alone, which tells the others."""
    settings.save(config, place / "config.yaml")
    words = [str(place / "config.yaml")] if folder is None else ["--resume", str(folder)]
    source = str(Path(settings.__file__).parents[1])
    environment = {
        **os.environ, "RANK": str(number), "LOCAL_RANK": str(number),
        "PYTHONPATH": os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH")))),
    }  # fmt: skip
    with (place / f"said-{number}").open("wb") as said:
        return subprocess.Popen(
            [sys.executable, "-c", CHILD, *words], env=environment, stdin=subprocess.PIPE, stdout=said, stderr=said,
            start_new_session=True,
        )  # fmt: skip


def _end_with_the_first() -> None:
    """End once the first process is no more, however it ended: nobody would meet this one, or take what it has."""
    os.read(0, 1)  # nothing is ever written there: it ends when whoever holds the other end does. Not by sys.stdin, whose lock
    # a thread that waits would hold when the program ends, and Python aborts then.
    os._exit(1)


def _await(others: list[subprocess.Popen[bytes]]) -> None:
    """Wait until the others are there to be met: to whom has ended, the library would wait for half an hour."""
    missing = {Path(f"{os.environ[MEET]}-{number}"): other for number, other in enumerate(others, 1)}
    while missing:
        missing = {file: other for file, other in missing.items() if not file.exists()}
        if any(other.poll() is not None for other in missing.values()):
            raise RuntimeError("another process has ended before it was met")
        time.sleep(0.05)


@contextmanager
def _connected() -> Iterator[None]:
    """Be connected to the others; all but the first are silent on standard output."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend, world = "cpu:gloo,cuda:nccl" if cuda else "gloo", int(os.environ["WORLD_SIZE"])
    meet = None  # by torchrun's environment
    if MEET in os.environ:
        meet = f"file://{os.environ[MEET]}"
        Path(f"{os.environ[MEET]}-{rank()}").touch()
    dist.init_process_group(backend, init_method=meet, rank=rank(), world_size=world)
    try:
        with contextlib.ExitStack() as silence:
            if rank():
                silence.enter_context(contextlib.redirect_stdout(silence.enter_context(open(os.devnull, "w"))))
            yield
    finally:
        dist.destroy_process_group()


def _wait(others: list[subprocess.Popen[bytes]]) -> None:
    for other in others:
        with contextlib.suppress(subprocess.TimeoutExpired):
            other.wait(PATIENCE)


def _what_became_of(number: int, count: int, place: Path) -> str:
    lines = (place / f"said-{number}").read_text(encoding="utf-8", errors="replace").split("\n")
    said = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
    return f"process {number} of {count} (0 is this one) ended, so training cannot go on; its last words: {said}"


def first_makes(make: Callable[[], Path]) -> Path:
    """What the first process makes, known to all."""
    return Path(gathered_words([str(make()) if rank() == 0 else ""])[0]) if several() else make()


def first_alone(work: Callable[[], Made]) -> Made:
    """What `work` makes, in each process; the first does it before the others, so that they find what it wrote."""
    if rank() and several():
        dist.barrier()
    made = work()
    if rank() == 0 and several():
        dist.barrier()
    return made


def as_the_first(trainer: TrainerConfig) -> TrainerConfig:
    """What the first process has decided about the way to compute."""
    return TrainerConfig(**json.loads(gathered_words([json.dumps(asdict(trainer))])[0])) if several() else trainer
