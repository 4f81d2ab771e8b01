"""The `dmt` command: parse the arguments, run the command, turn every ending into an exit code."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from typing import NoReturn

import dmt
from dmt import files, signals
from dmt.cli import compare, config, consolidate, distill, generate, memory, use
from dmt.cli.arguments import Parser, PrintCompletion, import_torch, indent
from dmt.cli.output import Output, escape_unencodable_chars, log_to_stderr
from dmt.errors import FailureError, UserError
from dmt.files import check_utf8_args

SUCCESS, FAILURE, MISTAKE = 0, 1, 2  # exit codes
DESCRIPTION = """Replace the feed-forward blocks of a language model by memory that can be edited.

exit codes: 0 success, 1 failure (a full disk, say), 2 mistake in the arguments or files,
128 + N stopped by signal N: 130 Ctrl-C, 143 TERM, 129 HUP, 138 USR1"""
EXAMPLES = (
    "dmt distill                                            # distill the embedded teacher",
    'dmt memory write "Ada Winterbourne was born in Ravenhill."',
    'dmt generate "The birthplace of Ada Winterbourne is" --trace',
)


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the console script: `main`, with signals handled from the first moment to the last."""
    signals.exit_on_signal()
    exit_code = _run_and_report(argv)
    signals.ignore_signals()
    sys.exit(exit_code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, in any thread; signal handlers are afterwards what they were before.

    Args:
        argv: the arguments after `dmt`; None means those of the process.

    Returns:
        The exit code: 0 for success, 2 for a mistake of the user, 1 for a failure, 128 + N for
        signal N. Errors that are neither are bugs and propagate with their traceback.
    """
    with signals.restore_handlers():
        return _run_and_report(argv)


def _run_and_report(argv: Sequence[str] | None) -> int:
    try:
        with escape_unencodable_chars():
            return _run_command(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        return _report_error(str(error), FAILURE if isinstance(error, FailureError) else MISTAKE)
    except KeyboardInterrupt as interrupt:
        return signals.report_signal(interrupt, "stopped; finished work is saved")
    except BrokenPipeError:  # the reader of our output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return SUCCESS
    except Exception as error:
        if (message := files.describe_disk_error(error)) is None:
            raise
        is_failure = files.disk_error_class(error) is FailureError
        return _report_error(message, FAILURE if is_failure else MISTAKE)


def distill_main(argv: Sequence[str]) -> int:
    """Run `dmt distill` with the arguments `argv`; return the exit code."""
    return main(["distill", *argv])


def build_parser() -> Parser:
    """Build the parser of `dmt` and all its commands."""
    root = Parser(
        prog="dmt",
        description=DESCRIPTION,
        epilog="\n".join(
            ["examples:", *indent(EXAMPLES), "", "dmt COMMAND --help describes a command."]
        ),
    )
    root.add_argument("--version", action="version", version=f"dmt {dmt.__version__}")
    root.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=("bash", "zsh", "tcsh"),
        help="print a script for tab completion in this shell",
    )
    root.set_defaults(parser=root)
    commands = root.add_subparsers(metavar="COMMAND", title="commands")
    for module in (distill, generate, memory, use, consolidate, compare, config):
        module.add_parser(commands)
    return root


def _run_command(argv: list[str]) -> int:
    check_utf8_args(argv)
    args = _parse_args(argv)
    if not hasattr(args, "run"):
        args.parser.print_help()
        return SUCCESS
    args.command = shlex.join(["dmt", *argv])
    if args.needs_torch(args) if callable(args.needs_torch) else args.needs_torch:
        import_torch()
    with log_to_stderr(args.quiet, args.verbose):
        args.run(args, Output(args.json, args.quiet))
    return SUCCESS


def _parse_args(argv: list[str]) -> argparse.Namespace:
    args, extra_args = build_parser().parse_known_args(argv)
    if not extra_args:
        return args
    # argparse does not continue a list of positionals after an option
    settings: list[str] | None = getattr(args, "settings", None)
    if settings is None:
        args.parser.error(f"unrecognized arguments: {' '.join(extra_args)}")
    elif options := [arg for arg in extra_args if arg.startswith("-")]:
        hint = "a setting is written key=value, without dashes"
        args.parser.error(f"unrecognized arguments: {' '.join(options)}; {hint}")
    else:
        args.settings = [*settings, *extra_args]
    return args


def _report_error(message: str, exit_code: int) -> int:
    process_rank = os.environ.get("RANK", "0")  # torchrun starts several processes
    prefix = "" if process_rank == "0" else f"process {process_rank}: "
    print(f"{prefix}error: {' '.join(message.split())}", file=sys.stderr)
    return exit_code
