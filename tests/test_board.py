"""What TensorBoard shows: runs by their names, curves of what was measured, settings that tell variants apart."""

import json

import pytest
from conftest import LAYERS, newest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from dmt import settings
from dmt.distill.folder import read_record
from dmt.errors import UserError
from dmt.facts.opening import student_folder
from dmt.main import main
from dmt.settings import load


def events(run):
    found = EventAccumulator(str(run), size_guidance={"tensors": 0, "scalars": 0})
    found.Reload()
    return found


def charts(found):
    """Tags of each chart, by group and title."""
    text = found.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    layout = layout_pb2.Layout.FromString(text)
    return {group.title: {chart.title: list(chart.multiline.tag) for chart in group.chart} for group in layout.category}


def variant(found):
    """Settings in HParams."""
    content = found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    said = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in said.items()}


ROWS = ["memory.kind=associative", "memory.write_from=0.5"]


@pytest.mark.parametrize(
    "changes",
    [[], ROWS, [*ROWS, "memory.base=none", "memory.writes=teacher", "stages.layerwise_steps=0", "stages.end_to_end_steps=9"],
     ["student.rules=[{layers: 0, memory: {kind: dense}}]", "loss.hidden=0"]],
    ids=str,
)  # fmt: skip
def test_charts_have_the_curves_that_are_there(words, tmp_path, changes):
    assert main([*words, *changes]) == 0
    found = events(newest(tmp_path))
    grouped = charts(found)
    there = set(found.Tags()["scalars"])
    named = [tag for group in grouped.values() for tags in group.values() for tag in tags]
    assert [tag for tag in named if tag not in there] == []
    measured = {
        tag for tag in there if not tag.startswith(("hparam/", "slots_used/", "learning_rate")) and "_perplexity" not in tag
    }
    assert measured - set(named) == set()
    assert ("rows" in grouped) == bool([word for word in changes if word == ROWS[0]])


def test_nothing_is_shown_that_was_not_measured(words, tmp_path):
    assert main([*words, *ROWS]) == 0
    found = events(newest(tmp_path))
    assert "epoch" not in found.Tags()["scalars"]
    first = min(event.step for event in found.Scalars("rows/layer_0"))
    assert first >= 4 + 2, "the second half of the end-to-end stage writes"
    for layer in range(LAYERS):
        for event in found.Scalars(f"rows_base/layer_{layer}"):
            assert event.step >= first
            assert event.value < 1
    for tag in found.Tags()["scalars"]:
        if tag.startswith("hparam/"):
            assert [event.step for event in found.Scalars(tag)] == [9], "measured after the last step, not before the first"
    record = read_record(newest(tmp_path))["fidelity"]["text"]
    assert found.Scalars("hparam/text_kl")[0].value == pytest.approx(record["kl"])


def test_a_memory_that_nobody_asked_has_read_nothing_we_know_of(words, tmp_path, monkeypatch):
    from dmt.memory.table import SlotTable

    monkeypatch.setattr(SlotTable, "_count", lambda *_: None)
    from dmt.distill import run

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    monkeypatch.setattr(run, "measure", stop)
    with pytest.raises(Stop):
        main([*words, "memory.k=8", "memory.budget="])
    assert not [tag for tag in events(newest(tmp_path)).Tags()["scalars"] if tag.startswith("slots_")]


def test_without_slots_no_number_of_slots_is_made_up(words, tmp_path):
    bare = [*ROWS, "memory.base=none", "memory.writes=teacher", "stages.layerwise_steps=0"]
    assert main([*words, *bare]) == 0
    found = events(newest(tmp_path))
    assert "hparam/slots_read" not in found.Tags()["scalars"]
    assert "hparam/rows" in found.Tags()["scalars"]
    assert variant(found)["memory.slots"] == "default"
    page = (newest(tmp_path) / "report.html").read_text(encoding="utf-8")
    assert "Stored rows" in page
    assert "Which slots are read" not in page
    assert read_record(newest(tmp_path))["budgets"] == {}


def test_hparams_tell_variants_apart_and_have_one_entry_a_run(words, tmp_path):
    assert main([*words, "trainer.name=plain"]) == 0
    assert main([*words, "trainer.name=wide", "memory.budget=16", "student.rules=[{layers: 1, memory: {linear: false}}]"]) == 0
    wide = tmp_path / "logs" / "wide"
    for checkpoint in (wide / "checkpoints").iterdir():
        if checkpoint.name != "step_8.ckpt":
            checkpoint.unlink()
    assert main(["--resume", str(wide)]) == 0
    board = EventMultiplexer()
    board.AddRunsFromDirectory(str(tmp_path / "logs"))
    board.Reload()
    assert set(board.Runs()) == {"plain", "wide"}, "a curve is called what its run is called"
    plain, other = (variant(board.GetAccumulator(name)) for name in ("plain", "wide"))
    assert {name: (plain[name], other[name]) for name in plain if plain[name] != other[name]} == {
        "memory.budget": (8.0, 16.0),
        "memory.k": (8.0, 16.0),
        "student.rules": ("[]", "[{layers: 1, memory: {linear: false}}]"),
    }
    assert plain["memory.slots"] == 64
    assert plain["memory.disk"] == "none"
    assert plain["data.corpora"].startswith("[")


# Names.


def test_a_named_run_lies_under_its_name_and_is_found_there(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    here = [*words, "trainer.log_dir=lightning_logs"]
    assert main([*here, "trainer.validate_every=0"]) == 0
    assert main([*here, "trainer.name=narrow", "memory.budget=4"]) == 0
    run = tmp_path / "lightning_logs" / "narrow"
    assert (run / "report.html").is_file()
    assert {path.name for path in run.parent.iterdir()} == {"version_0", "narrow"}
    assert student_folder(None).resolve() == run / "student", "it is the newest"
    assert "--resume lightning_logs/nowhere" in refused(capsys, ["--resume", "lightning_logs/nowhere"])
    assert "lightning_logs/narrow" in refused(capsys, ["--resume", "lightning_logs/nowhere"])
    line = refused(capsys, [*here, "trainer.name=narrow"])
    assert line == (
        "trainer.name=narrow: lightning_logs/narrow is there already; go on with it by --resume lightning_logs/narrow, or give "
        "another name"
    )
    assert main(["--resume", "lightning_logs/narrow"]) == 0
    replay = json.loads((run / "run.json").read_text())["replay"].split()
    assert replay[:2] == ["python", "distill.py"]
    assert main(replay[2:]) == 0
    assert student_folder(None).resolve() == tmp_path / "lightning_logs" / "version_1" / "student", "replayed beside it"
    first, again = (read_record(folder)["fidelity"] for folder in (run, run.parent / "version_1"))
    assert first == again


def refused(capsys, words):
    capsys.readouterr()
    assert main(words) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    return line.removeprefix("error: ")


@pytest.mark.parametrize(
    "name",
    ["a/b", "../up", "..", ".hidden", "-x", "a b", "C:\\x", "x" * 101, "version_3", "12", "'a\tb'", "''", "a*"],
)
def test_a_name_that_is_no_folders_is_refused(name, tmp_path):
    with pytest.raises(UserError, match=r"^trainer\.name"):
        load(None, [f"trainer.name={name}", f"trainer.log_dir={tmp_path}"])
    assert not list(tmp_path.iterdir())


def test_names_that_are_folders(tmp_path):
    for name in ("narrow", "k=8,lr=0.1", "größer", "2026-01-02", "version_x", "a.b+c@d_e"):
        assert load(None, [f"trainer.name={name}"]).trainer.name == name
    assert settings.load(None, ["trainer.name="]).trainer.name is None
