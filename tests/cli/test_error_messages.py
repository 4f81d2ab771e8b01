"""Wrong inputs over the whole product, one a row: one line that names the thing and the next step, and nothing written."""

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
Spoil = Callable[[], Any]


def put(name: str, content: str | bytes, encoding: str = "utf-8") -> Spoil:
    """Makes a file, or writes it anew."""
    return lambda: Path(name).write_bytes(
        content if isinstance(content, bytes) else content.encode(encoding, "surrogatepass")
    )


def cut(name: str, length: int) -> Spoil:
    """Keeps that many bytes of a file."""
    return lambda: Path(name).write_bytes(Path(name).read_bytes()[:length])


def gone(name: str) -> Spoil:
    return lambda: Path(name).unlink() if Path(name).is_file() else shutil.rmtree(name)


def changed(name: str, **differences: Any) -> Spoil:
    """Changes keys of a JSON file; None takes one away."""

    def change() -> None:
        found = json.loads(Path(name).read_text()) | differences
        Path(name).write_text(
            json.dumps({key: value for key, value in found.items() if value is not None})
        )

    return change


def sql(name: str, words: str) -> Spoil:
    def change() -> None:
        with sqlite3.connect(name) as connection:
            connection.execute(words)
        connection.close()

    return change


def folder(name: str) -> Spoil:
    return lambda: Path(name).mkdir(parents=True)


def link(name: str, target: str) -> Spoil:
    return lambda: Path(name).symlink_to(target)


def pipe(name: str) -> Spoil:
    return lambda: os.mkfifo(name)


def nothing() -> None:
    """All is as it was made."""


@dataclass(frozen=True)
class Row:
    """Words that are refused: of `distill.py` beside those of a tiny run, or where they begin with `dmt` of that.

    Attributes:
        says: what the line holds, the thing and the next step.
        spoil: what is done to the workshop before.
    """

    words: list[str]
    says: list[str]
    spoil: Spoil = nothing


S, V0 = ["-m", "logs/version_0"], "logs/version_0"
FLOOD = "9" * 40
DEEP = "[" * 100_000
TEXT = "data.corpora=[a.txt]"
LINES = "data.corpora=[a.jsonl]"
AS_UTF8, TEXT_FIELD = (
    ["data.corpora: a.txt is not UTF-8 text", "convert it, or remove it"],
    'not an object with a "text" field',
)
CONTEXT = ["task=consolidate", "context.file=a.txt"]
ASKED = ["task=consolidate", "context.text=Ada has a dog.", "context.questions=a.jsonl"]
KEPT = ["memory.kind=associative", "stages.layerwise_steps=0", "memory.write_start=0"]
NEEDS = "it needs config.json, model.safetensors and tokenizer.json"
RESUME = ["--resume", V0]
CACHE = "cache/logits.npy"
CACHE_METADATA = "cache/logits.json"
ANEW = "start anew: python distill.py logs/version_0/config.yaml"
SLOTS = "logs/version_1/student/slots.safetensors"
STUDENT, BOOK = f"{V0}/student", f"{V0}/student/memory.db"
FACTS = ["dmt", "memory", "write", "--file", "a.jsonl", *S]
TAKE = ["dmt", "memory", "import", "pack", *S]

SETTINGS = {
    "a setting that is none": Row(
        ["memory.wieghting=relu"],
        ["memory.wieghting is not a setting", "did you mean memory.activation?"],
    ),
    "not a number": Row(
        ["loss.kl=nan"], ["loss.kl must be a number, got nan", "it must be finite"]
    ),
    "endless": Row(
        ["optim.grad_clip=-.inf"],
        ["optim.grad_clip must be a number, got -inf", "it must be finite"],
    ),
    "past all floats": Row(["loss.kl=1e309"], ["loss.kl must be a number", "finite"]),
    "a whole number of forty digits": Row(
        [f"data.batch_size={FLOOD}"], ["data.batch_size must be a whole number", "it is too large"]
    ),
    "a batch of a billion": Row(
        ["data.batch_size=1000000000"], ["data.batch_size must be in [1, 1048576], got 1000000000"]
    ),
    "steps for ever": Row(
        ["stages.end_to_end_steps=4000000000"],
        ["stages.end_to_end_steps must be in [0, 2147483648]"],
    ),
    "slots past all memory": Row(
        ["memory.num_slots=1000000000"],
        ["memory.num_slots must be in [1, 67108864], got 1000000000"],
    ),
    "threads by the million": Row(
        ["trainer.num_threads=1000000"], ["trainer.num_threads must be in [0, 1024], got 1000000"]
    ),
    "nul for a number": Row(["seed=nul"], ["seed must be a whole number, got nul"]),
    "null for a number": Row(["seed=null"], ["seed must be a whole number, got nothing"]),
    "null for a list": Row(
        ["data.corpora=null"],
        ["data.corpora must be a list such as [speeches, biographies], got nothing"],
    ),
    "a NUL byte": Row(["teacher=a\0b"], ["cannot read teacher=", "not valid YAML"]),
    "half a character in a value": Row(
        ["teacher=\udcff"], ["'teacher=\\udcff' is not UTF-8 text", "type it in UTF-8"]
    ),
    "half a character in a key": Row(["\udcff=1"], ["'\\udcff=1' is not UTF-8 text"]),
    "half a character in a path": Row(
        ["data.corpora=['\udcff.txt']"], ["data.corpora", "\\udcff.txt"]
    ),
    "a newline in a key": Row(["a\nb=3"], ["'a\\nb' is not a setting"]),
    "a subcommand that is none": Row(
        ["fly"],
        [
            "cannot read config file fly (No such file or directory)",
            "a setting is written key=value",
        ],
    ),
    "an option that is none": Row(
        ["--fly"], ["unrecognized arguments: --fly", "python distill.py --help lists what there is"]
    ),
    "a rule for layers that are not there": Row(
        ["student.layer_overrides=[{layers: 9, memory: {k: 3}}]"],
        ["student.layer_overrides[0].layers must name layers in [0, 2], got 9"],
    ),
    "a log folder that is a file": Row(
        ["trainer.log_dir=text.txt/x"],
        ["trainer.log_dir=text.txt/x cannot be written (Not a directory)", "name another folder"],
    ),
    "a log folder where nobody may write": Row(
        ["trainer.log_dir=/proc/x"],
        ["trainer.log_dir=/proc/x cannot be written", "name another folder"],
    ),
    "a teacher for nobody": Row(
        ["task=pretrain", "pretrain.output=/proc/x"],
        ["pretrain.output=/proc/x cannot be written", "name another folder"],
    ),
    "a config in UTF-16": Row(
        ["a.yaml"],
        ["a.yaml is not UTF-8 text", "a config file is YAML such as"],
        put("a.yaml", "seed: 1\n", "utf-16"),
    ),
    "a config in Latin-1": Row(
        ["a.yaml"], ["a.yaml is not UTF-8 text"], put("a.yaml", "teacher: café\n", "latin-1")
    ),
    "a config with NUL bytes": Row(
        ["a.yaml"], ["a.yaml", "not valid YAML"], put("a.yaml", "se\0ed: 1\n")
    ),
    "a config that is a folder": Row(
        ["a.yaml"], ["cannot read config file a.yaml (Is a directory)"], folder("a.yaml")
    ),
    "a config of a thousand brackets": Row(
        ["a.yaml"], ["a.yaml", "not valid YAML"], put("a.yaml", "seed: " + "[" * 3000)
    ),
    "a config called by two lines": Row(["a\nb.yaml"], ["cannot read config file 'a\\nb.yaml'"]),
    "a config that is a program": Row(
        ["a.yaml"],
        ["a.yaml", "not valid YAML"],
        put("a.yaml", "teacher: !!python/object/apply:os.system [touch here]\n"),
    ),
}

TEXTS = {
    "UTF-16": Row([TEXT], AS_UTF8, put("a.txt", "one\n\ntwo\n\nthree", "utf-16")),
    "UTF-16 without a mark": Row(
        [TEXT],
        ["data.corpora: a.txt holds NUL bytes", "convert it to UTF-8"],
        put("a.txt", "one two three " * 99, "utf-16-le"),
    ),
    "Latin-1": Row([TEXT], AS_UTF8, put("a.txt", "café " * 99, "latin-1")),
    "NUL bytes": Row(
        [TEXT],
        ["data.corpora: a.txt holds NUL bytes", "convert it to UTF-8"],
        put("a.txt", "a\0b " * 999),
    ),
    "empty": Row(
        [TEXT], ["data.corpora: a.txt has no train text", "give it more text"], put("a.txt", "")
    ),
    "a byte order mark alone": Row(
        [TEXT],
        ["data.corpora: a.txt has no train text", "give it more text"],
        put("a.txt", "\ufeff"),
    ),
    "one token": Row([TEXT], ["a.txt has no", "give it more text"], put("a.txt", "a")),
    "one token a paragraph": Row(
        [TEXT],
        ["part of a has", "fewer than data.seq_len=16", "set a smaller data.seq_len"],
        put("a.txt", "a\n\n" * 9),
    ),
    "an address": Row(
        ["data.corpora=[http://host/a.txt]"],
        ["data.corpora: no file or folder http://host/a.txt", "accepted are speeches"],
    ),
    "a file of another kind": Row(
        ["data.corpora=[a.pdf]"],
        ["a.pdf is neither .txt nor .jsonl", "convert it or name another"],
        put("a.pdf", "%PDF"),
    ),
    "a link that leads nowhere": Row([TEXT], ["no file or folder a.txt"], link("a.txt", "nowhere")),
    "a folder with a folder called .txt": Row(
        ["data.corpora=[texts]"], ["texts/b.txt", "is no file"], folder("texts/b.txt")
    ),
    "a pipe": Row([TEXT], ["a.txt", "is no file"], pipe("a.txt")),
    "an empty folder": Row(["data.corpora=[texts]"], ["texts has no train text"], folder("texts")),
    "two of one name": Row(
        ["data.corpora=[text.txt, text.txt]"], ["two are called text", "rename"]
    ),
    "JSON lines of another shape": Row(
        [LINES], ["a.jsonl line 1", TEXT_FIELD], put("a.jsonl", '["text"]\n')
    ),
    "JSON lines of a number": Row(
        [LINES], ["a.jsonl line 2", TEXT_FIELD], put("a.jsonl", '{"text": "a"}\n{"text": 3}\n')
    ),
    "JSON lines of null": Row(
        [LINES], ["a.jsonl line 1", TEXT_FIELD], put("a.jsonl", '{"text": null}\n' * 40)
    ),
    "JSON lines of half a character": Row(
        [LINES], ["a.jsonl line 1", TEXT_FIELD], put("a.jsonl", '{"text": "\\ud800"}\n' * 40)
    ),
    "JSON lines of a hundred thousand brackets": Row(
        [LINES], ["a.jsonl line 1", TEXT_FIELD], put("a.jsonl", DEEP)
    ),
    "JSON lines in UTF-16": Row(
        [LINES], ["a.jsonl is not UTF-8 text"], put("a.jsonl", '{"text": "a"}\n' * 40, "utf-16")
    ),
    "JSON in one piece": Row(
        [LINES], ["a.jsonl line 1", TEXT_FIELD], put("a.jsonl", '[\n{"text": "a"}\n]')
    ),
    "a dataset without its library": Row(["data.corpora=['hub:x']"], ["data.corpora: ", "hub:x"]),
    "no context": Row(
        ["task=consolidate"], ["one of context.text and context.file", "got neither"]
    ),
    "an empty context": Row(CONTEXT, ["context.file=a.txt is empty"], put("a.txt", " \n")),
    "a context in UTF-16": Row(
        CONTEXT,
        ["context.file=a.txt is not UTF-8 text", "convert it"],
        put("a.txt", "Ada has a dog.", "utf-16"),
    ),
    "a context with NUL bytes": Row(
        CONTEXT,
        ["context.file=a.txt holds NUL bytes", "convert it"],
        put("a.txt", "Ada has a dog.", "utf-16-le"),
    ),
    "a context that is a folder": Row(
        CONTEXT,
        ["context.file=a.txt cannot be read (Is a directory)", "name a text file"],
        folder("a.txt"),
    ),
    "a context longer than may be": Row(
        [*CONTEXT, "context.max_tokens=3"],
        ["more than context.max_tokens=3", "give a shorter one"],
        put("a.txt", ADA),
    ),
    "questions of another shape": Row(
        ASKED,
        ["context.questions=a.jsonl line 1 is no question", "a line is"],
        put("a.jsonl", '{"question": "a"}'),
    ),
    "questions that are numbers": Row(
        ASKED,
        ["context.questions=a.jsonl line 1 is no question"],
        put("a.jsonl", '{"prompt": 1, "answer": 2}'),
    ),
    "questions of half a character": Row(
        ASKED,
        ["context.questions=a.jsonl line 1 is no question"],
        put("a.jsonl", '{"prompt": "\\ud800", "answer": "a"}'),
    ),
    "no questions": Row(
        ASKED,
        ["context.questions=a.jsonl holds no questions", "leave context.questions empty"],
        put("a.jsonl", "\n"),
    ),
    "questions in Latin-1": Row(
        ASKED,
        ["context.questions=a.jsonl is not UTF-8 text"],
        put("a.jsonl", '{"prompt": "café", "answer": "a"}', "latin-1"),
    ),
    "questions deeper than anybody": Row(
        ASKED, ["context.questions=a.jsonl line 1 is no question"], put("a.jsonl", DEEP)
    ),
    "a question longer than the model": Row(
        ASKED,
        ["context.questions=a.jsonl: very very", "have 1,201 tokens", "shorten it"],
        put("a.jsonl", json.dumps({"prompt": "very " * 400, "answer": " a"})),
    ),
}

TEACHERS = {
    "nowhere": Row(
        ["teacher=./nowhere"], ["teacher=./nowhere: no such directory", "accepted are embedded"]
    ),
    "an address as teacher": Row(
        ["teacher=http://host/model"],
        ["teacher=http://host/model: no such directory", "accepted are embedded"],
    ),
    "a file": Row(["teacher=./text.txt"], ["teacher=./text.txt: no such directory"]),
    "an empty folder as teacher": Row(
        ["teacher=./empty"], ["teacher=./empty cannot be loaded", NEEDS], folder("empty")
    ),
    "a vocabulary of another model": Row(
        [],
        ["its tokenizer has 300 tokens, its model 600", "put the right tokenizer.json"],
        lambda: another_vocabulary(),
    ),
    "a tokenizer that is none": Row(
        [], ["teacher=teacher cannot be loaded", NEEDS], put("teacher/tokenizer.json", "{}")
    ),
    "a tokenizer in UTF-16": Row(
        [],
        ["teacher=teacher cannot be loaded", NEEDS],
        put("teacher/tokenizer.json", "{}", "utf-16"),
    ),
    "an adapter": Row(
        [],
        ["teacher=teacher holds an adapter", "merge it into its model"],
        put("teacher/adapter_config.json", "{}"),
    ),
    "no tokenizer": Row([], ["teacher=teacher", NEEDS], gone("teacher/tokenizer.json")),
    "weights cut short": Row(
        [], ["teacher=teacher cannot be loaded", NEEDS], cut("teacher/model.safetensors", 5000)
    ),
    "weights that are text": Row(
        [],
        ["teacher=teacher cannot be loaded", NEEDS],
        put("teacher/model.safetensors", "no weights"),
    ),
    "no weights": Row([], ["teacher=teacher", NEEDS], gone("teacher/model.safetensors")),
    "a config that is a list": Row(
        [], ["teacher=teacher cannot be loaded", NEEDS], put("teacher/config.json", "[1]")
    ),
    "a model of another kind": Row(
        [], ["teacher=teacher", NEEDS], changed("teacher/config.json", model_type="no_such_model")
    ),
    "more layers than weights": Row(
        [],
        ["teacher=teacher: its weights are not those of its config.json", "save it anew"],
        changed("teacher/config.json", n_layer=5),
    ),
    "layers by the million": Row(
        [],
        ["teacher=teacher", "n_layer=10000000", "model.safetensors"],
        changed("teacher/config.json", n_layer=10_000_000),
    ),
    "a width of a billion": Row(
        [],
        ["teacher=teacher", "n_embd=2000000000"],
        changed("teacher/config.json", n_embd=2_000_000_000),
    ),
    "a vocabulary of a billion": Row(
        [],
        ["teacher=teacher", "vocab_size=2000000000"],
        changed("teacher/config.json", vocab_size=2_000_000_000),
    ),
    "positions of a billion": Row(
        [],
        ["teacher=teacher", "n_positions=2000000000"],
        changed("teacher/config.json", n_positions=2_000_000_000),
    ),
    "a width below nothing": Row(
        [], ["teacher=teacher", "n_embd=-16"], changed("teacher/config.json", n_embd=-16)
    ),
    "heads that are a text": Row(
        [], ["teacher=teacher"], changed("teacher/config.json", n_head="two")
    ),
    "heads that do not share out": Row(
        [], ["teacher=teacher"], changed("teacher/config.json", n_head=3)
    ),
    "no heads": Row([], ["teacher=teacher"], changed("teacher/config.json", n_head=0)),
    "an activation nobody knows": Row(
        [], ["teacher=teacher"], changed("teacher/config.json", activation_function="nope")
    ),
    "a student for a teacher": Row(
        [f"teacher={STUDENT}"], ["is a student of dmt already", "name its teacher"]
    ),
    "a window longer than the model": Row(
        ["data.seq_len=161"],
        ["data.seq_len=161 is longer than the 160 positions", "set data.seq_len=160 or less"],
    ),
}


def another_vocabulary() -> None:
    from conftest import make_teacher

    make_teacher(600, n_positions=160).save_pretrained("teacher")


def another_database() -> None:
    sql("a.db", "CREATE TABLE recipes (id)")()


def kept(place: str) -> list[str]:
    return [*KEPT, f"store.url={place}"]


STORES = {
    "a text": Row(kept("text.txt"), ["store text.txt: this file is not a store", "give another"]),
    "another program's database": Row(
        kept("a.db"),
        ["store a.db: a database of something else (tables recipes)", "give a new file"],
        another_database,
    ),
    "a newer schema": Row(
        kept("logs/version_2/memory.db"),
        ["schema version 99", "a newer dmt made it", "update"],
        sql("logs/version_2/memory.db", "UPDATE dmt_about SET value='99' WHERE name='schema'"),
    ),
    "an older schema": Row(
        kept("logs/version_2/memory.db"),
        ["schema version 1", "this dmt knows 2"],
        sql("logs/version_2/memory.db", "UPDATE dmt_about SET value='1' WHERE name='schema'"),
    ),
    "a schema that is none": Row(
        kept("logs/version_2/memory.db"),
        ["store logs/version_2/memory.db", "schema"],
        sql("logs/version_2/memory.db", "UPDATE dmt_about SET value='x' WHERE name='schema'"),
    ),
    "another model's": Row(
        kept("logs/version_2/memory.db"),
        ["its rows belong to another model", "give a new file"],
        sql("logs/version_2/memory.db", "UPDATE dmt_about SET value='x' WHERE name='model'"),
    ),
    "nobody's": Row(
        kept("logs/version_2/memory.db"),
        ["store logs/version_2/memory.db"],
        sql("logs/version_2/memory.db", "DELETE FROM dmt_about WHERE name='model'"),
    ),
    "a folder": Row(kept("teacher"), ["store teacher: it cannot be opened"]),
    "in a folder that is not there": Row(
        kept("no/where.db"), ["store no/where.db: it cannot be opened", "its folder must exist"]
    ),
    "where nobody may write": Row(
        kept("/proc/rows.db"), ["store /proc/rows.db: it cannot be opened"]
    ),
    "no server": Row(
        kept("postgresql://u:secret@127.0.0.1:9/x"),
        ["store postgresql://u:***@127.0.0.1:9/x: the server does not answer", "is it running"],
    ),
    "a port that is a word": Row(
        kept("postgresql://127.0.0.1:port/x"),
        ["store postgresql://127.0.0.1:port/x: not a file or a database URL", "give a file"],
    ),
    "another database": Row(kept("mysql://127.0.0.1/x"), ["mysql is not supported", "give a file"]),
    "an address as store": Row(
        kept("http://127.0.0.1/x.db"),
        ["store http://127.0.0.1/x.db: http is not supported", "give a file"],
    ),
    "in memory": Row(kept("sqlite://"), ["a store outlives the program", "give a file"]),
    "a store cut short": Row(
        kept("logs/version_2/memory.db"),
        ["store logs/version_2/memory.db", "damaged"],
        cut("logs/version_2/memory.db", 70_000),
    ),
    "a cache that is a file": Row(
        [*CACHED, "logit_cache.dir=text.txt"],
        ["logit_cache.dir=text.txt cannot be written", "name another folder"],
    ),
    "a cache of another format": Row(
        CACHED,
        ["logit_cache.dir=cache", "format", "name another logit_cache.dir"],
        changed(CACHE_METADATA, version=99),
    ),
    "a cache cut short": Row(
        CACHED,
        ["logit_cache.dir=cache: its logits.npy is damaged", "delete"],
        cut(CACHE, 2000),
    ),
    "a cache of other settings": Row(
        [*CACHED, "logit_cache.top_k=32"],
        ["logit_cache.top_k (16 in the cache, 32 in this run) differ", "name another logit_cache.dir or delete"],
    ),
    "a cache of absurd size": Row(
        CACHED,
        ["logit_cache.dir=cache", "damaged"],
        put(CACHE, (2**62).to_bytes(8, "little") + b"{}"),
    ),
}


def reheaded(name: str, **differences: str) -> None:
    """Changes the metadata in a safetensors file's header, whatever length it then has."""
    content = Path(name).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] |= differences
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 4096)
    Path(name).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


RUNS = {
    "a run that is none": Row(
        ["--resume", "teacher"], ["--resume teacher: no run is there (no config.yaml)"]
    ),
    "a run that is a file": Row(["--resume", "text.txt"], ["--resume text.txt: no run is there"]),
    "a run with settings beside": Row(
        [*RESUME, "seed=1"], ["--resume goes on with the run's own settings", "leave out seed=1"]
    ),
    "a run with a setting of a newer dmt": Row(
        RESUME,
        [
            "loss.wonder is not a setting",
            "this run is another dmt's",
            "go on with that or a newer one",
        ],
        lambda: put(
            f"{V0}/config.yaml",
            Path(f"{V0}/config.yaml").read_text().replace("loss:\n", "loss:\n  wonder: 1\n"),
        )(),
    ),
    "a run whose settings are no YAML": Row(
        RESUME, [f"{V0}/config.yaml", "not valid YAML"], put(f"{V0}/config.yaml", "a: [")
    ),
    "a run whose teacher is gone": Row(RESUME, ["teacher=teacher"], gone("teacher")),
    "a run whose text is gone": Row(
        RESUME, ["data.corpora: no file or folder text.txt"], gone("text.txt")
    ),
    "no student": Row(
        ["dmt", "generate", "x", "-m", "nowhere"],
        ["--model nowhere: nothing is there", "give a run's folder"],
    ),
    "no student here": Row(
        ["dmt", "generate", "x"],
        ["no student is in lightning_logs/ here", "run python distill.py first"],
    ),
    "a student of a newer version": Row(
        ["dmt", "generate", "x", *S],
        [f"--model {STUDENT}: version 9, this dmt knows 1", "a newer dmt made it"],
        changed(f"{STUDENT}/config.json", dmt=9),
    ),
    "settings of a newer version": Row(
        RESUME,
        [f"{V0}/config.yaml: settings of version 9", "a newer dmt made it"],
        lambda: put(
            f"{V0}/config.yaml",
            Path(f"{V0}/config.yaml").read_text().replace("version 1", "version 9"),
        )(),
    ),
    "a record of a newer version": Row(
        RESUME,
        [f"{V0}/run.json: version 9", "a newer dmt made it"],
        changed(f"{V0}/run.json", format=9),
    ),
    "a student's config that is a list": Row(
        ["dmt", "generate", "x", *S],
        [f"--model {STUDENT} cannot be loaded"],
        put(f"{STUDENT}/config.json", "[]"),
    ),
    "a student of another memory": Row(
        ["dmt", "generate", "x", *S],
        [f"--model {STUDENT} cannot be loaded"],
        lambda: memory_of(wonder=1),
    ),
    "a student of slots by the billion": Row(
        ["dmt", "generate", "x", *S], [f"--model {STUDENT}"], lambda: memory_of(slots=10**12)
    ),
    "a student with a layer too many": Row(
        ["dmt", "generate", "x", *S],
        [f"--model {STUDENT} cannot be loaded"],
        lambda: memory_of("7"),
    ),
    "a student whose layer is a word": Row(
        ["dmt", "generate", "x", *S],
        [f"--model {STUDENT} cannot be loaded"],
        lambda: memory_of("first"),
    ),
    "a student without weights": Row(
        ["dmt", "generate", "x", *S],
        [f"--model {STUDENT} cannot be loaded"],
        gone(f"{STUDENT}/model.safetensors"),
    ),
    "a student's weights cut short": Row(
        ["dmt", "generate", "x", *S],
        [f"--model {STUDENT} cannot be loaded"],
        cut(f"{STUDENT}/model.safetensors", 999),
    ),
    "a student whose weights are another's": Row(
        ["dmt", "generate", "x", *S],
        ["--model", "its weights are not those"],
        lambda: (
            gone(BOOK)(),
            shutil.copy("teacher/model.safetensors", f"{STUDENT}/model.safetensors"),
        ),
    ),
    "a student without its slots": Row(
        ["dmt", "generate", "x", "-m", "logs/version_1"],
        ["slots.safetensors is not there", "put it back"],
        gone(SLOTS),
    ),
    "slots cut short": Row(
        ["dmt", "generate", "x", "-m", "logs/version_1"],
        ["slots.safetensors is not a whole file", "copy it"],
        cut(SLOTS, 9000),
    ),
    "slots of another format": Row(
        ["dmt", "generate", "x", "-m", "logs/version_1"],
        ["slots.safetensors: its format is 99", "a newer dmt made it", "update"],
        lambda: reheaded(SLOTS, format="99"),
    ),
    "slots of absurd size": Row(
        ["dmt", "generate", "x", "-m", "logs/version_1"],
        ["slots.safetensors is not a whole file"],
        put(SLOTS, (2**63).to_bytes(8, "little") + b"{}"),
    ),
    "a book that is text": Row(
        ["dmt", "memory", "list", *S],
        [f"store {BOOK}: this file is not a store"],
        lambda: (gone(f"{BOOK}-wal")(), gone(f"{BOOK}-shm")(), put(BOOK, "text " * 999)()),
    ),
    "a book that is a folder": Row(
        ["dmt", "memory", "write", ADA, *S],
        [f"store {BOOK}"],
        lambda: (gone(BOOK)(), folder(BOOK)()),
    ),
    "a book of a newer schema": Row(
        ["dmt", "memory", "list", *S],
        ["schema version 99", "a newer dmt made it"],
        sql(BOOK, "UPDATE dmt_about SET value='99' WHERE name='schema'"),
    ),
    "facts of a newer schema": Row(
        ["dmt", "memory", "list", *S],
        ["facts of version 99", "a newer dmt made it"],
        sql(BOOK, "UPDATE dmt_about SET value='99' WHERE name='facts'"),
    ),
    "facts without their table": Row(
        ["dmt", "memory", "list", *S], [f"store {BOOK}"], sql(BOOK, "DROP TABLE dmt_facts")
    ),
    "facts whose words are no JSON": Row(
        ["dmt", "memory", "list", *S],
        [f"store {BOOK}", "damaged"],
        sql(BOOK, "UPDATE dmt_facts SET subject_ids='[['"),
    ),
    "rows cut short": Row(
        ["dmt", "memory", "list", *S],
        [f"store {BOOK}", "damaged"],
        sql(BOOK, "UPDATE dmt_rows SET key=x'00'"),
    ),
}


def memory_of(layer: str = "0", **differences: Any) -> None:
    """Changes what a student's config says of the memory in a layer."""
    file = Path(STUDENT) / "config.json"
    found = json.loads(file.read_text())
    found["memory"][layer] = found["memory"]["0"] | differences
    file.write_text(json.dumps(found))


COMMANDS = {
    "a verb that is none": Row(
        ["dmt", "memory", "fly"], ["invalid choice: 'fly'", "--help lists what there is"]
    ),
    "a command that is none": Row(
        ["dmt", "fly"], ["invalid choice: 'fly'", "--help lists what there is"]
    ),
    "an option of dmt that is none": Row(
        ["dmt", "generate", "x", "--fly", *S], ["unrecognized arguments: --fly"]
    ),
    "nothing to ask": Row(["dmt", "generate", "", *S], ["the prompt is empty"]),
    "half a character asked": Row(
        ["dmt", "generate", "\udcff", *S], ["'\\udcff' is not UTF-8 text", "type it in UTF-8"]
    ),
    "half a character as a student": Row(
        ["dmt", "generate", "x", "-m", "\udcff"],
        ["'\\udcff' is not UTF-8 text", "rename what it names"],
    ),
    "half a character as a tag": Row(
        ["dmt", "memory", "write", ADA, "--tag", "\udcff", *S], ["\\udcff"]
    ),
    "half a character as a fact": Row(["dmt", "memory", "write", "Ada is \udcff", *S], ["\\udcff"]),
    "half a character searched for": Row(["dmt", "memory", "search", "\udcff", *S], ["\\udcff"]),
    "half a character read": Row(["dmt", "memory", "read", "\udcff", *S], ["\\udcff"]),
    "half a character as a context": Row(
        ["dmt", "consolidate", "Ada \udcff", "--model", "teacher"], ["\\udcff"]
    ),
    "an endless temperature": Row(
        ["dmt", "generate", "x", "--temperature", "inf", *S], ["--temperature", "got"]
    ),
    "a temperature that is none": Row(
        ["dmt", "generate", "x", "--temperature", "nan", *S], ["--temperature", "got"]
    ),
    "a seed below nothing": Row(["dmt", "generate", "x", "--seed", "-1", *S], ["--seed", "got -1"]),
    "a seed of forty digits": Row(
        ["dmt", "generate", "x", "--temperature", "1", "--seed", FLOOD, *S], ["--seed", "got"]
    ),
    "a fact of forty digits": Row(["dmt", "memory", "show", FLOOD, *S], ["was never there"]),
    "a fact of forty digits brought back": Row(
        ["dmt", "memory", "restore", FLOOD, *S], ["was never there"]
    ),
    "a fact of forty digits forgotten": Row(
        ["dmt", "memory", "forget", "--id", FLOOD, *S], ["is not there"]
    ),
    "a slot in another spelling": Row(
        ["dmt", "memory", "show", "--slot", "²:1", *S], ["--slot must be LAYER:NUMBER"]
    ),
    "a rate that is none": Row(
        ["dmt", "memory", "write", ADA, "--false-positive-rate", "nan", *S],
        ["--rate must be in (0, 0.5], got nan"],
    ),
    "facts of another shape": Row(
        FACTS, ["a.jsonl:1: a fact is an object of texts"], put("a.jsonl", '["Ada"]\n')
    ),
    "facts with a key too many": Row(
        FACTS,
        ["a.jsonl:1: unknown key 'colour'", "accepted are"],
        put("a.jsonl", '{"colour": "red"}\n'),
    ),
    "facts in UTF-16": Row(
        FACTS,
        ["a.jsonl is not UTF-8 text"],
        put("a.jsonl", '{"sentence": "Ada is in Rome."}\n', "utf-16"),
    ),
    "facts of half a character": Row(
        FACTS, ["a.jsonl:1: not JSON"], put("a.jsonl", '{"sentence": "Ada is in \\ud800."}\n')
    ),
    "no facts": Row(FACTS, ["a.jsonl holds no facts"], put("a.jsonl", "")),
    "facts in a folder": Row(FACTS, ["a.jsonl cannot be read (Is a directory)"], folder("a.jsonl")),
    "text of two words to measure on": Row(
        ["dmt", "memory", "write", ADA, "--calibration-text", "a.txt", *S],
        ["--calibration-text a.txt", "give 2,000 or more"],
        put("a.txt", "two words"),
    ),
    "text in UTF-16 to measure on": Row(
        ["dmt", "memory", "write", ADA, "--calibration-text", "a.txt", *S],
        ["--calibration-text a.txt is not UTF-8 text"],
        put("a.txt", "two words " * 500, "utf-16"),
    ),
    "an address as a pack": Row(
        ["dmt", "memory", "import", "http://host/a.safetensors", *S],
        ["host/a.safetensors: nothing is there", "name a pack"],
    ),
    "a pack that is a text": Row(
        ["dmt", "memory", "import", "text.txt", *S],
        ["pack text.txt is damaged or no pack", "get another copy"],
    ),
    "a pack that is a model": Row(
        ["dmt", "memory", "import", "teacher/model.safetensors", *S],
        ["no manifest of a pack", "dmt memory export makes one"],
    ),
    "a pack of a newer version": Row(
        TAKE,
        ["pack pack: version 9", "a newer dmt made it", "update"],
        changed("pack/manifest.json", version=9),
    ),
    "a pack of an older version": Row(
        TAKE,
        ["pack pack: version 0, this dmt knows 1", "export it anew"],
        changed("pack/manifest.json", version=0),
    ),
    "a pack cut short": Row(
        TAKE, ["pack pack is damaged", "get another copy"], cut("pack/rows.safetensors", 700)
    ),
    "a pack without tensors": Row(
        TAKE, ["no rows.safetensors is in it", "name a pack"], gone("pack/rows.safetensors")
    ),
    "a pack without a manifest": Row(
        TAKE, ["pack pack cannot be read"], gone("pack/manifest.json")
    ),
    "a pack of another model": Row(
        TAKE,
        ["belongs to another model", "write its sentences instead"],
        changed("pack/manifest.json", model="x"),
    ),
    "a pack in UTF-16": Row(
        TAKE,
        ["pack pack is damaged"],
        lambda: put("pack/manifest.json", Path("pack/manifest.json").read_text(), "utf-16")(),
    ),
    "a pack of words that are none": Row(
        ["dmt", "generate", "x", "--pack", "pack", *S],
        ["pack pack: fact 0 of its manifest is not one", "get another copy"],
        changed("pack/manifest.json", facts="x"),
    ),
    "a pack that is there": Row(
        ["dmt", "memory", "export", "pack", *S], ["pack is there already", "give a new name"]
    ),
    "a pack where nobody may write": Row(
        ["dmt", "memory", "export", "/proc/x/pack", *S],
        ["/proc/x/pack cannot be written", "give another place"],
    ),
    "packs of nothing": Row(
        ["dmt", "memory", "merge", "nowhere", "-o", "new"], ["pack nowhere: nothing is there"]
    ),
    "what is no context": Row(
        ["dmt", "consolidate", "--file", "nowhere.txt", "--model", "teacher"],
        ["context.file=nowhere.txt cannot be read"],
    ),
    "what is no destination": Row(
        ["dmt", "consolidate", ADA, "--model", "teacher", "--target", "heaven"],
        ["context.target must be one of memory, weights, tokens, got heaven"],
    ),
    "a night without facts": Row(
        ["dmt", "sleep", "--tag", "none", "--replay-data", "text.txt", *S],
        ["has no rows like that to sleep on", "write facts with dmt memory write"],
    ),
    "a night of endless steps": Row(
        ["dmt", "sleep", "--lr", "nan", *S], ["--lr must be in (0, 1], got nan"]
    ),
    "a night on nothing": Row(
        ["dmt", "sleep", "--replay-data", "nowhere.txt", "--output", "new", *S],
        ["no file or folder nowhere.txt"],
    ),
    "a night on a run of a newer dmt": Row(
        ["dmt", "sleep", "--output", "new", *S],
        ["wonder is not a setting"],
        put(f"{V0}/config.yaml", "wonder: 1\n"),
    ),
}
ROWS = {
    f"{what}: {name}": row
    for what, rows in {
        "settings": SETTINGS,
        "text": TEXTS,
        "teacher": TEACHERS,
        "store": STORES,
        "run": RUNS,
        "command": COMMANDS,
    }.items()
    for name, row in rows.items()
}


@pytest.fixture(autouse=True)
def _signals_put_back():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def words_of(row: Row) -> list[str]:
    return row.words if row.words[:1] == ["dmt"] or "--resume" in row.words else [*TINY, *row.words]


@pytest.mark.parametrize("name", ROWS)
def test_a_wrong_input_is_one_line_and_writes_nothing(name, shop, capsys):
    row = ROWS[name]
    row.spoil()
    before = snapshot(shop)
    words = words_of(row)
    capsys.readouterr()
    code = main.main(words[1:]) if words[0] == "dmt" else main.distill_main(words)
    shown = capsys.readouterr()
    said = line_of(code, shown.out, shown.err)
    for part in row.says:
        assert part in said, said
    assert snapshot(shop) == before, f"something was written: {said}"


@pytest.mark.parametrize(
    "name",
    [
        "settings: half a character in a value",
        "text: UTF-16",
        "run: a student of a newer version",
        "command: half a character asked",
        "settings: nul for a number",
        "command: a pack cut short",
    ],
)
def test_a_wrong_input_in_a_process_of_its_own(name, shop):
    row = ROWS[name]
    row.spoil()
    before = snapshot(shop)
    words = words_of(row)
    program = ["-m", "dmt", *words[1:]] if words[0] == "dmt" else [str(ROOT / "distill.py"), *words]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, *program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    said = line_of(done.returncode, done.stdout, done.stderr)
    for part in row.says:
        assert part in said, said
    assert snapshot(shop) == before


def test_a_byte_order_mark_is_ignored(shop, capsys):
    """What Windows' editors put before UTF-8 is taken for what it is."""
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
    assert len(ROWS) >= 80
    assert all(row.says for row in ROWS.values())
