"""What the parsers of all commands share: the parser class, types of arguments, common options.

Nothing here or at the top of a command's module imports torch: a mistake in the arguments is
reported before the seconds that takes.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from dmt import signals
from dmt.errors import UserError, format_value

if TYPE_CHECKING:
    from dmt.cli.output import Output

Command = Callable[[argparse.Namespace, "Output"], None]

MAX_SEED = 2**32 - 1  # of numpy's generators


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `UserError` and does not complete abbreviated options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **(kwargs | {"allow_abbrev": False}))

    def error(self, message: str) -> NoReturn:
        """Raise `UserError` with `message` and where to look further."""
        message = re.sub(r"^argument ([^:]+): (?=must be)", r"\1 ", message)
        raise UserError(f"{message}; see {self.prog} --help")


class PrintCompletion(argparse.Action):
    """Print a script that completes commands and options, as `shtab` generates it."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> NoReturn:
        """Print the script for the shell `values` and exit."""
        import shtab

        print(shtab.complete(parser, str(values)))
        parser.exit(0)


def add_command(
    commands: Any,
    name: str,
    run: Command,
    summary: str,
    description: str = "",
    examples: Sequence[str] = (),
    *,
    needs_torch: bool | Callable[[argparse.Namespace], bool] = True,
) -> Parser:
    """Add a command with the options that all commands have.

    Args:
        commands: what `add_subparsers` returned.
        name: what is typed.
        run: called with the parsed arguments and an `Output`.
        summary: one line for the list of commands; a sentence without its period.
        description: more sentences for `--help`.
        examples: command lines for `--help`.
        needs_torch: whether torch and transformers are imported before `run` is called; may depend
            on the arguments.
    """
    parser: Parser = commands.add_parser(
        name,
        help=summary[0].lower() + summary[1:],
        description=textwrap.fill(f"{summary}. {description}", 90).strip(),
        epilog="\n".join(["examples:" if len(examples) > 1 else "example:", *indent(examples)]),
    )
    parser.set_defaults(run=run, parser=parser, needs_torch=needs_torch)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    verbosity = parser.add_mutually_exclusive_group()
    verbosity.add_argument("--quiet", action="store_true", help="print only results and warnings")
    verbosity.add_argument("--verbose", action="store_true", help="print debug messages too")
    return parser


def import_torch() -> None:
    """Import torch and transformers, quickly and silently; only once the arguments are valid."""
    check_docstrings()
    with signals.fast_imports():
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        from dmt.training.trainer import silence_libraries

        silence_libraries()


def check_docstrings() -> None:
    """Raise `UserError` if Python removed the docstrings, which transformers needs."""
    if sys.flags.optimize >= 2:
        raise UserError(
            "transformers cannot be imported without docstrings; unset PYTHONOPTIMIZE (it is "
            f"{sys.flags.optimize}), or leave out -OO"
        )


def indent(lines: Sequence[str]) -> list[str]:
    """Indent lines by two spaces."""
    return [f"  {line}" for line in lines]


def add_model_argument(parser: argparse.ArgumentParser, help_text: str = "") -> None:
    """Add `--model`, a student to work on."""
    parser.add_argument(
        "-m",
        "--model",
        metavar="RUN",
        help=help_text
        or "a run's folder or a saved student (default: what dmt use chose, or the newest run)",
    )


def add_trace_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how much of a trace is shown."""
    parser.add_argument(
        "--top-reads",
        type=positive_int,
        default=3,
        metavar="N",
        help="slots and rows shown per token and layer (default: 3)",
    )
    parser.add_argument(
        "--top-tokens",
        type=positive_int,
        default=3,
        metavar="N",
        help="promoted tokens shown per slot, row and fact (default: 3)",
    )


def add_seed_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--seed`."""
    parser.add_argument(
        "--seed", type=seed, default=0, metavar="N", help="random seed (default: 0)"
    )


def positive_int(text: str) -> int:
    """Parse a whole number of 1 or more."""
    return _parse_number(int, text, lambda number: number >= 1, "1 or more")


def non_negative_int(text: str) -> int:
    """Parse a whole number of 0 or more."""
    return _parse_number(int, text, lambda number: number >= 0, "0 or more")


def seed(text: str) -> int:
    """Parse a seed that every random number generator accepts."""
    return _parse_number(
        int, text, lambda number: 0 <= number <= MAX_SEED, f"a whole number in [0, {MAX_SEED}]"
    )


def temperature(text: str) -> float:
    """Parse a sampling temperature."""
    return _parse_number(float, text, lambda number: 0 <= number < math.inf, "0 or more")


def learning_rate(text: str) -> float:
    """Parse a learning rate in preconditioned units."""
    return _parse_number(float, text, lambda number: 0 < number <= 1, "in (0, 1]")


def false_positive_rate(text: str) -> float:
    """Parse the share of other questions about its subject that a fact may answer."""
    return _parse_number(float, text, lambda number: 0 < number <= 0.5, "in (0, 0.5]")


def _parse_number(
    number_type: type, text: str, accepts: Callable[[Any], bool], accepted: str
) -> Any:
    try:
        number = number_type(text)
    except ValueError:
        kind = "a whole number" if number_type is int else "a number"
        raise argparse.ArgumentTypeError(f"must be {kind}, got {format_value(text)}") from None
    if not accepts(number):
        raise argparse.ArgumentTypeError(f"must be {accepted}, got {format_value(text)}")
    return number
