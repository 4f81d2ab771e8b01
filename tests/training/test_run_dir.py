"""Files in the folder of a run."""

from dmt.training.run_dir import newest_checkpoint


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
