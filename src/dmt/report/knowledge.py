"""What left the weights: a run's student without its knowledge pack and with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dmt.report.tables import Row, Table

TITLE = "What left the weights"
COLUMNS = ("teacher", "unplugged", "plugged")
# Name of the measurement, its name for people, its meaning and its format.
MEASUREMENTS = (
    (
        "recall",
        "declared facts recalled",
        "share of the answers that greedy decoding generates",
        ".3f",
    ),
    (
        "recall_paraphrased",
        "declared facts recalled, other phrasings",
        "questions in phrasings that no training text has",
        ".3f",
    ),
    ("log_prob", "log-probability of their answers", "nats, all tokens of an answer", ".2f"),
)


def build_knowledge_table(record: Mapping[str, Any]) -> Table | None:
    """Return what the student knows without and with its pack; None where nothing was declared.

    Args:
        record: contents of the run's `run.json`.
    """
    knowledge = record.get("knowledge")
    if not knowledge:
        return None
    rows = [
        Row(label, tuple(format(knowledge[column][name], spec) for column in COLUMNS), meaning)
        for name, label, meaning, spec in MEASUREMENTS
        if name in knowledge["unplugged"]
    ]
    for name, value in knowledge["unplugged"].items():
        if name.startswith("ppl_ratio_"):
            label = f"{name.removeprefix('ppl_ratio_')}: perplexity, ratio to the teacher"
            cells = ("1", f"{value:.4f}", f"{knowledge['plugged'][name]:.4f}")
            rows.append(Row(label, cells, "on test text"))
    caption = (
        f"{knowledge['facts']:,} facts about {knowledge['subjects']:,} subjects are in a pack of "
        f"{knowledge['bytes'] / 1e6:.1f} MB and not in the student."
    )
    return Table(TITLE, COLUMNS, rows, caption)
