"""Results of a run: the same rows for every rendering."""

from dmt.report.results import (
    build_results_table,
    collect_metrics,
    collect_results,
    format_number,
    has_results,
)

RECORD = {
    "fidelity": {
        "text": {
            "teacher_perplexity": 10.0,
            "student_perplexity": 11.0,
            "ppl_ratio": 1.1,
            "kl": 0.05,
            "top1_agreement": 0.9,
            "recall": {"teacher": 0.8, "student": 0.6, "num_probes": 40},
        }
    },
    "slots": {
        "0": {"num_slots": 64, "active_per_token": 4.0, "dead": 2.0, "k": 4},
        "1": {"num_slots": 64, "active_per_token": 12.0, "dead": 0.0, "k": 12},
    },
    "knn": {"1": {"num_rows": 1_234, "null_weight": 0.26, "bytes": 1_000_000}},
    "bytes": {"teacher": 2_000_000, "student": 1_000_000, "student_on_disk": 1_500_000},
    "costs": {
        "total": {"read_bytes_per_token": 500_000.0, "multiply_adds": 250_000.0},
        "dense": {"read_bytes_per_token": 2_000_000.0, "multiply_adds": 500_000.0},
    },
    "seconds": {"train": 3.0},
}


def test_metrics_are_the_numbers_of_the_record():
    assert collect_metrics(RECORD) == {
        "text/ppl_ratio": 1.1,
        "text/kl": 0.05,
        "text/top1_agreement": 0.9,
        "text/recall": 0.6,
        "num_slots": 128,
        "active_slots": 16.0,
        "dead_slots": 2.0,
        "knn_rows": 1_234,
        "student_mb": 1.0,
        "read_mb_per_token": 0.5,
        "multiply_adds": 0.25,
        "seconds/train": 3.0,
    }


def test_the_table_of_a_run_has_baselines_and_notes():
    table = build_results_table("Results", collect_results(RECORD), ("teacher", "student"))
    rows = {row.label: row.cells for row in table.rows}
    assert table.columns == ("teacher", "student", "")
    assert rows["text: perplexity ↓"] == ("10.000", "11.000", "ratio 1.1000")
    assert rows["text: facts recalled ↑"] == ("0.8000", "0.6000", "75.0% of the teacher's")
    assert rows["active slots per token"] == ("128", "16.0", "1 in 8.0")
    assert rows["active slots by layer"] == ("", "4, 12", "")
    assert rows["dead slots ↓"] == ("", "2", "1.56%")
    assert rows["stored rows, layer 1"] == ("", "1,234", "null weight 26%, 1.0 MB")
    assert rows["weights in memory, MB ↓"] == ("2.0", "1.0", "1.5 on disk")
    assert rows["read per token, MB ↓"] == ("2.000", "0.500", "25.0% of the teacher's")
    assert rows["multiply-adds per token, millions ↓"][2] == "50.0% of the teacher's"
    assert not any(label.startswith("seconds") for label in rows)


def test_consolidations_have_three_conditions():
    scores = {
        f"{name}_{condition}": value
        for name in ("log_prob", "recall")
        for condition, value in (
            ("without_context", -5.0),
            ("with_context", -1.0),
            ("consolidated", -2.0),
        )
    }
    record = {
        "question_types": {
            "as written": {"num_questions": 3, "benefit_retained": None, **scores},
            "paraphrased": {"num_questions": 3, "benefit_retained": 0.75, **scores},
        },
        "unrelated": {"text": {"kl": 1.25e-4, "tokens": 100}},
    }
    metrics = collect_metrics(record)
    assert metrics["benefit_retained/paraphrased"] == 0.75
    assert "benefit_retained/as written" not in metrics
    assert metrics["text/kl_unrelated"] == 1.25e-4
    table = build_results_table("", collect_results(record), ("without", "with", "consolidated"))
    assert table.rows[0].cells == ("-5.00", "-1.00", "-2.00", "")
    assert table.rows[2].cells == ("-5.00", "-1.00", "-2.00", "0.750 of the benefit")
    assert table.rows[-1].cells == ("0", "", "1.25e-04", "")


def test_unfinished_runs_have_no_results():
    assert has_results(RECORD)
    assert not has_results({"format": 2, "time_estimate": {}})


def test_numbers_in_a_table():
    assert format_number(None) == ""
    assert format_number("text") == "text"
    assert [format_number(value) for value in (0.0, 1.0, 12.5)] == ["0.0000", "1.0000", "12.5000"]
    assert format_number(2_048, ",.0f") == "2,048"
    assert format_number(float("inf")) == "inf"
