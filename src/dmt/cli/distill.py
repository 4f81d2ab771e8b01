"""`dmt distill`: run a config file with settings changed on the command line, or resume a run."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmt import config_io, signals
from dmt.cli.arguments import add_command, check_docstrings
from dmt.config import Config
from dmt.config_files import find_config
from dmt.errors import UserError
from dmt.training.run_dir import (
    check_run_name_free,
    check_writable,
    load_run_config,
    read_record,
)

if TYPE_CHECKING:
    from dmt.cli.output import Output

CHANGEABLE_ON_RESUME = (
    "stages.layerwise_lr",
    "stages.end_to_end_lr",
    "sleep.lr",
    "optim.grad_clip",
)
REPORTED_RESULTS = (
    "fidelity",
    "slot_transfer",
    "seconds",
)  # parts of run.json that `--json` prints


def add_parser(commands: Any) -> None:
    """Add `dmt distill` to the commands."""
    parser = add_command(
        commands,
        "distill",
        run_distill,
        "Distill a student with discrete memory from a teacher",
        "Without arguments the embedded teacher is distilled with the default settings. "
        "`dmt config` lists the configs that come with dmt, `dmt config --list` all settings.",
        (
            "dmt distill                                  # 3 to 5 minutes on 2 cores",
            "dmt distill seed                             # a config that comes with dmt",
            "dmt distill my.yaml memory.mean_k=16 seed=1  # a file of yours and settings",
            "dmt distill --resume lightning_logs/version_0",
        ),
        needs_torch=False,  # imported once the settings are valid
    )
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="CONFIG | key=value",
        help="at most one config file or name, and settings that override it",
    )
    parser.add_argument("--config", metavar="FILE", help="the config file, as an option")
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help=f"resume this run's folder; only {', '.join(CHANGEABLE_ON_RESUME)} can be changed",
    )


def run_distill(args: argparse.Namespace, out: Output) -> None:
    """Train and evaluate what the arguments describe."""
    resume_dir = None if args.resume is None else Path(args.resume)
    config = load_config(args, resume_dir)
    if out.as_json or out.quiet:
        config = replace(config, trainer=replace(config.trainer, progress_bar=False))
    if config.trainer.devices > 1 or "RANK" in os.environ:
        # DDP warns about settings that only one of the two stages needs
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    check_docstrings()
    is_first_process = os.environ.get("RANK", "0") == "0"  # torchrun starts several
    if is_first_process and not out.quiet:
        print("loading torch and transformers ...", file=sys.stderr)
    with signals.fast_imports():
        from dmt.tasks import run_task_as_command
    with out.stdout_to_stderr():
        run_dir = run_task_as_command(config, resume_dir).run_dir
    if not is_first_process:  # the first one reports, and may still write the record
        return
    record = read_record(run_dir)
    print_summary(config.task, run_dir, record, out)
    results = {name: record[name] for name in REPORTED_RESULTS if name in record}
    out.print_json({"run_dir": str(run_dir), **results})


def print_summary(task: str, run_dir: Path, record: dict[str, Any], out: Output) -> None:
    """Print the results of a run as a table."""
    from dmt.report import consolidation, distillation, slot_transfer

    reports: dict[str, Any] = {
        "distill": distillation,
        "consolidate": consolidation,
        "sleep": slot_transfer,
    }
    out.print_summary(reports[task].summarize(run_dir, record))


def load_config(args: argparse.Namespace, resume_dir: Path | None) -> Config:
    """Load and check the settings that the arguments name.

    Raises:
        UserError: two config files, a wrong setting, or a folder that cannot be written to.
    """
    config_names = [arg for arg in args.settings if "=" not in arg]
    config_names += [] if args.config is None else [args.config]
    overrides = [arg for arg in args.settings if "=" in arg]
    if len(config_names) > 1:
        raise UserError(f"one config file at most, got {', '.join(config_names)}")
    if resume_dir is not None:
        rejected = config_names + [
            arg for arg in overrides if arg.partition("=")[0] not in CHANGEABLE_ON_RESUME
        ]
        if rejected:
            raise UserError(
                f"--resume uses the run's own settings; leave out {' '.join(rejected)} "
                f"(only {', '.join(CHANGEABLE_ON_RESUME)} can be changed)"
            )
        config = load_run_config(resume_dir, overrides)
    else:
        path = find_config(config_names[0]) if config_names else None
        config = config_io.load_config(path, overrides)
        check_writable(config.trainer.log_dir, "trainer.log_dir")
        check_run_name_free(config)
    return config
