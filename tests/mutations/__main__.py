"""`python -m tests.mutations`: break each chosen line in a copy of the product, run its tests.

Libraries are imported once. Every mutant is a forked process that has them already and imports the
broken copy.
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

from .catalog import PRODUCT, ROOT, Mutation, find_outdated, load_mutations

COPIED_PATHS = (
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
PRELOADED_LIBRARIES = (
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
PYTEST_OPTIONS = (
    "-q",
    "-m",
    "",  # slow tests too
    "--numprocesses=0",
    "--dist=no",
    "-p",
    "no:cacheprovider",
    "--no-header",
    "--tb=short",
    "-W",
    "ignore::pytest.PytestAssertRewriteWarning",
)
TIMEOUT = 300  # seconds for the tests of one mutant; a mutant that exceeds it is not caught
MAX_SILENT_TESTS = 5  # runs of more tests print a dot per passed test
MIN_CAUGHT_OF_30 = 28  # mutants of every 30 that must be caught


class OutcomeRecorder:
    """A pytest plugin that records failed tests and counts passed ones.

    Args:
        dots_fd: file descriptor that gets a dot for each passed test.
    """

    def __init__(self, dots_fd: int) -> None:
        self.failed: list[str] = []
        self.num_passed, self.dots_fd = 0, dots_fd

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Record the outcome of a phase of a test."""
        if report.failed:
            self.failed.append(report.nodeid)
        if report.when == "call" and report.passed:
            self.num_passed += 1
            os.write(self.dots_fd, b".")


def main(argv: list[str]) -> int:
    """Check all mutants, or those named with `--only`.

    Returns:
        0 if enough are caught, 1 if not, 2 if none can be judged, 130 after a signal.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument(
        "--only",
        action="append",
        metavar="NAME",
        help="check only the mutant of this name; may be repeated",
    )
    names = parser.parse_args(argv).only or []
    mutations = [mutation for mutation in load_mutations() if not names or mutation.name in names]
    if unknown := sorted(set(names) - {mutation.name for mutation in mutations}):
        parser.error(
            f"no mutant is named {unknown[0]}; tests/mutations/mutations.toml lists all of them"
        )
    if problems := find_outdated(mutations):
        parser.error("; ".join(problems))
    # Else the copy would stay; SIGINT may be ignored by default.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, _stop)
    try:
        with _temporary_copy() as checkout:
            return _check_all(mutations, checkout)
    except KeyboardInterrupt:
        print("stopped; the copy is removed", file=sys.stderr)
        return 130


def _check_all(mutations: list[Mutation], checkout: Path) -> int:
    start = time.perf_counter()
    output_path = checkout / "output.txt"
    print(f"{len(mutations)} mutants; first their tests with nothing broken ...", flush=True)
    node_ids = list(dict.fromkeys(node for mutation in mutations for node in mutation.node_ids))
    baseline = _run_tests(node_ids, checkout, output_path, 10 * TIMEOUT)
    print(file=sys.stderr)
    if baseline["code"] not in (0, 1):
        print(output_path.read_text(encoding="utf-8", errors="replace")[-4_000:])
        print(
            "with nothing broken the tests do not run to their end "
            f"({_explain_missing_result(baseline)}), so nothing can be judged",
            file=sys.stderr,
        )
        return 2
    broken_tests = {node.partition("[")[0] for node in baseline["failed"]}
    for node in baseline["failed"]:
        print(f"{node} fails with nothing broken: mutants that it should notice are not judged")
    seconds = time.perf_counter() - start
    print(f"{baseline['passed']} tests pass in {seconds:.0f} s\n", flush=True)
    name_width = max(len(mutation.name) for mutation in mutations)
    file_width = max(len(mutation.file) for mutation in mutations)
    num_caught = 0
    for number, mutation in enumerate(mutations, 1):
        if broken_tests & {node.partition("[")[0] for node in mutation.node_ids}:
            why = "its tests fail with nothing broken"
            outcome, seconds = {"code": -1, "failed": [], "why": why}, 0.0
        else:
            outcome, seconds = _check_mutation(mutation, checkout, output_path)
        num_caught += outcome["code"] == 1 and bool(outcome["failed"])
        print(
            f"{number:>3}  {mutation.name:{name_width}}  {mutation.file:{file_width}}  "
            f"{_describe_outcome(outcome)}, {seconds:.1f} s\n     {mutation.what}",
            flush=True,
        )
    print(f"\n{num_caught} of {len(mutations)} caught, {time.perf_counter() - start:.0f} s")
    return 0 if num_caught * 30 >= MIN_CAUGHT_OF_30 * len(mutations) else 1


def _describe_outcome(outcome: dict[str, Any]) -> str:
    """Say whether a mutant was caught, and by which test."""
    if outcome["code"] == 1 and outcome["failed"]:
        return f"caught by {outcome['failed'][0].removeprefix('tests/')}"
    if outcome["code"] == 0:
        return "SURVIVED"
    return f"SURVIVED: not judged, {_explain_missing_result(outcome)}"


def _explain_missing_result(outcome: dict[str, Any]) -> str:
    return str(outcome["why"] or f"pytest ended with {outcome['code']}")


def _check_mutation(
    mutation: Mutation, checkout: Path, output_path: Path
) -> tuple[dict[str, Any], float]:
    """Break the copy, run the mutant's tests and repair the copy; return outcome and seconds."""
    path, start = checkout / mutation.path, time.perf_counter()
    source = path.read_text(encoding="utf-8")
    path.write_text(mutation.apply(source), encoding="utf-8")
    try:
        outcome = _run_tests(["-x", *mutation.node_ids], checkout, output_path, TIMEOUT)
        return outcome, time.perf_counter() - start
    finally:
        path.write_text(source, encoding="utf-8")


def _run_tests(
    node_ids: list[str], checkout: Path, output_path: Path, timeout: float
) -> dict[str, Any]:
    """Run tests of the copy in a child process.

    Returns:
        `code`: pytest's exit code, -1 where there is none; `failed`: ids of the tests that failed;
        `passed`: how many passed; `why`: the reason where there is no code.
    """
    result_path = checkout / "result.json"
    result_path.unlink(missing_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if not child:
        shows_dots = len(node_ids) > MAX_SILENT_TESTS
        dots_fd = os.dup(2) if shows_dots else os.open(os.devnull, os.O_WRONLY)
        _run_in_child(lambda: _run_pytest(node_ids, checkout, result_path, dots_fd), output_path)
    has_ended = False
    try:
        has_ended = _wait(child, timeout)
    finally:
        # SIGINT first, so that tests end the processes that they have started.
        if not has_ended and not _kill_group(child, signal.SIGINT):
            _wait(child, 10)
        _kill_group(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)
    outcome: dict[str, Any] = {"code": -1, "failed": [], "passed": 0, "why": "its process died"}
    if result_path.exists():
        outcome |= json.loads(result_path.read_text()) | {"why": ""}
    return outcome if has_ended else outcome | {"why": f"no end in {timeout:.0f} s"}


def _wait(child: int, seconds: float) -> bool:
    """Return whether a process ends within so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        time.sleep(0.05)
    return False


def _kill_group(child: int, signum: int) -> bool:
    """Send a signal to the group of a process; return whether the group no longer exists."""
    try:
        os.killpg(child, signum)
    except (ProcessLookupError, PermissionError):
        return True
    return False


def _run_in_child(function: Callable[[], None], output_path: Path) -> None:
    """Call `function` in a forked process, in a group of its own, and exit.

    Its output goes to `output_path`.
    """
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # Even where the parent of this command ignores it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        output_fd = os.open(output_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for fd in (1, 2):
            os.dup2(output_fd, fd)
        function()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _run_pytest(node_ids: list[str], checkout: Path, result_path: Path, dots_fd: int) -> None:
    import pytest

    os.chdir(checkout)
    source_dir, temp_dir = str(checkout / "src"), str(checkout / "tmp")
    os.environ.update(
        PYTHONPATH=source_dir, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TMPDIR=temp_dir
    )
    tempfile.tempdir = temp_dir
    other_paths = [
        path for path in sys.path if Path(path or ".").resolve() not in (ROOT, ROOT / "src")
    ]
    sys.path[:] = [source_dir, *other_paths]
    import dmt

    assert Path(dmt.__file__).is_relative_to(checkout), f"{dmt.__file__} is not the copy"
    recorder = OutcomeRecorder(dots_fd)
    options = [*PYTEST_OPTIONS, f"--basetemp={checkout / 't'}"]
    code = int(pytest.main([*options, *node_ids], plugins=[recorder]))
    outside = [
        name
        for name, module in sys.modules.items()
        if name.startswith("dmt") and not _is_in(module, checkout)
    ]
    assert not outside, f"{outside[0]} is not the copy's"
    result = {"code": code, "failed": recorder.failed, "passed": recorder.num_passed}
    result_path.write_text(json.dumps(result))


def _is_in(module: Any, checkout: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is None or Path(file).is_relative_to(checkout)


@contextlib.contextmanager
def _temporary_copy() -> Iterator[Path]:
    """Copy and compile what tests need, and import the libraries but not the product.

    The copy is removed at the end.
    """
    with tempfile.TemporaryDirectory(prefix="dmt-mutants-", ignore_cleanup_errors=True) as folder:
        checkout = Path(folder).resolve()
        for name in COPIED_PATHS:
            if (ROOT / name).is_dir():
                shutil.copytree(
                    ROOT / name,
                    checkout / name,
                    ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"),
                )
            elif (ROOT / name).exists():
                shutil.copy2(ROOT / name, checkout / name)
        (checkout / "tmp").mkdir()
        # By digest, not by time and size, so that a file that was changed a moment ago is compiled
        # again.
        compileall.compile_dir(
            checkout / PRODUCT, quiet=2, invalidation_mode=PycInvalidationMode.CHECKED_HASH
        )
        for name in PRELOADED_LIBRARIES:
            import_module(name)
        assert not any(name.partition(".")[0] == "dmt" for name in sys.modules), (
            "a mutant cannot replace modules that are imported already"
        )
        yield checkout


def _stop(signum: int, _: FrameType | None) -> None:
    raise KeyboardInterrupt(signum)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
