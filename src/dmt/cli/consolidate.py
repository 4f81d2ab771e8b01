"""`dmt sleep`: from a student with rows to one that knows without them.

`dmt consolidate`: from a context to rows, weights or memory tokens of a student; the words of a command to a config.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from dmt import config_io, files
from dmt.cli.output import Output, check_seed
from dmt.config import Config
from dmt.config_io import list_setting_names
from dmt.consolidation.sleep import SlotTransferPlan, SlotTransferResult, plan_slot_transfer
from dmt.consolidation.sleep import transfer_rows as sleep_through
from dmt.data.corpora import load_corpus
from dmt.editing.fact_store import resolve_student_folder
from dmt.errors import UserError
from dmt.paths import RUNS_DIR
from dmt.signals import SignalInterrupt, get_signal_number
from dmt.training.run_dir import (
    check_run_name_free,
    check_writable,
    create_run_dir,
    read_record,
    unlock_runs,
    write_record,
)
from dmt.training.tasks import run_task

DEFAULT_STEPS, DEFAULT_LR = 200, 2e-3
"""Of what is trained, unless something else is asked for."""
SETTING_BY_OPTION = {
    "file": "context.file",
    "questions": "context.questions",
    "into": "context.target",
    "objective": "context.objective",
    "write": "context.row_method",
    "weights": "context.trainable",
    "rank": "context.lora_rank",
    "tokens": "context.prompt_length",
    "steps": "stages.end_to_end_steps",
    "lr": "stages.end_to_end_lr",
    "temperature": "loss.temperature",
    "seed": "seed",
}
"""Options of the command and the settings that they are."""


def run_consolidate(args: argparse.Namespace, out: Output) -> None:
    """Put a context into a student; the result is a run of its own, the student it began with stays as it is."""
    if args.student is not None and args.model is not None:
        raise UserError("--student and --model both name what learns; give one of them")
    source = args.model or str(resolve_student_folder(args.student))
    overrides = [
        "task=consolidate",
        f"teacher={source}",
        f"stages.end_to_end_steps={DEFAULT_STEPS}",
        f"stages.end_to_end_lr={DEFAULT_LR}",
    ]
    options = {
        setting: getattr(args, option)
        for option, setting in SETTING_BY_OPTION.items()
        if getattr(args, option) is not None
    }
    overrides += [f"{setting}={value}" for setting, value in options.items()]
    extra_overrides, text = list(args.settings), args.text
    if (
        text is not None and text.partition("=")[0] in list_setting_names()
    ):  # no text, but the first of the settings
        extra_overrides, text = [text, *extra_overrides], None
    overrides += extra_overrides
    config = config_io.load_config(
        None, [*overrides, *(["context.text=given"] if text is not None else [])]
    )
    if text is not None:  # as it is: not to be read as YAML
        config = replace(config, context=replace(config.context, text=text))
    if out.as_json:
        config = replace(config, trainer=replace(config.trainer, progress_bar=False))
    check_writable(config.trainer.log_dir, "trainer.log_dir")
    check_run_name_free(config)
    with out.stdout_to_stderr():
        folder = run_task(config)
    record = read_record(folder)
    reported = ("written", "kinds", "unrelated", "cost", "seconds")
    out.print_json(
        {"folder": str(folder), **{name: record[name] for name in reported if name in record}}
    )


REPORT_COLUMNS = ("", "evening", "morning")
LOG_EVERY = 10
"""Steps from one figure of a curve to the next."""


def run_sleep(args: argparse.Namespace, out: Output) -> None:
    """Sleep, and tell what was learnt, what stayed and where the new student is."""
    if not 0 < args.lr <= 1:
        raise UserError(f"--lr must be in (0, 1], got {args.lr:g}")
    check_seed(args.seed)
    if args.least < 0:
        raise UserError(f"--least must be 0 or more, got {args.least}")
    folder = resolve_student_folder(args.student)
    config = _build_config(folder, args)
    output = None if args.output is None else Path(args.output).expanduser()
    check_writable(str(output.parent) if output else RUNS_DIR, "--output")
    with _lock_output(output) if output else nullcontext():
        _run_locked(args, out, folder, config, output)


@contextmanager
def _lock_output(output: Path) -> Iterator[None]:
    """Be the only night whose student goes to `output`, which is not there yet."""
    _check_output_free(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    lock_path = output.with_name(f".{output.name}.lock")
    handle = files.acquire_lock(
        lock_path,
        f"--output {output}: another dmt sleep is about to write it; wait for that, or name another folder",
    )
    try:
        _check_output_free(output)
        yield
    finally:
        files.release_lock(handle, lock_path)


def _run_locked(
    args: argparse.Namespace, out: Output, folder: Path, config: Config, output: Path | None
) -> None:
    plan = plan_slot_transfer(folder, args.tag, args.least)
    corpora = [load_corpus(source) for source in config.data.corpora]
    run_folder = create_run_dir(config) if output is None else None
    student_path = output or run_folder / "student"  # type: ignore[operator]
    command = (
        f"dmt sleep --student {folder} --steps {args.steps} --lr {args.lr:g} --seed {args.seed}"
    )
    command += "".join(
        f" --{name} {value}" for name, value in (("tag", args.tag), ("least", args.least)) if value
    )
    command += f" --corpora {' '.join(args.corpora)}" if args.corpora else ""
    try:
        result = _run_transfer(args, out, plan, config, corpora, run_folder, student_path, command)
    except KeyboardInterrupt as interrupt:
        message = f"stopped; {folder} is as it was and nothing of the night was kept; sleep again with: {command}"
        if (student_path / "config.json").is_file():
            message = f"stopped while it was measured; the new student is whole: {student_path}"
        raise SignalInterrupt(get_signal_number(interrupt), message) from None
    except Exception as error:
        if (problem := files.disk_error(error)) is None or isinstance(error, UserError):
            raise
        raise UserError(
            f"{student_path}: {problem[0]}; {problem[1]}, then sleep again with: {command}; {folder} is as it was"
        ) from None
    finally:
        unlock_runs()
        if run_folder is not None and not (student_path / "config.json").is_file():
            shutil.rmtree(run_folder, ignore_errors=True)  # a run without a student is none
    out.print_table(REPORT_COLUMNS, _make_report_rows(result), "")
    out.print_line(f"{result.seconds:.0f} s; student: {result.student}")
    out.print_json(asdict(result))


def _run_transfer(
    args: argparse.Namespace,
    out: Output,
    plan: SlotTransferPlan,
    config: Config,
    corpora: list[Any],
    run_folder: Path | None,
    student_path: Path,
    command: str,
) -> SlotTransferResult:
    """The night, and what it leaves in the folder of its run."""
    _print_plan(plan, config, student_path, args, out)
    if run_folder is not None:
        write_record(run_folder, config, {"task": "sleep", "replay": command}, is_start=True)
    with out.progress_bar("sleeping", args.steps) as progress, _StepLogger(run_folder) as curves:

        def on_step(step: int, metrics: dict[str, float]) -> None:
            progress(1)
            curves(step, metrics)

        result = sleep_through(
            plan, corpora, student_path, args.steps, args.lr, args.seed, out.print_note, on_step
        )
    if run_folder is not None:
        write_record(
            run_folder, config, {"task": "sleep", "replay": command, "night": asdict(result)}
        )
        files.atomic_write(run_folder / "report.md", _format_report(run_folder, result, command))
    return result


def _build_config(folder: Path, args: argparse.Namespace) -> Config:
    """That of the run which made the student, where it is beside it: it says on what text."""
    config_path = folder.parent / "config.yaml"
    config = (
        config_io.load_config(config_path)
        if folder.name == "student" and config_path.is_file()
        else config_io.load_config()
    )
    config = replace(config, seed=args.seed, trainer=replace(config.trainer, log_dir=RUNS_DIR))
    return (
        replace(config, data=replace(config.data, corpora=args.corpora, mixture_weights=[]))
        if args.corpora
        else config
    )


def _check_output_free(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(
            f"--output {output} is there already; name a folder that is not, or remove it"
        )


def _print_plan(
    plan: SlotTransferPlan,
    config: Config,
    student_path: Path,
    args: argparse.Namespace,
    out: Output,
) -> None:
    num_rows = sum(map(len, plan.rows.values()))
    out.print_note(f"student    {plan.folder}")
    out.print_note(
        f"to sleep   {len(plan.facts):,} facts"
        + (f", {num_rows:,} rows of associative memory" if num_rows else "")
    )
    if num_retained := len(plan.fact_store.records) - len(plan.facts):
        out.print_note(f"awake      {num_retained:,} facts stay rows")
    out.print_note(
        f"remembered {len(plan.retained_facts):,} facts of earlier nights are gone through again"
    )
    out.print_note(f"text       {', '.join(config.data.corpora)}")
    out.print_note(f"slots      of layers {', '.join(map(str, plan.layers))}, {args.steps:,} steps")
    out.print_note(f"folder     {student_path}")


def _make_report_rows(result: SlotTransferResult) -> list[tuple[str, str, str]]:
    rows: list[tuple[str, str, str]] = []
    if result.facts:
        rows.append(
            (
                f"{result.facts:,} facts that slept, recall",
                f"{result.recall_before:.3f}",
                f"{result.recall_after:.3f}",
            )
        )
    if result.retained:
        rows.append(
            (
                f"{result.retained:,} facts of earlier nights",
                f"{result.retained_before:.3f}",
                f"{result.retained_after:.3f}",
            )
        )
    for layer, share in result.row_explained_share.items():
        rows.append((f"what rows of layer {layer} say, share", "1.000", f"{share:.3f}"))
    rows.append(("rows", f"{result.rows + result.remaining_rows:,}", f"{result.remaining_rows:,}"))
    return rows + [
        (f"KL on held-out {corpus}, nats", "", f"{kl:.2e}") for corpus, kl in result.kl.items()
    ]


def _format_report(run_folder: Path, result: SlotTransferResult, command: str) -> str:
    lines = [
        f"# {run_folder.name}: a night's sleep",
        "",
        f"| {' | '.join(REPORT_COLUMNS)} |",
        "|---|---:|---:|",
    ]
    lines += [f"| {' | '.join(row)} |" for row in _make_report_rows(result)]
    return "\n".join(
        [
            *lines,
            "",
            f"{result.seconds:.0f} s. Again: `{command}`. What produced this: `run.json`.",
            "",
        ]
    )


class _StepLogger:
    """Figures of each step for TensorBoard, where there is a run."""

    def __init__(self, run_folder: Path | None) -> None:
        self._writer: Any = None if run_folder is None else SummaryWriter(str(run_folder))

    def __enter__(self) -> Callable[[int, dict[str, float]], None]:
        return self._log_step

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def _log_step(self, step: int, metrics: dict[str, float]) -> None:
        if self._writer is not None and step % LOG_EVERY == 0:
            for name, value in metrics.items():
                self._writer.add_scalar(f"sleep/{name}", value, step)
