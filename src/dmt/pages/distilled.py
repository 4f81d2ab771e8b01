"""The page of a distillation: what its student came to, in plain words and pictures, from its record and its curves."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmt.config import Config
from dmt.pages.curves import Curve
from dmt.pages.maps import usage_maps
from dmt.pages.page import Card, Page, Row, Sample, Table
from dmt.pages.plots import Plot, Series, plot

LAYERS_NAMED = 12
"""Layers up to which each has its own tick."""


def distilled(run: Path, config: Config, record: Mapping[str, Any]) -> Page:
    """What `run.json` of a finished distillation says, as a page."""
    fidelity, curves = record["fidelity"], record.get("curves", {})
    first = next(iter(fidelity))
    found = fidelity[first]
    lead = (
        f"A copy of the teacher {config.teacher!r} whose feed-forward blocks are memory. On {first} that neither had seen, both "
        f"find the same next token likeliest in {percent(found['agreement'])} of places; the student's perplexity is "
        f"{found['ratio']:.3f} times the teacher's."
    )
    page = Page(run.name, lead, "distillation", made=made(record), places=places(run, record))
    page.cards = _cards(first, record)
    page.tables = [Table("Teacher and student on the same test text", ("teacher", "student", ""), _rows(record))]
    page.plots = [
        each
        for each in (*losses(curves), fidelity_curves(curves, list(fidelity)), layer_errors(curves), budget_curve(record))
        if each is not None
    ]
    page.maps = usage_maps(record["slots"])
    if page.maps:
        tokens = next(used["tokens"] for used in record["slots"].values() if used.get("reads"))
        each = max(used["reads_of"] for used in record["slots"].values() if used.get("reads"))
        cell = "one cell a slot" if each == 1 else f"a cell stands for up to {each} slots"
        page.maps_words = f"Counted over {tokens:,} tokens of test text, {cell}; all layers have one scale, a square root."
    if stored := record.get("rows"):
        page.tables.append(_stored(stored))
    page.samples = [
        Sample(
            corpus,
            on_one_line(each["prompt"]),
            [(who, [(on_one_line(text), alone) for text, alone in each[who]]) for who in ("teacher", "student")],
            f"{each['differing']} of the student's {each['tokens']} tokens are not the teacher's",
        )
        for corpus, several in record.get("samples", {}).items()
        for each in several
    ]
    page.notes = notes(record)
    return page


def percent(share: float, digits: int = 1) -> str:
    """A share of one as people write it."""
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def times(factor: float, digits: int = 4) -> str:
    """How many times as much something is."""
    return f"×\N{NO-BREAK SPACE}{factor:.{digits}f}"


def on_one_line(text: str) -> str:
    """Text whose line ends are seen, and take no room."""
    return re.sub(r"\s*\n\s*", " ↵ ", text)


def made(record: Mapping[str, Any]) -> str:
    """Where a page comes from, on one line."""
    version = record.get("libraries", {}).get("torch", "?")
    return f"written {record.get('written', '?')} by dmt, commit {str(record.get('commit', '?'))[:12]}, torch {version}"


def places(run: Path, record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Where everything of a run is, and how to do it again."""
    return [
        ("student", str(run / "student")),
        ("ask it", f"dmt ask 'Once' --student {run}"),
        ("replay", str(record.get("replay", f"python distill.py {run}/config.yaml"))),
        ("compare", f"dmt compare {run} ANOTHER_RUN --html compared.html"),
        ("curves", f"tensorboard --logdir {run.parent}"),
        ("settings", str(run / "config.yaml")),
        ("numbers", str(run / "run.json")),
        ("as text", str(run / "report.md")),
    ]


def _cards(first: str, record: Mapping[str, Any]) -> list[Card]:
    found, used = record["fidelity"][first], record["slots"].values()
    cards = [
        Card(percent(found["agreement"]), f"same next token, {first}", "places where both find the same next token likeliest"),
        Card(times(found["ratio"], 3), f"the teacher's perplexity, {first}", "1 would be as good as the teacher"),
        Card(f"{found['kl']:.3f}", f"nats apart per token, {first}", "KL(teacher || student): 0 would be the same"),
    ]
    if used:
        share = sum(u["slots"] for u in used) / max(1e-9, sum(u["read"] for u in used))
        cards.append(Card(f"1 in {share:.1f}", "slots read for a token", "mean over test text and layers"))
    for corpus, each in record["fidelity"].items():
        if said := each.get("recall"):
            what = f"facts recalled, {corpus}; teacher {percent(said['teacher'])}"
            cards.append(Card(percent(said["student"]), what, f"of {said['probes']:,} questions with one right answer"))
    return cards


def _rows(record: Mapping[str, Any]) -> list[Row]:
    rows = []
    for corpus, found in record["fidelity"].items():
        rows += [
            Row(f"{corpus}: perplexity", "among how many tokens it hesitates; lower is better",
                (f"{found['teacher_perplexity']:.3f}", f"{found['student_perplexity']:.3f}", times(found["ratio"]))),
            Row(f"{corpus}: distance", "KL from the teacher, nats per token; 0 is the same", ("0", f"{found['kl']:.4f}", "")),
            Row(f"{corpus}: agreement", "places where both find the same next token likeliest",
                (percent(1, 0), percent(found["agreement"]), "")),
        ]  # fmt: skip
        for name, what in (("recall", "facts known"), ("recall_unseen", "facts, asked in new words")):
            if said := found.get(name):
                kept = f"{percent(said['student'] / said['teacher'])} of it" if said["teacher"] else ""
                meaning = f"of {said['probes']:,} questions, those answered rightly"
                rows.append(Row(f"{corpus}: {what}", meaning, (percent(said["teacher"]), percent(said["student"]), kept)))
    if used := record["slots"].values():
        read, held, dead = (sum(u[name] for u in used) for name in ("read", "slots", "dead"))
        rows.append(
            Row(
                "slots read for a token",
                "all layers together; the teacher reads every neuron",
                (f"{held:,}", f"{read:,.1f}", f"1 in {held / max(read, 1e-9):.1f}"),
            )
        )
        rows.append(Row("slots never read", "on the test text", ("", f"{dead:,.0f}", percent(dead / held, 2))))
    size = {name: f"{number / 1e6:.1f}" for name, number in record["bytes"].items()}
    rows.append(
        Row("weights, MB", "in memory", (size["teacher"], size["student"], f"{size['student_on_disk']} on disk")),
    )
    return rows


def _stored(stored: Mapping[str, Any]) -> Table:
    rows = [
        Row(f"layer {layer}", "", (f"{kept['rows']:,}", percent(1 - kept["base"]), f"{kept['bytes'] / 1e6:.1f}"))
        for layer, kept in stored.items()
    ]
    words = "Associative memory writes rows while it trains; what they say is added to what the layer's base says."
    return Table("Stored rows", ("rows", "their part in what is said", "MB"), rows, words)


def losses(curves: Mapping[str, Curve]) -> list[Plot]:
    """Loss curves, one plot a stage; of the end-to-end stage each term."""
    plots = []
    if given := curves.get("layerwise/loss"):
        words = "Each memory alone learns its own block's output: the squared error, summed over layers."
        plots.append(plot("First stage: layer by layer", "step", "loss", [Series("", *given)], words, log="y"))
    terms = {name.partition("/")[2]: curve for name, curve in curves.items() if name.startswith("end_to_end/")}
    order = ["loss", *sorted(name for name in terms if name != "loss")]
    series = [
        Series(name.replace("_", " "), *terms[name], colour=number, line=number)
        for number, name in enumerate(name for name in order if name in terms and max(terms[name][1]) > 0)
    ]
    if series:
        words = (
            "The whole student learns what the teacher says. The loss is the weighted sum of its terms; kl is in nats per token."
        )
        plots.append(plot("Second stage: end to end", "step", "loss and its terms", series, words, log="y"))
    return plots


def fidelity_curves(curves: Mapping[str, Curve], corpora: list[str]) -> Plot | None:
    """KL on validation text while training."""
    there = [(number, corpus, curves[f"{corpus}/kl"]) for number, corpus in enumerate(corpora) if f"{corpus}/kl" in curves]
    if not there:
        return None
    series = [
        Series(corpus, *curve, tips=[f"{corpus}, step {x}: {y:.4f} nats" for x, y in zip(*curve, strict=True)],
               colour=number, line=number)
        for number, corpus, curve in there
    ]  # fmt: skip
    words = "Validation text, on which nothing is trained."
    return plot("Distance from the teacher while training", "step", "KL, nats per token", series, words, log="y")


def layer_errors(curves: Mapping[str, Curve]) -> Plot | None:
    """Each memory's error on what its teacher's block was given: at the first and at the last validation."""
    there = {int(name.rpartition("_")[2]): curve for name, curve in curves.items() if name.startswith("block_error/layer_")}
    if not there:
        return None
    layers = sorted(there)
    series = []
    for number, (name, at) in enumerate((("at the end", -1), ("at first validation", 0))):
        steps, errors = there[layers[0]][0][at], [there[layer][1][at] for layer in layers]
        tips = [f"layer {layer}, step {steps}: {error:.4f}" for layer, error in zip(layers, errors, strict=True)]
        if number and steps == there[layers[0]][0][-1]:
            break
        series.append(Series(f"{name} (step {steps})", layers, errors, tips, colour=number, line=number))
    shown = layers if len(layers) <= LAYERS_NAMED else layers[:: -(-len(layers) // LAYERS_NAMED)]
    words = "What a memory gets wrong of its own block's answer, as a share of its variance: 1 is no better than its mean."
    return plot("Error of each layer", "layer", "share of variance", series, words, ticks=shown)


def budget_curve(record: Mapping[str, Any]) -> Plot | None:
    """KL against slots read: the finished student with other budgets."""
    found = record.get("budgets") or {}
    points = found.get("points", [])
    if len(points) < 2:
        return None
    series = []
    for number, corpus in enumerate(points[0]["corpora"]):
        read, apart = [p["read"] for p in points], [p["corpora"][corpus]["kl"] for p in points]
        tips = [
            f"{corpus}: {p['factor']:g} × k, {r:.1f} slots read, KL {a:.4f}" for p, r, a in zip(points, read, apart, strict=True)
        ]
        series.append(Series(corpus, read, apart, tips, colour=number, line=number))
    own = next((p["read"] for p in points if p["factor"] == 1), None)
    words = f"The finished student, read with other budgets and not trained for them; {found['tokens']:,.0f} test tokens."
    words += f" Its own is {own:.1f} slots." if own is not None else ""
    across = "slots read per token and layer"
    return plot("What reading more, or less, would give", across, "KL, nats per token", series, words, log="xy",
                ticks=[float(f"{p['read']:.3g}") for p in points])  # fmt: skip


def notes(record: Mapping[str, Any]) -> list[str]:
    """On how much text everything was measured, and what was spent."""
    found = []
    for corpus, each in record["fidelity"].items():
        asked = f", {each['recall']['probes']:,} questions" if "recall" in each else ""
        windows = f"{each['windows']} windows of {each['window']}, stride {each['stride']}"
        found.append(f"{corpus}: {each['tokens']:,.0f} predicted tokens of test text in {windows}{asked}")
    seconds, tokens = record["seconds"], record["tokens"]
    spent = ", ".join(f"{seconds[part]:.0f} s to {part}" for part in ("prepare", "train", "measure"))
    if expected := record.get("estimated"):
        more = f", up to {expected['rows']:.0f} s more with rows" if expected.get("rows") else ""
        spent += f" ({expected['train']:.0f} s to train were expected, {expected['measure']:.0f} s to measure{more})"
    found.append(f"trained on {tokens['trained']:,} tokens, {tokens['per_second']:,.0f} a second; {spent}")
    return found
