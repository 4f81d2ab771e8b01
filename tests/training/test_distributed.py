"""Several processes that train one student: the same curve as one, the same rows, and every way they can end."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import newest, weights
from test_row_sync import rows_in

from dmt import config_io
from dmt.cli.main import distill_main
from dmt.training import launch

ROOT = Path(__file__).parents[2]
RUN = ["stages.layerwise_steps=6", "stages.end_to_end_steps=18"]
VARIANTS = {
    "featural": [*RUN, "stages.k_warmup_factor=2"],
    "associative": [
        *RUN,
        "memory.kind=associative",
        "memory.write_start=0.2",
        "memory.min_distance=0.05",
        "memory.merge_distance=0.3",
    ],
}


def curve(run):
    """Every measured number of a run, by step and name."""
    with (run / "metrics.csv").open() as file:
        return {
            (int(row["step"]), name): float(value)
            for row in csv.DictReader(file)
            for name, value in row.items()
            if value and name not in ("step", "epoch")
        }


def apart(first, second):
    """The largest difference between two curves, of numbers above 1 as a share, and where it is."""
    assert set(first) == set(second)
    return max((abs(first[at] - second[at]) / max(1, abs(first[at])), at) for at in first)


def alike(one, several):
    """Whether two runs learned the same to the last bit: every loss of every step, every tensor."""
    first, second = (
        {
            at: value
            for at, value in curve(run).items()
            if at[1].startswith("train/")
        }
        for run in (one, several)
    )
    assert first == second
    assert len({step for step, _ in first}) == 24
    first, second = weights(one), weights(several)
    assert all(first[name].equal(second[name]) for name in first)


def torchrun(words, folder, count=2, script=ROOT / "distill.py"):
    """`torchrun distill.py`, started."""
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={count}",
        str(script),
        *words,
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
    )


@pytest.mark.parametrize("kind", VARIANTS)
def test_two_processes_learn_what_one_learns(words, tmp_path, kind, capsys, monkeypatch):
    words += VARIANTS[kind]
    assert distill_main(words) == 0
    capsys.readouterr()
    begin, others = launch._start_worker, []
    monkeypatch.setattr(
        launch, "_start_worker", lambda *given: others.append(begin(*given)) or others[-1]
    )
    assert distill_main([*words, "trainer.devices=2"]) == 0
    assert [other.returncode for other in others] == [0]
    assert capsys.readouterr().out.count("on the same test text") == 1
    started = torchrun(words, tmp_path)
    shown, complaints = started.communicate(timeout=300)
    assert started.returncode == 0, complaints
    assert shown.count("on the same test text") == 1
    assert "Warning" not in complaints
    one, two, three = (tmp_path / "logs" / f"version_{number}" for number in range(3))
    alone = json.loads((one / "run.json").read_text())["fidelity"]["text"]
    for several in (two, three):
        alike(one, several)
        assert apart(curve(one), curve(several))[0] < 1e-5, (
            "of validation, whose windows are shared out, too"
        )
        assert json.loads((several / "run.json").read_text())["fidelity"]["text"] == alone
        assert config_io.load_config(several / "config.yaml").trainer.devices == 2
    if kind == "associative":
        rows = [
            {
                layer: {(n, row[0]) for n, row in kept.items()}
                for layer, kept in rows_in(run).items()
            }
            for run in (one, two)
        ]
        assert rows[0] == rows[1]
        assert sum(map(len, rows[0].values())) > 100


def begun(run, step):
    """Wait until a run has written its checkpoint of `step`."""
    for _ in range(1200):
        if (run / "checkpoints" / f"step_{step}.ckpt").exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{run} never came to step {step}")


def children(process):
    """Process ids of what a process has started."""
    return [
        int(number)
        for number in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]


def running(number):
    """Whether a process goes on; one that nobody has asked for its end does not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{number}/status").read_text()
    except OSError:
        return False


def gone(numbers):
    """Wait until none of these processes is there any more."""
    for _ in range(300):
        if not [number for number in numbers if running(number)]:
            return
        time.sleep(0.1)
    for number in filter(running, numbers):
        os.kill(number, signal.SIGKILL)
    raise AssertionError(f"of {numbers} some went on for nobody")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks into Linux's /proc")
def test_nobody_waits_for_a_first_process_that_was_killed_before_it_was_met(words, tmp_path):
    started = subprocess.Popen(
        [sys.executable, str(ROOT / "distill.py"), *words, "trainer.devices=2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (left := children(started)):
        assert started.poll() is None
        time.sleep(0.01)
    started.kill()
    started.wait()
    gone(left)
    assert not (tmp_path / "logs" / "version_0" / "run.json").exists()


def listening(pid):
    """Addresses on which a process listens, as the kernel writes them."""
    mine = {
        os.readlink(each)
        for each in Path(f"/proc/{pid}/fd").iterdir()
        if each.exists() or each.is_symlink()
    }
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]
    ]
    return {
        line[1].split(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in mine
    }


LOOPBACK = {"0100007F", "0" * 24 + "01000000", "0000000000000000FFFF00000100007F"}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks into Linux's /proc")
def test_several_processes_stop_together_and_go_on_to_the_same_end(words, tmp_path):
    words += [
        "stages.end_to_end_steps=120",
        *VARIANTS["associative"][2:],
        "trainer.devices=2",
        "trainer.validate_every=0",
    ]
    words += ["trainer.checkpoint_every=10", "memory.write_start=0.9"]
    started = subprocess.Popen(
        [sys.executable, str(ROOT / "distill.py"), *words], stderr=subprocess.PIPE, text=True
    )
    run = tmp_path / "logs" / "version_0"
    begun(run, 10)
    other = children(started)
    assert len(other) == 1
    assert listening(started.pid) <= LOOPBACK, "nothing beyond this machine"
    assert listening(other[0]) <= LOOPBACK
    started.send_signal(signal.SIGTERM)  # to the first alone
    said = started.communicate(timeout=120)[1].strip().splitlines()
    assert started.returncode == 128 + signal.SIGTERM
    assert re.fullmatch(
        rf"stopped after step \d+; go on with: dmt distill --resume {run}", said[-1]
    )
    assert not Path(f"/proc/{other[0]}").exists()

    resumed = subprocess.Popen(
        [sys.executable, str(ROOT / "distill.py"), "--resume", str(run)],
        stderr=subprocess.PIPE,
        text=True,
    )
    steps = max(int(file.stem[5:]) for file in (run / "checkpoints").glob("step_*.ckpt"))
    begun(run, steps - steps % 10 + 20)
    os.kill(children(resumed)[0], signal.SIGKILL)
    said = resumed.communicate(timeout=120)[1].strip().splitlines()
    assert resumed.returncode == 2
    assert said[-1].startswith("error: process 1 of 2 (0 is this one) ended")
    assert "Traceback" not in "".join(said)

    steps = max(int(file.stem[5:]) for file in (run / "checkpoints").glob("step_*.ckpt"))
    resumed = subprocess.Popen(
        [sys.executable, str(ROOT / "distill.py"), "--resume", str(run)], stderr=subprocess.DEVNULL
    )
    begun(run, steps - steps % 10 + 20)
    left = children(resumed)
    resumed.kill()
    resumed.wait()
    gone(left)

    assert distill_main(["--resume", str(run)]) == 0
    assert distill_main([*words, "trainer.devices=1"]) == 0
    whole = newest(tmp_path)
    assert whole != run
    ended, left_alone = weights(run), weights(whole)
    assert all(ended[name].equal(left_alone[name]) for name in left_alone)


SENT = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
from dmt.training.callbacks import StopOnSignal
from dmt.training.checkpoints import AtomicCheckpointIO
from dmt.cli.main import distill_main as main

moments, agree, save = eval(sys.argv.pop(1)), StopOnSignal.on_train_batch_end, AtomicCheckpointIO.save_checkpoint

def reached(rank, step, where):
    if (rank, step, where) in moments:
        moments.remove((rank, step, where))
        os.kill(os.getpid(), signal.SIGTERM)

def agreeing(self, trainer, *given):
    reached(trainer.global_rank, trainer.global_step, "before")
    agree(self, trainer, *given)
    reached(trainer.global_rank, trainer.global_step, "after")

def saving(self, checkpoint, *given, **named):
    reached(int(os.environ["RANK"]), checkpoint["global_step"], "saving")
    save(self, checkpoint, *given, **named)

StopOnSignal.on_train_batch_end, AtomicCheckpointIO.save_checkpoint = agreeing, saving
sys.exit(main(sys.argv[1:]))
"""
"""A run of which processes are sent a signal: just before or after they agree whether a step was the last, or as it is saved."""


@pytest.mark.parametrize("moments", [[(0, 5, "after")], [(1, 5, "before"), (0, 5, "saving")]])
def test_they_stop_together_whenever_a_signal_comes(words, tmp_path, moments):
    script = tmp_path / "sent.py"
    script.write_text(SENT)
    started = torchrun([str(ROOT / "src"), repr(moments), *words], tmp_path, script=script)
    try:
        complaints = started.communicate(timeout=120)[1]
    finally:
        started.terminate()
        started.wait()
    last = 6 if moments[0][2] == "after" else 5
    assert (
        f"\nstopped after step {last}; go on with: dmt distill --resume {newest(tmp_path)}\n"
        in complaints
    )
    assert (newest(tmp_path) / "checkpoints" / f"step_{last}.ckpt").exists()
    assert "exitcode  : 143" in complaints
    assert "KeyboardInterrupt" not in complaints


def test_what_is_wrong_with_torchrun_is_told(words, tmp_path, monkeypatch, capsys):
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "4",
    }.items():
        monkeypatch.setenv(name, value)
    assert distill_main([*words, "trainer.devices=2"]) == 2
    assert "trainer.devices=2, but torchrun started 4 processes" in capsys.readouterr().err
    assert distill_main([*words, "data.batch_size=6"]) == 2
    assert "data.batch_size=6 must be a multiple of trainer.devices=4" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert distill_main(words) == 2
    assert "on several machines" in capsys.readouterr().err
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name)
    assert (
        distill_main(
            [*words, "trainer.devices=256", "data.batch_size=256", "data.micro_batch_size=256"]
        )
        == 2
    )
    assert re.search(
        r"trainer.devices=256: there are \d+ processes at most here", capsys.readouterr().err
    )
    assert not (tmp_path / "logs").exists()


def test_another_process_that_cannot_work_is_told_in_one_line(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launch, "WORKER_SCRIPT", "print('no room for me'); raise SystemExit(3)")
    before = dict(os.environ)
    monkeypatch.setattr(launch, "SHUTDOWN_TIMEOUT", 60.0)
    assert distill_main([*words, "trainer.devices=2"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert (
        said[-1]
        == "error: process 1 of 2 (0 is this one) ended, so training cannot go on; its last words: no room for me"
    )
    assert dict(os.environ) == before
