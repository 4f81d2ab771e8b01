"""`dmt consolidate`: distill a context into a student; `dmt sleep`: distill its facts into slots."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from dmt import config_io, files
from dmt.cli.arguments import (
    add_command,
    add_model_argument,
    add_seed_argument,
    learning_rate,
    non_negative_int,
    positive_int,
)
from dmt.config import Config, ContextConfig
from dmt.config_io import list_setting_names
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

if TYPE_CHECKING:
    from dmt.cli.output import Output
    from dmt.consolidation.sleep import SlotTransferPlan, SlotTransferResult

DEFAULT_STEPS, DEFAULT_LR = 200, 2e-3
SETTING_BY_OPTION = {
    "file": "context.file",
    "questions": "context.questions",
    "target": "context.target",
    "objective": "context.objective",
    "row_method": "context.row_method",
    "trainable": "context.trainable",
    "lora_rank": "context.lora_rank",
    "prompt_length": "context.prompt_length",
    "steps": "stages.end_to_end_steps",
    "lr": "stages.end_to_end_lr",
    "temperature": "loss.temperature",
    "seed": "seed",
}


def add_parser(commands: Any) -> None:
    """Add `dmt consolidate` and `dmt sleep` to the commands."""
    _add_consolidate(commands)
    _add_sleep(commands)


def _add_consolidate(commands: Any) -> None:
    parser = add_command(
        commands,
        "consolidate",
        run_consolidate,
        "Distill a context into a model, so that it answers without the context as with it",
        "The result is a new run; the model itself is not changed.",
        (
            "dmt consolidate --file page.txt --questions page.jsonl",
            "dmt consolidate --file page.txt --target weights --trainable slots",
            'dmt consolidate "Ada keeps seven geese." --model smollm2 --row-method gradient',
        ),
    )
    parser.add_argument("text", nargs="?", help="the context; or use --file")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="any other setting")
    parser.add_argument("--file", metavar="TEXT.txt", help="a text file with the context")
    parser.add_argument(
        "--questions",
        metavar="FILE.jsonl",
        help='questions to evaluate: one {"prompt": ..., "answer": ...} per line',
    )
    _add_choice(parser, "target", "where it is stored (default: memory)")
    _add_choice(parser, "row_method", "how rows are computed (default: activation_delta)")
    _add_choice(parser, "trainable", "which weights are trained (default: lora)")
    _add_choice(parser, "objective", "what is distilled (default: generated)")
    for option, number_type, metavar, help_text in (
        ("--lora-rank", int, "N", "rank of LoRA (default: 8)"),
        ("--prompt-length", int, "N", "embeddings of --target prompt (default: 16)"),
        ("--steps", int, "N", f"training steps (default: {DEFAULT_STEPS})"),
        ("--lr", float, "X", f"peak learning rate (default: {DEFAULT_LR:g})"),
        ("--temperature", float, "T", "temperature of the KL divergence (default: 1)"),
        ("--seed", int, "N", "random seed (default: 0)"),
    ):
        parser.add_argument(option, type=number_type, metavar=metavar, help=help_text)
    add_model_argument(
        parser, "a run, a saved student, embedded, smollm2 or a hub name (default: the newest run)"
    )


def _add_choice(parser: argparse.ArgumentParser, setting: str, help_text: str) -> None:
    """Add an option that takes the choices of a setting in `context`."""
    choices = get_args(get_type_hints(ContextConfig)[setting])
    parser.add_argument(f"--{setting.replace('_', '-')}", choices=choices, help=help_text)


def _add_sleep(commands: Any) -> None:
    parser = add_command(
        commands,
        "sleep",
        run_sleep,
        "Distill stored facts and rows into the slots of a new student, and delete them there",
        "Facts that earlier runs have moved are replayed. The model itself is not changed.",
        (
            "dmt sleep --model lightning_logs/version_0",
            "dmt sleep --tag family --min-hits 3 --steps 400",
        ),
    )
    parser.add_argument("--tag", help="only facts and rows with this tag")
    parser.add_argument(
        "--min-hits",
        type=non_negative_int,
        default=0,
        metavar="N",
        help="only facts that fired at least N times (default: 0)",
    )
    parser.add_argument(
        "--steps",
        type=positive_int,
        default=200,
        metavar="N",
        help="training steps (default: 200)",
    )
    parser.add_argument(
        "--lr",
        type=learning_rate,
        default=0.03,
        metavar="X",
        help="peak learning rate, in preconditioned units (default: 0.03)",
    )
    add_seed_argument(parser)
    parser.add_argument(
        "--replay-data",
        nargs="+",
        metavar="CORPUS",
        help="corpora on which the student shall not change (default: its training data)",
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="folder of the new student (default: a new run in lightning_logs/)",
    )
    add_model_argument(parser)


def run_consolidate(args: argparse.Namespace, out: Output) -> None:
    """Put a context into a student; the result is a run of its own, the student it began with stays as it is."""
    from dmt.tasks import run_task_as_command

    source = _resolve_model(args.model)
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
        folder = run_task_as_command(config).run_dir
    record = read_record(folder)
    from dmt.report.consolidation import summarize

    out.print_summary(summarize(folder, record))
    reported = ("rows_written", "question_types", "unrelated", "cost", "seconds")
    out.print_json(
        {"run_dir": str(folder), **{name: record[name] for name in reported if name in record}}
    )


def _resolve_model(model: str | None) -> str:
    """Return the folder of the student that `--model` names, or the name of another model."""
    from dmt.editing.fact_store import resolve_student_folder

    is_run = model is not None and (Path(model).expanduser() / "student").is_dir()
    return str(resolve_student_folder(model)) if model is None or is_run else model


REPORT_COLUMNS = ("", "evening", "morning")
LOG_EVERY = 10
"""Steps from one figure of a curve to the next."""


def run_sleep(args: argparse.Namespace, out: Output) -> None:
    """Sleep, and tell what was learnt, what stayed and where the new student is."""
    from dmt.editing.fact_store import resolve_student_folder

    folder = resolve_student_folder(args.model)
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
    from dmt.consolidation.sleep import plan_slot_transfer
    from dmt.data.corpora import load_corpus

    plan = plan_slot_transfer(folder, args.tag, args.min_hits)
    corpora = [load_corpus(source) for source in config.data.corpora]
    run_folder = create_run_dir(config) if output is None else None
    student_path = output or run_folder / "student"  # type: ignore[operator]
    command = f"dmt sleep --model {folder} --steps {args.steps} --lr {args.lr:g} --seed {args.seed}"
    command += "".join(
        f" --{name} {value}"
        for name, value in (("tag", args.tag), ("min-hits", args.min_hits))
        if value
    )
    command += f" --replay-data {' '.join(args.replay_data)}" if args.replay_data else ""
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
    """Transfer rows to slots, and write the run folder."""
    from dmt.consolidation.sleep import transfer_rows

    _print_plan(plan, config, student_path, args, out)
    if run_folder is not None:
        write_record(
            run_folder, config, {"task": "sleep", "replay_command": command}, is_start=True
        )
    with out.progress_bar("sleeping", args.steps) as progress, _StepLogger(run_folder) as curves:

        def on_step(step: int, metrics: dict[str, float]) -> None:
            progress(1)
            curves(step, metrics)

        result = transfer_rows(
            plan, corpora, student_path, args.steps, args.lr, args.seed, out.print_note, on_step
        )
    if run_folder is not None:
        write_record(
            run_folder,
            config,
            {"task": "sleep", "replay_command": command, "night": asdict(result)},
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
        replace(config, data=replace(config.data, corpora=args.replay_data, mixture_weights=[]))
        if args.replay_data
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
        from torch.utils.tensorboard import SummaryWriter

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
