"""`dmt compare RUN RUN ...`: results and settings of runs side by side."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from dmt.cli.arguments import add_command
from dmt.cli.output import Output, escape_control_chars
from dmt.errors import UserError, format_value
from dmt.files import disk_error_class
from dmt.paths import expand_home
from dmt.report.compare import Comparison, compare
from dmt.report.html import write_page
from dmt.report.tables import Row, Table

FORMATS = ("table", "md", "csv", "latex", "json")
EXAMPLES = (
    "dmt compare version_0 version_1",
    "dmt compare 0 1 2 --html curves.html",
    "dmt compare 0 1 2 3 --by memory.mean_k --format latex",
)


def add_parser(commands: Any) -> None:
    """Add `dmt compare` to the commands."""
    parser = add_command(
        commands,
        "compare",
        run_compare,
        "Compare runs: their results, and the settings that differ",
        examples=EXAMPLES,
        needs_torch=False,
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="two or more: a folder, or a name or number in lightning_logs/",
    )
    parser.add_argument(
        "--by",
        action="append",
        metavar="KEY",
        help="group runs by this setting (mean and standard deviation over the others); "
        "default: all settings that differ but the seed",
    )
    parser.add_argument("--format", choices=FORMATS, help="format of the results (default: table)")
    parser.add_argument(
        "--html", metavar="FILE.html", help="write a page with the curves of all runs"
    )


def run_compare(args: argparse.Namespace, out: Output) -> None:
    """Print results and settings that differ; with `--html` also write the page with the curves."""
    if args.html is not None:
        _check_html_path(args.html)
    comparison = compare(args.runs, _split_keys(args.by))
    output_format = args.format or ("json" if out.as_json else "table")
    if output_format == "json":
        out.as_json = True
    page = None
    if args.html is not None:
        page = str(expand_home(args.html))
        try:
            write_page(comparison.to_page(), Path(page))
        except OSError as error:
            raise disk_error_class(error)(
                f"--html {args.html} cannot be written ({error.strerror}); name another file"
            ) from None
    if output_format == "table":
        _print_tables(comparison, out)
    elif output_format != "json":
        text = {
            "md": comparison.to_markdown,
            "csv": comparison.to_csv,
            "latex": comparison.to_latex,
        }[output_format]()
        for line in text.splitlines():
            out.print_line(line)
    if page is not None and output_format == "table":
        out.print_line("")
        out.print_line(page)
    out.print_json(comparison.to_dict() | {"html": page})


def _print_tables(comparison: Comparison, out: Output) -> None:
    results = _escape_table(comparison.results_table().transpose())
    out.print_renderable(results.to_rich())
    if any(row.best for row in results.rows):
        out.print_line("* best; ↓ lower is better, ↑ higher is better")
    for line in filter(None, [results.caption]):
        out.print_line(line)
    out.print_line("")
    settings = _escape_table(comparison.settings_table())
    if settings.rows:
        out.print_renderable(replace(settings, title="").to_rich())
    else:
        out.print_line("no setting differs")


def _escape_table(table: Table) -> Table:
    """Return a table whose texts are safe to print on a terminal."""

    def escape(texts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(escape_control_chars, texts))

    rows = [
        Row(escape_control_chars(row.label), escape(row.cells), best=row.best) for row in table.rows
    ]
    return replace(
        table,
        columns=escape(table.columns),
        rows=rows,
        caption=escape_control_chars(table.caption),
    )


def _split_keys(by: list[str] | None) -> list[str] | None:
    """Return the settings of `--by KEY[,KEY]`, which may be repeated."""
    return [key for text in by for key in text.split(",") if key] if by else None


def _check_html_path(target: str) -> None:
    """Check that a page can be written, before anything is read.

    Raises:
        UserError: it cannot.
    """
    file = expand_home(target)
    if file.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--html must name a file that ends in .html, got {format_value(target)}")
    if file.is_dir():
        raise UserError(
            f"--html {target} is a folder; name a file in it, for example {file / 'compared.html'}"
        )
    try:
        with TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise disk_error_class(error)(
            f"--html {target} cannot be written ({error.strerror}); name a file in another folder"
        ) from None
