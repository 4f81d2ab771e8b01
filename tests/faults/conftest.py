"""Real processes, real signals, real disks."""

import ctypes
import os
import subprocess

import pytest
from conftest import SENTENCES, make_teacher

from faults.subprocesses import Nursery, consolidation, facts_in, prose_in, result, small_run

NEW_NAMESPACE = 0x00020000  # CLONE_NEWNS


@pytest.fixture(scope="session")
def may_mount():
    """Whether disks can be mounted: then in a namespace of this process, so that nobody else ever sees them."""
    if os.geteuid() or ctypes.CDLL(None, use_errno=True).unshare(NEW_NAMESPACE):
        return False
    return not subprocess.run(["mount", "--make-rprivate", "/"], check=False).returncode


@pytest.fixture(scope="session")
def nursery(may_mount, tmp_path_factory):
    made = Nursery(tmp_path_factory.mktemp("nursery"))
    yield made
    made.close()


@pytest.fixture
def small_disk(may_mount, tmp_path):
    """Makes a disk of so many megabytes, and gives the folder it is in."""
    mounted = []

    def make(megabytes):
        if not may_mount:
            pytest.skip("a small disk needs root and mount(2)")
        folder = tmp_path / "disk"
        folder.mkdir()
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=777", "tmpfs", str(folder)],
            check=True,
        )
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="session")
def material(tmp_path_factory, tokenizer):
    """Where the tiny teacher and a text are: for all runs the same, so that one can be compared with another."""
    folder = tmp_path_factory.mktemp("material")
    make_teacher(len(tokenizer)).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    make_teacher(len(tokenizer), n_positions=256).save_pretrained(folder / "long")
    tokenizer.save_pretrained(folder / "long")
    (folder / "text.txt").write_text(
        "\n\n".join(f"{i} {SENTENCES[i % 3]} {i * 7 % 13}" for i in range(400)), encoding="utf-8"
    )
    return folder


@pytest.fixture(scope="session")
def alone(nursery, material, tmp_path_factory):
    """Gives the result of a run that nothing happens to, by its further words."""
    known = {}

    def run(*words):
        if words not in known:
            logs = tmp_path_factory.mktemp("alone")
            ended = nursery.run([*small_run(material, logs), *words])
            assert ended.code == 0, ended.err
            known[words] = result(logs / "version_0")
        return known[words]

    return run


@pytest.fixture(scope="session")
def consolidated(nursery, material, tmp_path_factory):
    """Gives the student of a consolidation that nothing happens to, by where it goes."""
    known = {}

    def run(into):
        if into not in known:
            folder = tmp_path_factory.mktemp("consolidated")
            assert nursery.run(consolidation(material, folder, into)).code == 0
            known[into] = folder / "logs" / "version_0" / "student"
        return known[into]

    return run


@pytest.fixture
def words(material, tmp_path):
    """The small run, logged in this test's folder."""
    return small_run(material, tmp_path / "logs")


@pytest.fixture(scope="session")
def told(material, nursery, tmp_path_factory):
    """A student with slots in every layer that has been told three facts."""
    logs = tmp_path_factory.mktemp("told")
    assert nursery.run([*small_run(material, logs), "memory.mean_k=", "memory.k=64"]).code == 0
    student = logs / "version_0" / "student"
    ended = nursery.run(
        [
            "memory",
            "write",
            "--file",
            facts_in(logs, 3),
            "-m",
            student,
            "--calibration-text",
            prose_in(logs),
        ],
        "dmt",
    )
    assert ended.code == 0, ended.err
    return student
