"""Several processes that train one student: the same curve as one, the same rows, every ending."""

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

from dmt import config_io
from dmt.cli.main import distill_main
from dmt.store import RowStore
from dmt.training import launch
from dmt.training.run_dir import format_distill_command

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
LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
needs_proc = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="looks into Linux's /proc"
)


def read_curve(run):
    """Return every measured number of a run, by step and name."""
    with (run / "metrics.csv").open() as file:
        return {
            (int(row["step"]), name): float(value)
            for row in csv.DictReader(file)
            for name, value in row.items()
            if value and name not in ("step", "epoch")
        }


def largest_difference(first, second):
    """Return the largest difference of two curves, relative above 1, and where it is."""
    assert set(first) == set(second)
    return max((abs(first[key] - second[key]) / max(1, abs(first[key])), key) for key in first)


def assert_learned_the_same(first_run, second_run):
    """Compare every loss of every step and every tensor to the last bit."""
    first, second = (
        {key: value for key, value in read_curve(run).items() if key[1].startswith("train/")}
        for run in (first_run, second_run)
    )
    assert first == second
    assert len({step for step, _ in first}) == 24
    first, second = weights(first_run), weights(second_run)
    assert all(first[name].equal(second[name]) for name in first)


def read_rows(run):
    """Return ids and keys of the stored rows of a run, by layer."""
    with RowStore(str(run / "memory.db"), read_only=True) as store:
        return {
            namespace.name: {
                (int(row_id), key.tobytes())
                for batch in store.scan(namespace)
                for row_id, key in zip(batch.ids, batch.keys, strict=True)
            }
            for namespace in store.list_namespaces()
        }


def start_torchrun(args, folder, count=2, script=ROOT / "distill.py", **options):
    """Start `torchrun distill.py` with `args` in `folder`."""
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={count}",
        str(script),
        *args,
    ]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen([sys.executable, *command], env=env, text=True, cwd=folder, **options)


def run_torchrun(args, folder):
    """Run `torchrun distill.py` to its end; return stdout and stderr."""
    process = start_torchrun(args, folder)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


@pytest.mark.parametrize("kind", VARIANTS)
def test_two_processes_train_the_same_student_as_one(distill_args, tmp_path, kind, capsys):
    distill_args += VARIANTS[kind]
    assert distill_main(distill_args) == 0
    out, err = run_torchrun(distill_args, tmp_path)
    assert out.count("on the same test text") == 1
    assert err.count("feed-forward block ->") == 1, "the first process alone logs"
    assert "Warning" not in err
    run_torchrun([*distill_args, "trainer.devices=2"], tmp_path)
    single, by_torchrun, by_devices = (
        tmp_path / "logs" / f"version_{number}" for number in range(3)
    )
    fidelity = json.loads((single / "run.json").read_text())["fidelity"]["text"]
    for run in (by_torchrun, by_devices):
        assert_learned_the_same(single, run)
        assert largest_difference(read_curve(single), read_curve(run))[0] < 1e-5, (
            "of validation too, whose windows are divided among the processes"
        )
        assert json.loads((run / "run.json").read_text())["fidelity"]["text"] == fidelity
        assert config_io.load_config(run / "config.yaml").trainer.devices == 2
    if kind == "associative":
        assert read_rows(single) == read_rows(by_torchrun)
        assert sum(map(len, read_rows(single).values())) > 100


def wait_for_checkpoint(run, step):
    """Wait until a run has written its checkpoint of `step`."""
    for _ in range(1200):
        if (run / "checkpoints" / f"step_{step}.ckpt").exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{run} never came to step {step}")


def list_children(process):
    """Return the ids of the processes that a process has started."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(number) for number in path.read_text().split()]


def is_running(pid):
    """Return whether a process runs; one that has ended and was not waited for does not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_for_end(pids):
    """Wait until none of these processes runs any more."""
    for _ in range(600):
        if not any(map(is_running, pids)):
            return
        time.sleep(0.1)
    for pid in filter(is_running, pids):
        os.kill(pid, signal.SIGKILL)
    raise AssertionError(f"some of {pids} went on without the others")


def list_listening_addresses(pid):
    """Return the addresses on which a process listens, as the kernel writes them."""
    sockets = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()}
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]
    ]
    return {
        line[1].split(":")[0]
        for line in lines
        if line[3] == "0A" and f"socket:[{line[9]}]" in sockets
    }


LOOPBACK = {"0100007F", "0" * 24 + "01000000", "0000000000000000FFFF00000100007F"}


def get_last_step(run):
    return max(int(file.stem[5:]) for file in (run / "checkpoints").glob("step_*.ckpt"))


@needs_proc
def test_several_processes_stop_together_and_resume_to_the_same_end(distill_args, tmp_path):
    distill_args += [
        "stages.end_to_end_steps=120",
        *VARIANTS["associative"][2:],
        "trainer.validate_every=0",
        "trainer.checkpoint_every=10",
        "memory.write_start=0.9",
    ]
    process = start_torchrun(distill_args, tmp_path, stdout=subprocess.DEVNULL)
    run = tmp_path / "logs" / "version_0"
    wait_for_checkpoint(run, 10)
    workers = list_children(process)
    assert len(workers) == 2
    for worker in workers:  # torchrun itself holds the rendezvous
        assert list_listening_addresses(worker) <= LOOPBACK, "nothing beyond this machine"
    process.send_signal(signal.SIGTERM)  # torchrun passes it on
    err = process.communicate(timeout=120)[1]
    command = re.escape(format_distill_command(f"--resume {run}", 2))
    assert re.search(rf"^stopped after step \d+; resume with: {command}$", err, re.MULTILINE), err
    wait_for_end(workers)

    process = start_torchrun(["--resume", str(run)], tmp_path, stdout=subprocess.DEVNULL)
    wait_for_checkpoint(run, get_last_step(run) // 10 * 10 + 20)
    workers = list_children(process)
    os.kill(workers[-1], signal.SIGKILL)
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert re.search(r"exitcode\s*: -9", err), err
    wait_for_end(workers)

    run_torchrun(["--resume", str(run)], tmp_path)
    assert distill_main(distill_args) == 0
    second_run = newest(tmp_path)
    assert second_run != run
    resumed, uninterrupted = weights(run), weights(second_run)
    assert all(resumed[name].equal(uninterrupted[name]) for name in uninterrupted)


SIGNAL_SCRIPT = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
from dmt.training.callbacks import StopOnSignal
from dmt.training.checkpoints import AtomicCheckpointIO
from dmt.cli.main import distill_main as main

moments = eval(sys.argv.pop(1))
agree, save = StopOnSignal.on_train_batch_end, AtomicCheckpointIO.save_checkpoint

def send_signal(rank, step, position):
    if (rank, step, position) in moments:
        moments.remove((rank, step, position))
        os.kill(os.getpid(), signal.SIGTERM)

def patched_agree(self, trainer, *args):
    send_signal(trainer.global_rank, trainer.global_step, "before")
    agree(self, trainer, *args)
    send_signal(trainer.global_rank, trainer.global_step, "after")

def patched_save(self, checkpoint, *args, **kwargs):
    send_signal(int(os.environ["RANK"]), checkpoint["global_step"], "saving")
    save(self, checkpoint, *args, **kwargs)

StopOnSignal.on_train_batch_end, AtomicCheckpointIO.save_checkpoint = patched_agree, patched_save
sys.exit(main(sys.argv[1:]))
"""  # sends signals just before or after the processes agree to stop, or while one saves


@pytest.mark.parametrize("moments", [[(0, 5, "after")], [(1, 5, "before"), (0, 5, "saving")]])
def test_processes_stop_together_whenever_a_signal_comes(distill_args, tmp_path, moments):
    script = tmp_path / "send_signal.py"
    script.write_text(SIGNAL_SCRIPT)
    process = start_torchrun(
        [str(ROOT / "src"), repr(moments), *distill_args], tmp_path, script=script
    )
    try:
        err = process.communicate(timeout=120)[1]
    finally:
        process.terminate()
        process.wait()
    last = 6 if moments[0][2] == "after" else 5
    command = format_distill_command(f"--resume {newest(tmp_path)}", 2)
    assert f"\nstopped after step {last}; resume with: {command}\n" in err
    assert (newest(tmp_path) / "checkpoints" / f"step_{last}.ckpt").exists()
    assert "exitcode  : 143" in err
    assert "KeyboardInterrupt" not in err


def test_wrong_uses_of_torchrun_are_one_line(distill_args, tmp_path, monkeypatch, capsys):
    for name, value in zip(LAUNCH_VARIABLES, ("0", "0", "4", "4"), strict=True):
        monkeypatch.setenv(name, value)
    assert distill_main([*distill_args, "trainer.devices=2"]) == 2
    assert "trainer.devices=2, but torchrun started 4 processes" in capsys.readouterr().err
    assert distill_main([*distill_args, "data.batch_size=6"]) == 2
    assert "data.batch_size=6 must be a multiple of trainer.devices=4" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert distill_main(distill_args) == 2
    assert "on several machines" in capsys.readouterr().err
    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name)
    too_many = ["trainer.devices=256", "data.batch_size=256", "data.micro_batch_size=256"]
    assert distill_main([*distill_args, *too_many]) == 2
    assert re.search(
        r"trainer.devices=256: this machine runs up to (\d+) processes; set at most \1",
        capsys.readouterr().err,
    )
    assert not (tmp_path / "logs").exists()


def test_several_devices_without_torchrun_name_its_command(distill_args, tmp_path, capsys):
    assert distill_main([*distill_args, "trainer.devices=2"]) == 2
    err = capsys.readouterr().err
    assert "trainer.devices=2 needs 2 processes, which torchrun starts: torchrun" in err
    assert "--nproc-per-node=2" in err
    assert not (tmp_path / "logs").exists()


def test_the_environment_is_restored_after_a_distributed_run(monkeypatch):
    config = config_io.load_config(None, ["trainer.devices=2"])
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(launch.dist, "init_process_group", lambda backend: None)
    before = dict(os.environ)
    with launch.distributed_context(config):
        assert launch.INTERFACE_VARIABLE in os.environ
    assert dict(os.environ) == before
