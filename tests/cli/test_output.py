"""What commands print: any encoding, any characters."""

import io
import json
import subprocess
import sys

import pytest

from dmt.cli import main
from dmt.cli.output import format_json

NAME = "日本語 José"


def make_stdout(monkeypatch, encoding):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    return stdout


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_is_not_utf8_gets_escapes(tmp_path, monkeypatch, encoding):
    file = tmp_path / "my.yaml"
    file.write_text(f"teacher: {NAME}\n", encoding="utf-8")
    stdout = make_stdout(monkeypatch, encoding)
    assert main.main(["config", "--show", str(file)]) == 0
    assert stdout.errors == "strict", "it is the caller's again"
    printed = stdout.buffer.getvalue().decode(encoding)
    assert r"\u65e5\u672c\u8a9e Jos" in printed
    stdout = make_stdout(monkeypatch, encoding)
    assert main.main(["config", "--show", str(file), "--json"]) == 0
    stdout.flush()
    assert json.loads(stdout.buffer.getvalue().decode("ascii"))["teacher"] == NAME


def test_json_holds_no_character_that_a_terminal_obeys():
    text = "\x1b[2J\x9b31m\x00\x7f\u202e\u2028\U000e0001 José\n"
    printed = format_json({"tag": text})
    assert json.loads(printed) == {"tag": text}
    assert all(char.isprintable() or char == "\n" for char in printed)
    assert "José" in printed
    assert format_json({"tag": text}, ascii_only=True).isascii()


@pytest.mark.parametrize("args", [["memory", "stats"], ["distill"]])
def test_python_without_docstrings_is_refused_in_one_line(tmp_path, args):
    process = subprocess.run(
        [sys.executable, "-OO", "-m", "dmt", *args],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 2
    assert process.stderr == (
        "error: transformers cannot be imported without docstrings; "
        "unset PYTHONOPTIMIZE (it is 2), or leave out -OO\n"
    )
