"""`python -m tests.mutations [--only NAME]`: break each chosen line in a copy of the product and see which test notices.

The libraries are loaded once; each mutant is a process of its own that has them already and loads the broken copy.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from py_compile import PycInvalidationMode
from types import FrameType
from typing import Any

from .chosen import PRODUCT, ROOT, Mutant, chosen, stale

COPIED = (
    "src",
    "tests",
    "configs",
    "examples",
    "benchmarks",
    "distill.py",
    "pyproject.toml",
    "requirements.txt",
    "README.md",
    "Makefile",
)
LIBRARIES = (
    "numpy",
    "torch",
    "transformers",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "pytorch_lightning",
    "tensorboard",
    "torch.utils.tensorboard",
    "sqlalchemy",
    "omegaconf",
    "rich.progress",
    "faiss",
    "safetensors.numpy",
    "pytest",
)
OPTIONS = (
    "-q",
    "--numprocesses=0",
    "--dist=no",
    "-p",
    "no:cacheprovider",
    "--no-header",
    "--tb=short",
    "-W",
    "ignore::pytest.PytestAssertRewriteWarning",
)
PATIENCE = 300
"""Seconds after which tests of one mutant are stopped: that is not noticing."""
MANY = 5
"""Tests more than which show how far they are."""
OF_30 = 28
"""Mutants that have to be caught of every 30."""


class Witness:
    """A pytest plugin that remembers which tests failed and how many passed; a dot goes to the file `dots` for each."""

    def __init__(self, dots: int) -> None:
        self.failed: list[str] = []
        self.passed, self.dots = 0, dots

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)
        if report.when == "call" and report.passed:
            self.passed += 1
            os.write(self.dots, b".")


def main(words: list[str]) -> int:
    """Check all mutants, or those that are named; 0 where enough of them are caught, 1 where not, 2 where none can be judged."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument(
        "--only",
        action="append",
        metavar="NAME",
        help="only the mutant of this name; may be repeated",
    )
    only = parser.parse_args(words).only or []
    mutants = [each for each in chosen() if not only or each.name in only]
    if unknown := sorted(set(only) - {each.name for each in mutants}):
        parser.error(
            f"no mutant is called {unknown[0]}; tests/mutations/mutations.toml has them all"
        )
    if wrong := stale(mutants):
        parser.error("; ".join(wrong))
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
    ):  # else the copy would stay; SIGINT may have been ignored
        signal.signal(number, _stop)
    try:
        with _house() as house:
            return _check(mutants, house)
    except KeyboardInterrupt:
        print("stopped; nothing is left behind", file=sys.stderr)
        return 130


def _check(mutants: list[Mutant], house: Path) -> int:
    began = time.perf_counter()
    said = house / "said"
    print(f"{len(mutants)} mutants; their tests, with nothing broken, first ...", flush=True)
    nodes = list(dict.fromkeys(node for each in mutants for node in each.nodes))
    before = _judge(nodes, house, said, 10 * PATIENCE)
    print(file=sys.stderr)
    if before["code"] not in (0, 1):
        print(said.read_text(encoding="utf-8", errors="replace")[-4_000:])
        print(
            f"with nothing broken the tests do not run to their end ({_why(before)}), so nothing can be judged",
            file=sys.stderr,
        )
        return 2
    sick = {node.partition("[")[0] for node in before["failed"]}
    for node in before["failed"]:
        print(f"{node} fails with nothing broken: whoever it should notice is not judged")
    print(f"{before['passed']} tests pass in {time.perf_counter() - began:.0f} s\n", flush=True)
    wide, deep = (
        max(len(word) for word in words)
        for words in ([m.name for m in mutants], [m.file for m in mutants])
    )
    caught = 0
    for number, each in enumerate(mutants, 1):
        if well := not sick & {node.partition("[")[0] for node in each.nodes}:
            found, seconds = _try(each, house, said)
        else:
            found, seconds = (
                {"code": -1, "failed": [], "why": "its tests fail with nothing broken"},
                0.0,
            )
        caught += well and found["code"] == 1 and bool(found["failed"])
        print(
            f"{number:>3}  {each.name:{wide}}  {each.file:{deep}}  {_said_of(found)}, {seconds:.1f} s\n     {each.what}",
            flush=True,
        )
    print(f"\n{caught} of {len(mutants)} caught, {time.perf_counter() - began:.0f} s")
    return 0 if caught * 30 >= OF_30 * len(mutants) else 1


def _said_of(found: dict[str, Any]) -> str:
    """What became of a mutant, in words."""
    if found["code"] == 1 and found["failed"]:
        return f"caught by {found['failed'][0].removeprefix('tests/')}"
    if found["code"] == 0:
        return "SURVIVED"
    return f"SURVIVED: not judged, {_why(found)}"


def _why(found: dict[str, Any]) -> str:
    """Why there is nothing to judge."""
    return str(found["why"] or f"pytest ended with {found['code']}")


def _try(mutant: Mutant, house: Path, said: Path) -> tuple[dict[str, Any], float]:
    """Break the copy, run the mutant's tests, mend the copy."""
    place, began = house / mutant.place, time.perf_counter()
    source = place.read_text(encoding="utf-8")
    place.write_text(mutant.applied(source), encoding="utf-8")
    try:
        return _judge(["-x", *mutant.nodes], house, said, PATIENCE), time.perf_counter() - began
    finally:
        place.write_text(source, encoding="utf-8")


def _judge(nodes: list[str], house: Path, said: Path, patience: float) -> dict[str, Any]:
    """Run tests in a process of their own, against the copy; its exit code, the first that failed, how many passed."""
    told = house / "told.json"
    told.unlink(missing_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if not child:
        dots = os.dup(2) if len(nodes) > MANY else os.open(os.devnull, os.O_WRONLY)
        _become(lambda: _run(nodes, house, told, dots), said)
    ended = False
    try:
        ended = _awaited(child, patience)
    finally:
        if not ended and not _signalled(
            child, signal.SIGINT
        ):  # so that tests end what they have started
            _awaited(child, 10)
        _signalled(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)
    why = "" if ended else f"no end in {patience:.0f} s"
    found: dict[str, Any] = (
        json.loads(told.read_text()) if told.exists() else {"code": -1, "failed": [], "passed": 0}
    )
    return found | {"why": why or ("" if told.exists() else "its process died")}


def _awaited(child: int, seconds: float) -> bool:
    """Whether a process ends within so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        time.sleep(0.05)
    return False


def _signalled(child: int, number: int) -> bool:
    """Whether the group of a process was there no more to be given a signal."""
    try:
        os.killpg(child, number)
    except (ProcessLookupError, PermissionError):
        return True
    return False


def _become(work: Callable[[], None], said: Path) -> None:
    """In a child process: do `work`, silently, in a group of its own, and never come back."""
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # even where whoever started us ignores it
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(out, number)
        work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _run(nodes: list[str], house: Path, told: Path, dots: int) -> None:
    import pytest

    os.chdir(house)
    source = str(house / "src")
    os.environ.update(
        PYTHONPATH=source, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TMPDIR=str(house / "tmp")
    )
    tempfile.tempdir = str(house / "tmp")
    sys.path[:] = [
        source,
        *(path for path in sys.path if Path(path or ".").resolve() not in (ROOT, ROOT / "src")),
    ]
    import dmt

    assert Path(dmt.__file__).is_relative_to(house), f"{dmt.__file__} is not the copy"
    witness = Witness(dots)
    code = int(pytest.main([*OPTIONS, f"--basetemp={house / 't'}", *nodes], plugins=[witness]))
    strange = [
        name
        for name, module in sys.modules.items()
        if name.startswith("dmt") and not _is_in(module, house)
    ]
    assert not strange, f"{strange[0]} is not the copy's"
    told.write_text(json.dumps({"code": code, "failed": witness.failed, "passed": witness.passed}))


def _is_in(module: Any, house: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is None or Path(file).is_relative_to(house)


@contextlib.contextmanager
def _house() -> Iterator[Path]:
    """A copy of what tests need, compiled; libraries are loaded meanwhile, the product is not. Gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="dmt-mutants-", ignore_cleanup_errors=True) as place:
        house = Path(place).resolve()
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(
                    ROOT / name,
                    house / name,
                    ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"),
                )
            elif (ROOT / name).exists():
                shutil.copy2(ROOT / name, house / name)
        (house / "tmp").mkdir()
        # By digest, not by time and size: what is loaded is what stands in the file, however fast it was changed.
        compileall.compile_dir(
            house / PRODUCT, quiet=2, invalidation_mode=PycInvalidationMode.CHECKED_HASH
        )
        for name in LIBRARIES:
            import_module(name)
        assert not any(name.partition(".")[0] == "dmt" for name in sys.modules), (
            "no mutant can be loaded over what is there"
        )
        yield house


def _stop(number: int, _: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
