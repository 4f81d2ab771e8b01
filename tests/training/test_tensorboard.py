"""What TensorBoard shows: runs by name, curves of measured values, settings that differ."""

import json

import pytest
from conftest import LAYERS, newest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from dmt import config_io
from dmt.cli.main import distill_main
from dmt.config_io import load_config
from dmt.errors import UserError
from dmt.models.loading import resolve_student_folder
from dmt.training.run_dir import read_record


def events(run):
    found = EventAccumulator(str(run), size_guidance={"tensors": 0, "scalars": 0})
    found.Reload()
    return found


def charts(found):
    """Tags of each chart, by group and title."""
    text = found.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    layout = layout_pb2.Layout.FromString(text)
    return {
        group.title: {chart.title: list(chart.multiline.tag) for chart in group.chart}
        for group in layout.category
    }


def variant(found):
    """Settings in HParams."""
    content = found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    said = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in said.items()}


ROWS = ["memory.kind=associative", "memory.write_start=0.5"]


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ROWS,
        [
            *ROWS,
            "memory.base=none",
            "memory.value_target=teacher",
            "stages.layerwise_steps=0",
            "stages.end_to_end_steps=9",
        ],
        ["student.layer_overrides=[{layers: 0, memory: {kind: dense}}]", "loss.hidden_mse=0"],
    ],
    ids=str,
)
def test_charts_have_the_curves_that_are_there(words, tmp_path, changes):
    assert distill_main([*words, *changes]) == 0
    found = events(newest(tmp_path))
    grouped = charts(found)
    there = set(found.Tags()["scalars"])
    named = [tag for group in grouped.values() for tags in group.values() for tag in tags]
    assert [tag for tag in named if tag not in there] == []
    measured = {
        tag
        for tag in there
        if not tag.startswith(("hparam/", "slots/used_fraction/", "lr"))
        and "_perplexity" not in tag
    }
    assert measured - set(named) == set()
    assert ("knn rows" in grouped) == bool([word for word in changes if word == ROWS[0]])


def test_nothing_is_shown_that_was_not_measured(words, tmp_path):
    assert distill_main([*words, *ROWS]) == 0
    found = events(newest(tmp_path))
    assert "epoch" not in found.Tags()["scalars"]
    first = min(event.step for event in found.Scalars("knn/rows/layer_0"))
    assert first >= 4 + 2, "the second half of the end-to-end stage writes"
    for layer in range(LAYERS):
        for event in found.Scalars(f"knn/null_weight/layer_{layer}"):
            assert event.step >= first
            assert event.value < 1
    for tag in found.Tags()["scalars"]:
        if tag.startswith("hparam/"):
            assert [event.step for event in found.Scalars(tag)] == [9], (
                "measured after the last step, not before the first"
            )
    record = read_record(newest(tmp_path))["fidelity"]["text"]
    assert found.Scalars("hparam/text_kl")[0].value == pytest.approx(record["kl"])


def test_a_memory_that_nobody_asked_has_read_nothing_we_know_of(words, tmp_path, monkeypatch):
    from dmt.memory.slot_table import SlotTable

    monkeypatch.setattr(SlotTable, "_record_reads", lambda *_: None)
    from dmt.distillation import run

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    monkeypatch.setattr(run, "evaluate_student", stop)
    with pytest.raises(Stop):
        distill_main([*words, "memory.k=8", "memory.mean_k="])
    assert not [
        tag for tag in events(newest(tmp_path)).Tags()["scalars"] if tag.startswith("slots/")
    ]


def test_without_slots_no_number_of_slots_is_made_up(words, tmp_path):
    bare = [*ROWS, "memory.base=none", "memory.value_target=teacher", "stages.layerwise_steps=0"]
    assert distill_main([*words, *bare]) == 0
    found = events(newest(tmp_path))
    assert "hparam/active_slots" not in found.Tags()["scalars"]
    assert "hparam/knn_rows" in found.Tags()["scalars"]
    assert variant(found)["memory.num_slots"] == "default"
    page = (newest(tmp_path) / "report.html").read_text(encoding="utf-8")
    assert "stored rows, layer" in page


def test_hparams_tell_variants_apart_and_have_one_entry_a_run(words, tmp_path):
    assert distill_main([*words, "trainer.run_name=plain"]) == 0
    assert (
        distill_main(
            [
                *words,
                "trainer.run_name=wide",
                "memory.mean_k=16",
                "student.layer_overrides=[{layers: 1, memory: {skip_connection: false}}]",
            ]
        )
        == 0
    )
    wide = tmp_path / "logs" / "wide"
    for checkpoint in (wide / "checkpoints").iterdir():
        if checkpoint.name != "step_8.ckpt":
            checkpoint.unlink()
    assert distill_main(["--resume", str(wide)]) == 0
    board = EventMultiplexer()
    board.AddRunsFromDirectory(str(tmp_path / "logs"))
    board.Reload()
    assert set(board.Runs()) == {"plain", "wide"}, "a curve is called what its run is called"
    plain, other = (variant(board.GetAccumulator(name)) for name in ("plain", "wide"))
    assert {name: (plain[name], other[name]) for name in plain if plain[name] != other[name]} == {
        "memory.mean_k": (8.0, 16.0),
        "memory.k": (8.0, 16.0),
        "student.layer_overrides": ("[]", "[{layers: 1, memory: {skip_connection: false}}]"),
    }
    assert plain["memory.num_slots"] == 64
    assert plain["memory.offload"] == "none"
    assert plain["data.corpora"].startswith("[")


# Names.


def test_a_named_run_lies_under_its_name_and_is_found_there(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    here = [*words, "trainer.log_dir=lightning_logs"]
    assert distill_main([*here, "trainer.validate_every=0"]) == 0
    assert distill_main([*here, "trainer.run_name=narrow", "memory.mean_k=4"]) == 0
    run = tmp_path / "lightning_logs" / "narrow"
    assert (run / "report.html").is_file()
    assert {path.name for path in run.parent.iterdir()} == {"version_0", "narrow"}
    assert resolve_student_folder(None).resolve() == run / "student", "it is the newest"
    assert "--resume lightning_logs/nowhere" in refused(
        capsys, ["--resume", "lightning_logs/nowhere"]
    )
    assert "lightning_logs/narrow" in refused(capsys, ["--resume", "lightning_logs/nowhere"])
    line = refused(capsys, [*here, "trainer.run_name=narrow"])
    assert line == (
        "trainer.run_name=narrow: lightning_logs/narrow exists; resume it by "
        "--resume lightning_logs/narrow, or give another name"
    )
    assert distill_main(["--resume", "lightning_logs/narrow"]) == 0
    replay = json.loads((run / "run.json").read_text())["replay_command"].split()
    assert replay[:2] == ["dmt", "distill"]
    assert distill_main(replay[2:]) == 0
    assert (
        resolve_student_folder(None).resolve()
        == tmp_path / "lightning_logs" / "version_1" / "student"
    ), "replayed beside it"
    first, again = (read_record(folder)["fidelity"] for folder in (run, run.parent / "version_1"))
    assert first == again


def refused(capsys, words):
    capsys.readouterr()
    assert distill_main(words) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    return line.removeprefix("error: ")


@pytest.mark.parametrize(
    "name",
    [
        "a/b",
        "../up",
        "..",
        ".hidden",
        "-x",
        "a b",
        "C:\\x",
        "x" * 101,
        "version_3",
        "12",
        "'a\tb'",
        "''",
        "a*",
    ],
)
def test_a_name_that_is_no_folders_is_refused(name, tmp_path):
    with pytest.raises(UserError, match=r"^trainer\.run_name"):
        load_config(None, [f"trainer.run_name={name}", f"trainer.log_dir={tmp_path}"])
    assert not list(tmp_path.iterdir())


def test_names_that_are_folders(tmp_path):
    for name in ("narrow", "k=8,lr=0.1", "größer", "2026-01-02", "version_x", "a.b+c@d_e"):
        assert load_config(None, [f"trainer.run_name={name}"]).trainer.run_name == name
    assert config_io.load_config(None, ["trainer.run_name="]).trainer.run_name is None
