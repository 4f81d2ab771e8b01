"""What tests/test_second_device.py runs on a second device: `python device_cases.py DEVICE CASE`.

Each case is a function that prints one JSON value; its arguments are those of the command line.
The device is installed first, because it patches torch.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import second_device

if __name__ == "__main__":
    second_device.install(sys.argv[1])

import csv
import json
import logging
import os
import shutil

import pytest
import torch
from factories import ADA, ROWS, TINY
from transformers import AutoModelForCausalLM

import dmt
from dmt.cli.main import distill_main
from dmt.editing.online import ensure_namespaces, write_online
from dmt.memory import AssociativeMemory, insert_policy
from dmt.memory.associative import enable_writes
from dmt.models.fact_hooks import disabled
from dmt.ops import run_copy_tasks

FACT_PROMPTS = ("Ada Holbrook runs to the", "Bob Stone reads a table of", "the quick brown fox")
PROMPT = [[5, 6, 7, 8, 9, 10]]
# A map that leaves one layer's weights on the CPU; accelerate moves them for each pass.
OFFLOADED_LAYER = {
    **dict.fromkeys(("transformer.wte", "transformer.wpe", "transformer.drop", "lm_head"), 0),
    **dict.fromkeys(("transformer.h.0", "transformer.h.2", "transformer.ln_f"), 0),
    "transformer.h.1": "cpu",
}


def generate(model, prompt=PROMPT, max_new_tokens=8):
    """Return the most likely continuation."""
    ids = torch.tensor(prompt).to(model.get_output_embeddings().weight.device)
    output = model.generate(
        ids, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0, eos_token_id=-1
    )
    return output.cpu().tolist()


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def load_with_default_device(folder):
    torch.set_default_device("cuda")
    try:
        model = load(folder)
        return generate(model)
    finally:
        torch.set_default_device(None)


def move_back(model):
    generate(model.to("cuda"))
    return generate(model.cpu())


def cast_after_use(model):
    """Cast a used model to half precision on both devices; return its tokens in float32 again."""
    for device in ("cpu", "cuda"):
        model.to(device)
        for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.float16):
            generate(model.to(dtype))
    return generate(model.float())


def load_students(*folders):
    """Load students in every way; print which do not continue as on the CPU."""
    different = []
    for folder in folders:
        expected = generate(load(folder))
        outputs = {
            "to": generate(load(folder).to("cuda")),
            "device_map": generate(load(folder, device_map="cuda")),
            "offloaded": generate(load(folder, device_map=OFFLOADED_LAYER)),
            "default device": load_with_default_device(folder),
            "moved back": move_back(load(folder)),
        }
        different += [f"{folder}: {way}" for way in outputs if outputs[way] != expected]
        cast_after_use(load(folder))  # float16 rounds weights for good, so tokens may differ
    return different


def run(log_dir, *arguments):
    """Distill with tiny settings in the working folder; return the folder of the run."""
    assert distill_main([*TINY, f"trainer.log_dir={log_dir}", *arguments]) == 0
    return max(Path(log_dir).glob("version_*"), key=lambda path: path.stat().st_mtime)


def read_metrics(run_dir):
    with (run_dir / "metrics.csv").open(encoding="utf-8") as file:
        return [
            {name: value for name, value in row.items() if value} for row in csv.DictReader(file)
        ]


def distill(folder, *arguments):
    """Distill on the CPU and on the device; print steps whose metrics differ, and the number."""
    os.chdir(folder)
    expected, actual = (
        read_metrics(run(f"logs_{accelerator}", *arguments, f"trainer.accelerator={accelerator}"))
        for accelerator in ("cpu", "gpu")
    )
    assert len(expected) == len(actual)
    different = []
    for row, device_row in zip(expected, actual, strict=True):
        assert row.keys() == device_row.keys()
        for name, value in row.items():
            if float(device_row[name]) != pytest.approx(float(value), rel=1e-3, abs=1e-5):
                different.append(f"step {row['step']}: {name} is {device_row[name]}, not {value}")
    return {"different": different, "rows": len(expected)}


def half_precision(folder):
    """Train in bfloat16; print whether the losses are near those in float32."""
    os.chdir(folder)
    arguments = ["trainer.accelerator=gpu", "stages.end_to_end_steps=3"]
    losses = []
    for precision in ("32-true", "auto"):
        run_dir = run(f"logs_{precision}", *arguments, f"trainer.precision={precision}")
        losses.append(float(read_metrics(run_dir)[-1]["train/loss"]))
    config = (run_dir / "config.yaml").read_text(encoding="utf-8")
    return {"losses": losses, "precision": "bf16-mixed" in config}


def resume(folder):
    """Resume a run with stored rows from its first checkpoint; print whether weights are equal."""
    os.chdir(folder)
    arguments = [*ROWS, "trainer.accelerator=gpu", "stages.end_to_end_steps=4"]
    run_dir = run("logs_resumed", *arguments)
    checkpoints = sorted((run_dir / "checkpoints").glob("step_*.ckpt"))
    expected = load(run_dir / "student").state_dict()
    checkpoints[-1].unlink()
    shutil.rmtree(run_dir / "student")
    assert distill_main(["--resume", str(run_dir)]) == 0
    actual = load(run_dir / "student").state_dict()
    different = [name for name in expected if not torch.equal(expected[name], actual[name])]
    return {"checkpoints": len(checkpoints), "different": different}


def write_facts(folder):
    """Write a fact on the CPU and on the device; print what each then answers, and its rows."""
    outputs = {}
    for device in ("cpu", "cuda"):
        student = Path(folder) / f"facts_{device}"
        shutil.copytree(Path(folder) / "logs" / "version_0" / "student", student)
        with dmt.Memory.open(student, device=device) as facts:
            written = facts.write("Bob Stone reads a table of rows")
            outputs[device] = [facts.generate(prompt, 4) for prompt in FACT_PROMPTS]
        with dmt.Memory.open(student, device=device) as facts:
            outputs[device] += [facts.generate(prompt, 4) for prompt in FACT_PROMPTS]
            with disabled(facts.model):
                outputs[device].append(facts.generate(FACT_PROMPTS[0], 4))
        outputs[device].append(len(written.fact.rows))
    return outputs


def write_rows(folder):
    """Write a text into stored rows on both devices; print the texts that follow, and the rows."""
    outputs = {}
    for device in ("cpu", "cuda"):
        student = Path(folder) / f"rows_{device}"
        shutil.copytree(Path(folder) / "logs" / "version_2" / "student", student)
        with dmt.Memory.open(student, device=device) as facts:
            ensure_namespaces(facts.model, facts.db)
            ids = torch.tensor(facts.tokenizer(ADA)["input_ids"])
            result = write_online(facts.model, facts.db, ids, "dogs")
            outputs[device] = [result.added, generate(facts.model)]
        model, _ = dmt.load(student, device)
        outputs[device].append(generate(model))
    return outputs


def insert_rows():
    """Insert rows on both devices; print their keys and values, and on the device how it waits.

    Distances between proposals are computed at once there, or, if there are many, for some of them.
    """
    policy = dmt.InsertPolicy(min_distance=0.05, merge_distance=0.4, capacity=40, decay=0.1)
    outputs = {"waits": []}
    for name, device, max_scores in (
        ("cpu", "cpu", insert_policy.MAX_SCORES),
        ("at once", "cuda", insert_policy.MAX_SCORES),
        ("in parts", "cuda", 100),
    ):
        insert_policy.MAX_SCORES = max_scores
        generator = torch.Generator().manual_seed(0)
        memories = [AssociativeMemory(4, insert_policy=policy).to(device) for _ in range(2)]
        for step in range(6):
            with torch.no_grad(), enable_writes(memories):
                for memory in memories:
                    memory(torch.randn(30, 4, generator=generator).to(device))
            with second_device.WaitCounter() as counter:
                run_copy_tasks([memory.commit_step_task(step + 1, 0.0) for memory in memories])
        outputs["waits"].append(counter.waits)
        outputs[name] = [
            [memory.rows.ids.tolist(), memory.rows.host_ids.tolist()]
            + [states.flatten().tolist() for states in (memory.rows.keys, memory.rows.values)]
            + [memory.rows.stats.entries.tolist(), memory.recent_hidden()[0].flatten().tolist()]
            for memory in memories
        ]
    return outputs


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    result = globals()[sys.argv[2]](*sys.argv[3:])
    print(f"\n{json.dumps(result)}")
