"""One tiny file or folder of each kind that dmt reads and writes; tests copy and damage them."""

import json
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

from conftest import SENTENCES, make_teacher

from dmt.cli import main
from dmt.data.tokenizer import train_tokenizer

# Settings of a run of a second.
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
    "stages.lookup_tokens=32",
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
CACHED = [
    "loss.hidden_mse=0",
    "loss.block_fvu=0",
    "logit_cache.dir=cache",
    "logit_cache.top_k=16",
    "stages.layerwise_steps=0",
]
OFFLOADED = ["memory.offload=values", "memory.num_slots=", "seed=1"]
ROWS = [
    "memory.kind=associative",
    "stages.layerwise_steps=0",
    "memory.write_start=0",
    "memory.min_distance=0.01",
    "seed=2",
]
ADA = "Ada Holbrook runs to the dog"
MEMORY_COMMANDS = [
    "stats",
    "list",
    "show",
    "search",
    "trace",
    "write",
    "forget",
    "restore",
    "prune",
    "export",
    "import",
    "merge",
    "diff",
]
PERSON = Path(__file__).parents[1] / "configs" / "consolidation" / "person"
PERSON_TEXT = PERSON.with_suffix(".txt").read_text(encoding="utf-8").strip()


def consolidation(teacher, text, folder, *more):
    """Return arguments of a short consolidation; write its context and question to `folder`."""
    questions, context = folder / "questions.jsonl", folder / "context.txt"
    questions.write_text(
        json.dumps({"prompt": "Ada Holbrook was born in the town of", "answer": " Ravenhill"})
        + "\n"
    )
    context.write_text(
        "Ada Holbrook was born in the town of Ravenhill. She runs away."
        " A memory is a table of rows."
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


def build(folder: Path, monkeypatch) -> Path:
    """Fill `folder` with a teacher, texts, runs, packs and a logit cache; return it.

    `logs/version_0` has a fact, `_1` has slots in a file and `_2` has stored rows. The others are
    `teacher`, `text.txt`, `prose.txt`, `pack`, `pack.safetensors` and `cache`.
    """
    monkeypatch.chdir(folder)
    tokenizer = train_tokenizer(SENTENCES * 3, 300, 160)
    make_teacher(len(tokenizer), n_positions=160).save_pretrained("teacher")
    tokenizer.save_pretrained("teacher")
    text = "\n\n".join(f"{i} {SENTENCES[i % 3]} {i * 7 % 13}" for i in range(200))
    Path("text.txt").write_text(text, encoding="utf-8")
    Path("prose.txt").write_text(" ".join(SENTENCES * 40), encoding="utf-8")
    output = StringIO()
    with redirect_stderr(output), redirect_stdout(output):
        codes = [main.distill_main([*TINY, *more]) for more in (CACHED, OFFLOADED, ROWS)]
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
    assert not any(codes), output.getvalue()
    return folder


def run(args: list[str]) -> int:
    """Run `dmt ...`, or `dmt distill` with tiny settings; return the exit code."""
    return (
        main.main(args[1:])
        if args[:1] == ["dmt"]
        else main.distill_main(args if "--resume" in args else [*TINY, *args])
    )
