"""The LightningModule and complete runs: stages, resume, signals and the files of a run."""

import csv
import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from conftest import LAYERS, SLOTS, WIDTH, make_llama, newest, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from dmt.cli.main import distill_main
from dmt.config import (
    Config,
    DataConfig,
    FeaturalConfig,
    NgramConfig,
    OptimConfig,
    StagesConfig,
    StudentConfig,
    SumConfig,
)
from dmt.distillation.losses import Batch, measure_scales
from dmt.distillation.module import DistillationModule
from dmt.memory.lookup_table import LookupTable
from dmt.models.conversion import convert_blocks
from dmt.models.forward import forward_teacher, forward_with_activations
from dmt.models.memories import get_memories
from dmt.training.optimization import k_schedule

TOTAL_STEPS = 9  # of the small run: four layer-wise, five end-to-end
EIGHT_SLOTS = FeaturalConfig(k=8)


def make_module(teacher, memory=EIGHT_SLOTS, **changes):
    settings = {"data": DataConfig(seq_len=16, batch_size=4, micro_batch_size=4)} | changes
    config = replace(Config(), **settings)
    student, _ = convert_blocks(teacher, [memory] * LAYERS)
    return DistillationModule(config, student, teacher)


def test_tables_are_updated_in_one_pass_over_memory(teacher):
    memory = SumConfig(parts=[FeaturalConfig(k=8), NgramConfig(order=2, num_rows=50)])
    module = make_module(teacher, memory, optim=OptimConfig(value_lr_scale=2))
    groups = module.configure_optimizers().param_groups
    fused = [value for group in groups if group.get("fused") for value in group["params"]]
    tables = [table.rows for table in module.student.modules() if isinstance(table, LookupTable)]
    assert {id(value) for value in fused} == {id(rows) for rows in tables}
    assert len(tables) == 2 * LAYERS
    scaled = [value for group in groups if group["lr_scale"] == 2 for value in group["params"]]
    slots = [layer.list_parts()[0].values for layer in get_memories(module.student).values()]
    assert {id(value) for value in scaled} == {id(values) for values in slots}


def test_a_finished_run_has_all_files_records_and_curves(distill_args, tmp_path, capsys, teacher):
    assert distill_main(distill_args) == 0
    output = capsys.readouterr().out
    run = newest(tmp_path)
    assert "text: perplexity" in output
    assert f"tensorboard --logdir {run.parent}" in output
    assert str(run / "student") in output
    assert {p.name for p in run.iterdir()} >= {
        "checkpoints",
        "config.yaml",
        "metrics.csv",
        "report.md",
        "run.json",
        "student",
        "weight_map.txt",
    }
    record = json.loads((run / "run.json").read_text())
    assert record["fidelity"]["text"]["tokens"] == 8 * 15
    assert record["tokens"]["trained"] == TOTAL_STEPS * 4 * 16
    assert record["libraries"]["torch"] == torch.__version__
    assert set(record["slots"]) == {str(layer) for layer in range(LAYERS)}
    assert "perplexity" in (run / "report.md").read_text()

    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(r["train/kl"]) > 0 for r in rows if r.get("train/kl")] == [True] * 5
    assert len([r for r in rows if r.get("train/layerwise_loss")]) == 4
    assert len([r for r in rows if r.get("val/text/kl")]) == 3

    events = EventAccumulator(str(run), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    for tag in (
        "train/layerwise_loss",
        "train/kl",
        "lr",
        "val/text/ppl_ratio",
        "val/text/top1_agreement",
    ):
        assert tag in tags["scalars"]
    for layer in range(LAYERS):
        for tag in (
            "val/fvu",
            "slots/dead",
            "slots/usage_entropy",
            "slots/used_fraction",
            "slots/active_per_token",
        ):
            assert f"{tag}/layer_{layer}" in tags["scalars"]
        assert f"slots/log10_reads/layer_{layer}" in tags["histograms"]
    assert "samples/text/text_summary" in tags["tensors"]
    assert "custom_scalars__config__" in tags["tensors"]
    assert "_hparams_/session_start_info" in events.summary_metadata

    checkpoint = torch.load(next((run / "checkpoints").glob("step_9.ckpt")), weights_only=True)
    teacher_weights = [weight for name, weight in teacher.named_parameters() if "mlp.c_" in name]
    teacher_weights += [weight.t() for weight in teacher_weights if weight.dim() == 2]
    assert not any(
        torch.equal(weight, tensor)
        for weight in teacher_weights
        for tensor in checkpoint["state_dict"].values()
    )
    assert all(
        name.startswith(("student.", "block_scales", "block_limits", "hidden_scale"))
        for name in checkpoint["state_dict"]
    )


@pytest.mark.parametrize(
    "changes",
    [
        ["memory.k=8", "memory.mean_k="],
        ["memory.num_slots=48", "memory.mean_k=6"],
        ["memory.num_slots=80"],
        ["student.layer_overrides=[{layers: 1, memory: {k: 4}}]"],
    ],
    ids=str,
)
def test_llama_teachers_are_distilled(distill_args, tokenizer, tmp_path, changes, capsys):
    make_llama(len(tokenizer)).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    assert distill_main([*distill_args, f"teacher={tmp_path / 'llama'}", *changes]) == 0
    run = newest(tmp_path)
    student = AutoModelForCausalLM.from_pretrained(run / "student")
    assert type(student).__name__ == "MemoryLlamaForCausalLM"
    record = json.loads((run / "run.json").read_text())
    assert record["fidelity"]["text"]["kl"] > 0
    assert all(
        0 < used["active_per_token"] <= used["num_slots"] for used in record["slots"].values()
    )


def read_curves(run):
    """Read the curves of a run, without the order of the numbers of one step."""
    with (run / "metrics.csv").open() as file:
        return [sorted(row.items()) for row in csv.DictReader(file)]


@pytest.mark.parametrize("repeat_with", ["arguments", "config.yaml", "run.json"])
@pytest.mark.parametrize("kind", ["featural", "associative"])
def test_the_same_settings_give_the_same_digits(distill_args, tmp_path, repeat_with, kind):
    distill_args = [
        arg for arg in distill_args if not arg.startswith("trainer.num_threads")
    ]  # threads and precision are autotuned, once
    distill_args += [f"memory.kind={kind}", "trainer.precision=auto"]
    if kind == "associative":
        distill_args += ["memory.write_start=0.2", "memory.min_distance=0.05"]
    assert distill_main(distill_args) == 0
    first = newest(tmp_path)
    second_args = distill_args if repeat_with == "arguments" else [str(first / repeat_with)]
    assert distill_main(second_args) == 0
    second = newest(tmp_path)
    assert first != second
    for name, value in weights(first).items():
        assert torch.equal(value, weights(second)[name]), name
    assert read_curves(first) == read_curves(second)
    first_record, second_record = (
        json.loads((run / "run.json").read_text()) for run in (first, second)
    )
    varying = {"seconds", "tokens", "created_at", "replay_command", "commands"}
    assert {name: value for name, value in first_record.items() if name not in varying} == {
        name: value for name, value in second_record.items() if name not in varying
    }
    assert first_record["replay_command"] == f"dmt distill {first}/run.json"


def test_a_record_without_settings_names_the_file_that_replays_the_run(
    distill_args, tmp_path, capsys
):
    assert distill_main(distill_args) == 0
    run = newest(tmp_path)
    record = json.loads((run / "run.json").read_text())
    del record["config"]
    (run / "run.json").write_text(json.dumps(record))
    assert distill_main([str(run / "run.json")]) == 2
    assert (
        f"holds no settings (an older dmt made it); give {run / 'config.yaml'}"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("stop_at", "number"), [(3, signal.SIGINT), (6, signal.SIGTERM)]
)  # tests/faults has more
def test_a_stopped_and_resumed_run_has_equal_weights(
    distill_args, tmp_path, monkeypatch, capsys, stop_at, number
):
    distill_args += [
        "stages.k_warmup_factor=2",
        "optim.value_lr_scale=2",
    ]  # everything that has a state
    assert distill_main(distill_args) == 0
    expected = weights(newest(tmp_path))
    original = DistillationModule.training_step

    def interrupted(self, tokens, batch_idx):
        if self.global_step == stop_at:
            os.kill(os.getpid(), number)
        return original(self, tokens, batch_idx)

    monkeypatch.setattr(DistillationModule, "training_step", interrupted)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert distill_main(distill_args) == 128 + number
    assert signal.getsignal(signal.SIGINT) == before[0]
    monkeypatch.setattr(DistillationModule, "training_step", original)
    run = newest(tmp_path)
    assert f"dmt distill --resume {run}" in capsys.readouterr().err
    stopped = json.loads((run / "run.json").read_text())
    assert "fidelity" not in stopped
    assert stopped["before_training"]["text"]["ppl_ratio"] > 0
    assert [len(corpus["digest"]) for corpus in stopped["corpora"]] == [32]
    assert f"step_{stop_at + 1}.ckpt" in {p.name for p in (run / "checkpoints").iterdir()}
    assert not (run / "student").exists()
    assert distill_main(["--resume", str(run)]) == 0
    resumed = weights(run)
    for name, value in expected.items():
        assert torch.equal(value, resumed[name]), name
    record = json.loads((run / "run.json").read_text())
    assert record["before_training"] == stopped["before_training"]
    assert len(record["commands"]) == 2
    assert list(run.glob("metrics.before-*.csv"))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_a_run_stopped_during_evaluation_can_be_resumed(
    distill_args, tmp_path, monkeypatch, capsys
):
    from dmt.distillation import run as runs

    original = runs.evaluate_student
    monkeypatch.setattr(
        runs, "evaluate_student", lambda *a: os.kill(os.getpid(), signal.SIGTERM) or original(*a)
    )
    assert distill_main(distill_args) == 128 + signal.SIGTERM
    run = newest(tmp_path)
    assert f"--resume {run}" in capsys.readouterr().err
    monkeypatch.setattr(runs, "evaluate_student", original)
    metrics = (run / "metrics.csv").read_text()
    assert distill_main(["--resume", str(run)]) == 0
    assert (run / "student" / "model.safetensors").exists()
    assert (run / "metrics.csv").read_text() == metrics
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_resuming_a_finished_run_changes_nothing(distill_args, tmp_path):
    assert distill_main([*distill_args, "trainer.validate_every=0"]) == 0
    run = newest(tmp_path)
    before, record = weights(run), json.loads((run / "run.json").read_text())
    metrics = (run / "metrics.csv").read_text()
    assert distill_main(["--resume", str(run)]) == 0
    for name, value in before.items():
        assert torch.equal(value, weights(run)[name]), name
    after = json.loads((run / "run.json").read_text())
    assert (after["fidelity"], after["before_training"]) == (
        record["fidelity"],
        record["before_training"],
    )
    assert len(after["commands"]) == 2
    assert (run / "metrics.csv").read_text() == metrics


def test_without_git_the_commit_is_unknown(distill_args, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert distill_main(distill_args) == 0
    assert json.loads((newest(tmp_path) / "run.json").read_text())["commit"] == "unknown"


def test_corpora_of_the_same_name_are_refused(distill_args, tmp_path, text_file, capsys):
    other = tmp_path / "other" / text_file.name
    other.parent.mkdir()
    other.write_text(text_file.read_text())
    assert distill_main([*distill_args, f"data.corpora=[{text_file}, {other}]"]) == 2
    assert "two are called text" in capsys.readouterr().err


def test_bf16_training_is_close_to_float32(distill_args, tmp_path):
    kls = []
    for precision in ("32-true", "bf16-mixed"):
        assert distill_main([*distill_args, f"trainer.precision={precision}"]) == 0
        kls.append(
            json.loads((newest(tmp_path) / "run.json").read_text())["fidelity"]["text"]["kl"]
        )
    assert kls[0] != kls[1]
    assert kls[1] == pytest.approx(kls[0], rel=0.2)


def test_calibration_reads_the_configured_number_of_tokens(teacher, monkeypatch):
    read = []
    monkeypatch.setattr(
        "dmt.distillation.module.calibrate_memories",
        lambda student, teacher, windows: read.append(windows.shape),
    )
    make_module(teacher, stages=stages(1, 1)).calibrate(torch.randint(1, 300, (9, 16)))
    assert read == [(4, 16)]  # 64 tokens


def train_steps(teacher, count, on_start=lambda module: None, **changes):
    """Make `count` training steps without a trainer and return the module.

    `on_start` is called with the module before the first step.
    """
    module = make_module(teacher, **changes)
    optimizer = module.configure_optimizers()
    state = {"step": 0}
    module.optimizers = lambda: optimizer  # type: ignore[method-assign]
    module.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign]
    module.log = lambda *a, **k: None  # type: ignore[method-assign]
    type(module).global_step = property(lambda self: state["step"])
    generator = torch.Generator().manual_seed(0)
    module.calibrate(torch.randint(1, 300, (6, 16), generator=generator))
    on_start(module)
    try:
        for _ in range(count):
            module.training_step(torch.randint(1, 300, (4, 16), generator=generator), 0)
            state["step"] += 1
    finally:
        del type(module).global_step
    return module


def stages(layerwise, end_to_end):
    return StagesConfig(
        calibration_tokens=64, layerwise_steps=layerwise, end_to_end_steps=end_to_end
    )


@pytest.mark.parametrize("stage", [(3, 0), (0, 3)])
def test_micro_batches_change_nothing(teacher, stage):
    full_batch, micro_batches = (
        train_steps(
            teacher,
            1,
            stages=stages(*stage),
            data=DataConfig(seq_len=16, batch_size=4, micro_batch_size=size),
        ).student
        for size in (4, 1)
    )
    for (name, parameter), other in zip(
        full_batch.named_parameters(), micro_batches.parameters(), strict=True
    ):
        if parameter.grad is None:
            assert other.grad is None, name
        else:
            torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-4, atol=1e-6)


def test_layerwise_steps_change_memories_only_and_end_to_end_steps_the_rest(teacher):
    start = make_module(teacher).student.state_dict()
    layerwise = train_steps(teacher, 2, stages=stages(2, 2)).student.state_dict()
    both = train_steps(teacher, 4, stages=stages(2, 2)).student.state_dict()
    memory_only = train_steps(
        teacher, 4, stages=stages(2, 2), student=StudentConfig(trainable="memory")
    ).student.state_dict()
    for name, value in start.items():
        changed = [not torch.equal(value, after[name]) for after in (layerwise, both, memory_only)]
        in_memory = ".mlp." in name
        assert changed == [in_memory, True, in_memory], name


def test_training_does_not_change_the_teacher(teacher):
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    module = train_steps(teacher, 2, stages=stages(1, 1))
    module.train()
    assert not teacher.training
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not [name for name, _ in module.named_parameters() if not name.startswith("student.")]


def test_training_lowers_a_threshold_that_is_too_high_for_the_budget(teacher):
    before = []

    def on_start(module):
        module.train()
        module.on_fit_start()
        for memory in get_memories(module.student).values():
            memory.threshold.mul_(2)
            before.append(float(memory.threshold))

    module = train_steps(
        teacher, 3, on_start, memory=FeaturalConfig(k="auto", mean_k=8), stages=stages(3, 0)
    )
    after = [float(memory.threshold) for memory in get_memories(module.student).values()]
    assert len(set(before)) == len(set(after)) == 1
    assert 0 < after[0] < 0.98 * before[0]


def test_errors_are_measured_for_each_memory(teacher, tokens):
    module = make_module(teacher, memory=FeaturalConfig(k=SLOTS))
    teacher_outputs = forward_teacher(teacher, tokens, capture_blocks=True)
    assert module._memory_fvu(teacher_outputs, Batch.full_step(tokens)).abs().max() < 1e-6, (
        "a memory that reads all slots equals the block"
    )
    with torch.no_grad():
        get_memories(module.student)[1].output_bias += 1
    assert (module._memory_fvu(teacher_outputs, Batch.full_step(tokens)) > 1e-2).tolist() == [
        False,
        True,
        False,
    ]


def test_teacher_outputs_need_no_gradient_even_if_parameters_do(teacher, tokens):
    teacher.requires_grad_(True)
    outputs = forward_teacher(teacher, tokens, capture_blocks=True)
    assert not any(
        state.requires_grad
        for state in (
            outputs.hidden,
            *outputs.block_inputs,
            *outputs.block_outputs,
            *outputs.layer_outputs,
        )
    )
    assert forward_with_activations(teacher, tokens).hidden.requires_grad


@torch.no_grad()
def test_calibration_sets_mean_outputs_to_those_of_the_teacher(teacher):
    module = make_module(teacher)
    windows = torch.randint(1, 300, (6, 16))
    teacher_outputs = forward_with_activations(teacher, windows, capture_blocks=True)
    before = forward_with_activations(module.student, windows, capture_blocks=True)
    module.calibrate(windows)
    after = forward_with_activations(module.student, windows, capture_blocks=True)
    for layer in range(LAYERS):
        mean = teacher_outputs.block_outputs[layer].flatten(0, 1).mean(0)
        assert (before.block_outputs[layer].flatten(0, 1).mean(0) - mean).abs().max() > 1e-2
        torch.testing.assert_close(
            after.block_outputs[layer].flatten(0, 1).mean(0), mean, rtol=1e-4, atol=1e-4
        )


@torch.no_grad()
def test_calibration_of_all_slots_changes_nothing(teacher, tokens):
    student, _ = convert_blocks(teacher, [FeaturalConfig(k=SLOTS)] * LAYERS)
    DistillationModule(replace(Config(), stages=stages(1, 1)), student, teacher).calibrate(
        torch.randint(1, 300, (6, 16))
    )
    assert (student(tokens).logits - teacher(tokens).logits).abs().max() <= 1e-4


@torch.no_grad()
def test_scales_are_variances_of_teacher_outputs(teacher):
    windows = torch.randint(1, 300, (6, 16))
    scales = measure_scales(teacher, windows)
    outputs = forward_with_activations(teacher, windows, capture_blocks=True)
    for layer in range(LAYERS):
        states = outputs.block_outputs[layer].flatten(0, 1)
        torch.testing.assert_close(
            scales.block_variances[layer], (states - states.mean(0)).square().sum(-1).mean()
        )
    states = outputs.hidden.flatten(0, 1)
    torch.testing.assert_close(
        scales.hidden_variance, (states - states.mean(0)).square().sum(-1).mean()
    )


def test_captured_activations_are_inputs_and_outputs_of_blocks(teacher, tokens):
    outputs = forward_with_activations(teacher, tokens, capture_blocks=True)
    for layer, (block_input, block_output) in enumerate(
        zip(outputs.block_inputs, outputs.block_outputs, strict=True)
    ):
        torch.testing.assert_close(teacher.transformer.h[layer].mlp(block_input), block_output)
    torch.testing.assert_close(outputs.logits, teacher(tokens).logits)
    assert not teacher.transformer.h[0].mlp._forward_hooks


def test_the_k_schedule_ends_at_k_halfway(teacher):
    assert [k_schedule(step, 8, 4.0) for step in (0, 2, 4, 7)] == [4.0, 2.0, 1.0, 1.0]
    assert k_schedule(0, 8, 1.0) == 1.0
    module = train_steps(teacher, 1, stages=replace(stages(0, 4), k_warmup_factor=2.0))
    memories = get_memories(module.student)
    for step, multiplier in ((0, 2.0), (1, 2.0**0.5), (2, 1.0), (3, 1.0)):
        with module.step_context(step):
            assert {memory.k_multiplier for memory in memories.values()} == {multiplier}
        assert {memory.k_multiplier for memory in memories.values()} == {1.0}
    with module.step_context(0):
        for training, num_reads in ((True, 16), (False, 8)):  # measurements read k
            memory = memories[0].train(training)
            with memory.recording_usage() as usage:
                memory(torch.randn(10, WIDTH))
            assert usage.reads.sum() == 10 * num_reads


def test_values_have_their_own_learning_rate(teacher):
    module = make_module(teacher, optim=OptimConfig(value_lr_scale=3.0, weight_decay=0.1))
    groups = module.configure_optimizers().param_groups
    values = {id(memory.values) for memory in get_memories(module.student).values()}
    for group in groups:
        assert group["lr_scale"] == (3.0 if {id(p) for p in group["params"]} <= values else 1.0)
        assert all((p.dim() > 1) == bool(group["weight_decay"]) for p in group["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(module.student.parameters()))


def test_mse_weights_layers_by_their_variance(teacher):
    tokens = Batch.full_step(torch.randint(1, 300, (4, 16)))
    fvu, raw = (
        make_module(teacher, stages=replace(stages(2, 0), layerwise_loss=kind))
        for kind in ("fvu", "mse")
    )
    for module in (fvu, raw):
        module.calibrate(torch.randint(1, 300, (6, 16), generator=torch.Generator().manual_seed(0)))
    errors = fvu._memory_fvu(forward_teacher(teacher, tokens.tokens, capture_blocks=True), tokens)
    torch.testing.assert_close(raw.layerwise_loss(tokens)[0], (errors * raw.block_scales).sum())
    torch.testing.assert_close(fvu.layerwise_loss(tokens)[0], errors.sum())
