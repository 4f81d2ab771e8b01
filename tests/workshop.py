"""One of everything that the product reads and writes, tiny, made once: tests copy it and spoil a part."""

import json
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

from conftest import SENTENCES, make_teacher

from dmt import cli, main
from dmt.distill.pretrain import train_tokenizer

TINY = [
    "teacher=teacher", "data.corpora=[text.txt]", "trainer.log_dir=logs", "data.block=16", "data.batch=2", "data.micro_batch=2",
    "data.validation_tokens=32", "data.test_tokens=32", "stages.calibrate_tokens=32", "stages.layerwise_steps=1",
    "stages.end_to_end_steps=2", "optim.warmup=1", "trainer.threads=1", "trainer.log_every=1", "trainer.validate_every=0",
    "trainer.checkpoint_every=1", "trainer.progress=false", "trainer.accelerator=cpu", "trainer.precision=32-true",
    "trainer.attention=sdpa", "memory.budget=8",
]  # fmt: skip
"""A run of a second, in the workshop."""
CACHED = ["loss.hidden=0", "loss.block=0", "cache.place=cache", "cache.kept=16", "stages.layerwise_steps=0"]
FILED = ["memory.disk=values", "memory.slots=", "seed=1"]
ROWS = ["memory.kind=associative", "stages.layerwise_steps=0", "memory.write_from=0", "memory.novelty=0.01", "seed=2"]
ADA = "Ada Holbrook runs to the dog"


def consolidation(teacher, text, folder, *more):
    """Words of a consolidation that takes seconds, whose context and question are written into `folder`."""
    questions, context = folder / "questions.jsonl", folder / "context.txt"
    questions.write_text(json.dumps({"prompt": "Ada Holbrook was born in the town of", "answer": " Ravenhill"}) + "\n")
    context.write_text("Ada Holbrook was born in the town of Ravenhill. She runs away. A memory is a table of rows.")
    return [
        "task=consolidate", f"teacher={teacher}", f"context.file={context}", f"context.questions={questions}",
        f"data.corpora=[{text}]", f"trainer.log_dir={folder / 'logs'}", "data.block=32", "data.batch=2", "data.micro_batch=2",
        "data.validation_tokens=64", "data.test_tokens=128", "stages.end_to_end_steps=4", "optim.warmup=1", "trainer.threads=1",
        "trainer.log_every=1", "trainer.validate_every=2", "trainer.checkpoint_every=2", "trainer.progress=false",
        "trainer.accelerator=cpu", "trainer.precision=32-true", "context.samples=8", "context.rank=2", *more,
    ]  # fmt: skip


def build(place: Path, monkeypatch) -> Path:
    """In `place`: `teacher`, `text.txt`, runs `logs/version_0` (with a book and a fact), `_1` (slots in a file), `_2` (rows),
    `pack`, `pack.safetensors`, `cache`."""
    monkeypatch.chdir(place)
    tokenizer = train_tokenizer(SENTENCES * 3, 300, 160)
    make_teacher(len(tokenizer), n_positions=160).save_pretrained("teacher")
    tokenizer.save_pretrained("teacher")
    text = "\n\n".join(f"{i} {SENTENCES[i % 3]} {i * 7 % 13}" for i in range(200))
    Path("text.txt").write_text(text, encoding="utf-8")
    Path("prose.txt").write_text(" ".join(SENTENCES * 40), encoding="utf-8")
    said = StringIO()
    with redirect_stderr(said), redirect_stdout(said):
        codes = [main.main([*TINY, *more]) for more in (CACHED, FILED, ROWS)]
        codes.append(cli.main(["memory", "write", ADA, "--tag", "dogs", "--calibrate-on", "prose.txt", "-s", "logs/version_0"]))
        codes += [cli.main(["memory", "export", pack, "-s", "logs/version_0"]) for pack in ("pack", "pack.safetensors")]
    assert not any(codes), said.getvalue()
    return place


def run(words: list[str]) -> int:
    """The exit code of a command, `dmt` or `distill.py`, the latter's run made tiny."""
    return cli.main(words[1:]) if words[:1] == ["dmt"] else main.main(words if "--resume" in words else [*TINY, *words])
