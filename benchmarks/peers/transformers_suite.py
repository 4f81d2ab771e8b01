"""transformers' own tests of models, run on students and, as a control, on plain models.

    python -m benchmarks.peers.transformers_suite [--tests-dir DIR] [--only ThresholdGPT2,...]

The tests are those of the installed version: its source distribution is downloaded to a temporary
folder, and nothing of it stays. It lacks tests/generation and tests/exporters, so give the folder
`tests` of a checkout of transformers for them. Needs `pip install parameterized pytest`.
Prints the counts of each case and every test that fails. Takes about five minutes a case.
"""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version
from pathlib import Path

CASES_FILE = Path(__file__).with_name("transformers_cases.py")
ROOT = Path(__file__).parents[2]
# What the source distribution lacks, and the class that the other tests import from it.
MISSING = {"generation/test_utils.py": "GenerationTesterMixin"}
MISSING |= {"exporters/test_export.py": "ExportTesterMixin"}


def list_cases() -> list[str]:
    """Return the names of the cases."""
    tree = ast.parse(CASES_FILE.read_text(encoding="utf-8"))
    classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    return [name for name in classes if name not in ("Tester", "Case")]


def download_tests(folder: Path) -> Path:
    """Download the source distribution of the installed transformers; return its `tests`."""
    name = f"transformers=={version('transformers')}"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
    process = subprocess.run([*command, "-d", str(folder), name], check=False)
    archives = list(folder.glob("*.tar.gz"))
    if process.returncode or not archives:
        raise SystemExit(f"cannot download the source distribution of {name}")
    with tarfile.open(archives[0]) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.glob("transformers-*/tests"))


def prepare_tests(folder: Path, checkout: Path | None) -> None:
    """Put a package `tests` into `folder`: the checkout's, and over it the installed version's."""
    target = folder / "tests"
    if checkout is not None:
        shutil.copytree(checkout, target)
    shutil.copytree(download_tests(folder), target, dirs_exist_ok=True)
    (target / "__init__.py").touch()
    for name, mixin in MISSING.items():
        if not (path := target / name).exists():
            print(f"left out: {mixin}; the source distribution has no tests/{name} (--tests-dir)")
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"class {mixin}:\n    pass\n", encoding="utf-8")
            path.with_name("__init__.py").touch()


def run_case(name: str, folder: Path) -> tuple[dict[str, int], list[str]]:
    """Run the tests of a case; return counts by outcome, and a line for each failing test."""
    report = folder / f"{name}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-c", os.devnull, f"--rootdir={folder}"]
    command += ["--import-mode=importlib", "-p", "no:cacheprovider", f"--junitxml={report}"]
    paths = [str(folder), str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [*command, f"{CASES_FILE}::{name}"],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        check=False,
    )
    if not report.exists():
        raise SystemExit(f"{name}: pytest wrote no report")
    counts, failures = {"passed": 0, "failed": 0, "skipped": 0}, {}
    for test in ElementTree.parse(report).iter("testcase"):
        problem = next((e for e in test if e.tag in ("failure", "error")), None)
        test_name = str(test.get("name"))
        if problem is not None:
            failures[test_name] = str(problem.get("message", "")).strip().splitlines()[:1]
        elif test.find("skipped") is not None:
            counts["skipped"] += 1
        else:
            counts["passed"] += 1
    counts["failed"] = len(failures)
    return counts, [f"    {test}: {''.join(lines)[:160]}" for test, lines in failures.items()]


def main() -> None:
    """Print the counts of each case and the tests that fail."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--tests-dir", type=Path, help="`tests` of a checkout of transformers")
    parser.add_argument("--only", help="cases, separated by commas")
    arguments = parser.parse_args()
    names = list_cases()
    if arguments.only:
        unknown = set(arguments.only.split(",")) - set(names)
        if unknown:
            parser.error(f"--only: no case {', '.join(unknown)}; there are {', '.join(names)}")
        names = [name for name in names if name in arguments.only.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        prepare_tests(Path(temporary), arguments.tests_dir)
        print(f"transformers {version('transformers')}")
        for name in names:
            counts, failures = run_case(name, Path(temporary))
            print(f"{name:20} " + ", ".join(f"{count} {key}" for key, count in counts.items()))
            print("\n".join(failures), end="\n" if failures else "", flush=True)


if __name__ == "__main__":
    main()
