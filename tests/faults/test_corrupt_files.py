"""Damaged and planted files: they are named, set aside and never read as intact."""

import json
import pickle
import random
import shutil
import zipfile

import pytest

from faults.subprocesses import ROWS, copy_folder, read_result, sample_cases
from faults.test_disk_errors import assert_one_line_error
from faults.test_kill import CACHE, MODULE, read_facts_and_rows


class Planted:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file):
    file.write_bytes(b"")


def randomize(file):
    file.write_bytes(random.Random(0).randbytes(file.stat().st_size))


def flip_one_bit(file):
    """Flip a bit of the largest tensor, which only a checksum reveals."""
    with zipfile.ZipFile(file) as parts:
        tensors = [part for part in parts.infolist() if "/data/" in part.filename]
    largest = max(tensors, key=lambda part: part.file_size)
    content, offset = bytearray(file.read_bytes()), largest.header_offset
    offset += (
        30
        + int.from_bytes(content[offset + 26 : offset + 28], "little")
        + int.from_bytes(content[offset + 28 : offset + 30], "little")
    )
    content[offset + largest.file_size // 2] ^= 64
    file.write_bytes(content)


def plant_pickle(file):
    """Put a pickle into a checkpoint that would create a file when it is loaded."""
    copy = file.with_suffix(".other")
    with zipfile.ZipFile(file) as parts, zipfile.ZipFile(copy, "w") as target:
        for part in parts.infolist():
            payload = pickle.dumps(
                {
                    "state_dict": Planted(file.with_name("planted")),
                    "global_step": 8,
                    "optimizer_states": [],
                }
            )
            target.writestr(
                part, payload if part.filename.endswith("data.pkl") else parts.read(part)
            )
    copy.replace(file)


DAMAGES = [truncate, empty, randomize, flip_one_bit, plant_pickle]


@pytest.fixture(scope="module")
def stopped_run(launcher, input_dir, tmp_path_factory):
    """A run stopped after step 8, with checkpoints and rows of steps 6 and 8."""
    from faults.subprocesses import small_run_args

    logs = tmp_path_factory.mktemp("halted")
    moment = {"in": f"{MODULE}.training_step", "nth": 8, "do": "SIGTERM"}
    assert launcher.run([*small_run_args(input_dir, logs), *ROWS], moments=[moment]).code == 143
    return logs / "version_0"


@pytest.fixture
def run(stopped_run, tmp_path):
    return shutil.copytree(stopped_run, tmp_path / "logs" / "version_0")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_set_aside(launcher, uninterrupted_result, run, damage):
    checkpoint_dir = run / "checkpoints"
    assert sorted(file.name for file in checkpoint_dir.iterdir()) == ["step_6.ckpt", "step_8.ckpt"]
    damage(checkpoint_dir / "step_8.ckpt")
    damaged_bytes = (checkpoint_dir / "step_8.ckpt").read_bytes()
    ended = launcher.run(["--resume", run])
    assert ended.code == 0, ended.err
    lines = [line for line in ended.err.splitlines() if line.startswith("damaged")]
    assert lines == [
        f"damaged in {checkpoint_dir}: step_8.ckpt (kept as step_8.ckpt.corrupt);"
        " resuming from step_6.ckpt"
    ]
    assert (checkpoint_dir / "step_8.ckpt.corrupt").read_bytes() == damaged_bytes
    assert not (checkpoint_dir / "planted").exists()
    assert read_result(run) == uninterrupted_result(*ROWS)


def test_a_run_without_an_intact_checkpoint_is_refused(launcher, run):
    checkpoint_dir = run / "checkpoints"
    truncate(checkpoint_dir / "step_6.ckpt")
    randomize(checkpoint_dir / "step_8.ckpt")
    before = (run / "memory.db").read_bytes()
    message = assert_one_line_error(
        launcher.run(["--resume", run]),
        f"every checkpoint in {checkpoint_dir} is damaged",
        "step_8.ckpt.corrupt",
    )
    assert message.endswith(f"start again: dmt distill {run}/config.yaml")
    assert sorted(file.name for file in checkpoint_dir.iterdir()) == [
        "step_6.ckpt.corrupt",
        "step_8.ckpt.corrupt",
    ]
    assert (run / "memory.db").read_bytes() == before
    assert not (run / "student").exists()


def test_a_finished_run_with_a_damaged_checkpoint_resumes(
    launcher, uninterrupted_result, distill_args, tmp_path
):
    assert launcher.run([*distill_args, *ROWS]).code == 0
    run = tmp_path / "logs" / "version_0"
    truncate(run / "checkpoints" / "step_9.ckpt")
    assert launcher.run(["--resume", run]).code == 0
    assert read_result(run) == uninterrupted_result(*ROWS)


@pytest.mark.parametrize("damage", [truncate, empty, randomize])
def test_a_damaged_row_store_is_refused_and_unchanged(launcher, run, damage):
    damage(run / "memory.db")
    (run / "memory.db-wal").unlink(missing_ok=True)
    damaged_bytes = (run / "memory.db").read_bytes()
    assert_one_line_error(launcher.run(["--resume", run]), f"store {run / 'memory.db'}")
    # An empty file is a database without tables, which may be changed.
    assert (run / "memory.db").read_bytes() == damaged_bytes or not damaged_bytes
    assert (run / "checkpoints" / "step_8.ckpt").exists()


@pytest.mark.parametrize(
    ("file", "damage"),
    sample_cases(
        [
            (file, damage)
            for file in ("model.safetensors", "memory.db", "config.json")
            for damage in (truncate, empty, randomize)
        ]
    ),
)
def test_a_damaged_student_is_refused_and_unchanged(
    launcher, student_with_facts, tmp_path, file, damage
):
    student = copy_folder(student_with_facts, tmp_path / "student")
    damage(student / file)
    damaged_bytes = (student / file).read_bytes()
    commands = {
        "truncate": ["memory", "write", "Ada was born in Hill."],
        "empty": ["sleep"],
        "randomize": ["memory", "stats"],
    }
    for args in (commands[damage.__name__],):
        assert_one_line_error(
            launcher.run([*args, "-m", student], "dmt", cwd=str(tmp_path)), student / file
        )
    assert (student / file).read_bytes() == damaged_bytes
    assert not (tmp_path / "lightning_logs").exists()


@pytest.mark.parametrize("damage", sample_cases([truncate, empty, randomize], 3))
def test_damaged_offloaded_slots_are_refused(launcher, distill_args, tmp_path, damage):
    assert (
        launcher.run(
            [
                *distill_args,
                "memory.offload=slots",
                "memory.search=int8",
                "stages.layerwise_steps=0",
                "stages.end_to_end_steps=1",
            ]
        ).code
        == 0
    )
    student = tmp_path / "logs" / "version_0" / "student"
    damage(student / "slots.safetensors")
    assert_one_line_error(
        launcher.run(["generate", "Ada", "-m", student], "dmt"), student / "slots.safetensors"
    )


@pytest.mark.parametrize("damage", sample_cases([truncate, empty, randomize], 3))
def test_a_damaged_teacher_is_refused_before_the_run_begins(
    launcher, input_dir, distill_args, tmp_path, damage
):
    teacher = copy_folder(input_dir / "teacher", tmp_path / "teacher")
    damage(teacher / "model.safetensors")
    args = [*distill_args, f"teacher={teacher}"]
    assert_one_line_error(launcher.run(args), f"teacher={teacher}", "model.safetensors")
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("damage", sample_cases([truncate, empty, randomize], 3))
def test_a_damaged_logit_cache_is_refused_before_the_run_begins(
    launcher, distill_args, tmp_path, damage
):
    cache_dir = tmp_path / "cache"
    args = [
        *distill_args,
        *CACHE,
        f"logit_cache.dir={cache_dir}",
        "stages.layerwise_steps=0",
        "stages.end_to_end_steps=2",
    ]
    assert launcher.run(args).code == 0
    damage(cache_dir / "logits.npy")
    assert_one_line_error(launcher.run(args), f"logit_cache.dir={cache_dir}", "logits.npy")
    assert not (tmp_path / "logs" / "version_1").exists()


@pytest.mark.parametrize("file", ["run.json", "config.yaml"])
def test_a_lost_record_is_written_again_and_a_damaged_config_refused(
    launcher, uninterrupted_result, run, file
):
    empty(run / file) if file == "run.json" else (run / file).write_bytes(b"\xff\x00: [")
    ended = launcher.run(["--resume", run])
    if file == "config.yaml":
        assert_one_line_error(ended, run / file)
        return
    assert ended.code == 0, ended.err
    assert read_result(run) == uninterrupted_result(*ROWS)
    assert json.loads((run / file).read_text())["commands"]


def test_damaged_pages_of_a_fact_store_are_refused(launcher, student_with_facts, tmp_path):
    """The first page, which the database header is in, stays intact."""
    student = copy_folder(student_with_facts, tmp_path / "student")
    stored = read_facts_and_rows(student)
    content = bytearray((student / "memory.db").read_bytes())
    assert len(content) > 3 * 32_768
    for page in range(1, len(content) // 32_768):
        content[page * 32_768 : page * 32_768 + 64] = b"\x7f" * 64
    (student / "memory.db").write_bytes(content)
    assert_one_line_error(
        launcher.run(["memory", "list", "-m", student], "dmt"), student / "memory.db", "damaged"
    )
    assert len(stored[0]) == 3
