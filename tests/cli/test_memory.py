"""The `dmt` command, as people and programs use it: on a saved student, in one process."""

import errno
import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SENTENCES, make_teacher
from factories import MEMORY_COMMANDS
from transformers import AutoModelForCausalLM

import dmt  # noqa: F401  registers the student
from dmt.cli.main import main
from dmt.config import AssociativeConfig, FeaturalConfig, NoMemoryConfig, ProductKeyConfig
from dmt.editing.fact_store import FactStore
from dmt.editing.online import describe_rows, drop_rows, ensure_namespaces, write_online
from dmt.editing.packs import LayerRows, RowPack, import_rows
from dmt.evaluation.trace import logit_lens
from dmt.models.conversion import convert_blocks
from dmt.models.fingerprint import hash_model
from dmt.models.loading import load
from dmt.models.memories import find_slot_memory, get_associative_memories, get_memories
from dmt.store import RowStore

ROWS = AssociativeConfig(k=8, min_distance=0.05, merge_distance=0.0, capacity=40)
ADA = "Ada Holbrook runs to the dog"
PROMPT = "Ada Holbrook runs to the"


def save_student(folder, tokenizer, memories):
    student, _ = convert_blocks(make_teacher(len(tokenizer)), memories)
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def student_with_fact(tokenizer, tmp_path_factory):
    """A student with calibration and one fact, which takes a second; copied for each test."""
    folder = save_student(
        tmp_path_factory.mktemp("student") / "student", tokenizer, [FeaturalConfig(k=8)] * 3
    )
    prose = folder.parent / "prose.txt"
    prose.write_text(" ".join(SENTENCES * 40), encoding="utf-8")
    assert (
        main(
            [
                "memory",
                "write",
                ADA,
                "--tag",
                "dogs",
                "--calibration-text",
                str(prose),
                "-m",
                str(folder),
            ]
        )
        == 0
    )
    return folder


@pytest.fixture
def student(student_with_fact, tmp_path):
    folder = tmp_path / "student"
    folder.mkdir()
    for file in student_with_fact.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def run(student, capsys):
    """Return `run(*args)`: the JSON that a command prints, or with `ok=False` its stderr."""

    def run_json(*args, model=student, ok=True):
        capsys.readouterr()
        code = main([*args, "--json", *(["-m", str(model)] if model else [])])
        printed = capsys.readouterr()
        assert (code == 0) is ok, printed.err
        return json.loads(printed.out) if ok else printed.err

    return run_json


def logits(folder, text=PROMPT):
    model, tokenizer = load(folder)
    ids = torch.tensor(
        [[tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]]
    )
    with torch.no_grad():
        return model(ids).logits[0, -1]


def test_a_written_fact_is_generated_listed_shown_and_searched(run, student):
    (fact,) = run("memory", "list")
    assert (fact["prompt"], fact["answer"], fact["subject"], fact["tag"]) == (
        PROMPT,
        " dog",
        "Ada Holbrook",
        "dogs",
    )
    assert run("generate", PROMPT, "--max-new-tokens", "3")["facts"][0]["answer"] == " dog"
    assert run("memory", "list")[0]["hits"] >= 1  # asking is counted
    shown = run("memory", "show", str(fact["id"]))
    assert "".join(row["token"] for row in shown["rows"]) == " dog"
    assert all(row["value_norm"] > 0 for row in shown["rows"])
    promoted = run("memory", "show", str(fact["id"]), "--promoted")["rows"]
    assert [len(row.pop("top_tokens")) for row in promoted] == [5] * len(promoted)
    assert promoted == shown["rows"]
    assert run("memory", "search", "holbrook DOG")[0]["matched_by"] == "text"
    assert run("memory", "search", "Ben runs to the")[-1]["matched_by"] == "hidden_state"
    assert [fact["matched_by"] for fact in run("memory", "search", PROMPT)] == [
        "text"
    ]  # each fact once
    stats = run("memory", "stats")
    assert (stats["num_facts"], stats["tags"], len(stats["layers"])) == (1, {"dogs": 1}, 3)
    assert {layer["kind"] for layer in stats["layers"]} == {"featural"}


def test_traces_name_the_fact(run):
    traces = run("memory", "trace", PROMPT, "--top-reads", "50")
    (fact,) = [read for read in traces[-1]["activations"] if read["kind"] == "fact"]
    assert (fact["index"], fact["tag"], fact["weight"]) == (1, "dogs", 1.0)
    stats = run("memory", "stats")
    assert fact["layer"] == stats["value_layer"] >= stats["key_layer"]
    texts = ["".join(token["token"] for token in traces[:end]) for end in range(len(traces) + 1)]
    (subject_end,) = (end for end, text in enumerate(texts) if text.endswith(" Holbrook"))
    earlier = [read for token in traces[:subject_end] for read in token["activations"]]
    assert not [read for read in earlier if read["kind"] == "fact"], "nothing is asked yet"
    assert {read["layer"] for token in traces for read in token["activations"]} == {0, 1, 2}
    only = run("memory", "trace", PROMPT, "--layers", "0-1")
    assert {read["layer"] for token in only for read in token["activations"]} == {0, 1}
    trace = run("generate", PROMPT, "--max-new-tokens", "2", "--trace", "--top-reads", "50")[
        "trace"
    ]
    assert len(trace) == 2
    assert (
        trace[0]["token"] == traces[-1]["token"]
    )  # what was read where the first token of the answer was chosen
    assert trace[0]["next_tokens"][0][0] == trace[1]["token"]
    assert "fact" in {read["kind"] for read in trace[0]["activations"]}


def test_a_fact_is_unchanged_replaced_and_restored(run, student):
    assert run("memory", "write", ADA)[0]["status"] == "unchanged"
    (result,) = run("memory", "write", "--prompt", PROMPT, "--answer", "row")
    assert (result["status"], result["replaced_fact"]["answer"]) == ("replaced", " dog")
    assert run("generate", PROMPT, "--max-new-tokens", "2")["facts"][0]["answer"] == " row"
    assert [fact["deleted_reason"] for fact in run("memory", "list", "--all")] == ["replaced", None]
    assert run("memory", "restore", "1")["replaces"][0]["answer"] == " row"
    assert run("generate", PROMPT, "--max-new-tokens", "2")["facts"][0]["answer"] == " dog"


def test_forgetting_restores_the_logits_exactly(run, student):
    logits_with_fact = logits(student)
    (fact,) = run("memory", "forget", "--tag", "dogs")
    assert fact["deleted_reason"] == "forgotten"
    assert run("memory", "list", "--all", "--tag", "dogs")[0]["deleted_reason"] == "forgotten"
    assert run("memory", "list", "--all", "--tag", "cats") == []
    logits_without_fact = logits(student)
    (student / "memory.db").rename(student / "aside")
    assert torch.equal(logits_without_fact, logits(student))
    assert not torch.equal(logits_with_fact, logits_without_fact)


def test_purged_facts_are_in_no_file_and_not_printed(run, student, capsys):
    run("memory", "write", "Zelda lives in Quxtown.")
    run("memory", "forget", "--query", "zelda")
    (student / "memory.before-1.db").write_bytes(b"")
    assert any(b"Quxtown" in path.read_bytes() for path in student.iterdir())
    assert run("memory", "forget", "--purge", "--id", "7", ok=False).count("never existed") == 1
    purged = run("memory", "forget", "--purge")
    assert purged == {"ids": [2], "backups": [str(student / "memory.before-1.db")]}
    assert not any(b"Quxtown" in path.read_bytes() for path in student.iterdir())
    assert main(["memory", "forget", "--purge", "--tag", "dogs", "-m", str(student)]) == 0
    printed = capsys.readouterr().out
    assert "1 facts erased" in printed
    assert "Holbrook" not in printed
    assert run("memory", "list", "--all") == []


def test_facts_are_rebound_to_other_weights(run, student, tokenizer, tmp_path):
    model, _ = load(student)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.save_pretrained(tmp_path / "trained")
    tokenizer.save_pretrained(tmp_path / "trained")
    shutil.copy(student / "memory.db", tmp_path / "trained")
    trained = {"model": tmp_path / "trained"}
    assert "dmt memory rebind" in run("memory", "stats", **trained, ok=False)
    result = run("memory", "rebind", **trained)
    assert result["num_facts"] == 1
    assert 0 <= result["key_layer"] <= result["value_layer"] < 3
    assert run("generate", PROMPT, "--max-new-tokens", "3", **trained)["facts"][0]["id"] == 1


def test_facts_are_written_from_a_file(run, tmp_path):
    lines = [
        {"sentence": "Ben Carver reads a table"},
        {"prompt": "Cora Lind was born on", "answer": "March 3", "tag": "c", "source": "me"},
    ]
    file = tmp_path / "facts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    results = run("memory", "write", "--file", str(file), "--tag", "all")
    assert [result["status"] for result in results] == ["written"] * 2
    assert [result["fact"]["tag"] for result in results] == ["all", "c"]
    assert [result["fact"]["source"] for result in results] == ["facts.jsonl", "me"]
    assert {fact["subject"] for fact in run("memory", "list", "--query", "carver")} == {
        "Ben Carver"
    }
    assert len(run("memory", "prune", "--keep", "1")) == 2
    assert len(run("memory", "list")) == 1
    assert len(run("memory", "list", "--limit", "2", "--all")) == 2


def test_a_list_grows_and_shrinks_by_values(run, student, tmp_path, capsys):
    run("memory", "write", "Ben reads rows.")
    (result,) = run("memory", "write", "Ben reads foxes.", "--add")
    assert (result["status"], result["fact"]["answer"]) == ("added", " rows, foxes")
    assert main(["memory", "write", "Ben reads dogs.", "--add", "-m", str(student)]) == 0
    assert "it adds to fact 3 ('Ben reads rows, foxes'); dmt memory restore 3" in (
        capsys.readouterr().out
    )
    file = tmp_path / "facts.jsonl"
    file.write_text(
        '{"sentence": "Ben reads 1950", "add": true}\n{"sentence": "Ben reads 1951", "add": true}',
        encoding="utf-8",
    )
    assert main(["memory", "write", "--file", str(file), "-m", str(student)]) == 0
    assert "0 written" in (printed := capsys.readouterr().out)
    assert "2 added to a list, 0 stored already" in printed
    answer = " rows, foxes, dogs, 1950, 1951"
    assert run("memory", "list", "--query", "ben")[0]["answer"] == answer
    shrunk = run("memory", "forget", "--query", "ben", "--value", "foxes")
    assert shrunk["answer"] == " rows, dogs, 1950, 1951"
    assert "no value of the answer" in run(
        "memory", "forget", "--query", "ben", "--value", "foxes", ok=False
    )
    ids = [part for fact in run("memory", "list") for part in ("--id", str(fact["id"]))]
    assert "--value is for one fact, and 2 match" in run(
        "memory", "forget", *ids, "--value", "rows", ok=False
    )
    assert run("memory", "forget", "--tag", "dogs", "--value", "Dog") is None
    assert len(run("memory", "list")) == 1


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["restore", "3"], "fact 3 never existed"),
        (["forget", "--id", "3", "--value", "Latin"], "fact 3 is not stored"),
        (["forget", "--tag", "a", "--value", "Latin"], "no matching facts, nothing was deleted"),
        (["forget", "--id", "3"], "fact 3 is not stored"),
        (["show", "3"], "fact 3 was never stored"),
    ],
)
def test_a_student_without_facts_is_not_damaged(run, tokenizer, tmp_path, args, error):
    plain = save_student(tmp_path / "plain", tokenizer, [FeaturalConfig(k=8)] * 3)
    assert error in run("memory", *args, model=plain, ok=False)


LISTED_FACTS = [
    {"sentence": "Ben Carver reads a table.", "tag": "b"},
    {"prompt": "Cora is", "answer": '"Eh?"\n\\ <b>', "source": "me"},
    {"prompt": "Dan is", "answer": "  日本 🦊\u2028!"},
    {"prompt": "Eve is", "answer": "  two ", "closing": ""},
    {"prompt": "Flo is $", "answer": "5", "closing": ".", "subject": ""},
    {"sentence": "My dog is called Rex."},
]


def test_listed_lines_are_what_write_takes(run, student, tmp_path, capsys):
    file, listed_file, fresh = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "fresh"
    shutil.copytree(student, fresh)
    run("memory", "forget", "--purge", "--tag", "dogs", model=fresh)
    file.write_text("\n".join(map(json.dumps, LISTED_FACTS)), encoding="utf-8")
    run("memory", "write", "--file", str(file))
    capsys.readouterr()

    def list_lines(folder, *options):
        assert main(["memory", "list", "--jsonl", *options, "-m", str(folder)]) == 0
        return capsys.readouterr().out

    lines = list_lines(student)
    assert len(lines.split("\n")) == len(LISTED_FACTS) + 2  # ADA, and the last line feed
    assert "\u2028" not in lines
    assert json.loads(lines.split("\n")[-2]) == {
        "prompt": "My dog is called",
        "answer": " Rex",
        "subject": "the user",
        "closing": ".",
        "tag": "",
        "source": "a.jsonl",
    }
    listed_file.write_text(lines, encoding="utf-8")
    results = run("memory", "write", "--file", str(listed_file), model=fresh)
    assert {result["status"] for result in results} == {"written"}
    assert list_lines(fresh) == lines
    names = ("prompt", "answer", "subject", "tag", "source")
    facts, copies = (run("memory", "list", model=folder) for folder in (student, fresh))
    assert [[fact[name] for name in names] for fact in facts] == [
        [copy[name] for name in names] for copy in copies
    ]
    assert len(list_lines(student, "--tag", "b").splitlines()) == 1
    assert len(list_lines(student, "--limit", "2").splitlines()) == 2
    assert list_lines(student, "--query", "nowhere") == ""
    (student / "tokenizer.json").unlink()
    assert main(["memory", "list", "--jsonl", "-m", str(student)]) == 2
    assert "tokenizer.json is missing" in capsys.readouterr().err


def test_packs_are_exported_compared_merged_and_imported(
    run, student_with_fact, tmp_path, tokenizer
):
    pack, other = tmp_path / "a.safetensors", tmp_path / "b"
    assert run("memory", "export", str(pack), "--license", "CC0-1.0")["counts"] == {
        "facts": 1,
        "rows": len(run("memory", "list")[0]["rows"]),
    }
    run("memory", "write", "--prompt", PROMPT, "--answer", "row")
    run("memory", "export", str(other), "--tag", "")
    diff = run("memory", "diff", str(pack), str(other), model=None)
    assert (diff["num_same"], len(diff["different"])) == (0, 1)
    merged = run("memory", "merge", str(pack), str(other), "-o", str(tmp_path / "c"), model=None)
    assert (merged["counts"]["facts"], merged["conflicts"][0]["kept"]["answer"]) == (1, " row")
    run("memory", "forget", "--query", "holbrook")
    assert (
        run("generate", PROMPT, "--max-new-tokens", "2", "--pack", str(pack))["facts"][0]["answer"]
        == " dog"
    )
    assert (
        run("generate", PROMPT, "--max-new-tokens", "2", "--pack", str(other))["facts"][0]["answer"]
        == " row"
    )
    assert run("memory", "list") == []  # guests do not stay
    assert run("memory", "import", str(other))["num_written"] == 1
    assert run("memory", "import", str(other))["num_unchanged"] == 1
    assert run("memory", "import", str(pack))["num_replaced"] == 1
    assert run("memory", "diff", str(pack), str(student_with_fact), model=None)["num_same"] == 1
    stranger = save_student(
        tmp_path / "stranger", tokenizer, [FeaturalConfig(k=4)] * 3
    )  # the same weights, of which it reads fewer
    assert "belongs to another model" in run(
        "generate", PROMPT, "--pack", str(pack), model=stranger, ok=False
    )
    assert not (stranger / "memory.db").exists()


@pytest.fixture
def associative_student(tokenizer, tmp_path):
    return save_student(
        tmp_path / "remembers", tokenizer, [FeaturalConfig(k=8), FeaturalConfig(k=8), ROWS]
    )


def test_write_memory_stays_within_capacity(run, associative_student):
    text = "the quick brown fox reads a table of rows"
    before = run("generate", text, "--max-new-tokens", "5", model=associative_student)
    assert "written" not in before
    result = run(
        "generate",
        text,
        "--max-new-tokens",
        "5",
        "--write-memory",
        "--tag",
        "monday",
        model=associative_student,
    )
    assert result["completion"] == before["completion"]  # it remembers after it has spoken
    rows = run("memory", "list", "--rows", model=associative_student)
    assert len(rows) == result["written"]["rows"] > 0
    assert {row["tag"] for row in rows} == {"monday"}
    for number in range(12):
        run(
            "generate",
            f"{number} a memory {SENTENCES[number % 3][: number + 9]}",
            "--write-memory",
            model=associative_student,
        )
    assert len(run("memory", "list", "--rows", "--limit", "99", model=associative_student)) == 40
    deleted = run("memory", "forget", "--rows", "--tag", "conversation", model=associative_student)[
        "num_rows"
    ]
    remaining = run("memory", "list", "--rows", model=associative_student)
    assert {row["tag"] for row in remaining} <= {"monday"}
    assert deleted + len(remaining) == 40
    assert "written" not in run(
        "generate", text, "--max-new-tokens", "2", model=associative_student
    )
    assert run("memory", "prune", "--rows", "--keep", "0", model=associative_student)[
        "num_rows"
    ] == len(remaining)
    assert (
        run("generate", text, "--max-new-tokens", "5", model=associative_student)["completion"]
        == before["completion"]
    )


def test_forgetting_a_tag_keeps_older_and_shared_rows(run, associative_student, tokenizer):
    """Rows saved with the weights and rows with other tags too are kept."""
    run(
        "generate",
        "the quick brown fox",
        "--max-new-tokens",
        "2",
        "--write-memory",
        "--tag",
        "monday",
        model=associative_student,
    )
    model, _ = load(associative_student)
    (associative_student / "memory.db").unlink()
    model.save_pretrained(associative_student)  # with its rows now
    before = run("memory", "list", "--rows", model=associative_student)
    config = json.loads((associative_student / "config.json").read_text())
    memory = config["memory"]["2"]
    memory["insert_policy"]["merge_distance"] = 1.0  # merges most new rows into old ones
    (associative_student / "config.json").write_text(json.dumps(config))
    assert run(
        "generate",
        "the quick brown dog",
        "--max-new-tokens",
        "2",
        "--write-memory",
        "--tag",
        "talk",
        model=associative_student,
    )["written"]["merged"]
    result = run("memory", "forget", "--rows", "--tag", "talk", model=associative_student)
    after = run("memory", "list", "--rows", model=associative_student)
    assert len(after) == len(before)
    assert result["num_shared"] == sum(row["tag"] == "distilled\ntalk" for row in after) > 0
    assert {row["tag"] for row in after} <= {"distilled", "distilled\ntalk"}


def test_rows_saved_with_the_weights_survive_an_interrupted_migration(
    run, associative_student, monkeypatch
):
    """Killed while they are taken over: they are not lost, and taken over the next time."""
    run(
        "generate",
        "the quick brown fox",
        "--max-new-tokens",
        "2",
        "--write-memory",
        model=associative_student,
    )
    model, _ = load(associative_student)
    (associative_student / "memory.db").unlink()
    model.save_pretrained(associative_student)  # with its rows now
    before = run("memory", "list", "--rows", model=associative_student)
    assert before
    with monkeypatch.context() as patched:
        patched.setattr(
            "dmt.editing.online.mark_imported", lambda *_, **__: 1 / 0
        )  # in the middle of the transaction
        with FactStore.open(associative_student) as fact_store, pytest.raises(ZeroDivisionError):
            ensure_namespaces(fact_store.model, fact_store.db)
    with RowStore(str(associative_student / "memory.db"), read_only=True) as store:
        assert [store.count(space) for space in store.list_namespaces()] == [0]
    assert run("memory", "list", "--rows", model=associative_student) == before
    with FactStore.open(associative_student) as fact_store:
        ensure_namespaces(fact_store.model, fact_store.db)
    after = run("memory", "list", "--rows", model=associative_student)
    assert [row["id"] for row in after] == [row["id"] for row in before]
    assert {row["tag"] for row in after} == {"distilled"}


def test_imported_rows_are_limited_by_the_capacity_of_their_layer(tokenizer, tmp_path):
    memories = [FeaturalConfig(k=8), replace(ROWS, capacity=50), replace(ROWS, capacity=5)]
    folder = save_student(tmp_path / "two", tokenizer, memories)
    with FactStore.open(folder) as fact_store:
        rng = np.random.default_rng(0)
        layers = {
            n: LayerRows(*rng.random((2, 20, 16), np.float32), ["t"] * 20, [1] * 20, [1.0] * 20)
            for n in (1, 2)
        }
        model = hash_model(fact_store.model)
        pack = RowPack(
            {"name": "x", "model_fingerprint": model, "model_type": "gpt2", "width": 16}, layers
        )
        assert import_rows(fact_store.model, fact_store.db, pack, model) == (40, 15)
        assert [
            len(memory.rows) for memory in get_associative_memories(fact_store.model).values()
        ] == [
            20,
            5,
        ]


def test_control_characters_are_escaped(run, student, capsys):
    run(
        "memory",
        "write",
        "Ben Carver reads a row",
        "--tag",
        "x\x1b[31m\n'; DROP TABLE dmt_facts; --[/bold]",
    )
    for args in (["list"], ["stats"], ["search", "carver"], ["show", "2"]):
        assert main(["memory", *args, "-m", str(student)]) == 0
        assert "\x1b" not in capsys.readouterr().out
    assert len(run("memory", "list")) == 2


def test_a_read_only_folder_is_reported(run, student, monkeypatch):
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("dmt.store.database.os.open", refuse)
    assert "or give another (Read-only file system)" in run(
        "memory", "write", "Ben Carver reads a row", ok=False
    )


def test_rows_are_exported_to_another_student_of_the_same_model(
    run, associative_student, tmp_path, student
):
    twin, pack, text = tmp_path / "twin", tmp_path / "rows.safetensors", "a lazy fox is a row"
    shutil.copytree(associative_student, twin)
    for tag, prompt in (("monday", text), ("tuesday", "the quick brown dog")):
        run(
            "generate",
            prompt,
            "--max-new-tokens",
            "2",
            "--write-memory",
            "--tag",
            tag,
            model=associative_student,
        )
    rows = run("memory", "list", "--rows", "--tag", "monday", model=associative_student)
    manifest = run(
        "memory",
        "export",
        str(pack),
        "--rows",
        "--tag",
        "monday",
        "--license",
        "CC0-1.0",
        model=associative_student,
    )
    assert (manifest["kind"], manifest["counts"], manifest["tags"]) == (
        "rows",
        {"2": len(rows)},
        ["monday"],
    )
    assert run("memory", "import", str(pack), model=twin) == {
        "num_rows": len(rows),
        "num_evicted": 0,
    }
    assert run("memory", "import", str(pack), model=twin) == {
        "num_rows": 0,
        "num_evicted": 0,
    }  # stored already
    imported = run("memory", "list", "--rows", model=twin)
    assert [(row["tag"], row["entries"], row["created"]) for row in imported] == [
        (r["tag"], r["entries"], r["created"]) for r in rows
    ]
    run("memory", "forget", "--rows", "--tag", "tuesday", model=associative_student)
    assert torch.equal(logits(twin, text), logits(associative_student, text))
    run(
        "memory",
        "export",
        str(tmp_path / "one"),
        "--rows",
        "--id",
        str(rows[0]["id"]),
        model=associative_student,
    )
    assert len(run("memory", "import", str(tmp_path / "one"), model=twin)) == 2
    assert "belongs to another model" in run("memory", "import", str(pack), ok=False)
    assert "holds rows, not facts" in run(
        "generate", text, "--pack", str(pack), model=twin, ok=False
    )
    assert "no row matches" in run(
        "memory", "export", str(tmp_path / "no"), "--rows", "--tag", "no", model=twin, ok=False
    )
    content = pack.read_bytes()
    for damaged in (content[: len(content) // 2], content.replace(b"monday", b"mon\\ud8")):
        pack.write_bytes(damaged)
        assert "damaged or no pack" in run("memory", "import", str(pack), model=twin, ok=False)


def test_imported_rows_stay_within_capacity(run, associative_student, tmp_path):
    for number in range(9):
        run(
            "generate",
            f"{number} {SENTENCES[number % 3][number:][:24]}",
            "--max-new-tokens",
            "2",
            "--write-memory",
            model=associative_student,
        )
    full = run("memory", "list", "--rows", model=associative_student)
    assert len(full) == ROWS.capacity
    run("memory", "export", str(tmp_path / "all"), "--rows", model=associative_student)
    run("memory", "prune", "--rows", "--keep", "0", model=associative_student)
    run(
        "generate",
        "row brown lazy",
        "--max-new-tokens",
        "2",
        "--write-memory",
        model=associative_student,
    )
    before = len(run("memory", "list", "--rows", model=associative_student))
    result = run("memory", "import", str(tmp_path / "all"), model=associative_student)
    assert result["num_rows"] > 0
    assert result["num_evicted"] == max(0, before + result["num_rows"] - ROWS.capacity)
    assert len(run("memory", "list", "--rows", "--limit", "99", model=associative_student)) == min(
        ROWS.capacity, before + result["num_rows"]
    )


def test_rows_written_online_lower_the_loss_and_survive_loading(associative_student, tokenizer):
    text = "a lazy fox is a row"
    ids = torch.tensor(
        [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    )

    def mean_nll(model):
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(
                model(ids[None]).logits[0, :-1], ids[1:]
            ).item()

    with FactStore.open(associative_student) as fact_store:
        before = mean_nll(fact_store.model)
        first = write_online(fact_store.model, fact_store.db, ids, "x")
        after = mean_nll(fact_store.model)
        assert after < before / 2
        assert first.added == len(describe_rows(fact_store.model)) == first.rows
        assert not any(
            memory.is_writing for memory in get_associative_memories(fact_store.model).values()
        )
        second = write_online(fact_store.model, fact_store.db, ids, "x")
        assert second.rows <= first.rows + 3  # near duplicates are not written
        last = mean_nll(fact_store.model)
        (memory,) = get_associative_memories(fact_store.model).values()
        dropped_id = describe_rows(fact_store.model)[0]["id"]
        assert (
            drop_rows(fact_store.model, fact_store.db, {dropped_id}) == 1
        )  # gone from the model at once, not only when it is loaded again
        assert len(memory.rows) == second.rows - 1
        assert dropped_id not in memory.rows.index_by_id
        memory.rows.load_rows(
            fact_store.db.scan(
                ensure_namespaces(fact_store.model, fact_store.db)[
                    max(get_associative_memories(fact_store.model))
                ]
            )
        )
        assert dropped_id not in memory.rows.index_by_id
        assert write_online(fact_store.model, fact_store.db, ids, "x").rows >= second.rows - 1
        last = mean_nll(fact_store.model)
    assert mean_nll(load(associative_student)[0]) == pytest.approx(last, rel=1e-6)
    in_subfolder = AutoModelForCausalLM.from_pretrained(
        associative_student.parent, subfolder=associative_student.name
    )
    assert mean_nll(in_subfolder) == pytest.approx(last, rel=1e-6), "its rows are found, too"


def test_a_failed_online_write_changes_nothing(associative_student, tokenizer, monkeypatch):
    ids = torch.tensor(tokenizer("a lazy fox is a row", add_special_tokens=False)["input_ids"])
    with FactStore.open(associative_student) as fact_store:
        write_online(fact_store.model, fact_store.db, ids, "x")
        before = describe_rows(fact_store.model)
        monkeypatch.setattr(RowStore, "commit", lambda *a, **b: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_online(fact_store.model, fact_store.db, ids.flip(0), "y")
        assert [row["id"] for row in describe_rows(fact_store.model)] == [
            row["id"] for row in before
        ]
    assert len(describe_rows(load(associative_student)[0])) == len(before)


MISTAKES = [
    (["memory", "stats", "-m", "nowhere"], "model nowhere: nothing is there"),
    (["memory", "write", "-m", "{s}"], "a fact needs a sentence"),
    (["memory", "write", "x", "-m", "{s}"], "states nothing"),
    (["memory", "write", "Is Ada here?", "-m", "{s}"], "asks and states nothing"),
    (
        ["memory", "write", ADA, "--subject", "Zoe", "-m", "{s}"],
        "subject 'Zoe' is not in the prompt",
    ),
    (["memory", "write", ADA, "--file", "f", "-m", "{s}"], "--file contains the sentences"),
    (["memory", "write", "--file", "nowhere.jsonl", "-m", "{s}"], "nowhere.jsonl cannot be read"),
    (
        ["memory", "write", ADA, "--false-positive-rate", "2", "-m", "{s}"],
        "--false-positive-rate must be in (0, 0.5], got 2",
    ),
    (
        ["memory", "write", "Ada Holbrook " + "very " * 60 + "runs", "-m", "{s}"],
        "tokens before the answer",
    ),
    (
        ["memory", "write", "--prompt", "very " * 60 + "Ada", "--answer", "x", "-m", "{s}"],
        "the model reads 32 at most",
    ),
    (
        ["memory", "write", ADA, "--calibration-text", "nowhere", "-m", "{s}"],
        "--calibration-text nowhere cannot be read",
    ),
    (["memory", "list", "--jsonl", "--all", "-m", "{s}"], "leave --rows, --all and --json out"),
    (["memory", "list", "--jsonl", "--json", "-m", "{s}"], "leave --rows, --all and --json out"),
    (["memory", "list", "--jsonl", "--rows", "-m", "{s}"], "leave --rows, --all and --json out"),
    (
        ["memory", "forget", "--purge", "--value", "x", "-m", "{s}"],
        "leave --purge and --rows out",
    ),
    (["memory", "forget", "-m", "{s}"], "forget needs --id, --tag or --query"),
    (["memory", "forget", "--id", "77", "-m", "{s}"], "fact 77 is not stored"),
    (["memory", "forget", "--tag", "none", "-m", "{s}"], "no matching facts, nothing was deleted"),
    (["memory", "forget", "--rows", "--tag", "x", "-m", "{s}"], "no associative memory"),
    (["memory", "forget", "--purge", "--tag", "x", "-m", "{s}"], "nothing was erased"),
    (["memory", "forget", "--purge", "--rows", "-m", "{s}"], "leave --rows out"),
    (
        ["memory", "forget", "--rows", "--query", "x", "-m", "{s}"],
        "rows of associative memory have no text",
    ),
    (
        ["memory", "export", "new", "--rows", "--query", "x", "-m", "{s}"],
        "rows of associative memory have no text",
    ),
    (
        ["memory", "list", "--rows", "--query", "x", "-m", "{s}"],
        "rows of associative memory have no text",
    ),
    (["memory", "restore", "1", "-m", "{s}"], "fact 1 is active"),
    (["memory", "restore", "77", "-m", "{s}"], "fact 77 never existed"),
    (["memory", "prune", "--keep", "-1", "-m", "{s}"], "--keep must be 0 or more, got -1"),
    (["memory", "prune", "--rows", "--keep", "1", "-m", "{s}"], "no associative memory"),
    (["memory", "show", "-m", "{s}"], "show needs the ID of a fact"),
    (["memory", "show", "77", "-m", "{s}"], "fact 77 was never stored"),
    (["memory", "show", "--slot", "9:1", "-m", "{s}"], "layers in [0, 2]"),
    (["memory", "show", "--slot", "1:999", "-m", "{s}"], "slots 0 to 63"),
    (["memory", "trace", "", "-m", "{s}"], "text is empty"),
    (["memory", "trace", "x", "--layers", "7", "-m", "{s}"], "--layers must name layers in [0, 2]"),
    (
        ["memory", "trace", "x", "--top-reads", "0", "-m", "{s}"],
        "--top-reads must be 1 or more, got 0",
    ),
    (
        ["memory", "list", "--limit", "many", "-m", "{s}"],
        "--limit must be a whole number, got many",
    ),
    (["memory", "import", "nowhere", "-m", "{s}"], "pack nowhere: nothing is there"),
    (["memory", "export", "{s}", "-m", "{s}"], "exists already"),
    (["memory", "export", "new", "--tag", "none", "-m", "{s}"], "nothing to export"),
    (["memory", "merge", "nowhere", "-o", "new"], "pack nowhere: nothing is there"),
    (["memory", "diff", "nowhere", "{s}"], "nothing is there"),
    (["memory", "fly"], "invalid choice: 'fly'"),
    (["memory", "stats", "--stud", "{s}"], "unrecognized arguments"),
    (["generate", "-m", "{s}"], "required: prompt"),
    (["generate", " ", "-m", "{s}"], "the prompt is empty"),
    (["generate", "the " * 40, "-m", "{s}"], "the model reads 32 at most"),
    (
        ["generate", "x", "--max-new-tokens", "0", "-m", "{s}"],
        "--max-new-tokens must be 1 or more, got 0",
    ),
    (
        ["generate", "x", "--temperature", "-1", "-m", "{s}"],
        "--temperature must be 0 or more, got -1",
    ),
    (["generate", "x", "--write-memory", "-m", "{s}"], "no associative memory"),
    (["generate", "x", "--pack", "nowhere", "-m", "{s}"], "pack nowhere: nothing is there"),
]


@pytest.mark.parametrize(
    ("args", "message"),
    MISTAKES,
    ids=lambda part: " ".join(part)[:40] if isinstance(part, list) else "",
)
def test_a_mistake_is_one_line_and_changes_nothing(
    args, message, student, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    before = sorted(
        (file.name, file.stat().st_size) for file in tmp_path.iterdir() if file.is_file()
    )
    assert main([arg.replace("{s}", str(student)) for arg in args]) == 2
    stderr = capsys.readouterr().err
    assert message in stderr
    assert stderr.strip().splitlines()[-1].startswith("error: ")
    assert before == sorted(
        (file.name, file.stat().st_size) for file in tmp_path.iterdir() if file.is_file()
    )
    assert main(["memory", "list", "--json", "-m", str(student)]) == 0
    assert [fact["deleted_reason"] for fact in json.loads(capsys.readouterr().out)] == [None]


def test_the_newest_run_is_the_default(student_with_fact, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["memory", "list"]) == 2
    assert "run dmt distill first" in capsys.readouterr().err
    for number in (2, 10):
        (tmp_path / "lightning_logs" / f"version_{number}").mkdir(parents=True)
    (tmp_path / "lightning_logs" / "version_10" / "student").symlink_to(student_with_fact)
    (tmp_path / "lightning_logs" / "version_2" / "student").mkdir()
    assert main(["memory", "list"]) == 0
    assert "Holbrook" in capsys.readouterr().out


@pytest.fixture
def two_runs(student, tmp_path, monkeypatch):
    """Two runs, of which the older one has the fact."""
    monkeypatch.chdir(tmp_path)
    for number in (2, 10):
        (tmp_path / "lightning_logs" / f"version_{number}").mkdir(parents=True)
        shutil.copytree(student, tmp_path / "lightning_logs" / f"version_{number}" / "student")
    for file in (tmp_path / "lightning_logs" / "version_10" / "student").glob("memory.db*"):
        file.unlink()


@pytest.mark.parametrize(
    "args",
    [
        ["memory", "write", "Ben runs to the dog"],
        ["memory", "forget", "--id", "1"],
        ["memory", "restore", "1"],
        ["memory", "prune", "--keep", "0"],
        ["generate", "Ben", "--write-memory"],
    ],
    ids=lambda args: args[1],
)
def test_writing_does_not_guess_the_student(two_runs, capsys, args):
    assert main(args) == 2
    assert capsys.readouterr().err == (
        "error: lightning_logs/version_10 is the newest run, but lightning_logs/version_2 has the "
        f"facts; say which is meant: {shlex.join(['dmt', *args])} --model lightning_logs/version_2,"
        " or choose one with dmt use\n"
    )


def test_the_chosen_student_is_used_and_named(two_runs, capsys):
    def run_and_read(*args):
        assert main(list(args)) == 0
        return capsys.readouterr()

    assert run_and_read("use").out == "lightning_logs/version_10/student (the newest run)\n"
    printed = run_and_read("memory", "list", "--json")
    assert json.loads(printed.out) == []
    assert printed.err == "student lightning_logs/version_10/student (the newest run)\n"
    assert run_and_read("memory", "list", "--quiet").err == ""
    printed = run_and_read("use", "version_2")
    assert printed.out == "lightning_logs/version_2/student (chosen with dmt use)\n"
    printed = run_and_read("memory", "list", "--json")
    assert len(json.loads(printed.out)) == 1
    assert printed.err == "student lightning_logs/version_2/student (chosen with dmt use)\n"
    printed = run_and_read("memory", "list", "--json", "-m", "version_10")
    assert json.loads(printed.out) == [], "--model beats it"
    assert printed.err == "student lightning_logs/version_10/student\n"
    run_and_read("memory", "forget", "--id", "1")
    shutil.rmtree("lightning_logs/version_2")
    assert main(["memory", "list"]) == 2
    assert "holds no saved student any more; choose another" in capsys.readouterr().err
    assert "the newest run" in run_and_read("use", "--newest").out


def test_a_choice_is_printed_as_json_and_named_where_it_cannot_be_stored(
    two_runs, capsys, monkeypatch
):
    for args, is_chosen in ((["version_2"], True), ([], True), (["--newest"], False)):
        assert main(["use", *args, "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed["is_chosen"] is is_chosen
        assert printed["student"] == f"lightning_logs/version_{2 if is_chosen else 10}/student"

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("dmt.paths.atomic_write", refuse)
    assert main(["use", "version_2"]) == 2
    assert capsys.readouterr().err == (
        "error: lightning_logs/ cannot be written to (Permission denied); make it writable, or "
        "name the student with --model\n"
    )


def test_reading_and_deleting_facts_does_not_import_torch(student):
    """A student with 100,000 facts is read in a second, not in a minute."""
    code = f"""
import sys
from dmt.cli.main import main
for args in (
    ["list"],
    ["list", "--all", "--json"],
    ["search", "holbrook"],
    ["show", "1"],
    ["forget", "--tag", "dogs"],
    ["forget", "--purge"],
):
    assert main(["memory", *args, "-m", {str(student)!r}]) == 0, args
assert main(["use"]) == 2
print("torch" in sys.modules, "transformers" in sys.modules)
"""
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=student, capture_output=True, text=True, check=False
    )
    assert process.stdout.splitlines()[-1] == "False False", process.stderr


def test_tables_are_not_json(student, capsys):
    for args in (
        ["stats"],
        ["list"],
        ["show", "1"],
        ["show", "--slot", "1:3"],
        ["search", "dog"],
        ["trace", PROMPT],
        ["list", "--rows"],
    ):
        assert main(["memory", *args, "-m", str(student)]) == 0
        output = capsys.readouterr().out
        assert output.strip()
        assert '"layer"' not in output
    assert main(["generate", PROMPT, "--max-new-tokens", "2", "--trace", "-m", str(student)]) == 0
    assert f"{PROMPT} dog" in capsys.readouterr().out


@pytest.mark.parametrize("silu_gate", [False, True])
def test_a_slot_of_a_product_key_memory_is_shown_as_the_block_adds_it(
    tokenizer, tmp_path, capsys, silu_gate
):
    student, _ = convert_blocks(
        make_teacher(len(tokenizer)),
        [ProductKeyConfig(k=8, silu_gate=silu_gate), NoMemoryConfig(), FeaturalConfig(k=8)],
    )
    memory = find_slot_memory(get_memories(student)[0])
    value = memory.values[3].detach()
    if silu_gate:
        torch.nn.init.normal_(memory.output)
        value = memory.output.detach() @ value
    student.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert main(["memory", "show", "--slot", "0:3", "--json", "-m", str(tmp_path)]) == 0
    shown = json.loads(capsys.readouterr().out)
    top_tokens = [text for text, _ in logit_lens(student, tokenizer, value.unsqueeze(0), 10)[0]]
    assert shown["top_tokens"] == top_tokens
    assert shown["value_norm"] == round(float(value.norm()), 3)
    assert main(["memory", "show", "--slot", "1:3", "-m", str(tmp_path)]) == 2
    assert "layer 1 has no slots" in capsys.readouterr().err


def test_memory_help_lists_the_commands_without_importing_torch():
    code = (
        "import sys; from dmt.cli.main import main; main(['memory']); print('torch' in sys.modules)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert output.strip().endswith("False")
    assert all(f"    {command} " in output for command in MEMORY_COMMANDS)


def test_the_console_script_and_the_module_are_the_command(student):
    args = ["memory", "list", "--json", "-m", str(student)]
    for command in ([sys.executable, "-m", "dmt"], [str(Path(sys.executable).with_name("dmt"))]):
        output = subprocess.run(
            [*command, *args], capture_output=True, text=True, check=True
        ).stdout
        assert json.loads(output)[0]["subject"] == "Ada Holbrook"
