"""`dmt use`: choose the student that commands without `--model` use."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from dmt.cli.arguments import add_command
from dmt.files import disk_error_class
from dmt.paths import RUNS_DIR, choose_student, read_chosen_student, resolve_student_folder

if TYPE_CHECKING:
    from dmt.cli.output import Output


def add_parser(commands: Any) -> None:
    """Add `dmt use` to the commands."""
    parser = add_command(
        commands,
        "use",
        run_use,
        "Choose the student that commands without --model use",
        f"The choice is stored in {RUNS_DIR}/. Without an argument the student is shown.",
        ("dmt use version_0", "dmt use", "dmt use --newest"),
        needs_torch=False,
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("model", nargs="?", metavar="RUN", help="a run or a saved student")
    choice.add_argument("--newest", action="store_true", help="use the newest run again")


def run_use(args: argparse.Namespace, out: Output) -> None:
    """Store the choice, if there is one, and print the student."""
    folder = None if args.model is None else resolve_student_folder(args.model)
    if folder is not None or args.newest:
        try:
            choose_student(folder)
        except OSError as error:
            raise disk_error_class(error)(
                f"{RUNS_DIR}/ cannot be written to ({error.strerror}); make it writable, or name "
                "the student with --model"
            ) from None
    folder = resolve_student_folder()
    is_chosen = read_chosen_student() is not None
    out.print_line(f"{folder} ({'chosen with dmt use' if is_chosen else 'the newest run'})")
    out.print_json({"student": str(folder), "is_chosen": is_chosen})
