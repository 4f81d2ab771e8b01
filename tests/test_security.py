"""What comes from outside is data: no pickle is loaded, no code run, no SQL made of words, no memory taken on a promise."""

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
from test_rows import MODEL, place, postgresql, some  # noqa: F401  (fixtures)

from dmt.cli import main
from dmt.config import Config, TrainerConfig
from dmt.models.loading import SAFE_LOADING
from dmt.store import RowStore, StepChanges
from dmt.store.facts import FactTable
from dmt.store.records import FactRecord
from dmt.training import launch

ROOT = Path(__file__).parents[1]
ASK, S = ["dmt", "generate", "Ada", "--max-new-tokens", "1"], ["-m", V0]
TRACE = Path("touched")
LOADING = "TRACE = open('touched', 'w')\n"


class Planted:
    """A pickle that makes a file where it is loaded."""

    def __reduce__(self):
        return open, (str(TRACE.absolute()), "w")


def as_pickle(name: str) -> None:
    Path(name).write_bytes(pickle.dumps(Planted()))


def as_torch(name: str) -> None:
    torch.save({"state_dict": Planted(), "global_step": 1}, name)


def as_numpy(name: str) -> None:
    with Path(name).open("wb") as file:
        np.save(file, np.array([Planted()], dtype=object), allow_pickle=True)


def as_numpy_pack(name: str) -> None:
    with Path(name).open("wb") as file:
        np.savez(file, keys=np.array([Planted()], dtype=object))


TENSORS = f"{STUDENT}/model.safetensors"
REPLACED = {
    "a teacher's weights": ("teacher/model.safetensors", []),
    "a student's weights": (TENSORS, [*ASK, *S]),
    "slots": (SLOTS, [*ASK, "-m", "logs/version_1"]),
    "a cache": (CACHE, CACHED),
    "a pack": ("pack.safetensors", ["dmt", "memory", "import", "pack.safetensors", *S]),
    "the tensors of a pack": ("pack/rows.safetensors", ["dmt", "memory", "import", "pack", *S]),
    "a guest": ("pack.safetensors", [*ASK, "--pack", "pack.safetensors", *S]),
    "a book": (f"{STUDENT}/memory.db", ["dmt", "memory", "list", *S]),
    "a store": ("logs/version_2/memory.db", [*ROWS_RUN, "store.url=logs/version_2/memory.db"]),
    "a tokenizer": ("teacher/tokenizer.json", []),
    "a model's config": ("teacher/config.json", []),
    "a run's config": (f"{V0}/config.yaml", RESUME),
    "a text": ("text.txt", []),
}


@pytest.mark.parametrize("form", [as_pickle, as_torch, as_numpy, as_numpy_pack])
@pytest.mark.parametrize("what", REPLACED)
def test_a_pickle_in_place_of_a_file_is_refused(what, form, artifacts_dir, capsys):
    name, words = REPLACED[what]
    form(name)
    before = snapshot(artifacts_dir)
    capsys.readouterr()
    code = run(words)
    shown = capsys.readouterr()
    line_of(code, shown.out, shown.err)
    assert not TRACE.exists()
    assert snapshot(artifacts_dir) == before


@pytest.mark.parametrize("form", [as_pickle, as_torch, as_numpy, as_numpy_pack])
def test_a_pickle_in_place_of_a_checkpoint_is_renamed_and_not_loaded(form, artifacts_dir, capsys):
    file = Path(f"{V0}/checkpoints/step_2.ckpt")
    form(str(file))
    planted = file.read_bytes()
    assert run(RESUME) == 0
    assert "step_2.ckpt (kept as step_2.ckpt.corrupt)" in capsys.readouterr().err
    assert not TRACE.exists()
    assert file.with_name("step_2.ckpt.corrupt").read_bytes() == planted


@pytest.mark.parametrize("folder", ["teacher", STUDENT])
@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.bin", "model.pt", "model.ckpt.index", "flax_model.msgpack"]
)
def test_a_pickle_instead_of_weights_is_refused(folder, name, artifacts_dir, capsys):
    Path(folder, "model.safetensors").unlink()
    as_torch(f"{folder}/{name}")
    capsys.readouterr()
    code = run([] if folder == "teacher" else [*ASK, *S])
    shown = capsys.readouterr()
    assert "model.safetensors" in line_of(code, shown.out, shown.err)
    assert not TRACE.exists()


def test_a_pickle_beside_the_weights_is_never_looked_at(artifacts_dir):
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
            as_torch(f"{folder}/{name}")
    as_torch("pack/keys.npy")
    assert run(["stages.end_to_end_steps=1", "stages.layerwise_steps=0"]) == 0
    assert run([*ASK, "--pack", "pack", *S]) == 0
    assert not TRACE.exists()


def test_the_planted_pickle_would_have_been_seen(artifacts_dir):
    as_pickle("proof")
    pickle.loads(Path("proof").read_bytes()).close()
    assert TRACE.exists()


@pytest.mark.parametrize("folder", ["teacher", STUDENT])
def test_code_beside_the_weights_is_not_run(folder, artifacts_dir, capsys, monkeypatch):
    monkeypatch.setattr(
        "builtins.input", lambda *_: pytest.fail("a person was asked whether to run it")
    )
    Path(folder, "evil.py").write_text(LOADING + "class Evil:\n    pass\n")
    classes = ("AutoConfig", "AutoModelForCausalLM", "AutoModel", "AutoTokenizer")
    for name in ("config.json", "tokenizer_config.json"):
        file = Path(folder, name)
        calls = {
            entry: ["evil.Evil", "evil.Evil"] if entry == "AutoTokenizer" else "evil.Evil"
            for entry in classes
        }
        file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": calls}))
    capsys.readouterr()
    code = run([] if folder == "teacher" else [*ASK, *S])
    shown = capsys.readouterr()
    if code:
        line_of(code, shown.out, shown.err)
    assert not TRACE.exists()
    file = Path(folder, "config.json")
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"model_type": "evil"})
    )  # a family that only the file beside it knows
    code = run([] if folder == "teacher" else [*ASK, *S])
    shown = capsys.readouterr()
    line_of(code, shown.out, shown.err)
    assert not TRACE.exists()


# --- the source -------------------------------------------------------------------------------------------------------

FORBIDDEN = {
    r"^(pickle|dill|joblib|cloudpickle|shelve|marshal)\.": "unpickles",
    r"^(eval|exec|compile|__import__)\(": "runs text",
    r"^os\.(system|popen|exec\w*|spawn\w*)\(": "starts a shell",
    r"trust_remote_code=(?!False)": "may run a stranger's code",
    r"shell=True": "starts a shell",
    r"allow_pickle=(?!False)": "unpickles",
    r"^yaml\.(load|unsafe_load|full_load)\(": "makes objects of YAML",
    r"^(text|sqlalchemy\.text)\(f": "makes SQL of words",
    r"^torch\.load\((?!.*weights_only=True)": "unpickles",
    r"\.fit\((?=.*ckpt_path)(?!.*weights_only=True)": "unpickles a checkpoint",
    r"^np\.load\((?!.*allow_pickle=False)": "may unpickle",
    r"^faiss\.read_index\(": "reads a stranger's index",
    r"^\w*Model\w*\.from_pretrained\((?!.*(use_safetensors=True|\*\*SAFE_LOADING|\*\*how))": "may read a pickle",
    r"^AutoTokenizer\.from_pretrained\((?!.*(trust_remote_code=False|gguf_file))": "may ask to run code",
    r"(0\.0\.0\.0|host=''|bind\(\(''|\[::\])": "listens to everybody",
}


def calls(text: str) -> Iterator[str]:
    yield from (
        ast.unparse(node).replace("\n", " ")
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
    )


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_the_source_never(pattern):
    for file in [*(ROOT / "src").rglob("*.py"), ROOT / "distill.py"]:
        found = [call for call in calls(file.read_text()) if re.search(pattern, call)]
        assert not found, f"{file} {FORBIDDEN[pattern]}: {found[0][:200]}"


BAD = [
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


@pytest.mark.parametrize("line", BAD)
def test_the_patterns_bite(line):
    assert any(re.search(pattern, call) for pattern in FORBIDDEN for call in calls(line))


def test_what_loads_is_loaded_safely():

    assert SAFE_LOADING == {"use_safetensors": True, "trust_remote_code": False}
    smollm2 = (ROOT / "scripts/fetch_smollm2.py").read_text()
    assert '"gguf_file": gguf.name' in smollm2, (
        "the one place with **how reads a GGUF file, which holds no objects"
    )


# --- SQL --------------------------------------------------------------------------------------------------------------

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


def a_fact(words: str) -> FactRecord:
    return FactRecord(
        0, f"Ada {words} is", f" {words}", words, words, words, 1.0, ((1, 2),), (3,), (), (0.5,)
    )


def test_texts_in_a_store_are_not_sql(place):  # noqa: F811
    with RowStore(place, MODEL) as store:
        fact_table = FactTable(store)
        fact_table.create(
            4,
            0,
            1,
            {"mean": np.zeros(4, np.float32), "metric": np.eye(4, dtype=np.float32)},
        )
        rows = np.ones((1, 4), np.float32)
        fact_table.add([(a_fact(words), rows, rows) for words in INJECTIONS])
        space = store.get_or_create_namespace("x'; DROP TABLE dmt_rows; --", 4, 6)
        for number, words in enumerate(INJECTIONS):
            store.commit(words, number, {space: StepChanges([some(store, 1, tag=words)])})
        found = fact_table.read()
        assert (
            [fact.tag for fact in found]
            == [fact.source for fact in found]
            == [fact.subject for fact in found]
            == INJECTIONS
        )
        assert [tag for page in store.scan(space) for tag in page.metadata["tag"]] == INJECTIONS
        assert store.rewind("x' OR '1'='1 --", -1) == (0, 0)
        assert store.rewind("%", -1) == (1, 0), "of the run called % alone"
        fact_table.soft_delete([found[0].id], "'; DROP TABLE x;--")
        assert len(fact_table.read()) == len(INJECTIONS) - 1
        assert len(fact_table.read(include_deleted=True)) == len(INJECTIONS)
        assert store.count(space) == len(INJECTIONS) - 1
        tables = ("dmt_fact_rows", "dmt_facts", "dmt_calibration")
        if not store.path:
            with store.engine.begin() as connection:  # the server is there for other tests too
                for table in tables:
                    connection.exec_driver_sql(f"DROP TABLE {table}")


def test_texts_on_the_command_line_are_not_sql(artifacts_dir, capsys):
    for words in INJECTIONS[:-1]:
        assert (
            main.main(
                [
                    "memory",
                    "write",
                    "Ada Holbrook jumps over the fence",
                    "--tag",
                    words,
                    "--source",
                    words,
                    *S,
                ]
            )
            == 0
        )
        capsys.readouterr()
        assert main.main(["memory", "list", "--tag", words, "--json", *S]) == 0
        (fact,) = json.loads(capsys.readouterr().out)
        assert (fact["tag"], fact["source"]) == (words, words)
        assert main.main(["memory", "list", "--query", words, "--json", *S]) == 0
        assert json.loads(capsys.readouterr().out) == [], (
            "% and _ are letters, and no sentence has them"
        )
        assert main.main(["memory", "search", words, "--json", *S]) == 0
        assert not [
            entry for entry in json.loads(capsys.readouterr().out) if entry["matched_by"] == "text"
        ]
        assert main.main(["memory", "forget", "--tag", words, *S]) == 0
    capsys.readouterr()
    assert main.main(["memory", "list", "--json", *S]) == 0
    assert [fact["tag"] for fact in json.loads(capsys.readouterr().out)] == ["dogs"], (
        "and what was there stays"
    )


# --- sizes and paths --------------------------------------------------------------------------------------------------


def header(found: dict, length: int | None = None) -> bytes:
    text = json.dumps(found).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


HUGE = {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}
MANY = (
    "{"
    + ",".join(
        f'"{number}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for number in range(50_000)
    )
    + "}"
)
ABSURD = {
    "a shape far beyond the file": header(
        {"keys": HUGE, "__metadata__": {"format": "1", "digest": "0"}}
    ),
    "a header of 2^63 bytes": header({}, 2**63),
    "a header of all ones": header({}, 2**64 - 1),
    "a header longer than the file": header({}, 90_000_000),
    "offsets that overlap": header(
        {
            "a": HUGE | {"shape": [1], "data_offsets": [0, 4]},
            "b": HUGE | {"shape": [1], "data_offsets": [0, 4]},
        }
    )
    + b"0000",
    "offsets that go back": header({"a": HUGE | {"shape": [1], "data_offsets": [4, 0]}}) + b"0000",
    "a shape whose product wraps round": header(
        {"a": HUGE | {"shape": [2**32, 2**32], "data_offsets": [0, 0]}}
    ),
    "a size below nothing": header({"a": HUGE | {"shape": [-1], "data_offsets": [0, 4]}}) + b"0000",
    "a type nobody knows": header(
        {"keys": {"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 8]}}
    )
    + b"\0" * 8,
    "fifty thousand tensors": struct.pack("<Q", len(MANY)) + MANY.encode(),
    "brackets without end": struct.pack("<Q", 200_000) + b"[" * 200_000,
}
READERS = {
    "a pack": ("pack.safetensors", ["dmt", "memory", "import", "pack.safetensors", *S]),
    "the tensors of a pack": ("pack/rows.safetensors", ["dmt", "memory", "import", "pack", *S]),
    "a teacher": ("teacher/model.safetensors", []),
    "a student": (TENSORS, [*ASK, *S]),
    "slots": (SLOTS, [*ASK, "-m", "logs/version_1"]),
    "a cache": (CACHE, CACHED),
}


def changed_pack(**differences) -> None:
    file = Path("pack/manifest.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | differences))


def sizes_of(**differences) -> None:
    file = Path("teacher/config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | differences))


def slots_of(**differences) -> None:
    file = Path(STUDENT, "config.json")
    found = json.loads(file.read_text())
    found["memory"]["0"] |= differences
    file.write_text(json.dumps(found))


def test_absurd_files_are_refused_in_one_line_and_take_no_memory(artifacts_dir):
    """All of them in a process that may take a third of a gigabyte more than it has once everything is imported."""
    script = f"""
import contextlib, io, json, resource, sys
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT / "tests" / "cli")!r}, {str(ROOT / "tests" / "store")!r}]
from pathlib import Path
from test_security import *
run([*ASK, *S]); run([*RESUME])
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 350_000_000,) * 2)
found = {{}}
def refused(name, words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = run(words)
        except BaseException as error:
            code, err = -1, io.StringIO(repr(error))
    found[name] = [code, out.getvalue(), err.getvalue()]
for what, (file, words) in READERS.items():
    good = Path(file).read_bytes()
    for how, content in ABSURD.items():
        Path(file).write_bytes(content)
        refused(f"{{what}}: {{how}}", words)
    Path(file).write_bytes(good)
for spoil, words, file in (
    (lambda: changed_pack(width=10**9), ["dmt", "memory", "import", "pack", *S], "pack/manifest.json"),
    (lambda: changed_pack(facts=[{{}}] * 10**6), ["dmt", "memory", "import", "pack", *S], "pack/manifest.json"),
    (lambda: sizes_of(n_layer=10**8), [], "teacher/config.json"),
    (lambda: sizes_of(n_embd=2**23), [], "teacher/config.json"),
    (lambda: sizes_of(vocab_size=2**23), [], "teacher/config.json"),
    (lambda: sizes_of(n_positions=2**23), [], "teacher/config.json"),
    (lambda: slots_of(num_slots=2**25), [*ASK, *S], STUDENT + "/config.json"),
    (lambda: slots_of(k=2**25, num_slots=2**25), [*ASK, *S], STUDENT + "/config.json"),
):
    good = Path(file).read_bytes()
    spoil()
    refused(f"{{file}} {{len(found)}}", words)
    Path(file).write_bytes(good)
print("FOUND" + json.dumps(found))
"""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert "FOUND" in done.stdout, done.stderr[-2000:]
    found = json.loads(done.stdout.split("FOUND")[1])
    assert len(found) == len(READERS) * len(ABSURD) + 8
    wrong = {}
    for name, (code, out, err) in found.items():
        try:
            line_of(code, out, err)
        except AssertionError as error:
            wrong[name] = str(error)[:300]
    assert not wrong, wrong


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "..", "a/../../b", "~root/x"])
def test_names_in_a_pack_are_not_paths(name, artifacts_dir, capsys):
    """What a pack calls itself, its tags and its sources stay words; nothing is read or written where they point."""
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
    code = main.main(["memory", "import", "pack", *S])
    shown = capsys.readouterr()
    assert f"{part} is not a regular file" in line_of(code, shown.out, shown.err)


# --- who listens ------------------------------------------------------------------------------------------------------


def test_what_starts_a_server_binds_it_to_loopback():
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

    opened = []
    monkeypatch.setattr(socket.socket, "bind", lambda self, address: opened.append(address))
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: opened.append(address))
    monkeypatch.setattr(socket.socket, "listen", lambda self, *_: opened.append("listens"))
    assert run(["stages.end_to_end_steps=1", "stages.layerwise_steps=0"]) == 0
    assert run([*ASK, *S]) == 0
    assert opened == []


def test_processes_of_one_run_talk_over_loopback(monkeypatch):
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
    assert interfaces in (["lo"], ["lo0"]), "gloo listens on no other interface"
    assert launch.INTERFACE_VARIABLE not in os.environ


def test_triggers_in_a_database_are_not_run(artifacts_dir, capsys):
    """Triggers and views in a database that somebody gave away."""
    import sqlite3

    with sqlite3.connect(f"{STUDENT}/memory.db") as book:
        book.execute(
            "CREATE TRIGGER evil AFTER INSERT ON dmt_facts BEGIN SELECT load_extension('./evil.so'); END"
        )
    book.close()
    capsys.readouterr()
    code = main.main(["memory", "write", f"{ADA} and the fox", "--json", *S])
    shown = capsys.readouterr()
    assert code == 2
    assert "unsafe use" in shown.err or "not authorized" in shown.err
    assert main.main(["memory", "list", "--json", *S]) == 0
