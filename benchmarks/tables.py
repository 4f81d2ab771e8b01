"""Shared by the benchmarks of speed: interleaved timing, tables, and files to compare commits."""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dmt.errors import UserError
from dmt.ops import gemm_library, read_cpu_field
from dmt.paths import resolve_student_folder
from dmt.training.run_dir import get_git_commit

Row = dict[str, Any]  # text cells name the row, floats are its figures
FORMAT = 1
LIBRARIES = ("torch", "transformers", "faiss-cpu", "pytorch-lightning")


def medians(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each call, interleaved and after one warm-up call each."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def cell(value: Any) -> str:
    """Format a float with four digits, an integer with commas, and anything else with `str`."""
    if isinstance(value, float):
        return (
            "" if math.isnan(value) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        )
    return f"{value:,}" if isinstance(value, int) else str(value)


def line(row: Row) -> str:
    """Format one line of a Markdown table."""
    return f"| {' | '.join(map(cell, row.values()))} |"


def head(row: Row) -> str:
    """Format the two header lines of a Markdown table."""
    return f"| {' | '.join(row)} |\n|{'---|' * len(row)}"


def table(rows: list[Row]) -> str:
    """Format rows as Markdown, with a new header where the columns change."""
    lines: list[str] = []
    columns: list[str] | None = None
    for row in rows:
        if list(row) != columns:
            columns = list(row)
            lines.append(("\n" if lines else "") + head(row))
        lines.append(line(row))
    return "\n".join(lines)


def newest_student() -> Path | None:
    """Return the student of the newest run, if there is one."""
    try:
        return resolve_student_folder(None)
    except UserError:
        return None


def machine() -> dict[str, Any]:
    """Return the machine, commit and versions."""
    return {
        "when": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": get_git_commit(),
        "processor": read_cpu_field() or platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": torch.get_num_threads(),
        "products": gemm_library,
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
    }


def write(path: Path, tables: dict[str, list[Row]], environment: dict[str, Any]) -> None:
    """Write a file for `read`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"format": FORMAT, "machine": environment, "tables": tables}, indent=1) + "\n",
        encoding="utf-8",
    )


def read(path: Path) -> dict[str, Any]:
    """Read a file of `write`.

    Raises:
        SystemExit: the file is missing or invalid; the message is one line.
    """
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
        if figures["format"] != FORMAT:
            raise ValueError(f"format {figures['format']}, not {FORMAT}")
        return {"machine": dict(figures["machine"]), "tables": dict(figures["tables"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(
            f"error: {path} is not what `python -m benchmarks` writes ({error}); run it to have one"
        ) from None


def compared(old: dict[str, Any], new: dict[str, Any]) -> list[Row]:
    """Return before, after and ratio of each shared figure, the largest changes first."""
    rows = []
    for name in sorted(set(old["tables"]) & set(new["tables"])):
        before, after = (_figures(figures["tables"][name]) for figures in (old, new))
        for key in before:
            if (
                key in after
                and before[key]
                and not math.isnan(before[key])
                and not math.isnan(after[key])
            ):
                line, figure = key
                ratio = after[key] / before[key]
                rows.append(
                    {
                        "table": name,
                        "line": line,
                        "figure": figure,
                        "before": before[key],
                        "after": after[key],
                        "ratio": ratio,
                    }
                )
    return sorted(
        rows, key=lambda row: -abs(math.log(row["ratio"])) if row["ratio"] > 0 else -math.inf
    )


def _figures(rows: list[Row]) -> dict[tuple[str, str], float]:
    figures: dict[tuple[str, str], float] = {}
    for row in rows:
        name = ", ".join(str(value) for value in row.values() if not isinstance(value, float))
        figures |= {
            (name, figure): value for figure, value in row.items() if isinstance(value, float)
        }
    return figures
