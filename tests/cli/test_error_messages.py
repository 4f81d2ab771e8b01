"""A table of wrong inputs: each is reported in one line with a next step, and writes nothing."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cli_asserts import line_of, snapshot
from factories import ADA, CACHED, TINY

from dmt import config_io
from dmt.cli import main
from dmt.data.corpora import load_corpus
from dmt.editing.fact import read_facts

ROOT = Path(__file__).parents[2]
Setup = Callable[[], Any]


def write_file(name: str, content: str | bytes, encoding: str = "utf-8") -> Setup:
    """Create or replace a file."""
    return lambda: Path(name).write_bytes(
        content if isinstance(content, bytes) else content.encode(encoding, "surrogatepass")
    )


def truncate(name: str, length: int) -> Setup:
    """Keep the first `length` bytes of a file."""
    return lambda: Path(name).write_bytes(Path(name).read_bytes()[:length])


def delete(name: str) -> Setup:
    return lambda: Path(name).unlink() if Path(name).is_file() else shutil.rmtree(name)


def edit_json(name: str, **differences: Any) -> Setup:
    """Change keys of a JSON file; None removes one."""

    def change() -> None:
        content = json.loads(Path(name).read_text()) | differences
        Path(name).write_text(
            json.dumps({key: value for key, value in content.items() if value is not None})
        )

    return change


def execute_sql(name: str, statement: str) -> Setup:
    def change() -> None:
        with sqlite3.connect(name) as connection:
            connection.execute(statement)
        connection.close()

    return change


def make_folder(name: str) -> Setup:
    return lambda: Path(name).mkdir(parents=True)


def make_link(name: str, target: str) -> Setup:
    return lambda: Path(name).symlink_to(target)


def make_pipe(name: str) -> Setup:
    return lambda: os.mkfifo(name)


def do_nothing() -> None:
    """Leave the folder as it is."""


@dataclass(frozen=True)
class Case:
    """A command that fails.

    Attributes:
        args: arguments of a tiny `dmt distill`, or a command that starts with `dmt`.
        parts: texts in the message: what is wrong, and the next step.
        setup: called first, in a copy of the folder with one of everything.
    """

    args: list[str]
    parts: list[str]
    setup: Setup = do_nothing


MODEL, V0 = ["-m", "logs/version_0"], "logs/version_0"
FORTY_DIGITS = "9" * 40
BRACKETS = "[" * 100_000
TEXT = "data.corpora=[a.txt]"
LINES = "data.corpora=[a.jsonl]"
NOT_UTF8, NO_TEXT_FIELD = (
    ["data.corpora: a.txt is not UTF-8 text", "convert it, or remove it"],
    'has no text in its field "text"',
)
NOT_OBJECT = "is not a JSON object"
CONTEXT = ["task=consolidate", "context.file=a.txt"]
QUESTIONS = ["task=consolidate", "context.text=Ada has a dog.", "context.questions=a.jsonl"]
ROWS_RUN = ["memory.kind=associative", "stages.layerwise_steps=0", "memory.write_start=0"]
NEEDED_FILES = "it needs config.json, model.safetensors and tokenizer.json"
RESUME = ["--resume", V0]
CACHE = "cache/logits.npy"
CACHE_METADATA = "cache/logits.json"
RESTART = "start anew: dmt distill logs/version_0/config.yaml"
SLOTS = "logs/version_1/student/slots.safetensors"
STUDENT, FACTS_DB = f"{V0}/student", f"{V0}/student/memory.db"
FACTS = ["dmt", "memory", "write", "--file", "a.jsonl", *MODEL]
IMPORT_PACK = ["dmt", "memory", "import", "pack", *MODEL]

SETTINGS = {
    "unknown setting": Case(
        ["memory.activaton=relu"],
        ["memory.activaton is not a setting", "did you mean memory.activation?"],
    ),
    "not a number": Case(
        ["loss.kl=nan"], ["loss.kl must be a number, got nan", "it must be finite"]
    ),
    "infinity": Case(
        ["optim.grad_clip=-.inf"],
        ["optim.grad_clip must be a number, got -inf", "it must be finite"],
    ),
    "number beyond all floats": Case(["loss.kl=1e309"], ["loss.kl must be a number", "finite"]),
    "integer of forty digits": Case(
        [f"data.batch_size={FORTY_DIGITS}"],
        ["data.batch_size must be a whole number", "it is too large"],
    ),
    "batch of a billion": Case(
        ["data.batch_size=1000000000"], ["data.batch_size must be in [1, 1048576], got 1000000000"]
    ),
    "too many steps": Case(
        ["stages.end_to_end_steps=4000000000"],
        ["stages.end_to_end_steps must be in [0, 2147483648]"],
    ),
    "too many slots": Case(
        ["memory.num_slots=1000000000"],
        ["memory.num_slots must be in [1, 67108864], got 1000000000"],
    ),
    "too many threads": Case(
        ["trainer.num_threads=1000000"], ["trainer.num_threads must be in [0, 1024], got 1000000"]
    ),
    "nul instead of a number": Case(["seed=nul"], ["seed must be a whole number, got nul"]),
    "null instead of a number": Case(["seed=null"], ["seed must be a whole number, got nothing"]),
    "null instead of a list": Case(
        ["data.corpora=null"],
        ["data.corpora must be a list such as [speeches, biographies], got nothing"],
    ),
    "NUL byte": Case(["teacher=a\0b"], ["cannot read teacher=", "not valid YAML"]),
    "lone surrogate in a value": Case(
        ["teacher=\udcff"], ["'teacher=\\udcff' is not UTF-8 text", "type it in UTF-8"]
    ),
    "lone surrogate in a key": Case(["\udcff=1"], ["'\\udcff=1' is not UTF-8 text"]),
    "lone surrogate in a path": Case(
        ["data.corpora=['\udcff.txt']"], ["data.corpora", "\\udcff.txt"]
    ),
    "newline in a key": Case(["a\nb=3"], ["'a\\nb' is not a setting"]),
    "unknown config name": Case(
        ["fly"],
        [
            "cannot read config file fly (No such file or directory)",
            "a setting is written key=value",
        ],
    ),
    "unknown option": Case(["--fly"], ["unrecognized arguments: --fly", "see dmt distill --help"]),
    "override for missing layers": Case(
        ["student.layer_overrides=[{layers: 9, memory: {k: 3}}]"],
        ["student.layer_overrides[0].layers must name layers in [0, 2], got 9"],
    ),
    "log folder is a file": Case(
        ["trainer.log_dir=text.txt/x"],
        ["trainer.log_dir=text.txt/x cannot be written (Not a directory)", "name another folder"],
    ),
    "log folder without permission": Case(
        ["trainer.log_dir=/proc/x"],
        ["trainer.log_dir=/proc/x cannot be written", "name another folder"],
    ),
    "config in UTF-16": Case(
        ["a.yaml"],
        ["a.yaml is not UTF-8 text", "a config file is YAML such as"],
        write_file("a.yaml", "seed: 1\n", "utf-16"),
    ),
    "config in Latin-1": Case(
        ["a.yaml"], ["a.yaml is not UTF-8 text"], write_file("a.yaml", "teacher: café\n", "latin-1")
    ),
    "config with NUL bytes": Case(
        ["a.yaml"], ["a.yaml", "not valid YAML"], write_file("a.yaml", "se\0ed: 1\n")
    ),
    "config is a folder": Case(
        ["a.yaml"], ["cannot read config file a.yaml (Is a directory)"], make_folder("a.yaml")
    ),
    "config of a thousand brackets": Case(
        ["a.yaml"], ["a.yaml", "not valid YAML"], write_file("a.yaml", "seed: " + "[" * 3000)
    ),
    "config name of two lines": Case(["a\nb.yaml"], ["cannot read config file 'a\\nb.yaml'"]),
    "config with a Python tag": Case(
        ["a.yaml"],
        ["a.yaml", "not valid YAML"],
        write_file("a.yaml", "teacher: !!python/object/apply:os.system [touch here]\n"),
    ),
}

TEXTS = {
    "UTF-16": Case([TEXT], NOT_UTF8, write_file("a.txt", "one\n\ntwo\n\nthree", "utf-16")),
    "UTF-16 without a byte order mark": Case(
        [TEXT],
        ["data.corpora: a.txt holds NUL bytes", "convert it to UTF-8"],
        write_file("a.txt", "one two three " * 99, "utf-16-le"),
    ),
    "Latin-1": Case([TEXT], NOT_UTF8, write_file("a.txt", "café " * 99, "latin-1")),
    "NUL bytes": Case(
        [TEXT],
        ["data.corpora: a.txt holds NUL bytes", "convert it to UTF-8"],
        write_file("a.txt", "a\0b " * 999),
    ),
    "empty": Case(
        [TEXT],
        ["data.corpora: a.txt has no text (files read: 1", "give it text in .txt, .md"],
        write_file("a.txt", ""),
    ),
    "only a byte order mark": Case(
        [TEXT],
        ["data.corpora: a.txt has no text (files read: 1", "give it text in .txt, .md"],
        write_file("a.txt", "\ufeff"),
    ),
    "one token": Case(
        [TEXT], ["a.txt has 1 tokens", "give it more text"], write_file("a.txt", "a")
    ),
    "one token per paragraph": Case(
        [TEXT],
        ["a.txt has 27 tokens", "need data.seq_len=16 each, about 48", "set data.seq_len=8"],
        write_file("a.txt", "a\n\n" * 9),
    ),
    "URL": Case(
        ["data.corpora=[http://host/a.txt]"],
        ["data.corpora: no file or folder http://host/a.txt", "accepted are speeches"],
    ),
    "file of another type": Case(
        ["data.corpora=[a.pdf]"],
        ["a.pdf is none of .txt, .md, .jsonl", "convert it or name another"],
        write_file("a.pdf", "%PDF"),
    ),
    "broken link": Case([TEXT], ["no file or folder a.txt"], make_link("a.txt", "nowhere")),
    "folder with a folder named .txt": Case(
        ["data.corpora=[texts]"], ["texts has no text (files read: 0)"], make_folder("texts/b.txt")
    ),
    "pipe": Case([TEXT], ["a.txt", "is not a file"], make_pipe("a.txt")),
    "empty folder": Case(
        ["data.corpora=[texts]"], ["texts has no text (files read: 0)"], make_folder("texts")
    ),
    "two corpora of one name": Case(
        ["data.corpora=[text.txt, text.txt]"], ["two are called text", "rename"]
    ),
    "JSON lines of another shape": Case(
        [LINES], ["a.jsonl line 1", NOT_OBJECT], write_file("a.jsonl", '["text"]\n')
    ),
    "JSON lines of a number": Case(
        [LINES],
        ["a.jsonl line 2", NO_TEXT_FIELD],
        write_file("a.jsonl", '{"text": "a"}\n{"text": 3}\n'),
    ),
    "JSON lines of null": Case(
        [LINES],
        ["a.jsonl has no text (files read: 1, skipped: 40 blank documents)"],
        write_file("a.jsonl", '{"text": null}\n' * 40),
    ),
    "JSON lines with a lone surrogate": Case(
        [LINES], ["a.jsonl line 1", NOT_OBJECT], write_file("a.jsonl", '{"text": "\\ud800"}\n' * 40)
    ),
    "JSON lines of a hundred thousand brackets": Case(
        [LINES], ["a.jsonl line 1", NOT_OBJECT], write_file("a.jsonl", BRACKETS)
    ),
    "JSON lines in UTF-16": Case(
        [LINES],
        ["a.jsonl is not UTF-8 text"],
        write_file("a.jsonl", '{"text": "a"}\n' * 40, "utf-16"),
    ),
    "JSON array instead of lines": Case(
        [LINES], ["a.jsonl line 1", NOT_OBJECT], write_file("a.jsonl", '[\n{"text": "a"}\n]')
    ),
    "hub data set without its library": Case(
        ["data.corpora=['hub:x']"], ["data.corpora: ", "hub:x"]
    ),
    "no context": Case(
        ["task=consolidate"], ["one of context.text and context.file", "got neither"]
    ),
    "empty context": Case(CONTEXT, ["context.file=a.txt is empty"], write_file("a.txt", " \n")),
    "context in UTF-16": Case(
        CONTEXT,
        ["context.file=a.txt is not UTF-8 text", "convert it"],
        write_file("a.txt", "Ada has a dog.", "utf-16"),
    ),
    "context with NUL bytes": Case(
        CONTEXT,
        ["context.file=a.txt holds NUL bytes", "convert it"],
        write_file("a.txt", "Ada has a dog.", "utf-16-le"),
    ),
    "context is a folder": Case(
        CONTEXT,
        ["context.file=a.txt cannot be read (Is a directory)", "name a text file"],
        make_folder("a.txt"),
    ),
    "context too long": Case(
        [*CONTEXT, "context.max_tokens=3"],
        ["more than context.max_tokens=3", "give a shorter one"],
        write_file("a.txt", ADA),
    ),
    "questions of another shape": Case(
        QUESTIONS,
        ["context.questions=a.jsonl line 1 is not a question", "a line is"],
        write_file("a.jsonl", '{"question": "a"}'),
    ),
    "questions that are numbers": Case(
        QUESTIONS,
        ["context.questions=a.jsonl line 1 is not a question"],
        write_file("a.jsonl", '{"prompt": 1, "answer": 2}'),
    ),
    "questions with a lone surrogate": Case(
        QUESTIONS,
        ["context.questions=a.jsonl line 1", NOT_OBJECT],
        write_file("a.jsonl", '{"prompt": "\\ud800", "answer": "a"}'),
    ),
    "no questions": Case(
        QUESTIONS,
        ["context.questions=a.jsonl holds no questions", "leave context.questions empty"],
        write_file("a.jsonl", "\n"),
    ),
    "questions in Latin-1": Case(
        QUESTIONS,
        ["context.questions=a.jsonl is not UTF-8 text"],
        write_file("a.jsonl", '{"prompt": "café", "answer": "a"}', "latin-1"),
    ),
    "questions of a hundred thousand brackets": Case(
        QUESTIONS,
        ["context.questions=a.jsonl line 1", NOT_OBJECT],
        write_file("a.jsonl", BRACKETS),
    ),
    "question longer than the model reads": Case(
        QUESTIONS,
        ["context.questions=a.jsonl: very very", "have 1,201 tokens", "shorten it"],
        write_file("a.jsonl", json.dumps({"prompt": "very " * 400, "answer": " a"})),
    ),
}

TEACHERS = {
    "missing folder": Case(
        ["teacher=./nowhere"], ["teacher=./nowhere: no such directory", "accepted are embedded"]
    ),
    "URL as teacher": Case(
        ["teacher=http://host/model"],
        ["teacher=http://host/model: no such directory", "accepted are embedded"],
    ),
    "file as teacher": Case(["teacher=./text.txt"], ["teacher=./text.txt: no such directory"]),
    "empty folder as teacher": Case(
        ["teacher=./empty"],
        ["teacher=./empty cannot be loaded", NEEDED_FILES],
        make_folder("empty"),
    ),
    "vocabulary of another model": Case(
        [],
        ["data.corpora: text has the token", "the model with its 270 embeddings does not"],
        lambda: save_teacher_with_another_vocabulary(),
    ),
    "empty tokenizer": Case(
        [],
        ["teacher=teacher cannot be loaded", NEEDED_FILES],
        write_file("teacher/tokenizer.json", "{}"),
    ),
    "tokenizer in UTF-16": Case(
        [],
        ["teacher=teacher cannot be loaded", NEEDED_FILES],
        write_file("teacher/tokenizer.json", "{}", "utf-16"),
    ),
    "adapter": Case(
        [],
        ["teacher=teacher holds an adapter", "merge it into its model"],
        write_file("teacher/adapter_config.json", "{}"),
    ),
    "no tokenizer": Case([], ["teacher=teacher", NEEDED_FILES], delete("teacher/tokenizer.json")),
    "truncated weights": Case(
        [],
        ["teacher=teacher cannot be loaded", NEEDED_FILES],
        truncate("teacher/model.safetensors", 5000),
    ),
    "weights are text": Case(
        [],
        ["teacher=teacher cannot be loaded", NEEDED_FILES],
        write_file("teacher/model.safetensors", "no weights"),
    ),
    "no weights": Case([], ["teacher=teacher", NEEDED_FILES], delete("teacher/model.safetensors")),
    "model config is a list": Case(
        [],
        ["teacher=teacher cannot be loaded", NEEDED_FILES],
        write_file("teacher/config.json", "[1]"),
    ),
    "unknown model type": Case(
        [],
        ["teacher=teacher", NEEDED_FILES],
        edit_json("teacher/config.json", model_type="no_such_model"),
    ),
    "more layers than weights": Case(
        [],
        ["teacher=teacher: its weights are not those of its config.json", "save it again"],
        edit_json("teacher/config.json", n_layer=5),
    ),
    "millions of layers": Case(
        [],
        ["teacher=teacher", "n_layer=10000000", "model.safetensors"],
        edit_json("teacher/config.json", n_layer=10_000_000),
    ),
    "width of a billion": Case(
        [],
        ["teacher=teacher", "n_embd=2000000000"],
        edit_json("teacher/config.json", n_embd=2_000_000_000),
    ),
    "vocabulary of a billion": Case(
        [],
        ["teacher=teacher", "vocab_size=2000000000"],
        edit_json("teacher/config.json", vocab_size=2_000_000_000),
    ),
    "positions of a billion": Case(
        [],
        ["teacher=teacher", "n_positions=2000000000"],
        edit_json("teacher/config.json", n_positions=2_000_000_000),
    ),
    "negative width": Case(
        [], ["teacher=teacher", "n_embd=-16"], edit_json("teacher/config.json", n_embd=-16)
    ),
    "heads are text": Case([], ["teacher=teacher"], edit_json("teacher/config.json", n_head="two")),
    "heads do not divide the width": Case(
        [], ["teacher=teacher"], edit_json("teacher/config.json", n_head=3)
    ),
    "no heads": Case([], ["teacher=teacher"], edit_json("teacher/config.json", n_head=0)),
    "unknown activation": Case(
        [], ["teacher=teacher"], edit_json("teacher/config.json", activation_function="nope")
    ),
    "student as teacher": Case(
        [f"teacher={STUDENT}"], ["is a student of dmt already", "name its teacher"]
    ),
    "window longer than the model reads": Case(
        ["data.seq_len=161"],
        ["data.seq_len=161 is longer than the 160 positions", "set data.seq_len=160 or less"],
    ),
}


def save_teacher_with_another_vocabulary() -> None:
    from conftest import make_teacher

    make_teacher(270, n_positions=160).save_pretrained("teacher")


def make_another_database() -> None:
    execute_sql("a.db", "CREATE TABLE recipes (id)")()


def store_run(place: str) -> list[str]:
    return [*ROWS_RUN, f"store.url={place}"]


STORES = {
    "text file as store": Case(
        store_run("text.txt"), ["store text.txt: this file is not a store", "give another"]
    ),
    "database of another program": Case(
        store_run("a.db"),
        ["store a.db: a database of something else (tables recipes)", "give a new file"],
        make_another_database,
    ),
    "newer schema": Case(
        store_run("logs/version_2/memory.db"),
        ["schema version 99", "a newer dmt made it", "update"],
        execute_sql(
            "logs/version_2/memory.db",
            "UPDATE dmt_metadata SET value='99' WHERE name='schema_version'",
        ),
    ),
    "older schema": Case(
        store_run("logs/version_2/memory.db"),
        ["schema version 1", "this dmt knows 3"],
        execute_sql(
            "logs/version_2/memory.db",
            "UPDATE dmt_metadata SET value='1' WHERE name='schema_version'",
        ),
    ),
    "invalid schema version": Case(
        store_run("logs/version_2/memory.db"),
        ["store logs/version_2/memory.db", "schema"],
        execute_sql(
            "logs/version_2/memory.db",
            "UPDATE dmt_metadata SET value='x' WHERE name='schema_version'",
        ),
    ),
    "rows of another model": Case(
        store_run("logs/version_2/memory.db"),
        ["its rows belong to another model", "give a new file"],
        execute_sql(
            "logs/version_2/memory.db",
            "UPDATE dmt_metadata SET value='x' WHERE name='model_fingerprint'",
        ),
    ),
    "rows of no model": Case(
        store_run("logs/version_2/memory.db"),
        ["store logs/version_2/memory.db"],
        execute_sql(
            "logs/version_2/memory.db", "DELETE FROM dmt_metadata WHERE name='model_fingerprint'"
        ),
    ),
    "folder as store": Case(store_run("teacher"), ["store teacher: it cannot be opened"]),
    "store in a missing folder": Case(
        store_run("no/where.db"),
        ["store no/where.db: it cannot be opened", "its folder must exist"],
    ),
    "store without permission": Case(
        store_run("/proc/rows.db"), ["store /proc/rows.db: it cannot be opened"]
    ),
    "unreachable server": Case(
        store_run("postgresql://u:secret@127.0.0.1:9/x"),
        ["store postgresql://u:***@127.0.0.1:9/x: the server does not answer", "is it running"],
    ),
    "port is a word": Case(
        store_run("postgresql://127.0.0.1:port/x"),
        ["store postgresql://127.0.0.1:port/x: not a file or a database URL", "give a file"],
    ),
    "unsupported database": Case(
        store_run("mysql://127.0.0.1/x"), ["mysql is not supported", "give a file"]
    ),
    "URL as store": Case(
        store_run("http://127.0.0.1/x.db"),
        ["store http://127.0.0.1/x.db: http is not supported", "give a file"],
    ),
    "store in memory": Case(
        store_run("sqlite://"), ["a store must outlive the program", "give a file"]
    ),
    "truncated store": Case(
        store_run("logs/version_2/memory.db"),
        ["store logs/version_2/memory.db", "damaged"],
        truncate("logs/version_2/memory.db", 70_000),
    ),
    "cache is a file": Case(
        [*CACHED, "logit_cache.dir=text.txt"],
        ["logit_cache.dir=text.txt cannot be written", "name another folder"],
    ),
    "cache of another format": Case(
        CACHED,
        ["logit_cache.dir=cache", "format", "name another logit_cache.dir"],
        edit_json(CACHE_METADATA, version=99),
    ),
    "truncated cache": Case(
        CACHED,
        ["logit_cache.dir=cache: its logits.npy is damaged", "delete"],
        truncate(CACHE, 2000),
    ),
    "cache of other settings": Case(
        [*CACHED, "logit_cache.top_k=32"],
        [
            "logit_cache.top_k (16 in the cache, 32 in this run) differ",
            "name another logit_cache.dir or delete",
        ],
    ),
    "cache with an absurd header": Case(
        CACHED,
        ["logit_cache.dir=cache", "damaged"],
        write_file(CACHE, (2**62).to_bytes(8, "little") + b"{}"),
    ),
}


def edit_header(name: str, **differences: str) -> None:
    """Changes the metadata in a safetensors file's header, whatever length it then has."""
    content = Path(name).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] |= differences
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 4096)
    Path(name).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


RUNS = {
    "folder that is not a run": Case(
        ["--resume", "teacher"], ["--resume teacher: no run is there (no config.yaml)"]
    ),
    "run is a file": Case(["--resume", "text.txt"], ["--resume text.txt: no run is there"]),
    "resume with other settings": Case(
        [*RESUME, "seed=1"], ["--resume uses the run's own settings", "leave out seed=1"]
    ),
    "run with an unknown setting": Case(
        RESUME,
        [
            "loss.wonder is not a setting",
            "another version of dmt made this run",
            "resume it with that version or a newer one",
        ],
        lambda: write_file(
            f"{V0}/config.yaml",
            Path(f"{V0}/config.yaml").read_text().replace("loss:\n", "loss:\n  wonder: 1\n"),
        )(),
    ),
    "run config is not YAML": Case(
        RESUME, [f"{V0}/config.yaml", "not valid YAML"], write_file(f"{V0}/config.yaml", "a: [")
    ),
    "run without its teacher": Case(RESUME, ["teacher=teacher"], delete("teacher")),
    "run without its text": Case(
        RESUME, ["data.corpora: no file or folder text.txt"], delete("text.txt")
    ),
    "missing student": Case(
        ["dmt", "generate", "x", "-m", "nowhere"],
        ["model nowhere: nothing is there", "give a run's folder"],
    ),
    "no run in this folder": Case(
        ["dmt", "generate", "x"],
        ["no student is in lightning_logs/ here", "run dmt distill first"],
    ),
    "student of a newer version": Case(
        ["dmt", "generate", "x", *MODEL],
        [f"model {STUDENT}: version 9, this dmt knows 2", "a newer dmt made it"],
        edit_json(f"{STUDENT}/config.json", dmt=9),
    ),
    "run config of a newer version": Case(
        RESUME,
        [f"{V0}/config.yaml: settings of version 9", "a newer dmt made it"],
        lambda: write_file(
            f"{V0}/config.yaml",
            Path(f"{V0}/config.yaml").read_text().replace("version 2", "version 9"),
        )(),
    ),
    "run record of a newer version": Case(
        RESUME,
        [f"{V0}/run.json: version 9", "a newer dmt made it"],
        edit_json(f"{V0}/run.json", format=9),
    ),
    "student config is a list": Case(
        ["dmt", "generate", "x", *MODEL],
        [f"model {STUDENT} cannot be loaded"],
        write_file(f"{STUDENT}/config.json", "[]"),
    ),
    "student with an unknown memory argument": Case(
        ["dmt", "generate", "x", *MODEL],
        [f"model {STUDENT} cannot be loaded"],
        lambda: edit_memory_config(wonder=1),
    ),
    "student with a trillion slots": Case(
        ["dmt", "generate", "x", *MODEL],
        [f"model {STUDENT}"],
        lambda: edit_memory_config(slots=10**12),
    ),
    "student with memory in a missing layer": Case(
        ["dmt", "generate", "x", *MODEL],
        [f"model {STUDENT} cannot be loaded"],
        lambda: edit_memory_config("7"),
    ),
    "student with a layer named by a word": Case(
        ["dmt", "generate", "x", *MODEL],
        [f"model {STUDENT} cannot be loaded"],
        lambda: edit_memory_config("first"),
    ),
    "student without weights": Case(
        ["dmt", "generate", "x", *MODEL],
        [f"model {STUDENT} cannot be loaded"],
        delete(f"{STUDENT}/model.safetensors"),
    ),
    "student with truncated weights": Case(
        ["dmt", "generate", "x", *MODEL],
        [f"model {STUDENT} cannot be loaded"],
        truncate(f"{STUDENT}/model.safetensors", 999),
    ),
    "student with weights of another model": Case(
        ["dmt", "generate", "x", *MODEL],
        ["model ", "its weights are not those"],
        lambda: (
            delete(FACTS_DB)(),
            shutil.copy("teacher/model.safetensors", f"{STUDENT}/model.safetensors"),
        ),
    ),
    "student without its slots file": Case(
        ["dmt", "generate", "x", "-m", "logs/version_1"],
        ["slots.safetensors does not exist", "put it back"],
        delete(SLOTS),
    ),
    "truncated slots file": Case(
        ["dmt", "generate", "x", "-m", "logs/version_1"],
        ["slots.safetensors is not a complete file", "copy it"],
        truncate(SLOTS, 9000),
    ),
    "slots file of another format": Case(
        ["dmt", "generate", "x", "-m", "logs/version_1"],
        ["slots.safetensors: its format is 99", "a newer dmt made it", "update"],
        lambda: edit_header(SLOTS, format="99"),
    ),
    "slots file with an absurd header": Case(
        ["dmt", "generate", "x", "-m", "logs/version_1"],
        ["slots.safetensors is not a complete file"],
        write_file(SLOTS, (2**63).to_bytes(8, "little") + b"{}"),
    ),
    "memory.db is text": Case(
        ["dmt", "memory", "list", *MODEL],
        [f"store {FACTS_DB}: this file is not a store"],
        lambda: (
            Path(f"{FACTS_DB}-wal").unlink(missing_ok=True),
            Path(f"{FACTS_DB}-shm").unlink(missing_ok=True),
            write_file(FACTS_DB, "text " * 999)(),
        ),
    ),
    "memory.db is a folder": Case(
        ["dmt", "memory", "write", ADA, *MODEL],
        [f"store {FACTS_DB}"],
        lambda: (delete(FACTS_DB)(), make_folder(FACTS_DB)()),
    ),
    "memory.db of a newer schema": Case(
        ["dmt", "memory", "list", *MODEL],
        ["schema version 99", "a newer dmt made it"],
        execute_sql(FACTS_DB, "UPDATE dmt_metadata SET value='99' WHERE name='schema_version'"),
    ),
    "facts of a newer schema": Case(
        ["dmt", "memory", "list", *MODEL],
        ["facts of version 99", "a newer dmt made it"],
        execute_sql(FACTS_DB, "UPDATE dmt_metadata SET value='99' WHERE name='facts_version'"),
    ),
    "memory.db without the facts table": Case(
        ["dmt", "memory", "list", *MODEL],
        [f"store {FACTS_DB}"],
        execute_sql(FACTS_DB, "DROP TABLE dmt_facts"),
    ),
    "fact with invalid JSON": Case(
        ["dmt", "memory", "list", *MODEL],
        [f"store {FACTS_DB}", "damaged"],
        execute_sql(FACTS_DB, "UPDATE dmt_facts SET answer_ids='[['"),
    ),
    "truncated rows": Case(
        ["dmt", "memory", "show", "1", *MODEL],
        [f"store {FACTS_DB}", "damaged"],
        execute_sql(FACTS_DB, "UPDATE dmt_rows SET key=x'00'"),
    ),
}


def edit_memory_config(layer: str = "0", **differences: Any) -> None:
    """Changes what a student's config says of the memory in a layer."""
    file = Path(STUDENT) / "config.json"
    found = json.loads(file.read_text())
    found["memory"][layer] = found["memory"]["0"] | differences
    file.write_text(json.dumps(found))


COMMANDS = {
    "unknown memory command": Case(["dmt", "memory", "fly"], ["invalid choice: 'fly'", "see dmt"]),
    "unknown command": Case(["dmt", "fly"], ["invalid choice: 'fly'", "see dmt"]),
    "unknown option of a command": Case(
        ["dmt", "generate", "x", "--fly", *MODEL], ["unrecognized arguments: --fly"]
    ),
    "empty prompt": Case(["dmt", "generate", "", *MODEL], ["the prompt is empty"]),
    "lone surrogate in a prompt": Case(
        ["dmt", "generate", "\udcff", *MODEL], ["'\\udcff' is not UTF-8 text", "type it in UTF-8"]
    ),
    "lone surrogate in a model name": Case(
        ["dmt", "generate", "x", "-m", "\udcff"],
        ["'\\udcff' is not UTF-8 text", "rename what it names"],
    ),
    "lone surrogate in a tag": Case(
        ["dmt", "memory", "write", ADA, "--tag", "\udcff", *MODEL], ["\\udcff"]
    ),
    "lone surrogate in a fact": Case(
        ["dmt", "memory", "write", "Ada is \udcff", *MODEL], ["\\udcff"]
    ),
    "lone surrogate in a search": Case(["dmt", "memory", "search", "\udcff", *MODEL], ["\\udcff"]),
    "lone surrogate in a traced text": Case(
        ["dmt", "memory", "read", "\udcff", *MODEL], ["\\udcff"]
    ),
    "lone surrogate in a context": Case(
        ["dmt", "consolidate", "Ada \udcff", "--model", "teacher"], ["\\udcff"]
    ),
    "infinite temperature": Case(
        ["dmt", "generate", "x", "--temperature", "inf", *MODEL], ["--temperature", "got"]
    ),
    "temperature is nan": Case(
        ["dmt", "generate", "x", "--temperature", "nan", *MODEL], ["--temperature", "got"]
    ),
    "negative seed": Case(["dmt", "generate", "x", "--seed", "-1", *MODEL], ["--seed", "got -1"]),
    "seed of forty digits": Case(
        ["dmt", "generate", "x", "--temperature", "1", "--seed", FORTY_DIGITS, *MODEL],
        ["--seed", "got"],
    ),
    "show a fact of forty digits": Case(
        ["dmt", "memory", "show", FORTY_DIGITS, *MODEL], ["was never stored"]
    ),
    "restore a fact of forty digits": Case(
        ["dmt", "memory", "restore", FORTY_DIGITS, *MODEL], ["never existed"]
    ),
    "forget a fact of forty digits": Case(
        ["dmt", "memory", "forget", "--id", FORTY_DIGITS, *MODEL], ["is not stored"]
    ),
    "slot with a superscript": Case(
        ["dmt", "memory", "show", "--slot", "²:1", *MODEL], ["--slot must be LAYER:INDEX"]
    ),
    "false-positive rate is nan": Case(
        ["dmt", "memory", "write", ADA, "--false-positive-rate", "nan", *MODEL],
        ["--false-positive-rate must be in (0, 0.5], got nan"],
    ),
    "facts of another shape": Case(
        FACTS,
        ["a.jsonl line 1 is not a JSON object", "a line is"],
        write_file("a.jsonl", '["Ada"]\n'),
    ),
    "facts with an unknown key": Case(
        FACTS,
        ["a.jsonl line 1: unknown key 'colour'", "accepted are"],
        write_file("a.jsonl", '{"colour": "red"}\n'),
    ),
    "facts in UTF-16": Case(
        FACTS,
        ["a.jsonl is not UTF-8 text"],
        write_file("a.jsonl", '{"sentence": "Ada is in Rome."}\n', "utf-16"),
    ),
    "facts with a lone surrogate": Case(
        FACTS,
        ["a.jsonl line 1 is not a JSON object (half of a surrogate pair)"],
        write_file("a.jsonl", '{"sentence": "Ada is in \\ud800."}\n'),
    ),
    "no facts": Case(FACTS, ["a.jsonl has no facts"], write_file("a.jsonl", "")),
    "facts in a folder": Case(
        FACTS, ["a.jsonl cannot be read (Is a directory)"], make_folder("a.jsonl")
    ),
    "calibration text of two words": Case(
        ["dmt", "memory", "write", ADA, "--calibration-text", "a.txt", *MODEL],
        ["--calibration-text a.txt", "give 2,000 or more"],
        write_file("a.txt", "two words"),
    ),
    "calibration text in UTF-16": Case(
        ["dmt", "memory", "write", ADA, "--calibration-text", "a.txt", *MODEL],
        ["--calibration-text a.txt is not UTF-8 text"],
        write_file("a.txt", "two words " * 500, "utf-16"),
    ),
    "URL as pack": Case(
        ["dmt", "memory", "import", "http://host/a.safetensors", *MODEL],
        ["host/a.safetensors: nothing is there", "name a pack"],
    ),
    "pack is text": Case(
        ["dmt", "memory", "import", "text.txt", *MODEL],
        ["pack text.txt is damaged or no pack", "get another copy"],
    ),
    "pack is a model": Case(
        ["dmt", "memory", "import", "teacher/model.safetensors", *MODEL],
        ["no manifest of a pack", "dmt memory export makes one"],
    ),
    "pack of a newer version": Case(
        IMPORT_PACK,
        ["pack pack: version 9", "a newer dmt made it", "update"],
        edit_json("pack/manifest.json", version=9),
    ),
    "pack of an older version": Case(
        IMPORT_PACK,
        ["pack pack: version 0, this dmt knows 3", "export it again"],
        edit_json("pack/manifest.json", version=0),
    ),
    "truncated pack": Case(
        IMPORT_PACK,
        ["pack pack is damaged", "get another copy"],
        truncate("pack/rows.safetensors", 700),
    ),
    "pack without tensors": Case(
        IMPORT_PACK,
        ["no rows.safetensors is in it", "name a pack"],
        delete("pack/rows.safetensors"),
    ),
    "pack without a manifest": Case(
        IMPORT_PACK, ["pack pack cannot be read"], delete("pack/manifest.json")
    ),
    "pack of another model": Case(
        IMPORT_PACK,
        ["belongs to another model", "dmt memory import --rewrite"],
        edit_json("pack/manifest.json", model_fingerprint="x"),
    ),
    "pack manifest in UTF-16": Case(
        IMPORT_PACK,
        ["pack pack is damaged"],
        lambda: write_file(
            "pack/manifest.json", Path("pack/manifest.json").read_text(), "utf-16"
        )(),
    ),
    "pack with an invalid fact": Case(
        ["dmt", "generate", "x", "--pack", "pack", *MODEL],
        ["pack pack: fact 0 of its manifest is not one", "get another copy"],
        edit_json("pack/manifest.json", facts="x"),
    ),
    "existing pack": Case(
        ["dmt", "memory", "export", "pack", *MODEL], ["pack exists already", "give a new name"]
    ),
    "pack without permission": Case(
        ["dmt", "memory", "export", "/proc/x/pack", *MODEL],
        ["/proc/x/pack cannot be written", "give another path"],
    ),
    "merge of a missing pack": Case(
        ["dmt", "memory", "merge", "nowhere", "-o", "new"], ["pack nowhere: nothing is there"]
    ),
    "missing context file": Case(
        ["dmt", "consolidate", "--file", "nowhere.txt", "--model", "teacher"],
        ["context.file=nowhere.txt cannot be read"],
    ),
    "unknown target": Case(
        ["dmt", "consolidate", ADA, "--model", "teacher", "--target", "heaven"],
        ["--target: invalid choice: 'heaven'", "'memory', 'weights', 'prompt'"],
    ),
    "sleep without facts": Case(
        ["dmt", "sleep", "--tag", "none", "--replay-data", "text.txt", *MODEL],
        ["has no facts or rows with this tag", "write facts with dmt memory write"],
    ),
    "sleep with lr nan": Case(
        ["dmt", "sleep", "--lr", "nan", *MODEL], ["--lr must be in (0, 1], got nan"]
    ),
    "sleep on missing data": Case(
        ["dmt", "sleep", "--replay-data", "nowhere.txt", "--output", "new", *MODEL],
        ["no file or folder nowhere.txt"],
    ),
    "sleep on a run with an unknown setting": Case(
        ["dmt", "sleep", "--output", "new", *MODEL],
        ["wonder is not a setting"],
        write_file(f"{V0}/config.yaml", "wonder: 1\n"),
    ),
}
CASES = {
    f"{topic}: {name}": case
    for topic, cases in {
        "settings": SETTINGS,
        "text": TEXTS,
        "teacher": TEACHERS,
        "store": STORES,
        "run": RUNS,
        "command": COMMANDS,
    }.items()
    for name, case in cases.items()
}


@pytest.fixture(autouse=True)
def _restore_signals():
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def get_args(case: Case) -> list[str]:
    return case.args if case.args[:1] == ["dmt"] or "--resume" in case.args else [*TINY, *case.args]


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_input_is_one_line_and_writes_nothing(name, artifacts_dir, capsys):
    case = CASES[name]
    case.setup()
    before = snapshot(artifacts_dir)
    args = get_args(case)
    capsys.readouterr()
    code = main.main(args[1:]) if args[0] == "dmt" else main.distill_main(args)
    printed = capsys.readouterr()
    message = line_of(code, printed.out, printed.err)
    for part in case.parts:
        assert part in message, message
    assert snapshot(artifacts_dir) == before, f"something was written: {message}"


@pytest.mark.parametrize(
    "name",
    [
        "settings: lone surrogate in a value",
        "text: UTF-16",
        "run: student of a newer version",
        "command: lone surrogate in a prompt",
        "settings: nul instead of a number",
        "command: truncated pack",
    ],
)
def test_a_wrong_input_in_a_process_of_its_own(name, artifacts_dir):
    case = CASES[name]
    case.setup()
    before = snapshot(artifacts_dir)
    args = get_args(case)
    program = ["-m", "dmt", *args[1:]] if args[0] == "dmt" else [str(ROOT / "distill.py"), *args]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")}
    process = subprocess.run(
        [sys.executable, *program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    message = line_of(process.returncode, process.stdout, process.stderr)
    for part in case.parts:
        assert part in message, message
    assert snapshot(artifacts_dir) == before


def test_a_byte_order_mark_is_ignored(artifacts_dir, capsys):
    """Editors of Windows write it before UTF-8."""
    for name, content in {
        "a.yaml": "seed: 3\n",
        "a.txt": Path("text.txt").read_text(),
        "a.jsonl": '{"sentence": "Ada lives in Rome."}\n',
    }.items():
        Path(name).write_text(content, encoding="utf-8-sig")
    config = config_io.load_config("a.yaml")
    assert config.seed == 3
    documents = load_corpus("a.txt").train
    assert documents
    assert not any("\ufeff" in document for document in documents)
    assert [fact.prompt for fact in read_facts(Path("a.jsonl"))] == ["Ada lives in"]


def test_the_table_has_at_least_eighty_cases():
    assert len(CASES) >= 80
    assert all(case.parts for case in CASES.values())
