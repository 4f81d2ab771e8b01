"""Comparisons of runs: groups of seeds, best values, and runs that are not comparable."""

import csv
import io
import json

import pytest
from omegaconf import OmegaConf
from page_checks import check_self_contained

from dmt.errors import UserError
from dmt.files import RECORD_VERSION
from dmt.report.compare import Comparison, compare, find_differing_settings
from dmt.report.html import render_html


@pytest.fixture
def make_run(tmp_path):
    """A function that writes the folder of a finished run and returns it."""

    def make(name, kl, settings=(), top1=0.9, teacher_perplexity=10.0, commit="a", **record_more):
        folder = tmp_path / name
        folder.mkdir()
        OmegaConf.save(OmegaConf.from_dotlist(list(settings)), folder / "config.yaml")
        record = {
            "format": RECORD_VERSION,
            "commit": commit,
            "fidelity": {
                "text": {
                    "teacher_perplexity": teacher_perplexity,
                    "student_perplexity": 11.0,
                    "ppl_ratio": 1.1,
                    "kl": kl,
                    "top1_agreement": top1,
                    "tokens": 100,
                    "window": 16,
                }
            },
            "seconds": {"train": 3.0},
            **record_more,
        }
        (folder / "run.json").write_text(json.dumps(record))
        (folder / "metrics.csv").write_text(
            f"val/text/kl,val/fvu/layer_0,step\n{kl},{kl},0\n{kl / 2},{kl / 2},10\n"
        )
        return str(folder)

    return make


@pytest.fixture
def sweep(make_run):
    """Two values of `memory.mean_k` with seeds 0 and 1 each."""
    return [
        make_run(
            f"k{k}-s{seed}",
            kl + seed * 0.02,
            [f"memory.mean_k={k}", f"seed={seed}", "stages.end_to_end_steps=10"],
        )
        for k, kl in ((8, 0.5), (16, 0.3))
        for seed in (0, 1)
    ]


def test_seeds_of_the_same_settings_form_a_group(sweep):
    comparison = compare(sweep)
    assert isinstance(comparison, Comparison)
    assert [group.label for group in comparison.groups] == [
        "memory.mean_k=8 (2 runs)",
        "memory.mean_k=16 (2 runs)",
    ]
    group = comparison.groups[0]
    assert group.mean("text/kl") == pytest.approx(0.51)
    assert group.std("text/kl") == pytest.approx(0.02 / 2**0.5)
    assert comparison.config_diff == {"memory.mean_k": [8, 8, 16, 16], "seed": [0, 1, 0, 1]}


def test_runs_that_differ_in_everything_are_not_grouped(make_run):
    runs = [
        make_run("a", 0.5, ["memory.mean_k=8", "seed=0"]),
        make_run("b", 0.4, ["memory.mean_k=16", "seed=1"]),
    ]
    comparison = compare(runs)
    assert [group.name for group in comparison.groups] == ["a", "b"]
    assert comparison.groups[0].std("text/kl") is None


def test_by_groups_over_all_other_settings(make_run):
    runs = [
        make_run(f"{k}-{steps}", 0.5, [f"memory.mean_k={k}", f"stages.end_to_end_steps={steps}"])
        for k in (8, 16)
        for steps in (10, 20)
    ]
    assert len(compare(runs).groups) == 4
    by_k = compare(runs, by="memory.mean_k")
    assert [group.label for group in by_k.groups] == [
        "memory.mean_k=8 (2 runs)",
        "memory.mean_k=16 (2 runs)",
    ]
    assert len(compare(runs, by=["memory.mean_k", "stages.end_to_end_steps"]).groups) == 4
    with pytest.raises(UserError, match=r"by=memory.slotz is not a setting"):
        compare(runs, by="memory.slotz")


def test_the_best_value_is_marked_by_direction(sweep):
    lines = compare(sweep).to_markdown().splitlines()
    assert lines[0] == (
        "| run | text: perplexity ratio ↓ | text: KL, nats/token ↓ | text: top-1 agreement ↑ |"
    )
    assert lines[2].count("**") == 0, "ties are not marked"
    assert "**0.3100 ± 0.0141**" in lines[3]
    assert lines[-1].startswith("Mean ± sample standard deviation")


def test_latex_and_csv_have_the_same_runs(sweep):
    comparison = compare(sweep)
    latex = comparison.to_latex()
    assert r"\textbf{0.3100 $\pm$ 0.0141}" in latex
    assert r"memory.mean\_k=16 (2 runs)" in latex
    rows = list(csv.DictReader(io.StringIO(comparison.to_csv())))
    assert [row["run"] for row in rows] == ["k8-s0", "k8-s1", "k16-s0", "k16-s1"]
    assert rows[1] | {"memory.mean_k": "8", "seed": "1", "group": "memory.mean_k=8"} == rows[1]
    assert float(rows[1]["text/kl"]) == 0.52
    assert float(rows[1]["seconds/train"]) == 3.0


def test_only_chosen_metrics_are_columns(sweep):
    comparison = compare(sweep)
    lines = comparison.to_markdown(metrics=["text/kl"]).splitlines()
    assert lines[0] == "| run | text: KL, nats/token ↓ |"
    with pytest.raises(UserError, match=r"metrics: no run has text/kk; accepted are text/ppl"):
        comparison.to_latex(metrics=["text/kk"])


@pytest.mark.parametrize(
    "setting", ["data.test_tokens=64", "data.seq_len=32", "data.corpora=[other.txt]"]
)
def test_runs_on_other_test_text_are_not_comparable(make_run, setting):
    runs = [
        make_run("a", 0.5, ["memory.mean_k=8"]),
        make_run("b", 0.4, ["memory.mean_k=16"]),
        make_run("c", 0.1, ["memory.mean_k=32", setting]),
    ]
    comparison = compare(runs)
    assert [group.is_comparable for group in comparison.groups] == [True, True, False]
    [warning] = comparison.warnings
    assert warning.startswith("† c is not comparable with the first: measured on other test text")
    assert setting.partition("=")[0] in warning
    lines = comparison.to_markdown().splitlines()
    assert "**0.4000**" in lines[3], "the best of the comparable runs"
    assert lines[4].startswith("| c † |")
    assert "**" not in lines[4]


def make_inputs(weights="w", digest="d", characters=9):
    """Return what `run.json` has of a teacher and a text."""
    corpus = {"name": "text", "digest": digest, "documents": 2, "characters": characters}
    return {"model": {"weights": weights}, "corpora": [corpus]}


@pytest.mark.parametrize(
    ("differences", "problem"),
    [
        ({"weights": "x"}, "measured against another teacher (its weights differ)"),
        ({"digest": "e"}, "measured on other test text (the text of text)"),
    ],
)
def test_runs_on_something_else_under_the_same_name_are_not_comparable(
    make_run, differences, problem
):
    runs = [
        make_run("a", 0.5, ["memory.mean_k=8"], **make_inputs()),
        make_run("b", 0.4, ["memory.mean_k=16", "data.corpora=[/x/text.txt]"], **make_inputs()),
        make_run("c", 0.1, ["memory.mean_k=32"], **make_inputs(**differences)),
    ]
    comparison = compare(runs)
    assert [group.label for group in comparison.groups] == ["a", "b", "c †"]
    assert comparison.warnings[0] == f"† c is not comparable with the first: {problem}."
    assert problem in comparison.to_markdown().splitlines()[-1]
    assert r"c $\dagger$" in comparison.to_latex()
    assert problem in render_html(comparison.to_page())
    assert "c †" in repr(comparison)
    rows = list(csv.DictReader(io.StringIO(comparison.to_csv())))
    assert [row["problem"] for row in rows] == ["", "", problem]
    assert [group["problem"] for group in comparison.to_dict()["groups"]] == ["", "", problem]


def test_a_text_split_by_another_seed_is_the_same_text(make_run):
    runs = [
        make_run("a", 0.5, ["seed=0"], **make_inputs()),
        make_run("b", 0.4, ["seed=1"], **make_inputs(digest="e")),
    ]
    assert compare(runs).groups[0].label == "all runs (2 runs)"
    runs[1] = make_run("c", 0.4, ["seed=2"], **make_inputs(digest="e", characters=8))
    assert compare(runs).groups[0].label == "all runs (2 runs) †"


def test_a_longer_training_is_marked(make_run):
    runs = [
        make_run("a", 0.5, ["stages.end_to_end_steps=100", "stages.layerwise_steps=0"]),
        make_run("b", 0.4, ["stages.end_to_end_steps=200", "stages.layerwise_steps=0"]),
    ]
    comparison = compare(runs)
    assert [group.label for group in comparison.groups] == ["a", "b ‡"]
    [warning] = comparison.warnings
    assert warning.startswith("‡ b is trained on ")
    assert comparison.groups[1].is_comparable
    assert r"b $\ddagger$" in comparison.to_latex()


def test_test_text_that_depends_on_the_seed_is_noted(make_run):
    runs = [
        make_run("a", 0.5, ["seed=0"], teacher_perplexity=10.0),
        make_run("b", 0.4, ["seed=1"], teacher_perplexity=12.0),
    ]
    comparison = compare(runs)
    assert [group.label for group in comparison.groups] == ["all runs (2 runs)"]
    assert "the teacher's perplexity" in comparison.warnings[0]


def test_different_teachers_are_noted(make_run):
    runs = [make_run("a", 0.5, ["teacher=x"]), make_run("b", 0.4, ["teacher=y"])]
    assert "teachers differ" in compare(runs).warnings[0]


def test_the_commit_is_shown_where_it_differs(make_run):
    runs = [make_run("a", 0.5, commit="1" * 40), make_run("b", 0.4, commit="2" * 40)]
    comparison = compare(runs)
    assert comparison.config_diff == {"commit": ["1" * 12, "2" * 12]}
    assert find_differing_settings(comparison.runs[:1]) == {}


def test_comparisons_have_a_dictionary_and_a_repr(sweep):
    comparison = compare(sweep)
    payload = json.loads(json.dumps(comparison.to_dict()))
    assert payload["runs"][0]["metrics"]["text/kl"] == 0.5
    assert payload["runs"][3]["config_diff"] == {"memory.mean_k": 16, "seed": 1}
    assert payload["groups"][1]["metrics"]["text/kl"]["mean"] == pytest.approx(0.31)
    assert payload["groups"][1]["runs"] == ["k16-s0", "k16-s1"]
    assert repr(comparison).startswith("Comparison(4 runs in 2 groups)\n")
    assert "0.3100 ± 0.0141 *" in repr(comparison)
    assert "<table>" in comparison._repr_html_()


def test_the_page_names_what_was_varied(sweep):
    page = check_self_contained(render_html(compare(sweep).to_page()))
    assert page.words.startswith("Comparison by memory.mean_k")
    assert "4 runs: k8-s0, k8-s1, k16-s0, k16-s1. Teacher embedded; 110 steps." in page.words
    assert "KL from the teacher on validation text, text" in page.words
    assert "Error of each layer after training" in page.words


def test_two_different_finished_runs_are_needed(make_run, tmp_path):
    run_dir = make_run("a", 0.5)
    for runs, message in (
        ([run_dir], "two runs or more, got 1"),
        ([run_dir, run_dir], "are the same run"),
        ([run_dir, str(tmp_path / "b")], "no run is there|not a run|b: "),
    ):
        with pytest.raises(UserError, match=message):
            compare(runs)
