"""The `dmt` command, as people and programs use it: on a saved student, in one process."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SENTENCES, make_teacher

import dmt  # noqa: F401  registers the student
from dmt.cli.main import MEMORY_COMMANDS, main
from dmt.config import MemoryConfig
from dmt.editing.fact_store import load_student, open_fact_store
from dmt.editing.online import describe_rows, drop_rows, ensure_namespaces, write_online
from dmt.editing.packs import LayerRows, RowPack, import_rows
from dmt.models.conversion import convert, get_associative_memories
from dmt.models.fingerprint import hash_model
from dmt.store import RowStore

ROWS = MemoryConfig(kind="associative", k=8, min_distance=0.05, merge_distance=0.0, capacity=40)
ADA = "Ada Holbrook runs to the dog"
ASKED = "Ada Holbrook runs to the"


def saved(folder, tokenizer, memories):
    student, _ = convert(make_teacher(len(tokenizer)), memories)
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tokenizer, tmp_path_factory):
    """A student whose book has been begun, which takes a second; copied for each test."""
    folder = saved(tmp_path_factory.mktemp("made") / "student", tokenizer, [MemoryConfig(k=8)] * 3)
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
                "--calibrate-on",
                str(prose),
                "-s",
                str(folder),
            ]
        )
        == 0
    )
    return folder


@pytest.fixture
def student(made, tmp_path):
    folder = tmp_path / "student"
    folder.mkdir()
    for file in made.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def run(student, capsys):
    """`run(*words)`: the JSON that the command answers, after a success."""

    def ask(*words, place=student, ok=True):
        capsys.readouterr()
        code = main([*words, "--json", *(["-s", str(place)] if place else [])])
        said = capsys.readouterr()
        assert (code == 0) is ok, said.err
        return json.loads(said.out) if ok else said.err

    return ask


def logits(folder, text=ASKED):
    model, tokenizer = load_student(folder)
    ids = torch.tensor(
        [[tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]]
    )
    with torch.no_grad():
        return model(ids).logits[0, -1]


def test_what_is_written_is_said_listed_shown_and_found(run, student):
    (fact,) = run("memory", "list")
    assert (fact["prompt"], fact["answer"], fact["subject"], fact["tag"]) == (
        ASKED,
        " dog",
        "Ada Holbrook",
        "dogs",
    )
    assert run("ask", ASKED, "--tokens", "3")["facts"][0]["answer"] == " dog"
    assert run("memory", "list")[0]["answered"] >= 1  # asking is counted
    shown = run("memory", "show", str(fact["id"]))
    assert "".join(part["says"] for part in shown["parts"]) == " dog"
    assert all(part["length"] > 0 for part in shown["parts"])
    assert run("memory", "search", "holbrook DOG")[0]["by"] == "words"
    assert run("memory", "search", "Ben runs to the")[-1]["by"] == "state"
    assert [each["by"] for each in run("memory", "search", ASKED)] == ["words"]  # each fact once
    stats = run("memory", "stats")
    assert (stats["facts"], stats["tags"], len(stats["layers"])) == (1, {"dogs": 1}, 3)
    assert {layer["memory"] for layer in stats["layers"]} == {"featural"}


def test_read_and_trace_name_the_fact(run):
    reads = run("memory", "read", ASKED, "--most", "50")
    (fact,) = [read for read in reads[-1]["reads"] if read["kind"] == "fact"]
    assert (fact["number"], fact["tag"], fact["weight"]) == (1, "dogs", 1.0)
    where = run("memory", "stats")
    assert fact["layer"] == where["answers"] != where["listens"]
    assert not [read for token in reads[:-1] for read in token["reads"] if read["kind"] == "fact"]
    assert {read["layer"] for token in reads for read in token["reads"]} == {0, 1, 2}
    only = run("memory", "read", ASKED, "--layers", "0-1")
    assert {read["layer"] for token in only for read in token["reads"]} == {0, 1}
    trace = run("ask", ASKED, "--tokens", "2", "--trace", "--most", "50")["trace"]
    assert len(trace) == 2
    assert (
        trace[0]["token"] == reads[-1]["token"]
    )  # what was read where the first token of the answer was chosen
    assert trace[0]["nexts"][0][0] == trace[1]["token"]
    assert "fact" in {read["kind"] for read in trace[0]["reads"]}


def test_the_same_again_another_answer_and_back(run, student):
    assert run("memory", "write", ADA)[0]["what"] == "known"
    (outcome,) = run("memory", "write", "--prompt", ASKED, "--answer", "row")
    assert (outcome["what"], outcome["old"]["answer"]) == ("replaced", " dog")
    assert run("ask", ASKED, "--tokens", "2")["facts"][0]["answer"] == " row"
    assert [fact["gone"] for fact in run("memory", "list", "--all")] == ["replaced", None]
    assert run("memory", "restore", "1")["replaces"][0]["answer"] == " row"
    assert run("ask", ASKED, "--tokens", "2")["facts"][0]["answer"] == " dog"


def test_forgotten_means_as_before_to_the_last_bit(run, student):
    told = logits(student)
    (gone,) = run("memory", "forget", "--tag", "dogs")
    assert gone["gone"] == "forgotten"
    assert run("memory", "list", "--all", "--tag", "dogs")[0]["gone"] == "forgotten"
    assert run("memory", "list", "--all", "--tag", "cats") == []
    forgotten = logits(student)
    (student / "memory.db").rename(student / "aside")
    assert torch.equal(forgotten, logits(student))
    assert not torch.equal(told, forgotten)


def test_a_file_of_facts(run, tmp_path):
    lines = [
        {"sentence": "Ben Carver reads a table"},
        {"prompt": "Cora Lind was born on", "answer": "March 3", "tag": "c", "source": "me"},
    ]
    file = tmp_path / "facts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    outcomes = run("memory", "write", "--file", str(file), "--tag", "all")
    assert [each["what"] for each in outcomes] == ["written"] * 2
    assert [each["fact"]["tag"] for each in outcomes] == ["all", "c"]
    assert [each["fact"]["source"] for each in outcomes] == ["facts.jsonl", "me"]
    assert {fact["subject"] for fact in run("memory", "list", "--query", "carver")} == {
        "Ben Carver"
    }
    assert len(run("memory", "evict", "--keep", "1")) == 2
    assert len(run("memory", "list")) == 1
    assert len(run("memory", "list", "--limit", "2", "--all")) == 2


def test_packs_go_from_one_student_to_another(run, made, tmp_path, tokenizer):
    pack, other = tmp_path / "a.safetensors", tmp_path / "b"
    assert run("memory", "export", str(pack), "--licence", "CC0-1.0")["counts"] == {
        "facts": 1,
        "rows": len(run("memory", "list")[0]["rows"]),
    }
    run("memory", "write", "--prompt", ASKED, "--answer", "row")
    run("memory", "export", str(other), "--tag", "")
    found = run("memory", "diff", str(pack), str(other), place=None)
    assert (found["same"], len(found["different"])) == (0, 1)
    merged = run("memory", "merge", str(pack), str(other), "-o", str(tmp_path / "c"), place=None)
    assert (merged["counts"]["facts"], merged["conflicts"][0]["kept"]["answer"]) == (1, " row")
    run("memory", "forget", "--query", "holbrook")
    assert run("ask", ASKED, "--tokens", "2", "--pack", str(pack))["facts"][0]["answer"] == " dog"
    assert run("ask", ASKED, "--tokens", "2", "--pack", str(other))["facts"][0]["answer"] == " row"
    assert run("memory", "list") == []  # guests do not stay
    assert run("memory", "import", str(other))["written"] == 1
    assert run("memory", "import", str(other))["known"] == 1
    assert run("memory", "import", str(pack))["replaced"] == 1
    assert run("memory", "diff", str(pack), str(made), place=None)["same"] == 1
    stranger = saved(
        tmp_path / "stranger", tokenizer, [MemoryConfig(k=4)] * 3
    )  # the same weights, of which it reads fewer
    assert "belongs to another model" in run(
        "ask", ASKED, "--pack", str(pack), place=stranger, ok=False
    )
    assert not (stranger / "memory.db").exists()


@pytest.fixture
def rememberer(tokenizer, tmp_path):
    return saved(tmp_path / "remembers", tokenizer, [MemoryConfig(k=8), MemoryConfig(k=8), ROWS])


def test_a_conversation_is_remembered_within_capacity(run, rememberer):
    text = "the quick brown fox reads a table of rows"
    before = run("ask", text, "--tokens", "5", place=rememberer)
    assert "remembered" not in before
    found = run("ask", text, "--tokens", "5", "--remember", "--tag", "monday", place=rememberer)
    assert found["answer"] == before["answer"]  # it remembers after it has spoken
    rows = run("memory", "list", "--rows", place=rememberer)
    assert len(rows) == found["remembered"]["rows"] > 0
    assert {row["tag"] for row in rows} == {"monday"}
    for number in range(12):
        run(
            "ask",
            f"{number} a memory {SENTENCES[number % 3][: number + 9]}",
            "--remember",
            place=rememberer,
        )
    assert len(run("memory", "list", "--rows", "--limit", "99", place=rememberer)) == 40
    gone = run("memory", "forget", "--rows", "--tag", "conversation", place=rememberer)["rows"]
    left = run("memory", "list", "--rows", place=rememberer)
    assert {row["tag"] for row in left} <= {"monday"}
    assert gone + len(left) == 40
    assert "remembered" not in run("ask", text, "--tokens", "2", place=rememberer)
    assert run("memory", "evict", "--rows", "--keep", "0", place=rememberer)["rows"] == len(left)
    assert run("ask", text, "--tokens", "5", place=rememberer)["answer"] == before["answer"]


def test_what_was_there_before_a_conversation_outlives_it(run, rememberer, tokenizer):
    """Rows that came with the weights, and those in which something else is too, stay when a conversation is forgotten."""
    run(
        "ask",
        "the quick brown fox",
        "--tokens",
        "2",
        "--remember",
        "--tag",
        "monday",
        place=rememberer,
    )
    model, _ = load_student(rememberer)
    (rememberer / "memory.db").unlink()
    model.save_pretrained(rememberer)  # with its rows now
    before = run("memory", "list", "--rows", place=rememberer)
    config = json.loads((rememberer / "config.json").read_text())
    config["memory"]["2"]["rows"]["policy"]["recombine"] = (
        1.0  # much of what is read is merged into rows that are there
    )
    (rememberer / "config.json").write_text(json.dumps(config))
    assert run(
        "ask",
        "the quick brown dog",
        "--tokens",
        "2",
        "--remember",
        "--tag",
        "talk",
        place=rememberer,
    )["remembered"]["merged"]
    done = run("memory", "forget", "--rows", "--tag", "talk", place=rememberer)
    after = run("memory", "list", "--rows", place=rememberer)
    assert len(after) == len(before)
    assert done["shared"] == sum(row["tag"] == "distilled\ntalk" for row in after) > 0
    assert {row["tag"] for row in after} <= {"distilled", "distilled\ntalk"}


def test_rows_of_the_weights_count_until_all_of_them_are_in_the_book(run, rememberer, monkeypatch):
    """Killed while they are taken over: they are not lost, and taken over the next time."""
    run("ask", "the quick brown fox", "--tokens", "2", "--remember", place=rememberer)
    model, _ = load_student(rememberer)
    (rememberer / "memory.db").unlink()
    model.save_pretrained(rememberer)  # with its rows now
    before = run("memory", "list", "--rows", place=rememberer)
    assert before
    with monkeypatch.context() as patched:
        patched.setattr(
            "dmt.editing.online.mark_imported", lambda *_, **__: 1 / 0
        )  # in the middle of the transaction
        with open_fact_store(rememberer) as book, pytest.raises(ZeroDivisionError):
            ensure_namespaces(book.model, book.db)
    with RowStore(str(rememberer / "memory.db"), read_only=True) as store:
        assert [store.count(space) for space in store.list_namespaces()] == [0]
    assert run("memory", "list", "--rows", place=rememberer) == before
    with open_fact_store(rememberer) as book:
        ensure_namespaces(book.model, book.db)
    after = run("memory", "list", "--rows", place=rememberer)
    assert [row["row"] for row in after] == [row["row"] for row in before]
    assert {row["tag"] for row in after} == {"distilled"}


def test_rows_taken_in_are_bounded_by_the_capacity_of_their_own_layer(tokenizer, tmp_path):
    memories = [MemoryConfig(k=8), replace(ROWS, capacity=50), replace(ROWS, capacity=5)]
    folder = saved(tmp_path / "two", tokenizer, memories)
    with open_fact_store(folder) as book:
        rng = np.random.default_rng(0)
        layers = {
            n: LayerRows(*rng.random((2, 20, 16), np.float32), ["t"] * 20, [1] * 20, [1.0] * 20)
            for n in (1, 2)
        }
        model = hash_model(book.model)
        pack = RowPack({"name": "x", "model": model, "model_type": "gpt2", "width": 16}, layers)
        assert import_rows(book.model, book.db, pack, model) == (40, 15)
        assert [len(memory.rows) for memory in get_associative_memories(book.model).values()] == [
            20,
            5,
        ]


def test_control_characters_are_shown_and_not_obeyed(run, student, capsys):
    run(
        "memory",
        "write",
        "Ben Carver reads a row",
        "--tag",
        "x\x1b[31m\n'; DROP TABLE dmt_facts; --[/bold]",
    )
    for words in (["list"], ["stats"], ["search", "carver"], ["show", "2"]):
        assert main(["memory", *words, "-s", str(student)]) == 0
        said = capsys.readouterr().out
        assert "\x1b" not in said
    assert len(run("memory", "list")) == 2


def test_a_folder_that_cannot_be_written_to_is_told(run, student, monkeypatch):
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("dmt.store.database.os.open", refuse)
    assert "or give another (Read-only file system)" in run(
        "memory", "write", "Ben Carver reads a row", ok=False
    )


def test_rows_are_given_to_another_student_of_the_same_model(run, rememberer, tmp_path, student):
    twin, pack, text = tmp_path / "twin", tmp_path / "rows.safetensors", "a lazy fox is a row"
    shutil.copytree(rememberer, twin)
    for tag, said in (("monday", text), ("tuesday", "the quick brown dog")):
        run("ask", said, "--tokens", "2", "--remember", "--tag", tag, place=rememberer)
    rows = run("memory", "list", "--rows", "--tag", "monday", place=rememberer)
    made = run(
        "memory",
        "export",
        str(pack),
        "--rows",
        "--tag",
        "monday",
        "--licence",
        "CC0-1.0",
        place=rememberer,
    )
    assert (made["kind"], made["counts"], made["tags"]) == ("rows", {"2": len(rows)}, ["monday"])
    assert run("memory", "import", str(pack), place=twin) == {"rows": len(rows), "left": 0}
    assert run("memory", "import", str(pack), place=twin) == {
        "rows": 0,
        "left": 0,
    }  # they are there
    there = run("memory", "list", "--rows", place=twin)
    assert [(row["tag"], row["entries"], row["created"]) for row in there] == [
        (r["tag"], r["entries"], r["created"]) for r in rows
    ]
    run("memory", "forget", "--rows", "--tag", "tuesday", place=rememberer)
    assert torch.equal(logits(twin, text), logits(rememberer, text))
    run(
        "memory",
        "export",
        str(tmp_path / "one"),
        "--rows",
        "--id",
        str(rows[0]["row"]),
        place=rememberer,
    )
    assert len(run("memory", "import", str(tmp_path / "one"), place=twin)) == 2
    assert "belongs to another model" in run("memory", "import", str(pack), ok=False)
    assert "holds rows, not facts" in run("ask", text, "--pack", str(pack), place=twin, ok=False)
    assert "no row is like that" in run(
        "memory", "export", str(tmp_path / "no"), "--rows", "--tag", "no", place=twin, ok=False
    )
    whole = pack.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole.replace(b"monday", b"mon\\ud8")):
        pack.write_bytes(damaged)
        assert "damaged or no pack" in run("memory", "import", str(pack), place=twin, ok=False)


def test_rows_taken_in_stay_within_capacity(run, rememberer, tmp_path):
    for number in range(9):
        run(
            "ask",
            f"{number} {SENTENCES[number % 3][number:][:24]}",
            "--tokens",
            "2",
            "--remember",
            place=rememberer,
        )
    full = run("memory", "list", "--rows", place=rememberer)
    assert len(full) == ROWS.capacity
    run("memory", "export", str(tmp_path / "all"), "--rows", place=rememberer)
    run("memory", "evict", "--rows", "--keep", "0", place=rememberer)
    run("ask", "row brown lazy", "--tokens", "2", "--remember", place=rememberer)
    before = len(run("memory", "list", "--rows", place=rememberer))
    done = run("memory", "import", str(tmp_path / "all"), place=rememberer)
    assert done["rows"] > 0
    assert done["left"] == max(0, before + done["rows"] - ROWS.capacity)
    assert len(run("memory", "list", "--rows", "--limit", "99", place=rememberer)) == min(
        ROWS.capacity, before + done["rows"]
    )


def test_what_was_remembered_is_expected_and_survives_loading(rememberer, tokenizer):
    text = "a lazy fox is a row"
    ids = torch.tensor(
        [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    )

    def nats(model):
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(
                model(ids[None]).logits[0, :-1], ids[1:]
            ).item()

    with open_fact_store(rememberer) as book:
        before = nats(book.model)
        done = write_online(book.model, book.db, ids, "x")
        after = nats(book.model)
        assert after < before / 2
        assert done.added == len(describe_rows(book.model)) == done.rows
        assert not any(memory.writing for memory in get_associative_memories(book.model).values())
        again = write_online(book.model, book.db, ids, "x")
        assert again.rows <= done.rows + 3  # what is known is not written again
        last = nats(book.model)
        (memory,) = get_associative_memories(book.model).values()
        some = describe_rows(book.model)[0]["row"]
        assert (
            drop_rows(book.model, book.db, {some}) == 1
        )  # gone from the model at once, not only when it is loaded again
        assert len(memory.rows) == again.rows - 1
        assert some not in memory.rows.index_by_id
        memory.rows.load_rows(
            book.db.scan(
                ensure_namespaces(book.model, book.db)[max(get_associative_memories(book.model))]
            )
        )
        assert some not in memory.rows.index_by_id
        assert write_online(book.model, book.db, ids, "x").rows >= again.rows - 1
        last = nats(book.model)
    assert nats(load_student(rememberer)[0]) == pytest.approx(last, rel=1e-6)


def test_remembering_that_fails_changes_nothing(rememberer, tokenizer, monkeypatch):
    ids = torch.tensor(tokenizer("a lazy fox is a row", add_special_tokens=False)["input_ids"])
    with open_fact_store(rememberer) as book:
        write_online(book.model, book.db, ids, "x")
        before = describe_rows(book.model)
        monkeypatch.setattr(RowStore, "commit", lambda *a, **b: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_online(book.model, book.db, ids.flip(0), "y")
        assert [row["row"] for row in describe_rows(book.model)] == [row["row"] for row in before]
    assert len(describe_rows(load_student(rememberer)[0])) == len(before)


MISTAKES = [
    (["memory", "stats", "-s", "nowhere"], "--student nowhere: nothing is there"),
    (["memory", "write", "-s", "{s}"], "a fact needs a sentence"),
    (["memory", "write", "x", "-s", "{s}"], "states nothing"),
    (["memory", "write", "Is Ada here?", "-s", "{s}"], "asks and states nothing"),
    (
        ["memory", "write", ADA, "--subject", "Zoe", "-s", "{s}"],
        "--subject 'Zoe' is not in the prompt",
    ),
    (["memory", "write", ADA, "--file", "f", "-s", "{s}"], "--file has its own sentences"),
    (["memory", "write", "--file", "nowhere.jsonl", "-s", "{s}"], "nowhere.jsonl cannot be read"),
    (["memory", "write", ADA, "--rate", "2", "-s", "{s}"], "--rate must be in (0, 0.5], got 2"),
    (
        ["memory", "write", "Ada Holbrook " + "very " * 60 + "runs", "-s", "{s}"],
        "tokens before the answer",
    ),
    (
        ["memory", "write", "--prompt", "very " * 60 + "Ada", "--answer", "x", "-s", "{s}"],
        "the model reads 32 at most",
    ),
    (
        ["memory", "write", ADA, "--calibrate-on", "nowhere", "-s", "{s}"],
        "--calibrate-on nowhere cannot be read",
    ),
    (["memory", "forget", "-s", "{s}"], "forget what?"),
    (["memory", "forget", "--id", "77", "-s", "{s}"], "fact 77 is not there"),
    (["memory", "forget", "--tag", "none", "-s", "{s}"], "no fact is like that"),
    (["memory", "forget", "--rows", "--tag", "x", "-s", "{s}"], "no associative memory"),
    (
        ["memory", "forget", "--rows", "--query", "x", "-s", "{s}"],
        "rows of associative memory have no words",
    ),
    (
        ["memory", "export", "new", "--rows", "--query", "x", "-s", "{s}"],
        "rows of associative memory have no words",
    ),
    (
        ["memory", "list", "--rows", "--query", "x", "-s", "{s}"],
        "rows of associative memory have no words",
    ),
    (["memory", "restore", "1", "-s", "{s}"], "fact 1 is there"),
    (["memory", "restore", "77", "-s", "{s}"], "fact 77 was never there"),
    (["memory", "evict", "--keep", "-1", "-s", "{s}"], "--keep must be 0 or more, got -1"),
    (["memory", "evict", "--rows", "--keep", "1", "-s", "{s}"], "no associative memory"),
    (["memory", "show", "-s", "{s}"], "show what?"),
    (["memory", "show", "77", "-s", "{s}"], "fact 77 was never there"),
    (["memory", "show", "--slot", "9:1", "-s", "{s}"], "layers in [0, 2]"),
    (["memory", "show", "--slot", "1:999", "-s", "{s}"], "slots 0 to 63"),
    (["memory", "read", "", "-s", "{s}"], "text is empty"),
    (["memory", "read", "x", "--layers", "7", "-s", "{s}"], "--layers must name layers in [0, 2]"),
    (["memory", "read", "x", "--most", "0", "-s", "{s}"], "0 is not 1 or more"),
    (["memory", "list", "--limit", "many", "-s", "{s}"], "invalid _positive value"),
    (["memory", "import", "nowhere", "-s", "{s}"], "pack nowhere: nothing is there"),
    (["memory", "export", "{s}", "-s", "{s}"], "is there already"),
    (["memory", "export", "new", "--tag", "none", "-s", "{s}"], "nothing to export"),
    (["memory", "merge", "nowhere", "-o", "new"], "pack nowhere: nothing is there"),
    (["memory", "diff", "nowhere", "{s}"], "nothing is there"),
    (["memory", "fly"], "invalid choice: 'fly'"),
    (["memory", "stats", "--stud", "{s}"], "unrecognized arguments"),
    (["ask", "-s", "{s}"], "required: prompt"),
    (["ask", " ", "-s", "{s}"], "the prompt is empty"),
    (["ask", "the " * 40, "-s", "{s}"], "the model reads 32 at most"),
    (["ask", "x", "--tokens", "0", "-s", "{s}"], "--tokens must be at least 1"),
    (["ask", "x", "--temperature", "-1", "-s", "{s}"], "--temperature at least 0"),
    (["ask", "x", "--remember", "-s", "{s}"], "no associative memory"),
    (["ask", "x", "--pack", "nowhere", "-s", "{s}"], "pack nowhere: nothing is there"),
]


@pytest.mark.parametrize(
    ("words", "told"),
    MISTAKES,
    ids=lambda each: " ".join(each)[:40] if isinstance(each, list) else "",
)
def test_a_mistake_is_one_line_and_changes_nothing(
    words, told, student, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    before = sorted(
        (file.name, file.stat().st_size) for file in tmp_path.iterdir() if file.is_file()
    )
    assert main([word.replace("{s}", str(student)) for word in words]) == 2
    said = capsys.readouterr()
    assert told in said.err
    assert said.err.strip().splitlines()[-1].startswith("error: ")
    assert before == sorted(
        (file.name, file.stat().st_size) for file in tmp_path.iterdir() if file.is_file()
    )
    assert main(["memory", "list", "--json", "-s", str(student)]) == 0
    assert [fact["gone"] for fact in json.loads(capsys.readouterr().out)] == [None]


def test_without_a_name_the_newest_run_is_meant(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["memory", "list"]) == 2
    assert "run python distill.py first" in capsys.readouterr().err
    for number in (2, 10):
        (tmp_path / "lightning_logs" / f"version_{number}").mkdir(parents=True)
    (tmp_path / "lightning_logs" / "version_10" / "student").symlink_to(made)
    (tmp_path / "lightning_logs" / "version_2" / "student").mkdir()
    assert main(["memory", "list"]) == 0
    assert "Holbrook" in capsys.readouterr().out


def test_tables_are_for_people(student, capsys):
    for words in (
        ["stats"],
        ["list"],
        ["show", "1"],
        ["show", "--slot", "1:3"],
        ["search", "dog"],
        ["read", ASKED],
        ["list", "--rows"],
    ):
        assert main(["memory", *words, "-s", str(student)]) == 0
        said = capsys.readouterr().out
        assert said.strip()
        assert '"layer"' not in said
    assert main(["ask", ASKED, "--tokens", "2", "--trace", "-s", str(student)]) == 0
    assert f"{ASKED} dog" in capsys.readouterr().out


def test_help_names_every_verb_and_costs_no_torch():
    code = (
        "import sys; from dmt.cli.main import main; main(['memory']); print('torch' in sys.modules)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert said.strip().endswith("False")
    assert all(f"    {verb} " in said for verb in MEMORY_COMMANDS)
    for verb in MEMORY_COMMANDS:
        with pytest.raises(SystemExit) as left:
            main(["memory", verb, "--help"])
        assert left.value.code == 0


def test_the_console_script_and_the_module_are_the_command(student):
    words = ["memory", "list", "--json", "-s", str(student)]
    for command in ([sys.executable, "-m", "dmt"], [str(Path(sys.executable).with_name("dmt"))]):
        said = subprocess.run([*command, *words], capture_output=True, text=True, check=True).stdout
        assert json.loads(said)[0]["subject"] == "Ada Holbrook"


def test_the_readme_names_every_verb():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    told = set(
        re.findall(
            r"\b(?:stats|list|show|search|read|write|forget|restore|evict|export|import|merge|diff)\b",
            readme,
        )
    )
    assert told == set(MEMORY_COMMANDS)
