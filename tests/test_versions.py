"""Every written file states its version; other versions are rejected in one line."""

import json
from pathlib import Path

import pytest
import torch
from cli_asserts import line_of, snapshot
from factories import CACHED, run
from safetensors import safe_open
from test_error_messages import (
    CACHE_METADATA,
    FACTS_DB,
    MODEL,
    RESUME,
    SLOTS,
    STUDENT,
    V0,
    edit_header,
    edit_json,
    execute_sql,
    store_run,
    write_file,
)
from transformers import AutoModelForCausalLM

import dmt
from dmt import files
from dmt.cli import main
from dmt.config_io import load_config
from dmt.distillation.logit_cache import FORMAT_VERSION
from dmt.editing.packs import PACK_VERSION
from dmt.files import check_version

ROOT = Path(__file__).parents[1]
STORE = "logs/version_2/memory.db"
NEWER = "a newer dmt made it: update dmt"


def set_database_version(path: str, name: str):
    return lambda version: execute_sql(
        path, f"UPDATE dmt_metadata SET value='{version}' WHERE name='{name}'"
    )()


def set_config_version(version: int) -> None:
    file = Path(V0) / "config.yaml"
    header = f"dmt, version {files.CONFIG_VERSION}\n"
    assert header in file.read_text()
    write_file(str(file), file.read_text().replace(header, f"dmt, version {version}\n"))()


def set_checkpoint_version(version: int | None) -> None:
    """Write `version` into the checkpoints, or remove it; one step is left to train."""
    Path(V0, "checkpoints", "step_2.ckpt").unlink()
    for file in Path(V0, "checkpoints").iterdir():
        checkpoint = torch.load(file, weights_only=True)
        assert checkpoint.pop("dmt") == files.CHECKPOINT_VERSION
        torch.save(checkpoint | ({} if version is None else {"dmt": version}), file)


GENERATE = ["dmt", "generate", "Ada", "--max-new-tokens", "1"]
# By kind of file: how to change its version, a command that reads it, and the error up to the
# version.
KINDS = {
    "config.yaml": (set_config_version, RESUME, f"{V0}/config.yaml: settings of version"),
    "run.json": (
        lambda version: edit_json(f"{V0}/run.json", format=version)(),
        RESUME,
        f"{V0}/run.json: version",
    ),
    "checkpoint": (set_checkpoint_version, RESUME, f"{V0}/checkpoints/step_1.ckpt: version"),
    "student": (
        lambda version: edit_json(f"{STUDENT}/config.json", dmt=version)(),
        [*GENERATE, *MODEL],
        f"model {STUDENT}: version",
    ),
    "slots": (
        lambda version: edit_header(SLOTS, format=str(version)),
        [*GENERATE, "-m", "logs/version_1"],
        f"{SLOTS}: its format is",
    ),
    "store": (
        set_database_version(STORE, "schema_version"),
        store_run(STORE),
        f"store {STORE}: schema version",
    ),
    "facts": (
        set_database_version(FACTS_DB, "facts_version"),
        ["dmt", "memory", "list", *MODEL],
        f"store {FACTS_DB}: facts of version",
    ),
    "pack, a folder": (
        lambda version: edit_json("pack/manifest.json", version=version)(),
        ["dmt", "memory", "import", "pack", *MODEL],
        "pack pack: version",
    ),
    "cache": (
        lambda version: edit_json(CACHE_METADATA, version=version)(),
        CACHED,
        "the format version",
    ),
}


# 1 is the current version of slots.
OTHER_VERSIONS = [
    (kind, version) for kind in KINDS for version in (0, 1, 99) if (kind, version) != ("slots", 1)
]


@pytest.mark.parametrize(("kind", "version"), OTHER_VERSIONS)
def test_another_version_is_rejected_with_advice(kind, version, artifacts_dir, capsys):
    change_version, args, prefix = KINDS[kind]
    change_version(version)
    before = snapshot(artifacts_dir)
    capsys.readouterr()
    code = run(args)
    output = capsys.readouterr()
    line = line_of(code, output.out, output.err)
    assert prefix in line
    assert str(version) in line
    if kind == "cache":
        assert f"({version} in the cache, {FORMAT_VERSION} in this run) differ" in line
        assert "name another logit_cache.dir or delete" in line
    else:
        assert f"{prefix} {version}, this dmt knows" in line
        assert (NEWER in line) is (version == 99)
    assert snapshot(artifacts_dir) == before


@pytest.mark.parametrize(
    ("remove_version", "args", "message"),
    [
        (
            lambda: set_checkpoint_version(None),
            RESUME,
            f"{V0}/checkpoints/step_1.ckpt: version 1, this dmt knows 2; start again",
        ),
        (
            edit_json(f"{STUDENT}/config.json", dmt=None),
            [*GENERATE, *MODEL],
            f"model {STUDENT}: version 1, this dmt knows 2; distill it again",
        ),
        (
            edit_json(f"{V0}/run.json", format=None),
            RESUME,
            f"{V0}/run.json: version nothing, this dmt knows 2; use the dmt that made this run",
        ),
    ],
    ids=["checkpoint", "student", "run.json"],
)
def test_files_without_a_version_are_rejected(remove_version, args, message, artifacts_dir, capsys):
    remove_version()
    capsys.readouterr()
    code = run(args)
    output = capsys.readouterr()
    assert message in line_of(code, output.out, output.err)


def test_transformers_rejects_a_student_without_a_version(artifacts_dir):
    edit_json(f"{STUDENT}/config.json", dmt=None)()
    with pytest.raises(dmt.errors.UserError, match="of version 1, this dmt knows 2; distill"):
        AutoModelForCausalLM.from_pretrained(STUDENT)


def test_a_config_without_a_version_is_read(artifacts_dir):
    """Hand-written files have none."""
    file = Path(V0) / "config.yaml"
    header, rest = file.read_text().split("\n", 1)
    assert header == f"# Settings of dmt, version {files.CONFIG_VERSION}"
    file.write_text(rest)
    assert load_config(file).teacher == "teacher"
    assert main.distill_main(RESUME) == 0


def test_every_file_of_a_run_states_a_version(artifacts_dir):
    """In the file, or for files without room for it in `run.json`."""
    record = json.loads(Path(V0, "run.json").read_text())
    assert (record["format"], record["dmt"]) == (files.RECORD_VERSION, dmt.__version__)
    versioned_files = {
        "config.yaml",
        "run.json",
        "memory.db",
        "memory.db.lock",
        "checkpoints",
        "student",
        *record["formats"],
    }
    for number in range(3):
        for file in Path(f"logs/version_{number}").iterdir():
            is_event_file = file.name.startswith("events.out.tfevents")
            assert is_event_file or file.name in versioned_files, file
    with safe_open(SLOTS, "np") as slots:
        assert slots.metadata()["format"] == "1"
    assert json.loads(Path(CACHE_METADATA).read_text())["version"] == FORMAT_VERSION
    assert json.loads(Path(STUDENT, "config.json").read_text())["dmt"] == files.STUDENT_VERSION
    assert json.loads(Path("pack/manifest.json").read_text())["version"] == PACK_VERSION


def test_the_reference_lists_every_file():
    reference = (ROOT / "docs" / "reference" / "file-formats.md").read_text()
    for name in (
        "config.yaml",
        "run.json",
        "checkpoints/",
        "config.json",
        "slots.safetensors",
        "memory.db",
        "a pack",
        "logit cache",
        "metrics.csv",
        "weight_map.txt",
        "report.md",
        "tokenizer.json",
        "events.out.tfevents",
    ):
        assert name in reference, name


@pytest.mark.parametrize("version", [1, "1"])
def test_the_supported_version_is_a_number_or_its_digits(version):
    check_version(version, 1, "x", "y")


@pytest.mark.parametrize("version", [None, True, 1.0, "one", "9" * 5000, [1], 2**80, -1, "²"])
def test_values_that_are_no_version_are_rejected(version):
    with pytest.raises(dmt.errors.UserError, match="this dmt knows 1"):
        check_version(version, 1, "x: version", "make it again")
