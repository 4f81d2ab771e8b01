"""What TensorBoard shows: runs by name, curves of measured values, settings that differ."""

import itertools
import json
import time

import pytest
from conftest import LAYERS, newest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from dmt import config_io
from dmt.cli.main import distill_main
from dmt.config_io import load_config
from dmt.distillation.module import DistillationModule
from dmt.errors import UserError
from dmt.paths import resolve_student_folder
from dmt.training.checkpoints import StepBoundaryCheckpoint
from dmt.training.run_dir import read_record


def load_events(run):
    accumulator = EventAccumulator(str(run), size_guidance={"tensors": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def read_charts(events):
    """Return the tags of each chart, by group and title."""
    text = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    layout = layout_pb2.Layout.FromString(text)
    return {
        group.title: {chart.title: list(chart.multiline.tag) for chart in group.chart}
        for group in layout.category
    }


def read_hparams(events):
    """Return the settings in the HParams tab."""
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    hparams = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in hparams.items()}


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
def test_charts_show_every_measured_curve_and_no_other(distill_args, tmp_path, changes):
    assert distill_main([*distill_args, *changes]) == 0
    events = load_events(newest(tmp_path))
    charts = read_charts(events)
    tags = set(events.Tags()["scalars"])
    charted_tags = [tag for group in charts.values() for tags in group.values() for tag in tags]
    assert [tag for tag in charted_tags if tag not in tags] == []
    measured = {
        tag
        for tag in tags
        if not tag.startswith(("hparam/", "slots/used_fraction/", "lr"))
        and "_perplexity" not in tag
    }
    assert measured - set(charted_tags) == set()
    assert ("knn rows" in charts) == bool([arg for arg in changes if arg == ROWS[0]])


def test_curves_begin_when_the_value_is_first_measured(distill_args, tmp_path):
    assert distill_main([*distill_args, *ROWS]) == 0
    events = load_events(newest(tmp_path))
    assert "epoch" not in events.Tags()["scalars"]
    first = min(event.step for event in events.Scalars("knn/rows/layer_0"))
    assert first >= 4 + 2, "the second half of the end-to-end stage writes"
    for layer in range(LAYERS):
        for event in events.Scalars(f"knn/null_weight/layer_{layer}"):
            assert event.step >= first
            assert event.value < 1
    for tag in events.Tags()["scalars"]:
        if tag.startswith("hparam/"):
            assert [event.step for event in events.Scalars(tag)] == [9], (
                "measured after the last step, not before the first"
            )
    record = read_record(newest(tmp_path))["fidelity"]["text"]
    assert events.Scalars("hparam/text_kl")[0].value == pytest.approx(record["kl"])


@pytest.mark.parametrize("clock", [0, -3_600], ids=["clock runs on", "clock set back"])
def test_a_resumed_run_has_each_step_once(distill_args, tmp_path, monkeypatch, clock):
    class Kill(BaseException):
        pass

    def kill_at_step_8(module, *_):
        if module.global_step == 7:
            raise Kill

    args = [*distill_args, "trainer.checkpoint_every=4", "trainer.validate_every=2"]
    with monkeypatch.context() as patch:
        patch.setattr(DistillationModule, "on_train_batch_start", kill_at_step_8, raising=False)
        patch.setattr(StepBoundaryCheckpoint, "on_exception", lambda *_: None)
        with pytest.raises(Kill):
            distill_main(args)
    run = newest(tmp_path)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_4.ckpt"]
    seconds = itertools.count(time.time() + clock)  # files have different seconds in their names
    monkeypatch.setattr(time, "time", lambda: next(seconds))
    assert distill_main(["--resume", str(run)]) == 0
    resumed = read_steps(run)
    assert all(steps == sorted(set(steps)) for steps in resumed.values()), resumed
    assert resumed["lr"] == list(range(9))
    monkeypatch.undo()
    assert distill_main(args) == 0
    assert read_steps(newest(tmp_path)) == resumed


def read_steps(run):
    events = load_events(run)
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_slot_usage_is_not_logged_without_recorded_reads(distill_args, tmp_path, monkeypatch):
    from dmt.memory.slot_table import SlotTable

    monkeypatch.setattr(SlotTable, "_record_reads", lambda *_: None)
    from dmt.distillation import run

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    monkeypatch.setattr(run, "evaluate_student", stop)
    with pytest.raises(Stop):
        distill_main([*distill_args, "memory.k=8", "memory.mean_k="])
    assert not [
        tag for tag in load_events(newest(tmp_path)).Tags()["scalars"] if tag.startswith("slots/")
    ]


def test_a_student_without_slots_has_no_slot_metrics(distill_args, tmp_path):
    bare = [*ROWS, "memory.base=none", "memory.value_target=teacher", "stages.layerwise_steps=0"]
    assert distill_main([*distill_args, *bare]) == 0
    events = load_events(newest(tmp_path))
    assert "hparam/active_slots" not in events.Tags()["scalars"]
    assert "hparam/knn_rows" in events.Tags()["scalars"]
    assert read_hparams(events)["memory.num_slots"] == "default"
    page = (newest(tmp_path) / "report.html").read_text(encoding="utf-8")
    assert "stored rows, layer" in page


def test_hparams_differ_by_variant_and_have_one_entry_per_run(distill_args, tmp_path):
    assert distill_main([*distill_args, "trainer.run_name=plain"]) == 0
    assert (
        distill_main(
            [
                *distill_args,
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
    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(tmp_path / "logs"))
    multiplexer.Reload()
    assert set(multiplexer.Runs()) == {"plain", "wide"}, "a curve has the name of its run"
    plain_hparams, wide_hparams = (
        read_hparams(multiplexer.GetAccumulator(name)) for name in ("plain", "wide")
    )
    assert {
        name: (plain_hparams[name], wide_hparams[name])
        for name in plain_hparams
        if plain_hparams[name] != wide_hparams[name]
    } == {
        "memory.mean_k": (8.0, 16.0),
        "memory.k": (8.0, 16.0),
        "student.layer_overrides": ("[]", "[{layers: 1, memory: {skip_connection: false}}]"),
    }
    assert plain_hparams["memory.num_slots"] == 64
    assert plain_hparams["memory.offload"] == "none"
    assert plain_hparams["data.corpora"].startswith("[")


def test_a_named_run_is_resolved_resumed_and_replayed_by_its_name(
    distill_args, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    args = [*distill_args, "trainer.log_dir=lightning_logs"]
    assert distill_main([*args, "trainer.validate_every=0"]) == 0
    assert distill_main([*args, "trainer.run_name=narrow", "memory.mean_k=4"]) == 0
    run = tmp_path / "lightning_logs" / "narrow"
    assert (run / "report.html").is_file()
    assert {path.name for path in run.parent.iterdir()} == {"version_0", "narrow"}
    assert resolve_student_folder(None).resolve() == run / "student", "it is the newest"
    assert "--resume lightning_logs/nowhere" in read_error(
        capsys, ["--resume", "lightning_logs/nowhere"]
    )
    assert "lightning_logs/narrow" in read_error(capsys, ["--resume", "lightning_logs/nowhere"])
    line = read_error(capsys, [*args, "trainer.run_name=narrow"])
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
    ), "it is replayed beside the first run"
    first, again = (read_record(folder)["fidelity"] for folder in (run, run.parent / "version_1"))
    assert first == again


def read_error(capsys, args):
    capsys.readouterr()
    assert distill_main(args) == 2
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
def test_a_name_that_cannot_be_a_folder_is_refused(name, tmp_path):
    with pytest.raises(UserError, match=r"^trainer\.run_name"):
        load_config(None, [f"trainer.run_name={name}", f"trainer.log_dir={tmp_path}"])
    assert not list(tmp_path.iterdir())


def test_names_that_can_be_folders_are_accepted(tmp_path):
    for name in ("narrow", "k=8,lr=0.1", "größer", "2026-01-02", "version_x", "a.b+c@d_e"):
        assert load_config(None, [f"trainer.run_name={name}"]).trainer.run_name == name
    assert config_io.load_config(None, ["trainer.run_name="]).trainer.run_name is None
