"""Every file that is written states its version; an older one is read or refused, a newer one refused, in one clear line."""

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

import dmt
from dmt import files
from dmt.cli import main
from dmt.config_io import load_config
from dmt.distillation.logit_cache import FORMAT_VERSION
from dmt.files import check_version

ROOT = Path(__file__).parents[1]
STORE = "logs/version_2/memory.db"
KNOWN, NEWER = "this dmt knows", "a newer dmt made it: update dmt"


def said_of_schema(place: str, name: str):
    return lambda version: execute_sql(
        place, f"UPDATE dmt_metadata SET value='{version}' WHERE name='{name}'"
    )()


def settings_of(version: str) -> None:
    file = Path(V0) / "config.yaml"
    write_file(str(file), file.read_text().replace("version 1", f"version {version}"))()


def checkpoint_of(version: int) -> None:
    Path(V0, "checkpoints", "step_2.ckpt").unlink()  # a step is left to be done
    for file in Path(V0, "checkpoints").iterdir():
        found = torch.load(file, weights_only=True)
        torch.save(found | {"dmt": version}, file)


ASK = ["dmt", "generate", "Ada", "--max-new-tokens", "1"]
KINDS = {
    "config.yaml": (settings_of, RESUME, f"{V0}/config.yaml: settings of version"),
    "run.json": (
        lambda version: edit_json(f"{V0}/run.json", format=version)(),
        RESUME,
        f"{V0}/run.json: version",
    ),
    "checkpoint": (checkpoint_of, RESUME, f"{V0}/checkpoints/step_1.ckpt: version"),
    "student": (
        lambda version: edit_json(f"{STUDENT}/config.json", dmt=version)(),
        [*ASK, *MODEL],
        f"model {STUDENT}: version",
    ),
    "slots": (
        lambda version: edit_header(SLOTS, format=str(version)),
        [*ASK, "-m", "logs/version_1"],
        f"{SLOTS}: its format is",
    ),
    "store": (
        said_of_schema(STORE, "schema_version"),
        store_run(STORE),
        f"store {STORE}: schema version",
    ),
    "facts": (
        said_of_schema(FACTS_DB, "facts"),
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
"""How a version is altered, the words that then are refused, and what the line says before the version."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", [0, 99])
def test_another_version_is_refused_and_says_what_to_do(kind, version, shop, capsys):
    alter, words, said = KINDS[kind]
    alter(version)
    before = snapshot(shop)
    capsys.readouterr()
    code = run(words)
    shown = capsys.readouterr()
    line = line_of(code, shown.out, shown.err)
    assert said in line
    assert str(version) in line
    if kind == "cache":
        assert f"({version} in the cache, {FORMAT_VERSION} in this run) differ" in line
        assert "name another logit_cache.dir or delete" in line
    else:
        assert f"{said} {version}, {KNOWN}" in line
        assert (NEWER in line) is (version == 99)
    assert snapshot(shop) == before


def test_what_was_made_before_there_were_versions_is_read(shop, capsys):
    """Checkpoints, settings and students of dmt 0.1 state none."""
    file = Path(V0) / "config.yaml"
    first, rest = file.read_text().split("\n", 1)
    assert first == "# Settings of dmt, version 1"
    file.write_text(rest)
    edit_json(f"{STUDENT}/config.json", dmt=None)()
    edit_json(f"{V0}/run.json", dmt=None)()
    for checkpoint in Path(V0, "checkpoints").iterdir():
        found = torch.load(checkpoint, weights_only=True)
        assert found.pop("dmt") == 1
        torch.save(found, checkpoint)
    assert main.distill_main(RESUME) == 0
    edit_json(f"{STUDENT}/config.json", dmt=None)()
    assert run([*ASK, *MODEL]) == 0
    assert load_config(file).teacher == "teacher"


def test_every_file_of_a_run_states_a_version(shop):
    """In itself, or where only people read it in `run.json`, which says so of each."""
    record = json.loads(Path(V0, "run.json").read_text())
    assert (record["format"], record["dmt"]) == (files.RECORD_VERSION, dmt.__version__)
    stated = {
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
            assert file.name.startswith("events.out.tfevents") or file.name in stated, file
    with safe_open(SLOTS, "np") as opened:
        assert opened.metadata()["format"] == "1"
    assert json.loads(Path(CACHE_METADATA).read_text())["version"] == FORMAT_VERSION
    assert json.loads(Path(STUDENT, "config.json").read_text())["dmt"] == files.STUDENT_VERSION
    assert json.loads(Path("pack/manifest.json").read_text())["version"] == 1


def test_the_readme_lists_every_kind():
    readme = (ROOT / "README.md").read_text()
    table = readme[readme.index("## Versions of files") :]
    for name in (
        "config.yaml",
        "run.json",
        "checkpoints/",
        "config.json",
        "slots.safetensors",
        "memory.db",
        "a pack",
        "logits.npy",
        "metrics.csv",
        "weight_map.txt",
        "report.md",
        "tokenizer.json",
        "events.out.tfevents",
    ):
        assert name in table, name


@pytest.mark.parametrize("found", [1, "1"])
def test_the_known_version_passes_as_a_number_or_its_digits(found):
    check_version(found, 1, "x", "y")


@pytest.mark.parametrize("found", [None, True, 1.0, "one", "9" * 5000, [1], 2**80, -1, "²"])
def test_what_is_no_version_is_refused(found):
    with pytest.raises(dmt.errors.UserError, match="this dmt knows 1"):
        check_version(found, 1, "x: version", "make it anew")
