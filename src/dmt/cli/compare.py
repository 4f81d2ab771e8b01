"""`dmt compare RUN RUN ...`: runs side by side, as a table, for programs, or as a page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dmt.cli.arguments import add_command
from dmt.cli.output import Output, escape_control_chars
from dmt.config import Config
from dmt.errors import UserError, format_value
from dmt.paths import expand_home, find_run
from dmt.report.compare import (
    ComparedRun,
    build_comparison_page,
    collect_metrics,
    find_differing_settings,
    format_number,
    has_results,
    read_curves,
)
from dmt.report.html import write_page
from dmt.training.run_dir import read_record


def add_parser(commands: Any) -> None:
    """Add `dmt compare` to the commands."""
    parser = add_command(
        commands,
        "compare",
        run_compare,
        "Compare runs: their results, and the settings that differ",
        examples=("dmt compare version_0 version_1", "dmt compare 0 1 2 --html curves.html"),
        needs_torch=False,
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="two or more: a folder, or a name or number in lightning_logs/",
    )
    parser.add_argument(
        "--html", metavar="FILE.html", help="write a page with the curves of all runs"
    )


def run_compare(args: argparse.Namespace, out: Output) -> None:
    """A table of results and one of settings that differ; with --html also their curves, laid over each other."""
    if args.html is not None:
        _check_html_path(args.html)
    runs = _load_runs(args.runs)
    names = [run.name for run in runs]
    differences = find_differing_settings(runs)
    results = [collect_metrics(run.record) for run in runs]
    rows = [
        (name, *(format_number(result.get(name)) for result in results))
        for name in dict.fromkeys(name for result in results for name in result)
    ]
    out.print_table(("", *names), rows, "nothing was measured")
    formatted = {
        name: [format_value(value) for value in values] for name, values in differences.items()
    }
    out.print_line("")
    out.print_table(
        ("settings that differ", *names),
        [(name, *values) for name, values in formatted.items()],
        "no setting differs",
    )
    page = None
    if args.html is not None:
        page = str(expand_home(args.html))
        try:
            write_page(build_comparison_page(runs, formatted), Path(page))
        except OSError as error:
            raise UserError(
                f"--html {args.html} cannot be written ({error.strerror}); name another file"
            ) from None
        out.print_line("")
        out.print_line(page)
    summaries = [
        {
            "name": run.name,
            "folder": run.run_dir,
            "measures": result,
            "settings": {name: differences[name][index] for name in differences},
        }
        for index, (run, result) in enumerate(zip(runs, results, strict=True))
    ]
    out.print_json({"runs": summaries, "html": page})


def _load_runs(run_names: Sequence[str]) -> list[ComparedRun]:
    if len(run_names) < 2:
        raise UserError(
            f"compare takes two runs or more, got {len(run_names)}; as in dmt compare version_0 version_1"
        )
    folders = [find_run(run_name) for run_name in run_names]
    name_by_folder: dict[Path, str] = {}
    for run_name, folder in zip(run_names, folders, strict=True):
        if (resolved := folder.resolve()) in name_by_folder:
            raise UserError(
                f"{run_name} and {name_by_folder[resolved]} are the same run, {folder}; name different ones"
            )
        name_by_folder[resolved] = run_name
    is_ambiguous = len({folder.name for folder in folders}) < len(folders)
    return [_load_run(folder, str(folder) if is_ambiguous else folder.name) for folder in folders]


def _load_run(folder: Path, name: str) -> ComparedRun:
    record = read_record(folder)
    if not isinstance(record, dict) or not has_results(record):
        raise UserError(
            f"{folder} has no results yet; go on with it: python distill.py --resume {folder}"
        )
    try:
        collect_metrics(record)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(
            f"{folder / 'run.json'} is not what this version writes; do it again: python distill.py {folder}/config.yaml"
        ) from None
    return ComparedRun(
        escape_control_chars(name),
        str(folder),
        record,
        _load_settings(folder / "config.yaml"),
        read_curves(folder),
    )


def _load_settings(path: Path) -> dict[str, Any]:
    """Every setting by dotted name; those that a run of another version did not know are as they are now."""
    try:
        raw_settings = (
            OmegaConf.to_container(OmegaConf.load(path), resolve=False) if path.is_file() else {}
        )
    except (OSError, ValueError, YAMLError, OmegaConfBaseException):
        raise UserError(
            f"{path} cannot be read as settings; it is what a run wrote when it began, put it back"
        ) from None
    return _flatten(asdict(Config())) | (
        _flatten(raw_settings) if isinstance(raw_settings, dict) else {}
    )


def _flatten(nested: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= (
            _flatten(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return flat


def _check_html_path(target: str) -> None:
    """Raise `UserError` where no page can be written to, before anything is read."""
    file = expand_home(target)
    if file.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--html must name a file that ends in .html, got {format_value(target)}")
    if file.is_dir():
        raise UserError(
            f"--html {target} is a folder; name a file in it, as in {file / 'compared.html'}"
        )
    try:
        with TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise UserError(
            f"--html {target} cannot be written ({error.strerror}); name a file in another folder"
        ) from None
