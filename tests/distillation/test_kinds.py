"""Every kind of memory through the whole engine, mixed by layer rules."""

import json
import os
import signal

import pytest
import torch
from conftest import LAYERS, SLOTS, WIDTH, newest, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from dmt.cli import main
from dmt.cli.main import distill_main
from dmt.config_io import load_config
from dmt.distillation import run
from dmt.distillation.module import DistillationModule
from dmt.errors import UserError
from dmt.memory import ExpertsMemory, PeerMemory, ProductKeyMemory
from dmt.memory.registry import list_memories
from dmt.models.calibration import set_lookup_rows
from dmt.models.memories import get_memories, get_slot_memories

RULES = {
    "found by routers": {
        "experts": "expert_size: 4, k: 8",
        "peer": "heads: 2, k: 8, key_width: 8",
        "product_key": "k: 8, silu_gate: true",
    },
    "found by scores": {
        "pruned": "num_slots: 8",
        "transcoder": "k: 8",
        "featural": "k: 8",
    },
    "found in the text": {
        "token": "",
        "ngram": "order: 2, num_rows: 50",
        "sum": "parts: [{kind: featural, k: 8}, {kind: ngram, num_rows: 50}]",
    },
    "without slots": {
        "none": "",
        "low_rank": "rank: 4",
        "associative": "k: 8, write_start: 0.2, min_distance: 0.05",
    },
}
SLOT_KINDS = {
    "experts",
    "peer",
    "product_key",
    "pruned",
    "transcoder",
    "featural",
    "associative",
    "sum",
}


def test_every_built_in_kind_is_tested():
    assert {kind for kinds in RULES.values() for kind in kinds} == set(list_memories())


@pytest.mark.parametrize("kinds", RULES.values(), ids=RULES)
def test_it_trains_resumes_is_measured_and_generates(
    distill_args, tmp_path, monkeypatch, capsys, kinds
):
    rules = ", ".join(
        f"{{layers: {layer}, memory: {{kind: {kind}, {settings}}}}}"
        for layer, (kind, settings) in enumerate(kinds.items())
    )
    distill_args += [f"student.layer_overrides=[{rules}]", "optim.value_lr_scale=2"]
    assert distill_main(distill_args) == 0
    whole_run = newest(tmp_path)
    training_step = DistillationModule.training_step

    def interrupt(self, tokens, batch_idx):
        if self.global_step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return training_step(self, tokens, batch_idx)

    monkeypatch.setattr(DistillationModule, "training_step", interrupt)
    assert distill_main(distill_args) == 128 + signal.SIGINT
    monkeypatch.setattr(DistillationModule, "training_step", training_step)
    run_dir = newest(tmp_path)
    assert distill_main(["--resume", str(run_dir)]) == 0
    resumed = weights(run_dir)
    for name, value in weights(whole_run).items():
        assert torch.equal(value, resumed[name]), name

    student = AutoModelForCausalLM.from_pretrained(run_dir / "student")
    assert [memory.kind for memory in get_memories(student).values()] == list(kinds)
    slot_layers = {layer for layer, kind in enumerate(kinds) if kind in SLOT_KINDS}
    assert set(get_slot_memories(student)) == slot_layers
    record = json.loads((run_dir / "run.json").read_text())
    assert record["fidelity"]["text"]["kl"] > 0
    assert set(record["slots"]) == {str(layer) for layer in slot_layers}
    assert all(used["active_per_token"] == 8 for used in record["slots"].values())
    costs = record["costs"]
    assert list(costs["layers"]) == [str(layer) for layer in range(LAYERS)]
    for name in ("read_bytes_per_token", "ram_bytes", "parameters", "multiply_adds"):
        assert costs["total"][name] == sum(layer[name] for layer in costs["layers"].values())
    assert costs["dense"]["read_bytes_per_token"] == LAYERS * 4 * (
        2 * SLOTS * WIDTH + SLOTS + WIDTH
    )
    assert (run_dir / "report.html").is_file()
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {f"val/fvu/layer_{layer}" for layer in range(LAYERS)} <= tags
    assert {f"slots/dead/layer_{layer}" for layer in slot_layers} <= tags

    capsys.readouterr()
    commands = (["generate", "the fox"], ["memory", "stats"], ["memory", "trace", "the fox"])
    for command in commands:
        assert main.main([*command, "--model", str(run_dir)]) == 0, command
    output = capsys.readouterr().out
    assert all(kind in output for kind in set(kinds) - {"sum"})
    assert "sum" not in kinds or "featural+ngram" in output
    for layer, kind in enumerate(kinds):
        if kind in SLOT_KINDS:
            assert (
                main.main(["memory", "show", "--slot", f"{layer}:3", "--model", str(run_dir)]) == 0
            )


def test_a_run_sets_the_rows_of_lookups_from_a_long_text(distill_args, monkeypatch):
    num_tokens = []

    def record(student, teacher, windows, batch_size):
        num_tokens.append(windows.numel())
        set_lookup_rows(student, teacher, windows, batch_size)

    monkeypatch.setattr(run, "set_lookup_rows", record)
    short = ["stages.layerwise_steps=0", "stages.end_to_end_steps=1"]
    for settings in (
        ["memory.kind=ngram", "memory.num_rows=50", "stages.lookup_tokens=96"],
        ["memory.kind=ngram", "memory.num_rows=50", "stages.lookup_tokens=0"],
        ["memory.kind=none", "stages.lookup_tokens=96"],
    ):
        arguments = [item for item in distill_args if not item.startswith("memory.")]
        assert distill_main([*arguments, *short, *settings]) == 0
    assert num_tokens == [96]


def test_layers_that_learn_stand_beside_rows_without_a_base():
    rows = "{layers: 0, memory: {kind: associative, base: none, value_target: teacher}}"
    load_config(None, [f"student.layer_overrides=[{rows}]", "memory.kind=none"])
    with pytest.raises(UserError, match="leaves nothing to learn layer by layer"):
        load_config(None, [f"student.layer_overrides=[{rows}]", "memory.kind=dense"])


@pytest.mark.parametrize(
    ("memory_class", "arguments", "message"),
    [
        (ExpertsMemory, {"expert_size": 5, "k": 5}, "expert_size must divide 16"),
        (ExpertsMemory, {"expert_size": 4, "k": 20}, r"k must be in \[1, 16\]"),
        (PeerMemory, {"heads": 2, "key_width": 4, "num_slots": 15}, "num_slots must be a square"),
        (PeerMemory, {"heads": 3, "key_width": 4}, "k=4 must be a multiple of heads=3"),
        (ProductKeyMemory, {"heads": 1, "key_width": 4, "k": 17}, "k must be at most 16"),
        (ProductKeyMemory, {"heads": 1, "key_width": 3}, "key_width must be an even number"),
    ],
)
def test_arguments_of_a_damaged_student_are_refused(memory_class, arguments, message):
    shared = {"num_slots": 16, "k": 4}
    kind = (
        {"silu_gate": False}
        if memory_class is ProductKeyMemory
        else {"activation_function": "gelu_new"}
    )
    with pytest.raises(UserError, match=f"^{message}"):
        memory_class.from_arguments(6, False, {**shared, **kind, **arguments})
