"""The mutation check (`tests/mutations`): its catalog fits the product, and its command works."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from mutations.catalog import MIN_FILES, MIN_MUTATIONS, ROOT, find_outdated, load_mutations

COMMAND = [sys.executable, "-m", "tests.mutations"]
# Checks one mutant with its own test, and once more with a test that cannot notice it.
ONE_OF_TWO = """
import sys
from dataclasses import replace
import tests.mutations.__main__ as command
caught = next(item for item in command.load_mutations() if item.name == "kl-swapped")
survivor = replace(
    caught, name="survivor", tests=("distillation/test_losses.py::test_next_token_mask",)
)
command.load_mutations = lambda: [caught, survivor]
sys.exit(command.main([]))
"""


def test_every_line_occurs_once_and_every_test_exists():
    mutations = load_mutations()
    assert not find_outdated(mutations), (
        "lines or tests were changed: bring tests/mutations/mutations.toml up to date"
    )
    assert len(mutations) >= MIN_MUTATIONS
    assert len({mutation.file for mutation in mutations}) >= MIN_FILES
    assert all(mutation.what for mutation in mutations)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"line": "no such line"}, "0 times"),
        ({"line": "return"}, "times, not once"),
        ({"file": "no_such_file.py"}, "0 times"),
        (
            {
                "mutant": "divergence = F.kl_div( student_log_probs, teacher_log_probs,"
                " reduction='none', log_target=True)"
            },
            "means the same",
        ),
        ({"mutant": "return ("}, "does not compile"),
        ({"tests": ()}, "no test"),
        (
            {"tests": ("distillation/test_losses.py::test_nothing",)},
            "no test tests/distillation/test_losses.py::test_nothing",
        ),
        ({"tests": ("distillation/test_losses.py",)}, "no test tests/distillation/test_losses.py"),
        ({"tests": ("test_mutations.py::start",)}, "no test"),
    ],
    ids=str,
)
def test_an_outdated_entry_is_reported(change, message):
    entry = next(mutation for mutation in load_mutations() if mutation.name == "kl-swapped")
    (problem,) = find_outdated([entry, replace(entry, **change)])
    assert message in problem


def start(command, temp_dir, **options):
    environment = {**os.environ, "TMPDIR": str(temp_dir), "PYTHONPATH": str(ROOT / "src")}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_a_noticed_mutant_is_caught_and_another_survives(tmp_path):
    file = ROOT / "src" / "dmt" / "ops.py"
    before = file.read_text(), file.stat().st_mtime_ns
    with start([sys.executable, "-c", ONE_OF_TWO], tmp_path) as check:
        out, err = check.communicate(timeout=300)
    assert check.returncode == 1, f"fewer than 28 of 30 are caught\n{out}{err}"
    assert "caught by distillation/test_losses.py::test_kl_of_two_coins" in out
    assert "survivor" in out
    assert out.count("SURVIVED") == 1
    assert "\n1 of 2 caught" in out
    assert (file.read_text(), file.stat().st_mtime_ns) == before
    assert not list(tmp_path.iterdir())


def test_a_stopped_check_removes_its_copy(tmp_path):
    with start([*COMMAND, "--only", "exit-code-1"], tmp_path, start_new_session=True) as check:
        while not list(tmp_path.glob("dmt-mutants-*/src")) and check.poll() is None:
            time.sleep(0.05)
        os.killpg(check.pid, signal.SIGINT)  # as a terminal does
        _, err = check.communicate(timeout=60)
    assert check.returncode == 130
    assert err.splitlines()[-1] == "stopped; the copy is removed"
    assert not list(tmp_path.iterdir())


def test_an_unknown_name_is_reported(tmp_path):
    with start([*COMMAND, "--only", "nobody"], tmp_path) as check:
        _, err = check.communicate(timeout=60)
    assert check.returncode == 2
    assert "no mutant is named nobody" in err
