"""Fixtures of faults: real processes, signals and disks."""

import ctypes
import os
import subprocess

import pytest
from conftest import SENTENCES, make_teacher

from faults.subprocesses import (
    Launcher,
    consolidation_args,
    read_result,
    small_run_args,
    write_facts_file,
    write_prose_file,
)

NEW_NAMESPACE = 0x00020000  # CLONE_NEWNS


@pytest.fixture(scope="session")
def can_mount():
    """Whether disks can be mounted, in a mount namespace that only this process sees."""
    if os.geteuid() or ctypes.CDLL(None, use_errno=True).unshare(NEW_NAMESPACE):
        return False
    return not subprocess.run(["mount", "--make-rprivate", "/"], check=False).returncode


@pytest.fixture(scope="session")
def launcher(can_mount, tmp_path_factory):
    launcher = Launcher(tmp_path_factory.mktemp("launcher"))
    yield launcher
    launcher.close()


@pytest.fixture
def small_disk(can_mount, tmp_path):
    """Return a function that mounts a disk of some megabytes and returns its folder."""
    mounted = []

    def mount(megabytes):
        if not can_mount:
            pytest.skip("a small disk needs root and mount(2)")
        folder = tmp_path / "disk"
        folder.mkdir()
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=777", "tmpfs", str(folder)],
            check=True,
        )
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="session")
def input_dir(tmp_path_factory, tokenizer):
    """The folder of the tiny teacher and a text, the same for all runs so that they compare."""
    folder = tmp_path_factory.mktemp("inputs")
    make_teacher(len(tokenizer)).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    make_teacher(len(tokenizer), n_positions=256).save_pretrained(folder / "long")
    tokenizer.save_pretrained(folder / "long")
    (folder / "text.txt").write_text(
        "\n\n".join(f"{i} {SENTENCES[i % 3]} {i * 7 % 13}" for i in range(400)), encoding="utf-8"
    )
    return folder


@pytest.fixture(scope="session")
def uninterrupted_result(launcher, input_dir, tmp_path_factory):
    """Return a function from extra arguments to the result of a run without faults."""
    results = {}

    def run(*args):
        if args not in results:
            logs = tmp_path_factory.mktemp("uninterrupted")
            ended = launcher.run([*small_run_args(input_dir, logs), *args])
            assert ended.code == 0, ended.err
            results[args] = read_result(logs / "version_0")
        return results[args]

    return run


@pytest.fixture(scope="session")
def uninterrupted_student(launcher, input_dir, tmp_path_factory):
    """Return a function from a target to the student of a consolidation without faults."""
    students = {}

    def run(target):
        if target not in students:
            folder = tmp_path_factory.mktemp("consolidated")
            assert launcher.run(consolidation_args(input_dir, folder, target)).code == 0
            students[target] = folder / "logs" / "version_0" / "student"
        return students[target]

    return run


@pytest.fixture
def distill_args(input_dir, tmp_path):
    """Arguments of a small run that logs into this test's folder."""
    return small_run_args(input_dir, tmp_path / "logs")


@pytest.fixture(scope="session")
def student_with_facts(input_dir, launcher, tmp_path_factory):
    """A student with slots in every layer and three facts."""
    logs = tmp_path_factory.mktemp("facts")
    assert (
        launcher.run([*small_run_args(input_dir, logs), "memory.mean_k=", "memory.k=64"]).code == 0
    )
    student = logs / "version_0" / "student"
    ended = launcher.run(
        [
            "memory",
            "write",
            "--file",
            write_facts_file(logs, 3),
            "-m",
            student,
            "--calibration-text",
            write_prose_file(logs),
        ],
        "dmt",
    )
    assert ended.code == 0, ended.err
    return student
