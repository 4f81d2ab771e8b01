"""The report of a slot transfer: the plan, the results table, `report.md` and `report.html`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmt import files
from dmt.config import Config
from dmt.report.curves import overlay_curves
from dmt.report.distillation import format_percent, format_provenance, list_run_locations
from dmt.report.hparams import log_hparams
from dmt.report.html import Card, Page, write_report_safely
from dmt.report.model_card import get_display_name, write_model_card
from dmt.report.summary import Summary
from dmt.report.tables import Row, Table
from dmt.training.plan import describe_corpus
from dmt.training.run_dir import read_record

if TYPE_CHECKING:
    from dmt.consolidation.sleep import SlotTransferPlan

logger = logging.getLogger(__name__)


def log_plan(
    config: Config,
    run_dir: Path,
    plan: SlotTransferPlan,
    corpora: Sequence[Mapping[str, Any]],
) -> None:
    """Log what is about to be moved into which slots."""
    num_rows = sum(map(len, plan.rows.values()))
    num_remaining = len(plan.fact_store.records) - len(plan.facts)
    rows = f", {num_rows:,} rows of associative memory" if num_rows else ""
    for name, text in (
        ("student", str(plan.folder)),
        ("transfer", f"{len(plan.facts):,} facts{rows}"),
        ("remain", f"{num_remaining:,} facts stay rows" if num_remaining else ""),
        ("replay", f"{len(plan.retained_facts):,} facts of earlier transfers"),
        *(("text", f"{corpus['name']}: {describe_corpus(corpus)}") for corpus in corpora),
        ("slots", f"of layers {', '.join(map(str, plan.layers))}, {config.sleep.steps:,} steps"),
        ("run", str(run_dir)),
    ):
        if text:
            logger.info("%-8s  %s", name, text)


def build_table(scores: Mapping[str, Any]) -> Table:
    """Return the results of a slot transfer, before and after.

    Args:
        scores: `slot_transfer` of a run's record.
    """
    rows = []
    if scores["facts"]:
        label = f"recall of {scores['facts']:,} transferred facts"
        rows.append(_make_row(label, scores["recall_before"], scores["recall_after"], ".3f"))
    if scores["retained"]:
        label = f"recall of {scores['retained']:,} facts of earlier transfers"
        rows.append(_make_row(label, scores["retained_before"], scores["retained_after"], ".3f"))
    for layer, share in scores["row_explained_share"].items():
        rows.append(_make_row(f"output of the rows of layer {layer}, share", 1.0, share, ".3f"))
    remaining = scores["remaining_rows"]
    rows.append(_make_row("rows", scores["rows"] + remaining, remaining, ",d"))
    rows += [
        Row(f"KL on {corpus}, nats per token", ("", f"{kl:.2e}"), values=(None, kl))
        for corpus, kl in scores["kl"].items()
    ]
    return Table("", ("before", "after"), rows, label_column="slot transfer")


def _make_row(label: str, before: float, after: float, spec: str) -> Row:
    return Row(label, (format(before, spec), format(after, spec)), values=(before, after))


def summarize(run_dir: Path, record: Mapping[str, Any]) -> Summary:
    """Return the results of a finished slot transfer, for the command line.

    Args:
        run_dir: folder of the run.
        record: contents of its `run.json`.
    """
    scores, report = record["slot_transfer"], run_dir / "report.html"
    locations = {
        "student": scores["student"],
        "report": str(report if report.exists() else run_dir / "report.md"),
    }
    return Summary(build_table(scores), [f"time: {scores['seconds']:.0f} s"], locations)


def write_report(run_dir: Path, config: Config) -> None:
    """Write `report.md`, `report.html` and HParams; log where they are."""
    record = read_record(run_dir)
    table = build_table(record["slot_transfer"])
    files.atomic_write(run_dir / "report.md", _render_markdown(run_dir, record, table))
    page = write_report_safely(
        lambda: build_slot_transfer_page(run_dir, record), run_dir / "report.html"
    )
    log_hparams(config, run_dir, record, ("sleep",), config.sleep.steps)
    logger.info("report    %s; %s", run_dir / "report.md", page)
    if (run_dir / "student").is_dir():
        source = get_display_name(record["config"]["teacher"])
        summary = f"{source} with stored facts moved into the weights of its memory layers."
        write_model_card(run_dir / "student", config, record, summary, table)


def _render_markdown(run_dir: Path, record: Mapping[str, Any], table: Table) -> str:
    seconds = record["slot_transfer"]["seconds"]
    lines = [f"# {run_dir.name}: facts and rows moved into slots", "", table.to_markdown(), ""]
    lines.append(f"{seconds:.0f} s. Replay: `{record['replay_command']}`. Numbers: `run.json`.")
    return "\n".join(lines) + "\n"


def build_slot_transfer_page(run_dir: Path, record: Mapping[str, Any]) -> Page:
    """Return the page of a finished slot transfer.

    Args:
        run_dir: folder of the run.
        record: contents of its `run.json`.
    """
    scores = record["slot_transfer"]
    source = record["config"]["teacher"]
    page = Page(
        run_dir.name,
        f"{scores['facts']:,} facts in {scores['rows']:,} rows of {source} were moved into the "
        "slots of a new student, and the rows deleted.",
        "slot transfer",
        provenance=format_provenance(record),
        locations=list_run_locations(run_dir, record),
        notes=[f"{scores['seconds']:.0f} s"],
    )
    if scores["facts"]:
        page.cards.append(
            Card(
                format_percent(scores["recall_after"]),
                "of the transferred facts predicted without rows",
                f"{scores['facts']:,} facts; with rows {format_percent(scores['recall_before'])}",
            )
        )
    if scores["retained"]:
        page.cards.append(
            Card(
                format_percent(scores["retained_after"]),
                "of the facts of earlier transfers retained",
                f"{scores['retained']:,} facts",
            )
        )
    for layer, share in scores["row_explained_share"].items():
        page.cards.append(
            Card(
                format_percent(share),
                f"of the output of the rows of layer {layer} explained by slots",
                "share of its square; 1 is all",
            )
        )
    for corpus, kl in scores["kl"].items():
        page.cards.append(
            Card(f"{kl:.1e}", f"KL in nats per token, {corpus}", "change on validation text")
        )
    page.tables.append(build_table(scores))
    page.plots = overlay_curves({"": record.get("curves", {})})
    return page
