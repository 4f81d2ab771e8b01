"""Files in the folder of a run, and commands that name it."""

import shlex

from dmt.training.run_dir import newest_checkpoint, resume_command


def test_the_command_that_resumes_can_be_pasted(tmp_path):
    run_dir = tmp_path / "my rüns" / "it's"
    assert shlex.split(resume_command(run_dir))[-2:] == ["--resume", str(run_dir)]


def test_the_newest_checkpoint_has_the_highest_step(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    for name in (
        "step_9.ckpt",
        "step_10.ckpt",
        "step_10-v1.ckpt",
        "step_11.ckpt.partial",
        "last.ckpt",
    ):
        (tmp_path / "checkpoints" / name).touch()
    assert newest_checkpoint(tmp_path).name == "step_10.ckpt"
