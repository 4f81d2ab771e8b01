"""The mutation check (`tests/mutants`): its list is about the product as it stands, and its command tells the truth."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from mutations.catalog import FILES, LEAST, ROOT, chosen, stale

COMMAND = [sys.executable, "-m", "tests.mutations"]
HALF = """
import sys
from dataclasses import replace
import tests.mutations.__main__ as command
caught = next(each for each in command.chosen() if each.name == "kl-swapped")
blind = replace(caught, name="blind", tests=("test_losses.py::test_next_token_mask",))
command.chosen = lambda: [caught, blind]
sys.exit(command.main([]))
"""


def test_every_line_is_there_once_and_every_test_exists():
    mutants = chosen()
    assert not stale(mutants), (
        "lines moved or tests got other names: bring tests/mutations/mutations.toml up to date"
    )
    assert len(mutants) >= LEAST
    assert len({each.file for each in mutants}) >= FILES
    assert all(each.what for each in mutants)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"line": "this stands nowhere"}, "0 times"),
        ({"line": "return"}, "times, not once"),
        ({"file": "nowhere.py"}, "0 times"),
        (
            {"mutant": "return F.kl_div( given, wanted, reduction='none', log_target=True)"},
            "means the same",
        ),
        ({"mutant": "return ("}, "does not compile"),
        ({"tests": ()}, "no test"),
        (
            {"tests": ("test_losses.py::test_nothing",)},
            "no test tests/distillation/test_losses.py::test_nothing",
        ),
        ({"tests": ("test_losses.py",)}, "no test tests/distillation/test_losses.py"),
        ({"tests": ("test_losses.py::signals",)}, "no test"),
    ],
    ids=str,
)
def test_a_list_that_is_stale_is_told(change, said):
    fine = next(each for each in chosen() if each.name == "kl-swapped")
    (wrong,) = stale([fine, replace(fine, **change)])
    assert said in wrong


def run(command, place, **how):
    environment = {**os.environ, "TMPDIR": str(place), "PYTHONPATH": str(ROOT / "src")}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **how,
    )


def test_what_is_noticed_is_caught_and_what_is_not_survives(tmp_path):
    file = ROOT / "src" / "dmt" / "distill" / "losses.py"
    before = file.read_text(), file.stat().st_mtime_ns
    with run([sys.executable, "-c", HALF], tmp_path) as check:
        said, _ = check.communicate(timeout=300)
    assert check.returncode == 1, "fewer than 28 of 30"
    assert "caught by test_losses.py::test_kl_of_two_coins" in said
    assert "blind" in said
    assert said.count("SURVIVED") == 1
    assert "\n1 of 2 caught" in said
    assert (file.read_text(), file.stat().st_mtime_ns) == before
    assert not list(tmp_path.iterdir())


def test_stopped_it_leaves_nothing_behind(tmp_path):
    with run([*COMMAND, "--only", "exit-1"], tmp_path, start_new_session=True) as check:
        while not list(tmp_path.glob("dmt-mutants-*/src")) and check.poll() is None:
            time.sleep(0.05)
        os.killpg(check.pid, signal.SIGINT)  # as a terminal does
        _, said = check.communicate(timeout=60)
    assert check.returncode == 130
    assert said.splitlines()[-1] == "stopped; nothing is left behind"
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_not_there_is_told(tmp_path):
    with run([*COMMAND, "--only", "nobody"], tmp_path) as check:
        _, said = check.communicate(timeout=60)
    assert check.returncode == 2
    assert "no mutant is called nobody" in said
