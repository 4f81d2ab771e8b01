"""`dmt compare`: tables, formats, the page, and runs that cannot be compared."""

import json
import os
import re
import shutil

import pytest
from page_checks import check_self_contained

from dmt.cli.main import distill_main as distill
from dmt.cli.main import main
from dmt.errors import UserError
from dmt.paths import find_run, list_runs
from dmt.training.run_dir import read_record


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory):
    """A folder with two runs that differ in two settings and in their results."""
    from conftest import POSITIONS, SENTENCES, make_teacher

    from dmt.data.tokenizer import train_tokenizer

    work_dir = tmp_path_factory.mktemp("compared")
    tokenizer = train_tokenizer(SENTENCES * 3, 300, POSITIONS)
    make_teacher(len(tokenizer)).save_pretrained(work_dir / "teacher")
    tokenizer.save_pretrained(work_dir / "teacher")
    (work_dir / "text.txt").write_text(
        "\n\n".join(f"{i} {SENTENCES[i % 3]} {i * 7 % 13}" for i in range(400)), encoding="utf-8"
    )
    arguments = [
        f"teacher={work_dir / 'teacher'}",
        f"data.corpora=[{work_dir / 'text.txt'}]",
        f"trainer.log_dir={work_dir / 'lightning_logs'}",
        "data.seq_len=16",
        "data.batch_size=4",
        "data.micro_batch_size=2",
        "data.validation_tokens=64",
        "data.test_tokens=128",
        "stages.calibration_tokens=64",
        "stages.layerwise_steps=2",
        "stages.end_to_end_steps=4",
        "optim.warmup_steps=1",
        "trainer.num_threads=1",
        "trainer.log_every=1",
        "trainer.validate_every=3",
        "trainer.progress_bar=false",
        "trainer.accelerator=cpu",
        "trainer.precision=32-true",
    ]
    assert distill([*arguments, "memory.mean_k=8"]) == 0
    assert (
        distill(
            [
                *arguments,
                "memory.mean_k=16",
                "student.layer_overrides=[{layers: 1, memory: {skip_connection: false}}]",
            ]
        )
        == 0
    )
    return work_dir


@pytest.fixture
def runs_dir(work_dir, monkeypatch):
    monkeypatch.chdir(work_dir)
    return work_dir / "lightning_logs"


def test_results_and_differing_settings_are_printed(runs_dir, capsys):
    assert main(["compare", "0", "version_1", "--json"]) == 0
    comparison = json.loads(capsys.readouterr().out)
    first, second = comparison["runs"]
    assert [run["name"] for run in comparison["runs"]] == ["version_0", "version_1"]
    for run in comparison["runs"]:
        record = read_record(runs_dir / run["name"])
        assert run["metrics"]["text/kl"] == record["fidelity"]["text"]["kl"]
        assert run["metrics"]["active_slots"] == sum(
            layer["active_per_token"] for layer in record["slots"].values()
        )
    assert first["metrics"]["text/kl"] != second["metrics"]["text/kl"]
    config_diffs = first["config_diff"], second["config_diff"]
    assert [diff["memory.mean_k"] for diff in config_diffs] == [8, 16]
    assert first["config_diff"]["student.layer_overrides"] == []
    assert set(first["config_diff"]) == {"memory.mean_k", "student.layer_overrides"}, (
        "settings that agree are left out"
    )
    assert comparison["html"] is None

    paths = [str(runs_dir / "version_0"), str(runs_dir / "version_1" / "student")]
    assert main(["compare", *paths]) == 0
    printed = capsys.readouterr().out
    assert f"{first['metrics']['text/kl']:.4f}" in printed
    assert "[{layers: 1, memory: {skip_connection: false}}]" in printed
    assert "* best; ↓ lower is better" in printed


def test_formats_for_papers(runs_dir, capsys):
    two = ["compare", "0", "1", "--format"]
    assert main([*two, "md"]) == 0
    assert capsys.readouterr().out.startswith("| run | text: perplexity ratio ↓ |")
    assert main([*two, "latex"]) == 0
    assert "\\begin{tabular}" in capsys.readouterr().out
    assert main([*two, "csv"]) == 0
    assert capsys.readouterr().out.startswith("run,group,student.layer_overrides,memory.mean_k,")
    assert main([*two, "json", "--by", "memory.mean_k"]) == 0
    groups = json.loads(capsys.readouterr().out)["groups"]
    assert [group["name"] for group in groups] == ["memory.mean_k=8", "memory.mean_k=16"]
    assert main(["compare", "0", "1", "--by", "memory.kk"]) == 2
    assert "by=memory.kk is not a setting" in capsys.readouterr().err


def test_the_page_has_the_curves_of_all_runs(runs_dir, tmp_path, capsys):
    file = tmp_path / "both.html"
    assert main(["compare", "version_0", "version_1", "--html", str(file)]) == 0
    assert str(file) in capsys.readouterr().out
    html = file.read_text(encoding="utf-8")
    page = check_self_contained(html)
    assert "memory.mean_k" in page.words
    tips = re.findall(r"<title>(.*?)</title>", html)
    for number in (0, 1):
        record = read_record(runs_dir / f"version_{number}")
        steps, values = record["curves"]["val/text/kl"]
        assert f"version_{number} step {steps[-1]}: {values[-1]:.4f}" in tips
        assert any(f"version_{number}, layer 2" in tip for tip in tips)
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", html)
    assert labels.count("version_0") == labels.count("version_1") >= 3


def test_runs_with_the_same_name_are_named_by_their_folders(runs_dir, tmp_path, capsys):
    shutil.copytree(runs_dir / "version_0", tmp_path / "version_0")
    assert main(["compare", "version_0", str(tmp_path / "version_0"), "--json"]) == 0
    names = [run["name"] for run in json.loads(capsys.readouterr().out)["runs"]]
    assert names == ["lightning_logs/version_0", str(tmp_path / "version_0")]
    assert main(["compare", "version_0", str(tmp_path / "version_0")]) == 0
    assert "no setting differs" in capsys.readouterr().out


def test_runs_that_cannot_be_compared_are_reported_in_one_line(runs_dir, tmp_path, capsys):
    unfinished, other, newer, broken = (
        runs_dir.parent / name for name in ("unfinished", "other", "newer", "broken")
    )
    for folder in (unfinished, other, newer, broken):
        if not folder.exists():
            shutil.copytree(
                runs_dir / "version_0",
                folder,
                ignore=shutil.ignore_patterns("student", "checkpoints"),
            )
    (unfinished / "run.json").write_text('{"format": 2}')
    (other / "run.json").write_text(
        '{"format": 2, "fidelity": {"text": {"recall": {"num_probes": 1}}}}'
    )
    (newer / "run.json").write_text('{"format": 99, "fidelity": {}}')
    (broken / "config.yaml").write_text("a: [")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.html").mkdir()
    two = ["compare", "version_0", "version_1"]
    for arguments, message in (
        (["compare"], "the following arguments are required: RUN"),
        (["compare", "version_0"], "two runs or more, got 1"),
        (
            ["compare", "version_0", "version_7"],
            "version_7: no run is there; give a run's folder, or one in lightning_logs: v",
        ),
        (
            ["compare", "version_0", str(tmp_path / "empty")],
            "it is no run (no config.yaml, no run.json)",
        ),
        (
            ["compare", "0", "version_1", "lightning_logs/version_0"],
            "lightning_logs/version_0 and 0 are the same run",
        ),
        (["compare", "0", str(runs_dir / "version_0")], "and 0 are the same run, "),
        (
            ["compare", "0", str(unfinished)],
            "unfinished has no results yet; resume it: dmt distill --resume",
        ),
        (["compare", "0", str(other)], "run.json does not have the fields of this version of dmt"),
        (["compare", "0", str(newer)], "a newer dmt made it: update dmt"),
        (["compare", "0", str(broken)], "config.yaml is not valid YAML"),
        (["compare", "0", "x" * 5_000], "it cannot be looked into"),
        (["compare", "0", "~nobody/run"], "~nobody/run: no run is there"),
        ([*two, "--html", str(tmp_path / "notes.html")], "is a folder; name a file in it"),
        (
            [*two, "--html", str(tmp_path / "nowhere" / "a.html")],
            "cannot be written (No such file or directory)",
        ),
        (
            [*two, "--html", str(runs_dir / "version_0" / "config.yaml")],
            "--html must name a file that ends in .html",
        ),
    ):
        assert main(arguments) == 2, arguments
        line = capsys.readouterr().err.strip()
        assert message in line, line
        assert line.startswith("error: ")
        assert "\n" not in line
    assert sorted(file.name for file in tmp_path.iterdir()) == ["empty", "notes.html"]


def test_a_page_that_cannot_be_written_leaves_no_file(runs_dir, tmp_path, capsys, monkeypatch):
    from dmt.cli import compare

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compare, "write_page", full)
    assert main(["compare", "0", "1", "--html", str(tmp_path / "a.html")]) == 1
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_named_runs_are_ordered_by_their_start_among_numbered_ones(tmp_path, monkeypatch):
    for order, name in enumerate(("version_2", "early", "version_10", "late")):
        (tmp_path / "lightning_logs" / name / "student").mkdir(parents=True)
        config = tmp_path / "lightning_logs" / name / "config.yaml"
        config.write_text("")
        os.utime(config, (1_000 + order, 1_000 + order))
    (tmp_path / "lightning_logs" / "notes" / "student").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    names = [run.name for run in list_runs(tmp_path / "lightning_logs")]
    assert names == ["version_2", "early", "version_10", "late"]
    assert find_run("early").name == "early"
    assert find_run("10").name == "version_10"
    with pytest.raises(UserError, match=r"in lightning_logs: version_2, early, version_10, late"):
        find_run("notes")
    os.utime(tmp_path / "lightning_logs" / "version_2" / "config.yaml", (5_000, 5_000))
    assert [run.name for run in list_runs(tmp_path / "lightning_logs")][-1] == "late", (
        "numbers go by their number"
    )
