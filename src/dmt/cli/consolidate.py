"""`dmt consolidate`: distill a context into a model; `dmt sleep`: distill its facts into slots."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from dmt import config_io
from dmt.cli.arguments import (
    add_command,
    add_model_argument,
    learning_rate,
    non_negative_int,
    positive_int,
    seed,
)
from dmt.cli.facts import resolve_student
from dmt.config import Config, ContextConfig
from dmt.config_io import list_setting_names
from dmt.errors import UserError
from dmt.paths import expand_home
from dmt.training.run_dir import check_run_name_free, check_writable, read_record
from dmt.validation import ArgumentError

if TYPE_CHECKING:
    from dmt.cli.output import Output

DEFAULT_STEPS, DEFAULT_LR = 200, 2e-3  # of a target that is trained
REPORTED_RESULTS = ("rows_written", "question_types", "unrelated", "cost", "seconds")
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
SETTING_BY_SLEEP_OPTION = {
    "tag": "sleep.tag",
    "min_hits": "sleep.min_hits",
    "steps": "sleep.steps",
    "lr": "sleep.lr",
    "seed": "seed",
    "replay_data": "data.corpora",
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
            'dmt consolidate "Ada keeps seven geese." --model smollm2 --row-method gradient',
            "dmt consolidate --from rows --to slots  # the same as dmt sleep",
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
    parser.add_argument(
        "--from",
        dest="source",
        choices=("context", "rows"),
        default="context",
        help="rows: as dmt sleep, with its options (default: context)",
    )
    parser.add_argument("--to", dest="destination", choices=("slots",), help="with --from rows")
    for action in _add_transfer_arguments(parser):
        action.help = argparse.SUPPRESS  # see dmt sleep --help
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
    _add_transfer_arguments(parser)
    for option, number_type, metavar, help_text in (
        ("--steps", positive_int, "N", "training steps (default: 200)"),
        ("--lr", learning_rate, "X", "peak learning rate, preconditioned (default: 0.03)"),
        ("--seed", seed, "N", "random seed (default: 0)"),
    ):
        parser.add_argument(option, type=number_type, metavar=metavar, help=help_text)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="any other setting")
    add_model_argument(parser)
    parser.set_defaults(source="rows", destination="slots", text=None)


def _add_transfer_arguments(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Add and return the options of a transfer from rows to slots."""
    tag = parser.add_argument("--tag", help="only facts and rows with this tag")
    min_hits = parser.add_argument(
        "--min-hits",
        type=non_negative_int,
        metavar="N",
        help="only facts and rows that fired at least N times (default: 0)",
    )
    replay_data = parser.add_argument(
        "--replay-data",
        nargs="+",
        metavar="CORPUS",
        help="text that should not change (default: the student's training data)",
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="the run's folder (default: the next one in lightning_logs/)",
    )
    return [tag, min_hits, replay_data]


def run_consolidate(args: argparse.Namespace, out: Output) -> None:
    """Distill a context into a model, or with `--from rows` its facts and rows into slots."""
    _check_direction(args)
    if args.source == "rows":
        run_sleep(args, out)
        return
    extra_settings, text = list(args.settings), args.text
    if text is not None and text.partition("=")[0] in list_setting_names():
        extra_settings, text = [text, *extra_settings], None  # the first of the settings
    values: dict[str, Any] = {
        "teacher": _resolve_model(args, extra_settings, out),
        "stages.end_to_end_steps": DEFAULT_STEPS,
        "stages.end_to_end_lr": DEFAULT_LR,
    }
    values |= _read_options(args, SETTING_BY_OPTION)
    if text is not None:
        values["context.text"] = text
    config = _build_config("consolidate", values, extra_settings, args.output, out)
    from dmt.report.consolidation import summarize

    run_dir = _run(config, out)
    record = read_record(run_dir)
    out.print_summary(summarize(run_dir, record))
    results = {name: record[name] for name in REPORTED_RESULTS if name in record}
    out.print_json({"run_dir": str(run_dir), **results})


def run_sleep(args: argparse.Namespace, out: Output) -> None:
    """Distill facts and rows into the slots of a new student; print what was learned and kept."""
    from dmt.consolidation.sleep import find_replay_data, read_result
    from dmt.report.slot_transfer import summarize

    values: dict[str, Any] = {"teacher": _resolve_model(args, args.settings, out)}
    if args.replay_data is None:
        replay_data = find_replay_data(Path(values["teacher"]))
        values |= {f"data.{name}": value for name, value in replay_data.items()}
    values |= _read_options(args, SETTING_BY_SLEEP_OPTION)
    config = _build_config("sleep", values, args.settings, args.output, out)
    run_dir = _run(config, out)
    out.print_summary(summarize(run_dir, read_record(run_dir)))
    out.print_json(asdict(read_result(run_dir)))


def _check_direction(args: argparse.Namespace) -> None:
    """Raise `UserError` for options that belong to the other source."""
    if args.source == "rows":
        rejected = [
            option
            for option in ("text", "file", "questions", "target", "row_method", "trainable")
            if getattr(args, option, None) is not None
        ]
        reason = "which is about a context; leave it out"
    else:
        rejected = [
            option
            for option in ("destination", "tag", "min_hits", "replay_data")
            if getattr(args, option, None) is not None
        ]
        reason = "which needs --from rows"
    if rejected:
        name = "the context" if rejected[0] == "text" else f"--{rejected[0].replace('_', '-')}"
        name = name.replace("--destination", "--to")
        raise UserError(f"dmt consolidate --from {args.source} does not take {name}, {reason}")


def _read_options(args: argparse.Namespace, settings: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of options that were passed, by the names of their settings."""
    return {
        setting: value
        for option, setting in settings.items()
        if (value := getattr(args, option)) is not None
    }


def _resolve_model(args: argparse.Namespace, settings: Sequence[str], out: Output) -> str:
    """Return the folder of the student that `--model` names, or the name of another model."""
    model: str | None = args.model
    if model is None and any(setting.startswith("teacher=") for setting in settings):
        return next(s for s in settings if s.startswith("teacher=")).partition("=")[2]
    is_run = model is not None and (expand_home(model) / "student").is_dir()
    return str(resolve_student(args, out)) if model is None or is_run else model


def _build_config(
    task: str,
    values: Mapping[str, Any],
    extra_settings: Sequence[str],
    output: str | None,
    out: Output,
) -> Config:
    """Build and check the config of a command.

    Args:
        task: the task.
        values: values of settings by dotted name, used as they are: text is not read as YAML.
        extra_settings: `key=value`, read as YAML; they win.
        output: the run's folder.
        out: where the command prints.
    """
    values = dict(values)
    if output is not None:
        path = expand_home(output)
        values |= {"trainer.log_dir": str(path.parent), "trainer.run_name": path.name}
    if out.as_json or out.quiet:
        values["trainer.progress_bar"] = False
    placeholders = [
        f"{name}=placeholder" for name in ("context.text", "context.file") if name in values
    ]
    config = config_io.load_config(None, [f"task={task}", *placeholders, *extra_settings])
    set_by_user = {setting.partition("=")[0] for setting in extra_settings}
    for name, value in values.items():
        if name in set_by_user:
            continue
        group_name, _, field_name = name.rpartition(".")
        if group_name:
            try:
                group = replace(getattr(config, group_name), **{field_name: value})
            except ArgumentError as error:
                raise error.with_prefix(f"{group_name}.") from None
            config = replace(config, **{group_name: group})
        else:
            config = replace(config, **{field_name: value})
    config_io.check_config(config)
    check_writable(config.trainer.log_dir, "trainer.log_dir" if output is None else "--output")
    check_run_name_free(config)
    return config


def _run(config: Config, out: Output) -> Path:
    """Run the task of a config; return the run's folder."""
    from dmt.tasks import run_task_as_command

    with out.stdout_to_stderr():
        return run_task_as_command(config).run_dir
