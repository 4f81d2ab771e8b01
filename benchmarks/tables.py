"""What the benchmarks of speed share: calls that take turns, tables, and files that two commits can be compared by."""

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
from dmt.models.loading import resolve_student_folder
from dmt.ops import gemm_library, read_cpu_field
from dmt.training.run_dir import get_git_commit

Row = dict[str, Any]
"""One line: text cells name it, numbers are figures."""
FORMAT = 1
LIBRARIES = ("torch", "transformers", "faiss-cpu", "pytorch-lightning")


def medians(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each call after one to warm up, the calls taking turns so that noise hits all alike."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if repeat:
                taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(each) for name, each in taken.items()}


def cell(value: Any) -> str:
    """A figure with four digits, a count with commas, anything else as it is."""
    if isinstance(value, float):
        return (
            "" if math.isnan(value) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        )
    return f"{value:,}" if isinstance(value, int) else str(value)


def line(row: Row) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(map(cell, row.values()))} |"


def head(row: Row) -> str:
    """The two lines above it."""
    return f"| {' | '.join(row)} |\n|{'---|' * len(row)}"


def table(rows: list[Row]) -> str:
    """Markdown, with a new head where the columns change."""
    lines, columns = [], None
    for row in rows:
        if list(row) != columns:
            columns = list(row)
            lines.append(("\n" if lines else "") + head(row))
        lines.append(line(row))
    return "\n".join(lines)


def newest_student() -> Path | None:
    """The student of the newest run here, if there is one."""
    try:
        return resolve_student_folder(None)
    except UserError:
        return None


def machine() -> dict[str, Any]:
    """Where and with what figures were measured."""
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


def write(place: Path, tables: dict[str, list[Row]], where: dict[str, Any]) -> None:
    """A file that `read` takes."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(
        json.dumps({"format": FORMAT, "machine": where, "tables": tables}, indent=1) + "\n",
        encoding="utf-8",
    )


def read(place: Path) -> dict[str, Any]:
    """What `write` wrote.

    Raises:
        SystemExit: it is not there or not such a file, in one line.
    """
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']}, not {FORMAT}")
        return {"machine": dict(found["machine"]), "tables": dict(found["tables"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(
            f"error: {place} is not what `python -m benchmarks` writes ({error}); run it to have one"
        ) from None


def compared(old: dict[str, Any], new: dict[str, Any]) -> list[Row]:
    """A row for each figure that both have: before, after, ratio; those that changed most first."""
    rows = []
    for name in sorted(set(old["tables"]) & set(new["tables"])):
        before, after = (_figures(each["tables"][name]) for each in (old, new))
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
    found = {}
    for row in rows:
        name = ", ".join(str(value) for value in row.values() if not isinstance(value, float))
        found |= {
            (name, figure): value for figure, value in row.items() if isinstance(value, float)
        }
    return found
