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

from dmt import config_io
from dmt.config import Config, TrainerConfig
from dmt.distributed import all_gather_strings, is_distributed
from dmt.errors import UserError

ResultT = TypeVar("ResultT")

SHUTDOWN_TIMEOUT = 20.0
"""Seconds that processes which have nothing more to do are given to end."""
WORKER_SCRIPT = "import sys; from dmt.cli.main import main; sys.exit(main(sys.argv[1:]))"
RANK_VARIABLE, LAUNCH_VARIABLES = "RANK", ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
INTERFACE_VARIABLE = "GLOO_SOCKET_IFNAME"
RENDEZVOUS_VARIABLE = "DMT_MEET"
"""Environment variable with the file by which processes that were started here find each other."""


def get_rank() -> int:
    """Number of this process among those that train together; the first, 0, alone speaks and writes."""
    return int(os.environ.get(RANK_VARIABLE, 0))


def resolve_device_count(config: Config) -> Config:
    """`config` with as many `trainer.devices` as torchrun started processes, where it did.

    Raises:
        UserError: another number was asked for, or they are on several machines.
    """
    world_size, local_world_size = (
        int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
    )
    if RENDEZVOUS_VARIABLE in os.environ or world_size == 1:
        return config
    if world_size != local_world_size:
        raise UserError(
            f"torchrun started {world_size} processes on several machines; dmt trains on one: give --nnodes=1"
        )
    if config.trainer.devices not in (1, world_size):
        raise UserError(
            f"trainer.devices={config.trainer.devices}, but torchrun started {world_size} processes; leave trainer.devices out, or "
            f"give torchrun --nproc-per-node={config.trainer.devices}"
        )
    config = replace(config, trainer=replace(config.trainer, devices=world_size))
    config_io.check_config(config)
    return config


@contextmanager
def distributed_context(config: Config, resume_dir: Path | None) -> Iterator[None]:
    """Be one of `trainer.devices` processes within: this one starts the others, unless torchrun has started all.

    The others are given the same config, or the folder to go on in; they say nothing, and what is wrong with them is said here.
    They meet by a file and talk through the loopback interface, so nothing listens where another machine could reach it.

    Raises:
        UserError: one of the others ended before its work was done.
    """
    world_size = config.trainer.devices
    if world_size == 1:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="dmt-") as temp_dir:
        workers: list[subprocess.Popen[bytes]] = []
        saved_environ = dict(os.environ)
        try:
            if RENDEZVOUS_VARIABLE in os.environ:
                threading.Thread(target=_exit_with_rank_zero, daemon=True).start()
            if RANK_VARIABLE not in os.environ:
                _set_rank_zero_environment(world_size, Path(temp_dir))
                workers = [
                    _start_worker(config, resume_dir, worker_rank, Path(temp_dir))
                    for worker_rank in range(1, world_size)
                ]
                _wait_for_startup(workers)
            with _process_group():
                yield
            _wait_for_exit(workers)
        except UserError:
            raise
        except (RuntimeError, ValueError) as error:
            _wait_for_exit(workers)
            if failed_ranks := [
                worker_rank for worker_rank, worker in enumerate(workers, 1) if worker.returncode
            ]:
                raise UserError(
                    _format_worker_failure(failed_ranks[0], world_size, Path(temp_dir))
                ) from error
            raise
        finally:
            for worker in workers:
                worker.kill()  # which does nothing to those that have ended
                worker.wait()
                worker.stdin.close()  # type: ignore[union-attr]
            os.environ.clear()
            os.environ.update(saved_environ)


def _set_rank_zero_environment(world_size: int, temp_dir: Path) -> None:
    """Be the first of `count` processes, to Lightning too."""
    os.environ.update(
        zip(LAUNCH_VARIABLES, ("0", "0", str(world_size), str(world_size)), strict=True)
    )
    os.environ.setdefault(INTERFACE_VARIABLE, "lo0" if sys.platform == "darwin" else "lo")
    os.environ[RENDEZVOUS_VARIABLE] = str(temp_dir / "meet")


def _start_worker(
    config: Config, resume_dir: Path | None, worker_rank: int, temp_dir: Path
) -> subprocess.Popen[bytes]:
    """Another process for the same work; what it says goes to a file. Ctrl-C is for the first alone, which tells the others."""
    config_io.save_config(config, temp_dir / "config.yaml")
    args = [str(temp_dir / "config.yaml")] if resume_dir is None else ["--resume", str(resume_dir)]
    source = str(Path(config_io.__file__).parents[1])
    env = {
        **os.environ,
        "RANK": str(worker_rank),
        "LOCAL_RANK": str(worker_rank),
        "PYTHONPATH": os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH")))),
    }
    with (temp_dir / f"said-{worker_rank}").open("wb") as log_file:
        return subprocess.Popen(
            [sys.executable, "-c", WORKER_SCRIPT, *args],
            env=env,
            stdin=subprocess.PIPE,
            stdout=log_file,
            stderr=log_file,
            start_new_session=True,
        )


def _exit_with_rank_zero() -> None:
    """End once the first process is no more, however it ended: nobody would meet this one, or take what it has."""
    os.read(
        0, 1
    )  # nothing is ever written there: it ends when whoever holds the other end does. Not by sys.stdin, whose lock
    # a thread that waits would hold when the program ends, and Python aborts then.
    os._exit(1)


def _wait_for_startup(workers: list[subprocess.Popen[bytes]]) -> None:
    """Wait until the others are there to be met: to whom has ended, the library would wait for half an hour."""
    pending = {
        Path(f"{os.environ[RENDEZVOUS_VARIABLE]}-{worker_rank}"): worker
        for worker_rank, worker in enumerate(workers, 1)
    }
    while pending:
        pending = {path: worker for path, worker in pending.items() if not path.exists()}
        if any(worker.poll() is not None for worker in pending.values()):
            raise RuntimeError("another process has ended before it was met")
        time.sleep(0.05)


@contextmanager
def _process_group() -> Iterator[None]:
    """Be connected to the others; all but the first are silent on standard output."""
    has_cuda = torch.cuda.is_available()
    if has_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend, world_size = (
        "cpu:gloo,cuda:nccl" if has_cuda else "gloo",
        int(os.environ["WORLD_SIZE"]),
    )
    init_method = None  # by torchrun's environment
    if RENDEZVOUS_VARIABLE in os.environ:
        init_method = f"file://{os.environ[RENDEZVOUS_VARIABLE]}"
        Path(f"{os.environ[RENDEZVOUS_VARIABLE]}-{get_rank()}").touch()
    dist.init_process_group(
        backend, init_method=init_method, rank=get_rank(), world_size=world_size
    )
    try:
        with contextlib.ExitStack() as exit_stack:
            if get_rank():
                exit_stack.enter_context(
                    contextlib.redirect_stdout(exit_stack.enter_context(open(os.devnull, "w")))
                )
            yield
    finally:
        dist.destroy_process_group()


def _wait_for_exit(workers: list[subprocess.Popen[bytes]]) -> None:
    for worker in workers:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(SHUTDOWN_TIMEOUT)


def _format_worker_failure(worker_rank: int, world_size: int, temp_dir: Path) -> str:
    lines = (
        (temp_dir / f"said-{worker_rank}").read_text(encoding="utf-8", errors="replace").split("\n")
    )
    last_line = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
    return f"process {worker_rank} of {world_size} (0 is this one) ended, so training cannot go on; its last words: {last_line}"


def make_on_rank_zero(make_path: Callable[[], Path]) -> Path:
    """What the first process makes, known to all."""
    return (
        Path(all_gather_strings([str(make_path()) if get_rank() == 0 else ""])[0])
        if is_distributed()
        else make_path()
    )


def rank_zero_first(function: Callable[[], ResultT]) -> ResultT:
    """What `work` makes, in each process; the first does it before the others, so that they find what it wrote."""
    if get_rank() and is_distributed():
        dist.barrier()
    result = function()
    if get_rank() == 0 and is_distributed():
        dist.barrier()
    return result


def broadcast_config(trainer: TrainerConfig) -> TrainerConfig:
    """What the first process has decided about the way to compute."""
    return (
        TrainerConfig(**json.loads(all_gather_strings([json.dumps(asdict(trainer))])[0]))
        if is_distributed()
        else trainer
    )
