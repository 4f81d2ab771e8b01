"""Runs side by side: what each came to, what was set differently, and words that name no run."""

import json
import os
import re
import shutil

import pytest
from test_distillation import Read, check_alone

from dmt.cli.main import distill_main as distill
from dmt.cli.main import main
from dmt.errors import UserError
from dmt.paths import find_run, list_runs
from dmt.report.compare import format_number
from dmt.training.run_dir import read_record


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run in `lightning_logs`, and a second that differs in two settings and in its results."""
    from conftest import POSITIONS, SENTENCES, make_teacher

    from dmt.distillation.pretrain import train_tokenizer

    place = tmp_path_factory.mktemp("compared")
    tokenizer = train_tokenizer(SENTENCES * 3, 300, POSITIONS)
    make_teacher(len(tokenizer)).save_pretrained(place / "teacher")
    tokenizer.save_pretrained(place / "teacher")
    (place / "text.txt").write_text(
        "\n\n".join(f"{i} {SENTENCES[i % 3]} {i * 7 % 13}" for i in range(400)), encoding="utf-8"
    )
    words = [
        f"teacher={place / 'teacher'}",
        f"data.corpora=[{place / 'text.txt'}]",
        f"trainer.log_dir={place / 'lightning_logs'}",
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
    assert distill([*words, "memory.mean_k=8"]) == 0
    assert (
        distill(
            [
                *words,
                "memory.mean_k=16",
                "student.layer_overrides=[{layers: 1, memory: {skip_connection: false}}]",
            ]
        )
        == 0
    )
    return place


@pytest.fixture
def inside(place, monkeypatch):
    monkeypatch.chdir(place)
    return place / "lightning_logs"


def test_results_and_differing_settings_stand_side_by_side(inside, capsys):
    assert main(["compare", "0", "version_1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    first, second = found["runs"]
    assert [run["name"] for run in found["runs"]] == ["version_0", "version_1"]
    for run in found["runs"]:
        record = read_record(inside / run["name"])
        assert run["measures"]["text: KL, nats/token"] == record["fidelity"]["text"]["kl"]
        assert run["measures"]["slots read per token"] == sum(
            used["read"] for used in record["slots"].values()
        )
    assert first["measures"]["text: KL, nats/token"] != second["measures"]["text: KL, nats/token"]
    assert (first["settings"]["memory.mean_k"], second["settings"]["memory.mean_k"]) == (8, 16)
    assert first["settings"]["student.layer_overrides"] == []
    assert set(first["settings"]) == {"memory.mean_k", "student.layer_overrides"}, (
        "what is the same is not said"
    )
    assert found["html"] is None

    assert main(["compare", str(inside / "version_0"), str(inside / "version_1" / "student")]) == 0
    shown = capsys.readouterr().out
    assert f"{first['measures']['text: KL, nats/token']:.4f}" in shown
    assert "[{layers: 1, memory: {skip_connection: false}}]" in shown


def test_a_page_lays_their_curves_over_each_other(inside, tmp_path, capsys):
    file = tmp_path / "both.html"
    assert main(["compare", "version_0", "version_1", "--html", str(file)]) == 0
    assert str(file) in capsys.readouterr().out
    read = check_alone(file.read_text(encoding="utf-8"))
    said = " ".join(" ".join(read.text).split())
    assert "memory.mean_k" in said
    record = [read_record(inside / f"version_{number}") for number in (0, 1)]
    tips = re.findall(r"<title>(.*?)</title>", file.read_text(encoding="utf-8"))
    for number, each in enumerate(record):
        last = each["curves"]["text/kl"]
        assert f"version_{number} step {last[0][-1]}: {last[1][-1]:.4f}" in tips
        assert any(f"version_{number}: 2 × k" in tip for tip in tips)
        assert any(f"version_{number}, layer 2" in tip for tip in tips)
    legends = [
        text for tag, text in _texts(file) if tag == "text" and text in ("version_0", "version_1")
    ]
    assert legends.count("version_0") == legends.count("version_1") >= 4


def _texts(file):
    read = Read(file.read_text(encoding="utf-8"))
    return (
        re.findall(r"<(text)[^>]*>([^<]*)</text>", file.read_text(encoding="utf-8"))
        if read.tags
        else []
    )


def test_runs_of_one_name_are_told_apart_by_their_folders(inside, tmp_path, capsys):
    shutil.copytree(inside / "version_0", tmp_path / "version_0")
    assert main(["compare", "version_0", str(tmp_path / "version_0"), "--json"]) == 0
    names = [run["name"] for run in json.loads(capsys.readouterr().out)["runs"]]
    assert names == ["lightning_logs/version_0", str(tmp_path / "version_0")]
    assert main(["compare", "version_0", str(tmp_path / "version_0")]) == 0
    assert "no setting differs" in capsys.readouterr().out


def test_what_cannot_be_compared_is_said_in_one_line(inside, tmp_path, capsys):
    unfinished, other, newer, broken = (
        inside.parent / name for name in ("unfinished", "other", "newer", "broken")
    )
    for folder in (unfinished, other, newer, broken):
        if not folder.exists():
            shutil.copytree(
                inside / "version_0",
                folder,
                ignore=shutil.ignore_patterns("student", "checkpoints"),
            )
    (unfinished / "run.json").write_text('{"format": 1}')
    (other / "run.json").write_text(
        '{"format": 1, "fidelity": {"text": {"recall": {"probes": 1}}}}'
    )
    (newer / "run.json").write_text('{"format": 99, "fidelity": {}}')
    (broken / "config.yaml").write_text("a: [")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.html").mkdir()
    two = ["compare", "version_0", "version_1"]
    for words, said in (
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
        (["compare", "0", str(inside / "version_0")], "and 0 are the same run, "),
        (
            ["compare", "0", str(unfinished)],
            "unfinished has no results yet; go on with it: python distill.py --resume",
        ),
        (["compare", "0", str(other)], "run.json is not what this version writes"),
        (["compare", "0", str(newer)], "a newer dmt made it: update dmt"),
        (["compare", "0", str(broken)], "config.yaml cannot be read as settings"),
        (["compare", "0", "x" * 5_000], "it cannot be looked into"),
        (["compare", "0", "~nobody/run"], "~nobody/run: no run is there"),
        ([*two, "--html", str(tmp_path / "notes.html")], "is a folder; name a file in it"),
        (
            [*two, "--html", str(tmp_path / "nowhere" / "a.html")],
            "cannot be written (No such file or directory)",
        ),
        (
            [*two, "--html", str(inside / "version_0" / "config.yaml")],
            "--html must name a file that ends in .html",
        ),
    ):
        assert main(words) == 2, words
        line = capsys.readouterr().err.strip()
        assert said in line, line
        assert line.startswith("error: ")
        assert "\n" not in line
    assert sorted(file.name for file in tmp_path.iterdir()) == ["empty", "notes.html"]


def test_a_page_that_cannot_be_written_leaves_nothing(inside, tmp_path, capsys, monkeypatch):
    from dmt.cli import compare

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compare, "write_page", full)
    assert main(["compare", "0", "1", "--html", str(tmp_path / "a.html")]) == 2
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_named_runs_stand_among_numbered_ones_where_they_were_begun(tmp_path, monkeypatch):
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


def test_numbers_as_they_stand_in_a_table():

    shown = [format_number(value) for value in (None, 0.0, 1.0, 2_048, 0.03981, 123.73, 12.5)]
    assert shown == ["-", "0", "1.0000", "2,048", "0.0398", "123.7", "12.5000"]
