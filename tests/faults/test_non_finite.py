"""Numbers that are not finite end a run with step, layer and checkpoint, and nothing of the step is kept."""

import json
import re

import pytest
import torch

from faults.subprocesses import ROWS, consolidation, rows_of, whole_files
from faults.test_disk_errors import one_line
from faults.test_kill import SLEEP


@pytest.mark.parametrize(
    ("spoilt", "step", "where"),
    [
        ("nan_in_the_output_of_layer_1", 6, "the output of layer 1's block"),
        (
            "inf_in_the_gradient_of_layer_2",
            7,
            r"the gradient of layer 2 \(transformer.h.2.mlp\S*values\)",
        ),
        ("nan_in_the_loss", 7, "the loss"),
    ],
)
def test_a_step_of_a_distillation(nursery, words, tmp_path, spoilt, step, where):
    ended = nursery.run([*words, *ROWS], prepare=[spoilt])
    run = tmp_path / "logs" / "version_0"
    said = one_line(ended)
    kept = (step - 1) // 2 * 2
    rate = 0.00025
    assert re.fullmatch(
        f"error: step {step}: {where} is not finite; nothing of this step was kept; the last good checkpoint is step_{kept}.ckpt, "
        f"resume from it with a lower rate: dmt distill --resume {run} stages.end_to_end_lr={rate}",
        said,
    ), said
    whole_files(run)
    found = torch.load(run / "checkpoints" / f"step_{kept}.ckpt", weights_only=True)
    assert all(
        value.isfinite().all()
        for name, value in found["state_dict"].items()
        if "block_limits" not in name
    )
    assert all(
        value.isfinite().all()
        for state in found["optimizer_states"][0]["state"].values()
        for value in state.values()
    )
    assert (
        max(
            [step for rows in rows_of(run / "memory.db").values() for step, _, _ in rows], default=0
        )
        < step
    )
    ended = nursery.run(said.partition("dmt distill ")[2].split())
    assert ended.code == 0, ended.err
    assert json.loads((run / "run.json").read_text())["fidelity"]
    assert "end_to_end_lr: 0.00025" in (run / "config.yaml").read_text()
    assert [
        file
        for file in run.glob("config.before-*.yaml")
        if "end_to_end_lr: 0.001" in file.read_text()
    ]


def test_weights_that_no_gradient_has_told_of_are_not_saved(nursery, words, tmp_path):
    said = one_line(nursery.run(words, prepare=["overflow_in_the_weights"]))
    assert re.match(
        r"error: step 6: transformer\.h\.1\.\S+ after it is not finite; nothing of this step was kept",
        said,
    ), said
    assert "step_4.ckpt" in said
    saved = sorted(
        file.name for file in (tmp_path / "logs" / "version_0" / "checkpoints").iterdir()
    )
    assert saved == ["step_2.ckpt", "step_4.ckpt"]


def test_before_the_first_checkpoint(nursery, words, tmp_path):
    said = one_line(nursery.run([*words, "stages.layerwise_lr=1e30"]))
    assert "there is no checkpoint yet, begin again with a lower rate: dmt distill --resume" in said
    assert said.endswith("stages.layerwise_lr=2.5e+29")
    assert not (tmp_path / "logs" / "version_0" / "checkpoints").exists()


def test_a_consolidation(nursery, material, tmp_path):
    said = one_line(
        nursery.run(consolidation(material, tmp_path, "weights", "stages.end_to_end_lr=1e30"))
    )
    assert re.search(
        r"error: step \d: .* is not finite; .* stages\.end_to_end_lr=2\.5e\+29$", said
    ), said
    assert not (tmp_path / "logs" / "version_0" / "student").exists()


def test_a_slot_transfer(nursery, material, told, tmp_path):
    run = tmp_path / "run"
    words = ["sleep", "-m", told, "--replay-data", material / "text.txt", *SLEEP, "--output", run]
    said = one_line(nursery.run(words, "dmt", prepare=["nan_in_the_replay_loss"]))
    assert "step 2: the loss is not finite" in said
    assert said.endswith(f"--resume {run} sleep.lr=0.025")
    assert not (run / "student").exists()
