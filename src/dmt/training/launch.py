"""Several processes that train one student, started by torchrun: checks and rank-zero helpers."""

from __future__ import annotations

import json
import logging
import os
import sys
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
from dmt.paths import quote_path
from dmt.training.run_dir import format_distill_command

ResultT = TypeVar("ResultT")

INTERFACE_VARIABLE = "GLOO_SOCKET_IFNAME"


def get_rank() -> int:
    """Return the number of this process among those that train together; 0 logs and writes."""
    return int(os.environ.get("RANK", 0))


def resolve_device_count(config: Config, resume_dir: Path | None = None) -> Config:
    """Return `config` with `trainer.devices` set to the number of processes torchrun started.

    Args:
        config: Settings of the run.
        resume_dir: Run to resume, for the error message.

    Raises:
        UserError: Another number is set, or the processes are on several machines.
    """
    devices = config.trainer.devices
    world_size, local_world_size = (
        int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
    )
    if world_size != local_world_size:
        raise UserError(
            f"torchrun started {world_size} processes on several machines;"
            " dmt trains on one: give --nnodes=1"
        )
    if world_size == devices:
        return config
    if world_size == 1:
        arguments = (
            "[CONFIG.yaml] [key=value ...]"
            if resume_dir is None
            else f"--resume {quote_path(resume_dir)}"
        )
        raise UserError(
            f"trainer.devices={devices} needs {devices} processes, which torchrun starts:"
            f" {format_distill_command(arguments, devices)}"
        )
    if devices != 1:
        raise UserError(
            f"trainer.devices={devices}, but torchrun started {world_size} processes;"
            f" leave trainer.devices out, or give torchrun --nproc-per-node={devices}"
        )
    config = replace(config, trainer=replace(config.trainer, devices=world_size))
    config_io.check_config(config)
    return config


@contextmanager
def distributed_context(config: Config) -> Iterator[None]:
    """Connect the processes that torchrun started; do nothing for a single one.

    They talk through the loopback interface, so they listen on no other network. Only the first
    one logs below the level ERROR.
    """
    if config.trainer.devices == 1:
        yield
        return
    has_cuda = torch.cuda.is_available()
    if has_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    interface_before = os.environ.get(INTERFACE_VARIABLE)
    os.environ.setdefault(INTERFACE_VARIABLE, "lo0" if sys.platform == "darwin" else "lo")
    logger = logging.getLogger("dmt")
    level_before = logger.level
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if has_cuda else "gloo")
        if get_rank():
            logger.setLevel(logging.ERROR)
        yield
    finally:
        logger.setLevel(level_before)
        if interface_before is None:
            del os.environ[INTERFACE_VARIABLE]
        if dist.is_initialized():
            dist.destroy_process_group()


def make_on_rank_zero(make_path: Callable[[], Path]) -> Path:
    """Call `make_path` in the first process and return its result in all."""
    if not is_distributed():
        return make_path()
    return Path(all_gather_strings([str(make_path()) if get_rank() == 0 else ""])[0])


def rank_zero_first(function: Callable[[], ResultT]) -> ResultT:
    """Call `function` in each process, in the first one before the others start."""
    if get_rank() and is_distributed():
        dist.barrier()
    result = function()
    if get_rank() == 0 and is_distributed():
        dist.barrier()
    return result


def broadcast_config(trainer: TrainerConfig) -> TrainerConfig:
    """Return the first process's trainer settings in all processes."""
    if not is_distributed():
        return trainer
    return TrainerConfig(**json.loads(all_gather_strings([json.dumps(asdict(trainer))])[0]))
