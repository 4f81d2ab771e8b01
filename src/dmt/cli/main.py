"""The `dmt` command: `memory` opens a student's memory, `ask` lets it speak, `consolidate` and `sleep` let it learn by itself,
`compare` puts runs side by side.

Words to a command to an exit code.

The words of `distill.py` to a run, and every way a run can end to a line and an exit code.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from dmt import config_io, files, signals
from dmt.errors import UserError
from dmt.files import check_utf8_args
from dmt.training.run_dir import check_run_name_free, check_writable, load_run_config

DISTILL_USAGE = "python distill.py [CONFIG.yaml | --config CONFIG.yaml] [key=value ...]\n       python distill.py --resume RUN_FOLDER"
CHANGEABLE_ON_RESUME = (
    "stages.layerwise_lr",
    "stages.end_to_end_lr",
    "pretrain.lr",
    "optim.grad_clip",
)
"""Settings with which a run may be gone on with that are not those it began with."""
DISTILL_DESCRIPTION = """Clone a GPT-2, put memories in place of its feed-forward blocks, distil the clone from the original.

Without arguments the embedded teacher is distilled with the defaults below. A config file holds differences from
them, key=value words go last. configs/ has ready ones. Exit code 0: done, 2: a mistake that the last line names,
130 or 143: stopped by a signal, saved."""


def distill_main(argv: list[str]) -> int:
    """Run what `words` ask for; the exit code."""
    try:
        return _run_distill(argv)
    except UserError as error:
        process_rank = os.environ.get("RANK", "0")  # of several processes started by torchrun
        prefix = "" if process_rank == "0" else f"process {process_rank}: "
        print(
            f"{prefix}error: {' '.join(str(error).split())}", file=sys.stderr
        )  # on one line, whoever worded it
        return 2
    except KeyboardInterrupt as interruption:
        return signals.report_signal(
            interruption,
            "stopped; nothing was being trained at that moment, so there is nothing more to save",
        )
    except Exception as error:
        if (message := files.describe_disk_error(error)) is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2


def _run_distill(argv: list[str]) -> int:
    check_utf8_args(argv)
    parser = argparse.ArgumentParser(
        usage=DISTILL_USAGE,
        description=DISTILL_DESCRIPTION,
        epilog="settings, as key=default:\n\n" + config_io.describe_settings(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = _raise_usage_error  # type: ignore[method-assign]
    parser.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG.yaml or key=value",
        help="a config file (at most one) and settings",
    )
    parser.add_argument("--config", metavar="FILE", help="the config file, if not given as a word")
    parser.add_argument(
        "--resume", metavar="RUN_FOLDER", help="go on with a stopped run, with its own settings"
    )
    args = parser.parse_intermixed_args(argv)
    config_files = [arg for arg in args.words if "=" not in arg] + (
        [] if args.config is None else [args.config]
    )
    overrides = [arg for arg in args.words if "=" in arg]
    if len(config_files) > 1:
        raise UserError(f"one config file at most, got {', '.join(config_files)}")
    resume_dir = None if args.resume is None else Path(args.resume)
    if resume_dir and (
        not_changeable := config_files
        + [arg for arg in overrides if arg.partition("=")[0] not in CHANGEABLE_ON_RESUME]
    ):
        raise UserError(
            f"--resume goes on with the run's own settings; leave out {' '.join(not_changeable)} (only {', '.join(CHANGEABLE_ON_RESUME)} may be given)"
        )
    config = (
        load_run_config(resume_dir, overrides)
        if resume_dir
        else config_io.load_config(config_files[0] if config_files else None, overrides)
    )
    if not resume_dir:
        check_writable(config.trainer.log_dir, "trainer.log_dir")
        check_run_name_free(config)
    if config.task == "pretrain":
        check_writable(config.pretrain.output, "pretrain.output")

    if (
        config.trainer.devices > 1 or "RANK" in os.environ
    ):  # DDP warns of a setting that only one of two stages needs
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    print("loading torch and transformers ...", file=sys.stderr)
    with signals.fast_imports():  # only once the words are known to be right
        from dmt.training.tasks import run_task_as_command
    return run_task_as_command(config, resume_dir)


def _raise_usage_error(message: str) -> NoReturn:
    hint = (
        "a setting is written key=value, without dashes; "
        if message.startswith("unrecognized")
        else ""
    )
    raise UserError(f"{message}; {hint}python distill.py --help lists what there is")


DESCRIPTION = """Open the memory of a distilled student: read it, write facts into it, take them out, give them away. Let it learn
a context (consolidate), or take what was written into its slots (sleep); both make a new student.

A student is a folder that save_pretrained made, or the run that distilled it; without --student the newest run in
lightning_logs/. Facts and what was remembered lie in memory.db beside the weights, which they never change. Exit code 0: done,
2: a mistake that the last line names, 130 or 143: stopped by a signal."""
MEMORY_COMMANDS: dict[str, tuple[str, str, str]] = {
    "stats": ("memory", "run_stats", "layers, slots, rows, facts and what they weigh"),
    "list": ("memory", "run_list", "facts, or with --rows what associative memory holds"),
    "show": ("memory", "run_show",
        "one fact, or with --slot one slot, and the tokens its values push up",
    ),
    "search": ("memory", "run_search", "facts by their words, and by the state at the end of a text"),
    "read": ("memory", "run_trace",
        "which slots, rows and facts each token of a text reads, with what weight, saying what",
    ),
    "write": ("memory", "run_write",
        "write a fact from a sentence that states it, or thousands from a file",
    ),
    "forget": ("memory", "run_forget", "take facts out, by number, tag or words"),
    "restore": ("memory", "run_restore", "bring back a fact that was forgotten, replaced or evicted"),
    "evict": ("memory", "run_prune", "keep what answers most lately and take out the rest"),
    "export": ("memory", "run_export",
        "put facts, or with --rows associative memory, into a pack: a .safetensors file or a folder",
    ),
    "import": ("memory", "run_import", "write the facts or rows of a pack into a student"),
    "merge": ("memory", "run_merge", "one pack of several, contradictions reported"),
    "diff": ("memory", "run_diff", "what differs between two packs, students or runs"),
}
"""Verb of `dmt memory`: module of `dmt.cli`, function in it, what it does."""


def main(argv: list[str]) -> int:
    """Do what `words` ask for; the exit code."""
    try:
        return _run_command(argv)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        return signals.report_signal(interruption, "stopped; what was finished is kept")
    except BrokenPipeError:  # whoever read what we print has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if (message := files.describe_disk_error(error)) is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2


def run() -> NoReturn:
    """The console script."""
    signals.exit_on_signal()
    exit_code = main(sys.argv[1:])
    signals.ignore_signals()
    sys.exit(exit_code)


def _run_command(argv: list[str]) -> int:
    check_utf8_args(argv)
    root_parser = build_parser()
    args, extra_args = root_parser.parse_known_args(argv)
    if extra_args and (
        not hasattr(args, "settings")
        or any(arg.startswith("-") or "=" not in arg for arg in extra_args)
    ):
        root_parser.error(f"unrecognized arguments: {' '.join(extra_args)}")
    elif extra_args:  # settings may stand between options
        args.settings += extra_args
    if not hasattr(args, "does"):
        (args.parser if hasattr(args, "parser") else root_parser).print_help()
        return 0
    module_name, function_name = args.does
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with signals.fast_imports():  # only once the words are known to be right
        from dmt.training.trainer import silence_libraries

        silence_libraries()
        from dmt.cli.output import Output

        command: Callable[[argparse.Namespace, Any], None] = getattr(
            import_module(f"dmt.cli.{module_name}"), function_name
        )
    command(args, Output(args.json))
    return 0


class _CommandParser(argparse.ArgumentParser):
    """One whose complaints are ours, and that does not guess what an option was meant to be."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"allow_abbrev": False}))

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help lists what there is")


def build_parser() -> argparse.ArgumentParser:
    """What the words of `dmt` may be; those of a command have `does`, its module and function."""
    formatting: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    root = _CommandParser(prog="dmt", description=DESCRIPTION, **formatting)
    commands = root.add_subparsers(metavar="COMMAND")
    generate_parser = commands.add_parser(
        "ask",
        help="let a student go on from a prompt",
        **formatting,
        description=(
            "Let a student go on from a prompt. --trace tells which slots, rows and facts answered each token; --remember writes\n"
            "what was said into the student's associative memory, within its capacity."
        ),
    )
    generate_parser.add_argument("prompt", help="what it goes on from")
    generate_parser.add_argument(
        "--tokens", type=int, default=30, metavar="N", help="most tokens it says (30)"
    )
    generate_parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0: what is likeliest (default); above: drawn",
    )
    generate_parser.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")
    generate_parser.add_argument(
        "--trace", action="store_true", help="which slots, rows and facts answered each token"
    )
    generate_parser.add_argument(
        "--pack",
        action="append",
        metavar="PACK",
        help="with the facts of a pack, for this once; may be repeated",
    )
    generate_parser.add_argument(
        "--remember", action="store_true", help="keep what was said in associative memory"
    )
    generate_parser.add_argument(
        "--tag",
        default="conversation",
        help="with --remember, what the rows are filed under (conversation)",
    )
    _add_depth_arguments(generate_parser)
    _add_common_arguments(generate_parser, ("generate", "run_generate"))
    summary = "put a context into a student's memory, weights or memory tokens"
    _add_consolidate_arguments(
        commands.add_parser(
            "consolidate",
            help=summary,
            description=(
                f"{summary.capitalize()}, so that it answers without as it would with it. The result is a run of its own."
            ),
        )
    )
    summary = (
        "move rows that are read into the slots of a new student, which then knows without them"
    )
    _add_sleep_arguments(
        commands.add_parser(
            "sleep",
            help=summary,
            description=(
                f"{summary.capitalize()}. Facts and rows of associative memory leave once slots have learnt them by distillation; what\n"
                "earlier nights have learnt is gone through again. The student of the evening stays as it is."
            ),
            **formatting,
        )
    )
    summary = "runs side by side: results, settings that differ, and with --html their curves"
    compare_parser = commands.add_parser(
        "compare", help=summary, description=f"{summary.capitalize()}."
    )
    compare_parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="two or more: a folder, or a name or number in lightning_logs/",
    )
    compare_parser.add_argument(
        "--html", metavar="FILE.html", help="write a page with their curves laid over each other"
    )
    _add_common_arguments(compare_parser, ("compare", "run_compare"), takes_student=False)
    memory_parser = commands.add_parser(
        "memory",
        help="look into a student's memory, or change it",
        **formatting,
        description=DESCRIPTION,
    )
    memory_parser.set_defaults(parser=memory_parser)
    memory_commands = memory_parser.add_subparsers(metavar="VERB")
    parsers = {
        command: memory_commands.add_parser(
            command, help=command_help, description=f"{command_help[0].upper()}{command_help[1:]}."
        )
        for command, (_, _, command_help) in MEMORY_COMMANDS.items()
    }
    _add_memory_arguments(parsers)
    for command, (module_name, function_name, _) in MEMORY_COMMANDS.items():
        _add_common_arguments(
            parsers[command],
            (module_name, function_name),
            takes_student=command not in ("merge", "diff"),
        )
    return root


def _add_sleep_arguments(parser: _CommandParser) -> None:
    """What `dmt sleep` takes."""
    parser.add_argument(
        "--tag", help="only what is filed under this; the rest stays awake, as rows"
    )
    parser.add_argument(
        "--least",
        type=int,
        default=0,
        metavar="N",
        help="only what has answered at least so many times (0)",
    )
    parser.add_argument(
        "--steps", type=_positive_int, default=200, metavar="N", help="of training (200)"
    )
    parser.add_argument(
        "--lr", type=float, default=0.03, metavar="X", help="length of the longest step (0.03)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(0)")
    parser.add_argument(
        "--corpora",
        nargs="+",
        metavar="TEXT",
        help="what the student was trained on (as its run says, or built in)",
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="of the new student (a run of its own in lightning_logs/)",
    )
    _add_common_arguments(parser, ("consolidate", "run_sleep"))


def _add_consolidate_arguments(parser: _CommandParser) -> None:
    """What `dmt consolidate` takes; each option is a setting of `distill.py`."""
    parser.add_argument("text", nargs="?", help="the context; or --file")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="any setting of distill.py"
    )
    parser.add_argument("--file", metavar="TEXT.txt", help="that holds the context")
    parser.add_argument(
        "--questions",
        metavar="FILE.jsonl",
        help='asked before and after: {"prompt": ..., "answer": ...} a line',
    )
    parser.add_argument("--into", metavar="WHERE", help="memory (default), weights or tokens")
    parser.add_argument(
        "--objective",
        metavar="WHAT",
        help="causal_lm, logits, hidden_last, hidden_all or generated (default)",
    )
    parser.add_argument(
        "--write", metavar="HOW", help="into memory: difference (default), gradient or trained"
    )
    parser.add_argument(
        "--weights", metavar="WHICH", help="into weights: lora (default), all or slots"
    )
    for name, help_text in (
        ("rank", "of lora (8)"),
        ("tokens", "into tokens: how many (16)"),
        ("steps", "of training (200)"),
        ("seed", "(0)"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=help_text)
    for name, help_text in (
        ("lr", "peak learning rate (0.002)"),
        ("temperature", "of both sides in the loss (1)"),
    ):
        parser.add_argument(f"--{name}", type=float, metavar="X", help=help_text)
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="instead of a student: embedded, smollm2, a folder, a hub name",
    )
    _add_common_arguments(parser, ("consolidate", "run_consolidate"))


def _add_memory_arguments(parsers: dict[str, _CommandParser]) -> None:
    """What each verb takes."""
    for command in ("list", "forget", "export"):
        _add_selection_arguments(parsers[command])
    for command in ("list", "forget", "evict", "export"):
        parsers[command].add_argument(
            "--rows", action="store_true", help="rows of associative memory, not facts"
        )
    parsers["list"].add_argument(
        "--all", action="store_true", help="those that were forgotten, replaced or evicted, too"
    )
    for command, limit in (("list", 50), ("search", 5), ("diff", 50)):
        parsers[command].add_argument(
            "--limit",
            type=_positive_int,
            default=limit,
            metavar="N",
            help=f"most that are shown ({limit})",
        )
    parsers["show"].add_argument("number", nargs="?", type=int, help="of a fact")
    parsers["show"].add_argument("--slot", metavar="LAYER:NUMBER", help="a slot instead")
    parsers["search"].add_argument("text", help="words, or a question up to its answer")
    parsers["read"].add_argument("text", help="what is read")
    parsers["read"].add_argument("--layers", metavar="WHICH", help="such as last, 3 or 0-2 (all)")
    _add_depth_arguments(parsers["read"])
    write_parser = parsers["write"]
    write_parser.add_argument(
        "sentence", nargs="?", help="states the fact; its last name, number or word is the answer"
    )
    write_parser.add_argument(
        "--prompt", help="the text that asks, if not found in the sentence rightly"
    )
    write_parser.add_argument("--answer", help="what follows it")
    write_parser.add_argument(
        "--subject", help="whom it is about, as in the prompt; '' for nobody in particular"
    )
    write_parser.add_argument(
        "--file",
        metavar="FACTS.jsonl",
        help='a fact a line: {"sentence": ...} or {"prompt": ..., "answer": ...}',
    )
    write_parser.add_argument("--tag", default="", help="what it is filed under")
    write_parser.add_argument("--source", default="", help="where it comes from")
    write_parser.add_argument(
        "--rate", type=float, default=0.01, help="share of places that may answer unasked (0.01)"
    )
    write_parser.add_argument(
        "--calibrate-on",
        metavar="TEXT",
        help="held-out text for the first fact's measurement (built-in speeches)",
    )
    parsers["restore"].add_argument("number", type=int, help="of a fact")
    parsers["evict"].add_argument(
        "--keep",
        type=int,
        required=True,
        metavar="N",
        help="how many stay (with --rows: in each layer)",
    )
    parsers["export"].add_argument("pack", help="a .safetensors file or a folder to make")
    parsers["export"].add_argument("--licence", default="", help="under which it is given")
    parsers["import"].add_argument("pack", help="a .safetensors file or a folder")
    parsers["merge"].add_argument("packs", nargs="+", metavar="PACK")
    parsers["merge"].add_argument(
        "-o", "--output", required=True, metavar="PACK", help="the pack to make"
    )
    parsers["merge"].add_argument(
        "--prefer",
        choices=("newest", "first"),
        default="newest",
        help="of two that contradict (newest)",
    )
    for command in ("export", "merge"):
        parsers[command].add_argument("--name", help="of the pack (its file's)")
    parsers["diff"].add_argument("first", help="a pack, student or run")
    parsers["diff"].add_argument("second", help="another")


def _add_selection_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--id", type=int, action="append", metavar="N", help="of this number; may be repeated"
    )
    parser.add_argument("--tag", help="filed under this")
    parser.add_argument(
        "--query", metavar="WORDS", help="whose sentence or subject has all these words"
    )


def _add_depth_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--most",
        type=_positive_int,
        default=3,
        metavar="N",
        help="slots and rows shown of a token and layer (3)",
    )
    parser.add_argument(
        "--lens",
        type=_positive_int,
        default=3,
        metavar="N",
        help="tokens of the vocabulary shown of each (3)",
    )


def _add_common_arguments(
    parser: argparse.ArgumentParser, handler: tuple[str, str], takes_student: bool = True
) -> None:
    parser.set_defaults(does=handler)
    if takes_student:
        parser.add_argument(
            "-s", "--student", metavar="FOLDER", help="a run or a saved student (the newest run)"
        )
    parser.add_argument("--json", action="store_true", help="one JSON document, for programs")


def _positive_int(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number
