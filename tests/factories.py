"""One of everything that the product reads and writes, tiny, made once: tests copy it and spoil a part."""

import json
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

from conftest import SENTENCES, make_teacher

from dmt.cli import main
from dmt.data.tokenizer import train_tokenizer

TINY = [
    "teacher=teacher",
    "data.corpora=[text.txt]",
    "trainer.log_dir=logs",
    "data.seq_len=16",
    "data.batch_size=2",
    "data.micro_batch_size=2",
    "data.validation_tokens=32",
    "data.test_tokens=32",
    "stages.calibration_tokens=32",
    "stages.layerwise_steps=1",
    "stages.end_to_end_steps=2",
    "optim.warmup_steps=1",
    "trainer.num_threads=1",
    "trainer.log_every=1",
    "trainer.validate_every=0",
    "trainer.checkpoint_every=1",
    "trainer.progress_bar=false",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "memory.mean_k=8",
]
"""A run of a second, in the workshop."""
CACHED = [
    "loss.hidden_mse=0",
    "loss.block_fvu=0",
    "logit_cache.dir=cache",
    "logit_cache.top_k=16",
    "stages.layerwise_steps=0",
]
FILED = ["memory.offload=values", "memory.num_slots=", "seed=1"]
ROWS = [
    "memory.kind=associative",
    "stages.layerwise_steps=0",
    "memory.write_start=0",
    "memory.min_distance=0.01",
    "seed=2",
]
ADA = "Ada Holbrook runs to the dog"


def consolidation(teacher, text, folder, *more):
    """Words of a consolidation that takes seconds, whose context and question are written into `folder`."""
    questions, context = folder / "questions.jsonl", folder / "context.txt"
    questions.write_text(
        json.dumps({"prompt": "Ada Holbrook was born in the town of", "answer": " Ravenhill"})
        + "\n"
    )
    context.write_text(
        "Ada Holbrook was born in the town of Ravenhill. She runs away. A memory is a table of rows."
    )
    return [
        "task=consolidate",
        f"teacher={teacher}",
        f"context.file={context}",
        f"context.questions={questions}",
        f"data.corpora=[{text}]",
        f"trainer.log_dir={folder / 'logs'}",
        "data.seq_len=32",
        "data.batch_size=2",
        "data.micro_batch_size=2",
        "data.validation_tokens=64",
        "data.test_tokens=128",
        "stages.end_to_end_steps=4",
        "optim.warmup_steps=1",
        "trainer.num_threads=1",
        "trainer.log_every=1",
        "trainer.validate_every=2",
        "trainer.checkpoint_every=2",
        "trainer.progress_bar=false",
        "trainer.accelerator=cpu",
        "trainer.precision=32-true",
        "context.num_samples=8",
        "context.lora_rank=2",
        *more,
    ]


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
        codes = [main.distill_main([*TINY, *more]) for more in (CACHED, FILED, ROWS)]
        codes.append(
            main.main(
                [
                    "memory",
                    "write",
                    ADA,
                    "--tag",
                    "dogs",
                    "--calibration-text",
                    "prose.txt",
                    "-m",
                    "logs/version_0",
                ]
            )
        )
        codes += [
            main.main(["memory", "export", pack, "-m", "logs/version_0"])
            for pack in ("pack", "pack.safetensors")
        ]
    assert not any(codes), said.getvalue()
    return place


def run(words: list[str]) -> int:
    """The exit code of a command, `dmt ...` or `dmt distill`, the latter's run made tiny."""
    return (
        main.main(words[1:])
        if words[:1] == ["dmt"]
        else main.distill_main(words if "--resume" in words else [*TINY, *words])
    )
