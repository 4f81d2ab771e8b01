"""Non-finite numbers end a run: the error names step, layer and checkpoint, nothing is saved."""

import json
import re

import pytest
import torch

from faults.subprocesses import ROWS, assert_files_intact, consolidation_args, read_rows
from faults.test_disk_errors import assert_one_line_error
from faults.test_kill import SLEEP


@pytest.mark.parametrize(
    ("fault", "step", "source"),
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
def test_a_non_finite_step_of_a_distillation_is_discarded(
    launcher, distill_args, tmp_path, fault, step, source
):
    ended = launcher.run([*distill_args, *ROWS], prepare=[fault])
    run = tmp_path / "logs" / "version_0"
    message = assert_one_line_error(ended)
    last_step = (step - 1) // 2 * 2
    rate = 0.00025
    assert re.fullmatch(
        f"error: step {step}: {source} is not finite; nothing of this step was kept; "
        f"the last good checkpoint is step_{last_step}.ckpt, "
        f"resume from it with a lower rate: dmt distill --resume {run} stages.end_to_end_lr={rate}",
        message,
    ), message
    assert_files_intact(run)
    checkpoint = torch.load(run / "checkpoints" / f"step_{last_step}.ckpt", weights_only=True)
    assert all(
        value.isfinite().all()
        for name, value in checkpoint["state_dict"].items()
        if "block_limits" not in name
    )
    assert all(
        value.isfinite().all()
        for state in checkpoint["optimizer_states"][0]["state"].values()
        for value in state.values()
    )
    assert (
        max(
            [step for rows in read_rows(run / "memory.db").values() for step, _, _ in rows],
            default=0,
        )
        < step
    )
    ended = launcher.run(message.partition("dmt distill ")[2].split())
    assert ended.code == 0, ended.err
    assert json.loads((run / "run.json").read_text())["fidelity"]
    assert "end_to_end_lr: 0.00025" in (run / "config.yaml").read_text()
    assert [
        file
        for file in run.glob("config.before-*.yaml")
        if "end_to_end_lr: 0.001" in file.read_text()
    ]


def test_non_finite_weights_are_not_saved(launcher, distill_args, tmp_path):
    message = assert_one_line_error(launcher.run(distill_args, prepare=["overflow_in_the_weights"]))
    assert re.match(
        r"error: step 6: transformer\.h\.1\.\S+ after it is not finite;"
        " nothing of this step was kept",
        message,
    ), message
    assert "step_4.ckpt" in message
    saved = sorted(
        file.name for file in (tmp_path / "logs" / "version_0" / "checkpoints").iterdir()
    )
    assert saved == ["step_2.ckpt", "step_4.ckpt"]


def test_a_run_without_a_checkpoint_begins_again_with_a_lower_rate(
    launcher, distill_args, tmp_path
):
    message = assert_one_line_error(launcher.run([*distill_args, "stages.layerwise_lr=1e30"]))
    assert (
        "there is no checkpoint yet, begin again with a lower rate: dmt distill --resume" in message
    )
    assert message.endswith("stages.layerwise_lr=2.5e+29")
    assert not (tmp_path / "logs" / "version_0" / "checkpoints").exists()


def test_a_consolidation_names_a_lower_rate(launcher, input_dir, tmp_path):
    message = assert_one_line_error(
        launcher.run(
            consolidation_args(input_dir, tmp_path, "weights", "stages.end_to_end_lr=1e30")
        )
    )
    assert re.search(
        r"error: step \d: .* is not finite; .* stages\.end_to_end_lr=2\.5e\+29$", message
    ), message
    assert not (tmp_path / "logs" / "version_0" / "student").exists()


def test_a_slot_transfer_names_a_lower_rate(launcher, input_dir, student_with_facts, tmp_path):
    run = tmp_path / "run"
    args = [
        "sleep",
        "-m",
        student_with_facts,
        "--replay-data",
        input_dir / "text.txt",
        *SLEEP,
        "--output",
        run,
    ]
    message = assert_one_line_error(launcher.run(args, "dmt", prepare=["nan_in_the_replay_loss"]))
    assert "step 2: the loss is not finite" in message
    assert message.endswith(f"--resume {run} sleep.lr=0.025")
    assert not (run / "student").exists()
