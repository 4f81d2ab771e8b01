"""Files and texts from outside are data: no pickles, no code, no SQL, no unchecked sizes."""

import ast
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_asserts import line_of, snapshot
from factories import ADA, CACHED, run
from test_error_messages import CACHE, RESUME, ROWS_RUN, SLOTS, STUDENT, V0
from test_rows import MODEL, make_rows, postgresql, store_url  # noqa: F401  (fixtures)

from dmt.cli import main
from dmt.config import Config, TrainerConfig
from dmt.models.loading import SAFE_LOADING
from dmt.store import RowStore, StepChanges
from dmt.store.facts import FactTable
from dmt.store.records import FactRecord
from dmt.training import launch

ROOT = Path(__file__).parents[1]
GENERATE, STUDENT_ARGS = ["dmt", "generate", "Ada", "--max-new-tokens", "1"], ["-m", V0]
MARKER = Path("touched")
MARKER_CODE = "MARKER = open('touched', 'w')\n"


class Planted:
    """A pickle that creates a file when it is loaded."""

    def __reduce__(self):
        return open, (str(MARKER.absolute()), "w")


def write_pickle(name: str) -> None:
    Path(name).write_bytes(pickle.dumps(Planted()))


def write_torch(name: str) -> None:
    torch.save({"state_dict": Planted(), "global_step": 1}, name)


def write_numpy(name: str) -> None:
    with Path(name).open("wb") as file:
        np.save(file, np.array([Planted()], dtype=object), allow_pickle=True)


def write_npz(name: str) -> None:
    with Path(name).open("wb") as file:
        np.savez(file, keys=np.array([Planted()], dtype=object))


TENSORS = f"{STUDENT}/model.safetensors"
READ_FILES = {
    "a teacher's weights": ("teacher/model.safetensors", []),
    "a student's weights": (TENSORS, [*GENERATE, *STUDENT_ARGS]),
    "slots": (SLOTS, [*GENERATE, "-m", "logs/version_1"]),
    "a cache": (CACHE, CACHED),
    "a pack": ("pack.safetensors", ["dmt", "memory", "import", "pack.safetensors", *STUDENT_ARGS]),
    "the tensors of a pack": (
        "pack/rows.safetensors",
        ["dmt", "memory", "import", "pack", *STUDENT_ARGS],
    ),
    "a temporary pack": (
        "pack.safetensors",
        [*GENERATE, "--pack", "pack.safetensors", *STUDENT_ARGS],
    ),
    "a fact store": (f"{STUDENT}/memory.db", ["dmt", "memory", "list", *STUDENT_ARGS]),
    "a store": ("logs/version_2/memory.db", [*ROWS_RUN, "store.url=logs/version_2/memory.db"]),
    "a tokenizer": ("teacher/tokenizer.json", []),
    "a model's config": ("teacher/config.json", []),
    "a run's config": (f"{V0}/config.yaml", RESUME),
    "a text": ("text.txt", []),
}


@pytest.mark.parametrize("write_file", [write_pickle, write_torch, write_numpy, write_npz])
@pytest.mark.parametrize("kind", READ_FILES)
def test_a_pickle_in_place_of_a_file_is_rejected(kind, write_file, artifacts_dir, capsys):
    name, args = READ_FILES[kind]
    write_file(name)
    before = snapshot(artifacts_dir)
    capsys.readouterr()
    code = run(args)
    output = capsys.readouterr()
    line_of(code, output.out, output.err)
    assert not MARKER.exists()
    assert snapshot(artifacts_dir) == before


@pytest.mark.parametrize("write_file", [write_pickle, write_torch, write_numpy, write_npz])
def test_a_pickle_in_place_of_a_checkpoint_is_renamed_and_not_loaded(
    write_file, artifacts_dir, capsys
):
    file = Path(f"{V0}/checkpoints/step_2.ckpt")
    write_file(str(file))
    planted = file.read_bytes()
    assert run(RESUME) == 0
    assert "step_2.ckpt (kept as step_2.ckpt.corrupt)" in capsys.readouterr().err
    assert not MARKER.exists()
    assert file.with_name("step_2.ckpt.corrupt").read_bytes() == planted


@pytest.mark.parametrize("folder", ["teacher", STUDENT])
@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.bin", "model.pt", "model.ckpt.index", "flax_model.msgpack"]
)
def test_a_pickle_instead_of_weights_is_rejected(folder, name, artifacts_dir, capsys):
    Path(folder, "model.safetensors").unlink()
    write_torch(f"{folder}/{name}")
    capsys.readouterr()
    code = run([] if folder == "teacher" else [*GENERATE, *STUDENT_ARGS])
    output = capsys.readouterr()
    assert "model.safetensors" in line_of(code, output.out, output.err)
    assert not MARKER.exists()


def test_a_pickle_beside_the_weights_is_not_loaded(artifacts_dir):
    for folder in ("teacher", STUDENT):
        for name in (
            "pytorch_model.bin",
            "training_args.bin",
            "optimizer.pt",
            "tokenizer.pkl",
            "vocab.bin",
            "spiece.model",
            "index.faiss",
            "adapter_model.bin",
            "scheduler.pt",
            "rng_state.pth",
        ):
            write_torch(f"{folder}/{name}")
    write_torch("pack/keys.npy")
    assert run(["stages.end_to_end_steps=1", "stages.layerwise_steps=0"]) == 0
    assert run([*GENERATE, "--pack", "pack", *STUDENT_ARGS]) == 0
    assert not MARKER.exists()


def test_the_planted_pickle_leaves_a_file_when_loaded(artifacts_dir):
    write_pickle("proof")
    pickle.loads(Path("proof").read_bytes()).close()
    assert MARKER.exists()


@pytest.mark.parametrize("folder", ["teacher", STUDENT])
def test_code_beside_the_weights_is_not_run(folder, artifacts_dir, capsys, monkeypatch):
    monkeypatch.setattr(
        "builtins.input", lambda *_: pytest.fail("the user was asked whether to run it")
    )
    Path(folder, "evil.py").write_text(MARKER_CODE + "class Evil:\n    pass\n")
    class_names = ("AutoConfig", "AutoModelForCausalLM", "AutoModel", "AutoTokenizer")
    for name in ("config.json", "tokenizer_config.json"):
        file = Path(folder, name)
        auto_map = {
            class_name: ["evil.Evil", "evil.Evil"] if class_name == "AutoTokenizer" else "evil.Evil"
            for class_name in class_names
        }
        file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": auto_map}))
    capsys.readouterr()
    code = run([] if folder == "teacher" else [*GENERATE, *STUDENT_ARGS])
    output = capsys.readouterr()
    if code:
        line_of(code, output.out, output.err)
    assert not MARKER.exists()
    file = Path(folder, "config.json")
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"model_type": "evil"})
    )  # a model type that only evil.py defines
    code = run([] if folder == "teacher" else [*GENERATE, *STUDENT_ARGS])
    output = capsys.readouterr()
    line_of(code, output.out, output.err)
    assert not MARKER.exists()


# Source code.

FORBIDDEN = {
    r"^(pickle|dill|joblib|cloudpickle|shelve|marshal)\.": "unpickles",
    r"^(eval|exec|compile|__import__)\(": "runs text",
    r"^os\.(system|popen|exec\w*|spawn\w*)\(": "starts a shell",
    r"trust_remote_code=(?!False)": "may run foreign code",
    r"shell=True": "starts a shell",
    r"allow_pickle=(?!False)": "unpickles",
    r"^yaml\.(load|unsafe_load|full_load)\(": "creates objects from YAML",
    r"^(text|sqlalchemy\.text)\(f": "builds SQL from text",
    r"^torch\.load\((?!.*weights_only=True)": "unpickles",
    r"\.fit\((?=.*ckpt_path)(?!.*weights_only=True)": "unpickles a checkpoint",
    r"^np\.load\((?!.*allow_pickle=False)": "may unpickle",
    r"^faiss\.read_index\(": "reads a foreign index",
    (
        r"^\w*Model\w*\.from_pretrained\("
        r"(?!.*(use_safetensors=True|\*\*SAFE_LOADING|\*\*how))"
    ): "may read a pickle",
    (
        r"^AutoTokenizer\.from_pretrained\((?!.*(trust_remote_code=False|gguf_file))"
    ): "may ask to run code",
    r"(0\.0\.0\.0|host=''|bind\(\(''|\[::\])": "listens on all interfaces",
}


def unparse_calls(text: str) -> Iterator[str]:
    yield from (
        ast.unparse(node).replace("\n", " ")
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
    )


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_the_source_has_no_unsafe_calls(pattern):
    for file in [*(ROOT / "src").rglob("*.py"), ROOT / "distill.py"]:
        matches = [call for call in unparse_calls(file.read_text()) if re.search(pattern, call)]
        assert not matches, f"{file} {FORBIDDEN[pattern]}: {matches[0][:200]}"


UNSAFE_CALLS = [
    "pickle.load(f)",
    "eval(x)",
    "os.system('ls')",
    "AutoModel.from_pretrained(p, trust_remote_code=True)",
    "subprocess.run(x, shell=True)",
    "np.save(f, x, allow_pickle=True)",
    "yaml.load(x)",
    "text(f'select {x}')",
    "torch.load(p, weights_only=False)",
    "torch.load(p)",
    "trainer.fit(m, ckpt_path=p)",
    "np.load(p)",
    "faiss.read_index(p)",
    "AutoModelForCausalLM.from_pretrained(p)",
    "AutoTokenizer.from_pretrained(p)",
    "serve(host='0.0.0.0')",
]


@pytest.mark.parametrize("line", UNSAFE_CALLS)
def test_the_patterns_match_unsafe_calls(line):
    assert any(re.search(pattern, call) for pattern in FORBIDDEN for call in unparse_calls(line))


def test_models_are_loaded_with_safe_arguments():
    assert SAFE_LOADING == {"use_safetensors": True, "trust_remote_code": False}
    smollm2 = (ROOT / "scripts/fetch_smollm2.py").read_text()
    assert '"gguf_file": gguf.name' in smollm2, (
        "the only call with other arguments reads a GGUF file, which holds no objects"
    )


# SQL.

INJECTIONS = [
    "'; DROP TABLE dmt_facts; --",
    "x' OR '1'='1",
    '"; DELETE FROM dmt_rows; --',
    "%",
    "_",
    "\\",
    "%s :row ? {0} $1",
    "Robert'); --",
    "100%_\\%",
    "\N{SNOWMAN}\u202e'",
]


def make_record(text: str) -> FactRecord:
    return FactRecord(0, f"Ada {text} is", f" {text}", text, text, text, 1.0, (3,), (), (0.5,))


def test_texts_in_a_store_are_not_sql(store_url):  # noqa: F811
    with RowStore(store_url, MODEL) as store:
        fact_table = FactTable(store)
        fact_table.create(
            4,
            0,
            1,
            {"mean": np.zeros(4, np.float32), "metric": np.eye(4, dtype=np.float32)},
        )
        rows = np.ones((1, 4), np.float32)
        fact_table.add([(make_record(text), rows, rows) for text in INJECTIONS])
        namespace = store.get_or_create_namespace("x'; DROP TABLE dmt_rows; --", 4, 6)
        for step, text in enumerate(INJECTIONS):
            store.commit(text, step, {namespace: StepChanges([make_rows(store, 1, tag=text)])})
        records = fact_table.read()
        assert (
            [fact.tag for fact in records]
            == [fact.source for fact in records]
            == [fact.subject for fact in records]
            == INJECTIONS
        )
        assert [tag for page in store.scan(namespace) for tag in page.metadata["tag"]] == INJECTIONS
        assert store.rewind("x' OR '1'='1 --", -1) == (0, 0)
        assert store.rewind("%", -1) == (1, 0), "only of the run named %"
        fact_table.soft_delete([records[0].id], "'; DROP TABLE x;--")
        assert len(fact_table.read()) == len(INJECTIONS) - 1
        assert len(fact_table.read(include_deleted=True)) == len(INJECTIONS)
        assert store.count(namespace) == len(INJECTIONS) - 1
        tables = ("dmt_fact_rows", "dmt_facts", "dmt_calibration")
        if not store.path:
            with store.engine.begin() as connection:  # other tests use the server too
                for table in tables:
                    connection.exec_driver_sql(f"DROP TABLE {table}")


def test_texts_on_the_command_line_are_not_sql(artifacts_dir, capsys):
    for text in INJECTIONS[:-1]:
        assert (
            main.main(
                [
                    "memory",
                    "write",
                    "Ada Holbrook jumps over the fence",
                    "--tag",
                    text,
                    "--source",
                    text,
                    *STUDENT_ARGS,
                ]
            )
            == 0
        )
        capsys.readouterr()
        assert main.main(["memory", "list", "--tag", text, "--json", *STUDENT_ARGS]) == 0
        (fact,) = json.loads(capsys.readouterr().out)
        assert (fact["tag"], fact["source"]) == (text, text)
        assert main.main(["memory", "list", "--query", text, "--json", *STUDENT_ARGS]) == 0
        assert json.loads(capsys.readouterr().out) == [], (
            "% and _ are no wildcards, and no sentence contains them"
        )
        assert main.main(["memory", "search", text, "--json", *STUDENT_ARGS]) == 0
        assert not [
            entry for entry in json.loads(capsys.readouterr().out) if entry["matched_by"] == "text"
        ]
        assert main.main(["memory", "forget", "--tag", text, *STUDENT_ARGS]) == 0
    capsys.readouterr()
    assert main.main(["memory", "list", "--json", *STUDENT_ARGS]) == 0
    assert [fact["tag"] for fact in json.loads(capsys.readouterr().out)] == ["dogs"], (
        "other facts stay"
    )


# Sizes and paths.


def make_header(content: dict, length: int | None = None) -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


HUGE = {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}
MANY = (
    "{"
    + ",".join(
        f'"{number}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for number in range(50_000)
    )
    + "}"
)
CORRUPT_HEADERS = {
    "a shape far beyond the file": make_header(
        {"keys": HUGE, "__metadata__": {"format": "1", "digest": "0"}}
    ),
    "a header of 2^63 bytes": make_header({}, 2**63),
    "a header of all ones": make_header({}, 2**64 - 1),
    "a header longer than the file": make_header({}, 90_000_000),
    "offsets that overlap": make_header(
        {
            "a": HUGE | {"shape": [1], "data_offsets": [0, 4]},
            "b": HUGE | {"shape": [1], "data_offsets": [0, 4]},
        }
    )
    + b"0000",
    "offsets that go back": make_header({"a": HUGE | {"shape": [1], "data_offsets": [4, 0]}})
    + b"0000",
    "a shape whose product overflows": make_header(
        {"a": HUGE | {"shape": [2**32, 2**32], "data_offsets": [0, 0]}}
    ),
    "a negative size": make_header({"a": HUGE | {"shape": [-1], "data_offsets": [0, 4]}}) + b"0000",
    "an unknown type": make_header(
        {"keys": {"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 8]}}
    )
    + b"\0" * 8,
    "fifty thousand tensors": struct.pack("<Q", len(MANY)) + MANY.encode(),
    "unclosed brackets": struct.pack("<Q", 200_000) + b"[" * 200_000,
}
READERS = {
    "a pack": ("pack.safetensors", ["dmt", "memory", "import", "pack.safetensors", *STUDENT_ARGS]),
    "the tensors of a pack": (
        "pack/rows.safetensors",
        ["dmt", "memory", "import", "pack", *STUDENT_ARGS],
    ),
    "a teacher": ("teacher/model.safetensors", []),
    "a student": (TENSORS, [*GENERATE, *STUDENT_ARGS]),
    "slots": (SLOTS, [*GENERATE, "-m", "logs/version_1"]),
    "a cache": (CACHE, CACHED),
}


def edit_manifest(**differences) -> None:
    file = Path("pack/manifest.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | differences))


def edit_teacher_config(**differences) -> None:
    file = Path("teacher/config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | differences))


def edit_slot_config(**differences) -> None:
    file = Path(STUDENT, "config.json")
    config = json.loads(file.read_text())
    config["memory"]["0"] |= differences
    file.write_text(json.dumps(config))


def test_corrupt_headers_and_sizes_are_rejected_in_one_line_without_memory(artifacts_dir):
    """A process reads all of them with 350 MB more than it needs after all imports."""
    test_folders = [str(ROOT / "tests" / name) for name in ("", "cli", "store")]
    script = f"""
import contextlib, io, json, resource, sys
sys.path[:0] = {test_folders!r}
from pathlib import Path
from test_security import *
run([*GENERATE, *STUDENT_ARGS]); run([*RESUME])
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 350_000_000,) * 2)
results = {{}}
def record_result(name, args):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = run(args)
        except BaseException as error:
            code, err = -1, io.StringIO(repr(error))
    results[name] = [code, out.getvalue(), err.getvalue()]
for kind, (file, args) in READERS.items():
    original = Path(file).read_bytes()
    for problem, content in CORRUPT_HEADERS.items():
        Path(file).write_bytes(content)
        record_result(f"{{kind}}: {{problem}}", args)
    Path(file).write_bytes(original)
IMPORT = ["dmt", "memory", "import", "pack", *STUDENT_ARGS]
for damage, args, file in (
    (lambda: edit_manifest(width=10**9), IMPORT, "pack/manifest.json"),
    (lambda: edit_manifest(facts=[{{}}] * 10**6), IMPORT, "pack/manifest.json"),
    (lambda: edit_teacher_config(n_layer=10**8), [], "teacher/config.json"),
    (lambda: edit_teacher_config(n_embd=2**23), [], "teacher/config.json"),
    (lambda: edit_teacher_config(vocab_size=2**23), [], "teacher/config.json"),
    (lambda: edit_teacher_config(n_positions=2**23), [], "teacher/config.json"),
    (
        lambda: edit_slot_config(num_slots=2**25),
        [*GENERATE, *STUDENT_ARGS],
        STUDENT + "/config.json",
    ),
    (
        lambda: edit_slot_config(k=2**25, num_slots=2**25),
        [*GENERATE, *STUDENT_ARGS],
        STUDENT + "/config.json",
    ),
):
    original = Path(file).read_bytes()
    damage()
    record_result(f"{{file}} {{len(results)}}", args)
    Path(file).write_bytes(original)
print("RESULTS" + json.dumps(results))
"""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert "RESULTS" in process.stdout, process.stderr[-2000:]
    results = json.loads(process.stdout.split("RESULTS")[1])
    assert len(results) == len(READERS) * len(CORRUPT_HEADERS) + 8
    failures = {}
    for name, (code, out, err) in results.items():
        try:
            line_of(code, out, err)
        except AssertionError as error:
            failures[name] = str(error)[:300]
    assert not failures, failures


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "..", "a/../../b", "~root/x"])
def test_names_in_a_pack_are_not_paths(name, artifacts_dir, capsys):
    """The name, tags and sources of a pack are texts; nothing is read or written at such paths."""
    manifest = json.loads(Path("pack/manifest.json").read_text())
    manifest["name"] = name
    manifest["facts"][0] |= {"tag": name, "source": name}
    Path("pack/manifest.json").write_text(json.dumps(manifest))
    outside = snapshot(artifacts_dir.parent)
    capsys.readouterr()
    assert main.main(["memory", "import", "pack", "--json", "-m", "logs/version_1"]) in (0, 2)
    assert main.main(["memory", "diff", "pack", V0]) == 0
    changed = {
        path for path, about in snapshot(artifacts_dir.parent).items() if outside.get(path) != about
    }
    assert all("/artifacts/logs/version_1/student" in path for path in changed), changed


@pytest.mark.parametrize("part", ["manifest.json", "rows.safetensors"])
@pytest.mark.parametrize("target", ["../secret", "/etc/hostname", "/dev/zero", "/dev/stdin"])
def test_links_out_of_a_pack_are_not_followed(part, target, artifacts_dir, capsys):
    shutil.copy(f"pack/{part}", artifacts_dir.parent / "secret")
    Path("pack", part).unlink()
    Path("pack", part).symlink_to(
        artifacts_dir.parent / "secret" if target == "../secret" else target
    )
    capsys.readouterr()
    code = main.main(["memory", "import", "pack", *STUDENT_ARGS])
    output = capsys.readouterr()
    assert f"{part} is not a regular file" in line_of(code, output.out, output.err)


# Network.


def test_documented_servers_bind_to_loopback():
    for file in [
        ROOT / "Makefile",
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.sh"),
        *(ROOT / "benchmarks").glob("*.py"),
    ]:
        text = file.read_text()
        for line in text.splitlines():
            if re.search(r"^\s*tensorboard --logdir", line):
                assert "--host 127.0.0.1" in line, f"{file}: {line}"
        assert "bind_all" not in text, file
        assert "0.0.0.0" not in text, file


def test_a_run_and_a_command_open_no_socket(artifacts_dir, monkeypatch):
    import socket

    calls = []
    monkeypatch.setattr(socket.socket, "bind", lambda self, address: calls.append(address))
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: calls.append(address))
    monkeypatch.setattr(socket.socket, "listen", lambda self, *_: calls.append("listens"))
    assert run(["stages.end_to_end_steps=1", "stages.layerwise_steps=0"]) == 0
    assert run([*GENERATE, *STUDENT_ARGS]) == 0
    assert calls == []


def test_processes_of_a_run_communicate_over_loopback(monkeypatch):
    interfaces = []
    monkeypatch.delenv(launch.INTERFACE_VARIABLE, raising=False)
    monkeypatch.setattr(launch.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        launch.dist,
        "init_process_group",
        lambda _: interfaces.append(os.environ[launch.INTERFACE_VARIABLE]),
    )
    with launch.distributed_context(Config(trainer=TrainerConfig(devices=2))):
        pass
    assert interfaces in (["lo"], ["lo0"]), "gloo listens only on loopback"
    assert launch.INTERFACE_VARIABLE not in os.environ


def test_triggers_in_a_database_are_not_run(artifacts_dir, capsys):
    """A store from outside may contain triggers and views."""
    import sqlite3

    with sqlite3.connect(f"{STUDENT}/memory.db") as connection:
        connection.execute(
            "CREATE TRIGGER evil AFTER INSERT ON dmt_facts BEGIN"
            " SELECT load_extension('./evil.so'); END"
        )
    connection.close()
    capsys.readouterr()
    code = main.main(["memory", "write", f"{ADA} and the fox", "--json", *STUDENT_ARGS])
    output = capsys.readouterr()
    assert code == 2
    assert "unsafe use" in output.err or "not authorized" in output.err
    assert main.main(["memory", "list", "--json", *STUDENT_ARGS]) == 0
