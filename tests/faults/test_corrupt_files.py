"""Files that a disk has damaged, or somebody has put there: never taken for whole, named, put aside, and done without."""

import json
import pickle
import random
import shutil
import zipfile

import pytest

from faults.subprocesses import ROWS, copied, result, some
from faults.test_disk_errors import one_line
from faults.test_kill import CACHE, MODULE, book_of


class Planted:
    """What a pickle may hold."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(file):
    file.write_bytes(b"")


def noise(file):
    file.write_bytes(random.Random(0).randbytes(file.stat().st_size))


def one_bit(file):
    """In a tensor, which every reader but one that looks at checksums takes as it comes."""
    with zipfile.ZipFile(file) as parts:
        tensors = [part for part in parts.infolist() if "/data/" in part.filename]
    largest = max(tensors, key=lambda part: part.file_size)
    content, at = bytearray(file.read_bytes()), largest.header_offset
    at += (
        30
        + int.from_bytes(content[at + 26 : at + 28], "little")
        + int.from_bytes(content[at + 28 : at + 30], "little")
    )
    content[at + largest.file_size // 2] ^= 64
    file.write_bytes(content)


def running(file):
    """A checkpoint of the right form whose pickle would make a file where it is read."""
    other = file.with_suffix(".other")
    with zipfile.ZipFile(file) as parts, zipfile.ZipFile(other, "w") as made:
        for part in parts.infolist():
            planted = pickle.dumps(
                {
                    "state_dict": Planted(file.with_name("planted")),
                    "global_step": 8,
                    "optimizer_states": [],
                }
            )
            made.writestr(part, planted if part.filename.endswith("data.pkl") else parts.read(part))
    other.replace(file)


DAMAGES = [cut, emptied, noise, one_bit, running]


@pytest.fixture(scope="module")
def halted(nursery, material, tmp_path_factory):
    """A run that was stopped after step 8, with checkpoints of 6 and 8 and rows of both."""
    from faults.subprocesses import small_run

    logs = tmp_path_factory.mktemp("halted")
    moment = {"in": f"{MODULE}.training_step", "nth": 8, "do": "SIGTERM"}
    assert nursery.run([*small_run(material, logs), *ROWS], moments=[moment]).code == 143
    return logs / "version_0"


@pytest.fixture
def run(halted, tmp_path):
    return shutil.copytree(halted, tmp_path / "logs" / "version_0")


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_checkpoint(nursery, alone, run, damage):
    place = run / "checkpoints"
    assert sorted(file.name for file in place.iterdir()) == ["step_6.ckpt", "step_8.ckpt"]
    damage(place / "step_8.ckpt")
    spoilt = (place / "step_8.ckpt").read_bytes()
    ended = nursery.run(["--resume", run])
    assert ended.code == 0, ended.err
    said = [line for line in ended.err.splitlines() if "damaged" in line]
    assert said == [
        f"damaged in {place}: step_8.ckpt (kept as step_8.ckpt.corrupt); resuming from step_6.ckpt"
    ]
    assert (place / "step_8.ckpt.corrupt").read_bytes() == spoilt
    assert not (place / "planted").exists()
    assert result(run) == alone(*ROWS)


def test_every_checkpoint(nursery, run):
    place = run / "checkpoints"
    cut(place / "step_6.ckpt")
    noise(place / "step_8.ckpt")
    before = (run / "memory.db").read_bytes()
    said = one_line(
        nursery.run(["--resume", run]),
        f"every checkpoint in {place} is damaged",
        "step_8.ckpt.corrupt",
    )
    assert said.endswith(f"start again: dmt distill {run}/config.yaml")
    assert sorted(file.name for file in place.iterdir()) == [
        "step_6.ckpt.corrupt",
        "step_8.ckpt.corrupt",
    ]
    assert (run / "memory.db").read_bytes() == before
    assert not (run / "student").exists()


def test_the_last_checkpoint_of_a_finished_run(nursery, alone, words, tmp_path):
    assert nursery.run([*words, *ROWS]).code == 0
    run = tmp_path / "logs" / "version_0"
    cut(run / "checkpoints" / "step_9.ckpt")
    assert nursery.run(["--resume", run]).code == 0
    assert result(run) == alone(*ROWS)


@pytest.mark.parametrize("damage", [cut, emptied, noise])
def test_rows_of_a_run(nursery, run, damage):
    damage(run / "memory.db")
    (run / "memory.db-wal").unlink(missing_ok=True)
    spoilt = (run / "memory.db").read_bytes()
    one_line(nursery.run(["--resume", run]), f"store {run / 'memory.db'}")
    assert (
        run / "memory.db"
    ).read_bytes() == spoilt or not spoilt  # an empty file is a database without tables
    assert (run / "checkpoints" / "step_8.ckpt").exists()


@pytest.mark.parametrize(
    ("file", "damage"),
    some(
        [
            (file, damage)
            for file in ("model.safetensors", "memory.db", "config.json")
            for damage in (cut, emptied, noise)
        ]
    ),
)
def test_a_student(nursery, told, tmp_path, file, damage):
    student = copied(told, tmp_path / "student")
    damage(student / file)
    spoilt = (student / file).read_bytes()
    commands = {
        "cut": ["memory", "write", "Ada was born in Hill."],
        "emptied": ["sleep"],
        "noise": ["memory", "stats"],
    }
    for words in (commands[damage.__name__],):
        one_line(nursery.run([*words, "-m", student], "dmt", cwd=str(tmp_path)), student / file)
    assert (student / file).read_bytes() == spoilt
    assert not (tmp_path / "lightning_logs").exists()


@pytest.mark.parametrize("damage", some([cut, emptied, noise], 3))
def test_slots_in_a_file_of_their_own(nursery, words, tmp_path, damage):
    assert (
        nursery.run(
            [
                *words,
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
    one_line(nursery.run(["generate", "Ada", "-m", student], "dmt"), student / "slots.safetensors")


@pytest.mark.parametrize("damage", some([cut, emptied, noise], 3))
def test_a_teacher(nursery, material, words, tmp_path, damage):
    teacher = copied(material / "teacher", tmp_path / "teacher")
    damage(teacher / "model.safetensors")
    given = [*words, f"teacher={teacher}"]
    one_line(nursery.run(given), f"teacher={teacher}", "model.safetensors")
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("damage", some([cut, emptied, noise], 3))
def test_a_teachers_answers(nursery, words, tmp_path, damage):
    place = tmp_path / "answers"
    given = [
        *words,
        *CACHE,
        f"logit_cache.dir={place}",
        "stages.layerwise_steps=0",
        "stages.end_to_end_steps=2",
    ]
    assert nursery.run(given).code == 0
    damage(place / "logits.npy")
    one_line(nursery.run(given), f"logit_cache.dir={place}", "logits.npy")
    assert not (tmp_path / "logs" / "version_1").exists()


@pytest.mark.parametrize("file", ["run.json", "config.yaml"])
def test_what_a_run_says_of_itself(nursery, alone, run, file):
    emptied(run / file) if file == "run.json" else (run / file).write_bytes(b"\xff\x00: [")
    ended = nursery.run(["--resume", run])
    if file == "config.yaml":
        one_line(ended, run / file)
        return
    assert ended.code == 0, ended.err
    assert result(run) == alone(*ROWS)
    assert json.loads((run / file).read_text())["commands"]


def test_a_book_in_the_middle(nursery, told, tmp_path):
    """One page of many: what is read of it is told, not taken."""
    student = copied(told, tmp_path / "student")
    known = book_of(student)
    content = bytearray((student / "memory.db").read_bytes())
    assert len(content) > 3 * 32_768
    for page in range(1, len(content) // 32_768):
        content[page * 32_768 : page * 32_768 + 64] = b"\x7f" * 64
    (student / "memory.db").write_bytes(content)
    one_line(
        nursery.run(["memory", "list", "-m", student], "dmt"), student / "memory.db", "damaged"
    )
    assert len(known[0]) == 3
