"""The model card of a student, with the results of its run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmt import files
from dmt.config import Config
from dmt.models.hub_files import CARD_FILE, render_model_card
from dmt.paths import expand_home
from dmt.report.tables import Table

# Licenses of teachers that are known by name.
LICENSES = {
    "embedded": "apache-2.0",
    "reader": "apache-2.0",
    "smollm2": "apache-2.0",
    "gpt2": "mit",
    "gpt2-medium": "mit",
    "gpt2-large": "mit",
    "gpt2-xl": "mit",
    "openai-community/gpt2": "mit",
    "distilgpt2": "apache-2.0",
}
HUB_NAMES = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # names of our own
HUB_PREFIX = "hub:"
METRICS = ("student_perplexity", "ppl_ratio", "kl", "top1_agreement")


def write_model_card(
    folder: Path, config: Config, record: Mapping[str, Any], summary: str, table: Table
) -> None:
    """Write the model card of a student.

    Args:
        folder: folder of the saved student.
        config: settings of the run.
        record: contents of its `run.json`.
        summary: what the student is, in a few sentences.
        table: the results of the run.
    """
    datasets = [
        corpus.removeprefix(HUB_PREFIX).split(":")[0]
        for corpus in config.data.corpora
        if corpus.startswith(HUB_PREFIX)
    ]
    metadata = {
        "base_model": get_hub_name(config.teacher),
        "license": LICENSES.get(config.teacher) or read_license(config.teacher),
        "datasets": datasets,
    }
    commit = str(record.get("commit", "?"))[:12]
    sections = {
        "Results": table.to_markdown(),
        "Provenance": f"Made by dmt {record.get('dmt', '?')}, commit {commit}.",
    }
    name = folder.parent.name if folder.name == "student" else folder.name
    card = render_model_card(name, summary, sections, metadata, build_model_index(record))
    files.atomic_write(folder / CARD_FILE, card)


def build_model_index(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the results of a distillation in the format of a model card's `model-index`."""
    results = []
    for corpus, scores in record.get("fidelity", {}).items():
        metrics = [
            {"type": name.removeprefix("student_"), "value": round(scores[name], 6), "name": name}
            for name in METRICS
            if name in scores
        ]
        if recall := scores.get("recall"):
            value = round(recall.get("student", recall["teacher"]), 6)
            metrics.append({"type": "recall", "value": value, "name": "facts recalled"})
        results.append(
            {
                "task": {"type": "text-generation"},
                "dataset": {"name": corpus, "type": corpus},
                "metrics": metrics,
            }
        )
    return results


def get_display_name(teacher: str) -> str:
    """Return the name of a teacher without local folders."""
    return Path(teacher).name if expand_home(teacher).exists() else teacher


def get_hub_name(teacher: str) -> str | None:
    """Return the name of a teacher on the hub; None for a local folder or the embedded teacher."""
    if teacher in HUB_NAMES:
        return HUB_NAMES[teacher]
    is_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", teacher) is not None
    if teacher in ("embedded", "reader") or not is_name or Path(teacher).exists():
        return None
    return teacher


def read_license(teacher: str) -> str | None:
    """Return the license in the model card of a teacher's folder; None if there is none."""
    try:
        text = (expand_home(teacher) / CARD_FILE).read_text(encoding="utf-8")
    except (OSError, RuntimeError, ValueError):
        return None
    header = text.partition("---\n")[2].partition("\n---")[0] if text.startswith("---") else ""
    match = re.search(r"^license:\s*([\w.-]+)\s*$", header, re.MULTILINE)
    return match.group(1) if match else None
