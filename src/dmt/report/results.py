"""What a run measured, as rows that are built once from its record and shown everywhere.

The console, `report.md`, `report.html`, TensorBoard's HParams and `dmt compare` use these rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dmt.report.tables import Row, Table

Value = float | str | None


@dataclass(frozen=True)
class Result:
    """One measured quantity.

    Attributes:
        key: its name for programs, such as `speeches/kl`.
        label: its name for people.
        value: the value of the run's own model; text where it is no single number.
        baselines: values of what the model is compared with, in the order of the table's columns.
        note: how `value` relates to the baselines.
        meaning: what is measured, in a few words.
        spec: format of the numbers.
        goal: whether the smallest or the largest value is best; empty where neither is.
        only_in: `run` leaves the row out of comparisons, `comparison` out of the run's own table.
    """

    key: str
    label: str
    value: Value
    baselines: tuple[Value, ...] = ()
    note: str = ""
    meaning: str = ""
    spec: str = ",.4f"
    goal: Literal["", "min", "max"] = ""
    only_in: Literal["", "run", "comparison"] = ""

    @property
    def name(self) -> str:
        """The label with an arrow that shows which direction is better."""
        return self.label + {"min": " ↓", "max": " ↑"}.get(self.goal, "")


def collect_results(record: Mapping[str, Any]) -> list[Result]:
    """Return everything that a run measured.

    Args:
        record: contents of `run.json`, of any task; what was not measured is left out.
    """
    results: list[Result] = []
    for corpus, scores in record.get("fidelity", {}).items():
        results += _fidelity_results(corpus, scores)
    if slot_usage := record.get("slots"):
        results += _slot_results(slot_usage)
    if knowledge := record.get("knowledge"):
        results += _knowledge_results(knowledge)
    if knn_usage := record.get("knn"):
        results += _knn_results(knn_usage)
    for question_type, scores in record.get("question_types", {}).items():
        results += _question_results(question_type, scores)
    for corpus, scores in record.get("unrelated", {}).items():
        results.append(
            Result(
                f"{corpus}/kl_unrelated",
                f"{corpus}: KL, nats/token",
                scores["kl"],
                ("0", ""),
                meaning="change of the predictions on unrelated text",
                spec=".2e",
                goal="min",
            )
        )
    for name, value in record.get("slot_transfer", {}).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            label = f"slot transfer: {name.replace('_', ' ')}"
            results.append(Result(f"slot_transfer/{name}", label, value, spec=_guess_spec(value)))
    if sizes := record.get("bytes"):
        results.append(_size_result(sizes))
    if costs := record.get("costs"):
        results += _cost_results(costs)
    for phase, seconds in record.get("seconds", {}).items():
        results.append(
            Result(
                f"seconds/{phase}", f"seconds, {phase}", seconds, spec=",.1f", only_in="comparison"
            )
        )
    return results


def collect_metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a run by key, such as `{"speeches/kl": 0.041, ...}`."""
    return {
        result.key: result.value
        for result in collect_results(record)
        if isinstance(result.value, int | float) and result.only_in != "run"
    }


def has_results(record: Mapping[str, Any]) -> bool:
    """Return whether a run came to its end."""
    return any(record.get(name) for name in ("fidelity", "unrelated", "slot_transfer"))


def build_results_table(
    title: str, results: Iterable[Result], columns: Sequence[str], caption: str = ""
) -> Table:
    """Return the results of one run as a table.

    Args:
        title: title of the table.
        results: what was measured.
        columns: names of the baselines' columns, then that of the model's own.
        caption: a sentence below the table.
    """
    rows = []
    for result in results:
        if result.only_in == "comparison":
            continue
        baselines = result.baselines or ("",) * (len(columns) - 1)
        values = (*baselines, result.value)
        cells = tuple(format_number(value, result.spec) for value in values)
        rows.append(Row(result.name, (*cells, result.note), result.meaning, (*values, result.note)))
    return Table(title, (*columns, ""), rows, caption)


def format_number(value: Value, spec: str = ",.4f") -> str:
    """Return a number as a table shows it; text as it is, nothing for None."""
    return value if isinstance(value, str) else "" if value is None else format(value, spec)


def _guess_spec(value: float) -> str:
    return ",.0f" if isinstance(value, int) else ",.4f" if abs(value) < 100 else ",.1f"


def _fidelity_results(corpus: str, scores: Mapping[str, Any]) -> list[Result]:
    results = []
    if "ppl_ratio" in scores:
        results = [
            Result(
                f"{corpus}/perplexity",
                f"{corpus}: perplexity",
                scores["student_perplexity"],
                (scores["teacher_perplexity"],),
                f"ratio {scores['ppl_ratio']:.4f}",
                "on test text",
                ",.3f",
                "min",
                only_in="run",
            ),
            Result(
                f"{corpus}/ppl_ratio",
                f"{corpus}: perplexity ratio",
                scores["ppl_ratio"],
                goal="min",
                only_in="comparison",
            ),
            Result(
                f"{corpus}/kl",
                f"{corpus}: KL, nats/token",
                scores["kl"],
                ("0",),
                meaning="KL(teacher || student); 0 means identical predictions",
                goal="min",
            ),
            Result(
                f"{corpus}/top1_agreement",
                f"{corpus}: top-1 agreement",
                scores["top1_agreement"],
                ("1",),
                meaning="share of tokens with the same most likely next token",
                goal="max",
            ),
        ]
    elif "perplexity" in scores:
        results = [
            Result(
                f"{corpus}/perplexity", f"{corpus}: perplexity", scores["perplexity"], goal="min"
            )
        ]
    for name, label in (
        ("recall", "facts recalled"),
        ("recall_paraphrased", "facts recalled, paraphrased"),
    ):
        if recall := scores.get(name):
            value, baseline = recall.get("student", recall["teacher"]), recall["teacher"]
            note = f"{value / baseline:.1%} of the teacher's" if baseline else ""
            results.append(
                Result(
                    f"{corpus}/{name}",
                    f"{corpus}: {label}",
                    value,
                    (baseline,),
                    note,
                    f"share of {recall['num_probes']:,} questions answered correctly",
                    goal="max",
                )
            )
    return results


def _slot_results(slot_usage: Mapping[str, Mapping[str, Any]]) -> list[Result]:
    layers = list(slot_usage.values())
    active, num_slots, dead = (
        sum(layer[name] for layer in layers) for name in ("active_per_token", "num_slots", "dead")
    )
    by_layer = ", ".join(f"{layer['active_per_token']:.0f}" for layer in layers)
    results = [
        Result("num_slots", "slots", num_slots, spec=",.0f", only_in="comparison"),
        Result(
            "active_slots",
            "active slots per token",
            active,
            (f"{num_slots:,}",),
            f"1 in {num_slots / max(active, 1e-9):.1f}",
            "sum over layers; the teacher uses every neuron",
            ",.1f",
        ),
        Result(
            "active_slots_by_layer",
            "active slots by layer",
            by_layer if len(layers) <= 12 else "",
            note=by_layer if len(layers) > 12 else "",
            only_in="run",
        ),
        Result(
            "dead_slots",
            "dead slots",
            dead,
            note=f"{dead / num_slots:.2%}",
            meaning="slots that no token of the test text uses",
            spec=",.0f",
            goal="min",
        ),
    ]
    if recalls := [layer["search_recall"] for layer in layers if "search_recall" in layer]:
        results.append(
            Result(
                "search_recall",
                "recall of the slot search",
                sum(recalls) / len(recalls),
                note=f"minimum {min(recalls):.4f}",
                meaning="share of the slots of an exact search that the approximate one finds",
                goal="max",
            )
        )
    return results


def _knn_results(knn_usage: Mapping[str, Mapping[str, Any]]) -> list[Result]:
    results = [
        Result(
            f"knn_rows/layer_{layer}",
            f"stored rows, layer {layer}",
            usage["num_rows"],
            note=f"null weight {usage['null_weight']:.0%}, {usage['bytes'] / 1e6:.1f} MB",
            meaning="null weight: share of the attention that no row gets",
            spec=",.0f",
            only_in="run",
        )
        for layer, usage in knn_usage.items()
    ]
    total = sum(usage["num_rows"] for usage in knn_usage.values())
    return [
        *results,
        Result("knn_rows", "stored rows", total, spec=",.0f", only_in="comparison"),
    ]


def _knowledge_results(knowledge: Mapping[str, Any]) -> list[Result]:
    goals: dict[str, Literal["min", "max"]] = {"unplugged": "min", "plugged": "max"}
    return [
        Result(
            f"knowledge/{name}_{state}",
            f"{label}, {state}",
            knowledge[state][name],
            (knowledge["teacher"][name],),
            meaning="without the knowledge pack" if state == "unplugged" else "with it",
            spec=".3f",
            goal=goal,
        )
        for state, goal in goals.items()
        for name, label in (
            ("recall", "declared facts recalled"),
            ("recall_paraphrased", "the same, other phrasings"),
        )
        if name in knowledge[state]
    ]


def _question_results(question_type: str, scores: Mapping[str, Any]) -> list[Result]:
    def baselines(name: str) -> tuple[Value, ...]:
        return tuple(
            scores[f"{name}_{condition}"] for condition in ("without_context", "with_context")
        )

    retained = scores["benefit_retained"]
    return [
        Result(
            f"log_prob/{question_type}",
            f"{question_type}: log-probability",
            scores["log_prob_consolidated"],
            baselines("log_prob"),
            "" if retained is None else f"{retained:.3f} of the benefit",
            f"of the correct answer to {scores['num_questions']} questions, in nats",
            ",.2f",
            "max",
            only_in="run",
        ),
        Result(
            f"recall/{question_type}",
            f"{question_type}: recall",
            scores["recall_consolidated"],
            baselines("recall"),
            meaning="share of questions whose answer greedy decoding generates",
            spec=".3f",
            goal="max",
        ),
        Result(
            f"benefit_retained/{question_type}",
            f"{question_type}: benefit retained",
            retained,
            spec=".3f",
            goal="max",
            only_in="comparison",
        ),
    ]


def _size_result(sizes: Mapping[str, int]) -> Result:
    note = ""
    if "student_on_disk" in sizes:
        note = f"{sizes['student_on_disk'] / 1e6:,.1f} on disk"
    if "student_offloaded" in sizes:
        note += f", of which {sizes['student_offloaded'] / 1e6:,.1f} stay there"
    return Result(
        "student_mb",
        "weights in memory, MB",
        sizes["student"] / 1e6,
        (sizes["teacher"] / 1e6,) if "teacher" in sizes else (),
        note,
        "in memory",
        ",.1f",
        "min",
    )


def _cost_results(costs: Mapping[str, Any]) -> list[Result]:
    total, dense = costs["total"], costs["dense"]
    return [
        Result(
            key,
            label,
            total[name] / unit,
            (dense[name] / unit,),
            f"{total[name] / dense[name]:.1%} of the teacher's",
            meaning,
            ",.3f",
            "min",
        )
        for key, label, name, unit, meaning in (
            (
                "read_mb_per_token",
                "read per token, MB",
                "read_bytes_per_token",
                1e6,
                "weights of all memories or feed-forward blocks that one token reads",
            ),
            (
                "multiply_adds",
                "multiply-adds per token, millions",
                "multiply_adds",
                1e6,
                "of all memories or feed-forward blocks, for one token",
            ),
        )
    ]
