"""The package: its metadata, what is installed, and requirements that agree with each other."""

import ast
import importlib.metadata
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import dmt
from dmt.config_files import get_configs_dir

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
IMPORT_NAMES = {
    "pytorch-lightning": "pytorch_lightning",
    "faiss-cpu": "faiss",
    "pyyaml": "yaml",
    "huggingface-hub": "huggingface_hub",
    "psycopg": "psycopg",
}


def list_imported_packages():
    """Return the top-level packages that the sources import, but for Python's and our own."""
    names = set()
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.partition(".")[0])
    return {name for name in names if name not in sys.stdlib_module_names} - {"dmt"}


def read_requirements(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line.partition("  #")[0].strip() for line in lines if line and line[0] not in "#-"]


def test_every_dependency_is_a_range_and_every_import_is_declared():
    declared = [Requirement(text) for text in PROJECT["dependencies"]]
    assert not [requirement for requirement in declared if "==" in str(requirement.specifier)]
    extras = PROJECT["optional-dependencies"]
    optional = [
        Requirement(text)
        for name in ("hub", "lora", "parquet", "postgresql", "smollm2")
        for text in extras[name]
    ]
    names = {requirement.name for requirement in declared + optional}
    imported = list_imported_packages()
    assert imported <= {IMPORT_NAMES.get(name, name) for name in names} | ALWAYS_INSTALLED
    unused = {IMPORT_NAMES.get(name, name) for name in names} - imported
    assert unused <= USED_BY_OTHERS


ALWAYS_INSTALLED = {"lightning_fabric", "typing_extensions"}  # parts of a declared dependency
USED_BY_OTHERS = {"psycopg", "gguf", "accelerate", "tensorboard"}  # SQLAlchemy, transformers, torch


def test_requirements_satisfy_the_ranges_of_the_package():
    ranges = {Requirement(text).name: Requirement(text) for text in PROJECT["dependencies"]}
    pins = [Requirement(text) for text in read_requirements("requirements.txt")]
    assert "torch==2.13.0" in map(str, pins)
    for pin in pins:
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        assert ranges[pin.name].specifier.contains(specifier.version), pin


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == dmt.__version__
    assert f"## {dmt.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    try:
        installed = importlib.metadata.version(PROJECT["name"])
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("runs from a checkout that is not installed")
    assert installed == dmt.__version__


def test_configs_are_found_in_a_checkout():
    assert get_configs_dir() == ROOT / "configs"


@pytest.mark.slow
def test_the_wheel_contains_configs_and_assets(tmp_path):
    """Builds without a network, with the setuptools that is installed."""
    import shutil
    import subprocess

    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "lightning_logs", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    process = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    (wheel,) = tmp_path.glob("discrete_memory_transformers-*.whl")
    files = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "configs").rglob("*.*"):
        assert f"dmt/configs/{path.relative_to(ROOT / 'configs').as_posix()}" in files
    for path in (ROOT / "src" / "dmt").rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            assert path.relative_to(ROOT / "src").as_posix() in files


# Imports each module as the first one of dmt, in a copy of a process that has read the libraries.
IMPORT_EACH_ALONE = """
import importlib, os, sys, traceback
import faiss, torch, transformers
from transformers import GenerationMixin, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

del sys.modules["transformers"]  # to be imported again, in a moment, as the first time
for name in sys.argv[1:]:
    if os.fork() == 0:
        try:
            importlib.import_module(name)
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.wait()
"""


@pytest.mark.slow
def test_every_module_can_be_the_first_to_be_imported():
    """The import of transformers brings that of the model classes: no circle may come of it."""
    source = ROOT / "src"
    names = [
        ".".join(file.relative_to(source).with_suffix("").parts)
        for file in (source / "dmt").rglob("*.py")
        if file.stem not in ("__init__", "__main__")
    ]
    process = subprocess.run(
        [sys.executable, "-c", IMPORT_EACH_ALONE, *names],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (process.returncode, process.stderr) == (0, "")
