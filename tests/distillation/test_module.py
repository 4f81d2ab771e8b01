"""The LightningModule and a whole run: stages, resume, signals, and what lies in the folder afterwards."""

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
    OptimConfig,
    StagesConfig,
    StudentConfig,
)
from dmt.distillation.calibration import measure_scales
from dmt.distillation.losses import Batch
from dmt.distillation.module import DistillationModule
from dmt.models.conversion import convert_blocks, get_memories
from dmt.models.forward import forward_teacher, forward_with_activations
from dmt.training import callbacks
from dmt.training.callbacks import StepProgressBar
from dmt.training.run_dir import newest_checkpoint
from dmt.training.trainer import k_schedule, lr_schedule

TOGETHER = 9
"""Steps of the small run: four layer-wise, five end to end."""
EIGHT = FeaturalConfig(k=8)


def module(teacher, each=EIGHT, **changes):
    settings = {"data": DataConfig(seq_len=16, batch_size=4, micro_batch_size=4)} | changes
    config = replace(Config(), **settings)
    student, _ = convert_blocks(teacher, [each] * LAYERS)
    return DistillationModule(config, student, teacher)


def test_a_run_ends_in_everything_it_promises(words, tmp_path, capsys, teacher):
    assert distill_main(words) == 0
    shown = capsys.readouterr().out
    run = newest(tmp_path)
    assert "text: perplexity" in shown
    assert f"tensorboard --logdir {run.parent}" in shown
    assert str(run / "student") in shown
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
    assert record["tokens"]["trained"] == TOGETHER * 4 * 16
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
    for tag in ("train/layerwise_loss", "train/kl", "lr", "val/text/ppl_ratio", "val/text/top1_agreement"):
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
    theirs = [t for n, t in teacher.named_parameters() if "mlp.c_" in n]
    theirs += [t.t() for t in theirs if t.dim() == 2]
    assert not any(
        torch.equal(t, mine) for t in theirs for mine in checkpoint["state_dict"].values()
    )
    assert all(
        name.startswith(("student.", "block_scales", "block_limits", "hidden_scale"))
        for name in checkpoint["state_dict"]
    )


def test_the_progress_bar_shows_steps_time_left_and_loss(words, capsys, monkeypatch):
    monkeypatch.setattr("dmt.training.trainer.make_progress_callback", StepProgressBar)
    assert distill_main([*words, "trainer.progress_bar=true"]) == 0
    bar = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("training"))
    assert "9/9" in bar
    assert bar.count(":") >= 4, "time gone and time left"
    assert "loss:" in bar
    assert "v_num" not in bar


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
def test_a_llama_goes_the_same_way(words, tokenizer, tmp_path, changes, capsys):
    make_llama(len(tokenizer)).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    assert distill_main([*words, f"teacher={tmp_path / 'llama'}", *changes]) == 0
    run = newest(tmp_path)
    student = AutoModelForCausalLM.from_pretrained(run / "student")
    assert type(student).__name__ == "MemoryLlamaForCausalLM"
    record = json.loads((run / "run.json").read_text())
    assert record["fidelity"]["text"]["kl"] > 0
    assert all(0 < used["active_per_token"] <= used["num_slots"] for used in record["slots"].values())


def curves(run):
    """The file of curves, without the order in which numbers of one step were written."""
    with (run / "metrics.csv").open() as file:
        return [sorted(row.items()) for row in csv.DictReader(file)]


@pytest.mark.parametrize("again", ["the same words", "config.yaml", "run.json"])
@pytest.mark.parametrize("kind", ["featural", "associative"])
def test_the_same_settings_give_the_same_digits(words, tmp_path, again, kind):
    words = [
        word for word in words if not word.startswith("trainer.num_threads")
    ]  # the ways to compute are found, once
    words += [f"memory.kind={kind}", "trainer.precision=auto"]
    if kind == "associative":
        words += ["memory.write_start=0.2", "memory.min_distance=0.05"]
    assert distill_main(words) == 0
    first = newest(tmp_path)
    assert distill_main(words if again == "the same words" else [str(first / again)]) == 0
    second = newest(tmp_path)
    assert first != second
    for name, value in weights(first).items():
        assert torch.equal(value, weights(second)[name]), name
    assert curves(first) == curves(second)
    one, two = (json.loads((run / "run.json").read_text()) for run in (first, second))
    apart = {"seconds", "tokens", "created_at", "replay_command", "commands"}
    assert {name: value for name, value in one.items() if name not in apart} == {
        name: value for name, value in two.items() if name not in apart
    }
    assert one["replay_command"] == f"dmt distill {first}/run.json"


def test_a_record_of_an_earlier_version_names_the_file_that_replays(words, tmp_path, capsys):
    assert distill_main(words) == 0
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
)  # more are in tests/faults
def test_a_stopped_and_resumed_run_ends_equal(
    words, tmp_path, monkeypatch, capsys, stop_at, number
):
    words += [
        "stages.k_warmup_factor=2",
        "optim.value_lr_scale=2",
    ]  # all that has a state
    assert distill_main(words) == 0
    whole = weights(newest(tmp_path))
    original = DistillationModule.training_step

    def interrupted(self, tokens, batch_idx):
        if self.global_step == stop_at:
            os.kill(os.getpid(), number)
        return original(self, tokens, batch_idx)

    monkeypatch.setattr(DistillationModule, "training_step", interrupted)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert distill_main(words) == 128 + number
    assert signal.getsignal(signal.SIGINT) == before[0]
    monkeypatch.setattr(DistillationModule, "training_step", original)
    run = newest(tmp_path)
    assert f"dmt distill --resume {run}" in capsys.readouterr().err
    stopped = json.loads((run / "run.json").read_text())
    assert "fidelity" not in stopped
    assert stopped["before_training"]["text"]["ppl_ratio"] > 0
    assert f"step_{stop_at + 1}.ckpt" in {p.name for p in (run / "checkpoints").iterdir()}
    assert not (run / "student").exists()
    assert distill_main(["--resume", str(run)]) == 0
    resumed = weights(run)
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    record = json.loads((run / "run.json").read_text())
    assert record["before_training"] == stopped["before_training"]
    assert len(record["commands"]) == 2
    assert list(run.glob("metrics.before-*.csv"))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_a_signal_while_processes_agree_whether_to_stop_is_not_lost(
    words, tmp_path, monkeypatch, capsys
):
    sent = []

    def agreeing(number):
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return number

    monkeypatch.setattr(callbacks, "all_reduce_max", agreeing)
    assert distill_main(words) == 128 + signal.SIGTERM
    assert "stopped after step 1; resume with" in capsys.readouterr().err
    assert not (newest(tmp_path) / "student").exists()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_the_newest_checkpoint_is_that_of_the_latest_step_whatever_its_name_sorts_like(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    for name in (
        "step_9.ckpt",
        "step_10.ckpt",
        "step_10-v1.ckpt",
        "step_11.ckpt.partial",
        "last.ckpt",
    ):
        (tmp_path / "checkpoints" / name).touch()
    assert newest_checkpoint(tmp_path).name == "step_10.ckpt"


def test_a_signal_while_measuring_can_be_resumed_too(words, tmp_path, monkeypatch, capsys):
    from dmt.distillation import run as runs

    original = runs.evaluate_student
    monkeypatch.setattr(
        runs, "evaluate_student", lambda *a: os.kill(os.getpid(), signal.SIGTERM) or original(*a)
    )
    assert distill_main(words) == 128 + signal.SIGTERM
    run = newest(tmp_path)
    assert f"--resume {run}" in capsys.readouterr().err
    monkeypatch.setattr(runs, "evaluate_student", original)
    metrics = (run / "metrics.csv").read_text()
    assert distill_main(["--resume", str(run)]) == 0
    assert (run / "student" / "model.safetensors").exists()
    assert (run / "metrics.csv").read_text() == metrics
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_resuming_a_finished_run_changes_nothing(words, tmp_path):
    assert distill_main([*words, "trainer.validate_every=0"]) == 0
    run = newest(tmp_path)
    before, record = weights(run), json.loads((run / "run.json").read_text())
    metrics = (run / "metrics.csv").read_text()
    assert distill_main(["--resume", str(run)]) == 0
    for name, value in before.items():
        assert torch.equal(value, weights(run)[name]), name
    after = json.loads((run / "run.json").read_text())
    assert (after["fidelity"], after["before_training"]) == (record["fidelity"], record["before_training"])
    assert len(after["commands"]) == 2
    assert (run / "metrics.csv").read_text() == metrics


def test_a_machine_without_git(words, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert distill_main(words) == 0
    assert json.loads((newest(tmp_path) / "run.json").read_text())["commit"] == "unknown"


def test_corpora_of_one_name_are_refused(words, tmp_path, text_file, capsys):
    other = tmp_path / "other" / text_file.name
    other.parent.mkdir()
    other.write_text(text_file.read_text())
    assert distill_main([*words, f"data.corpora=[{text_file}, {other}]"]) == 2
    assert "two are called text" in capsys.readouterr().err


def test_half_precision_steps_stay_near_full_ones(words, tmp_path):
    found = []
    for precision in ("32-true", "bf16-mixed"):
        assert distill_main([*words, f"trainer.precision={precision}"]) == 0
        found.append(
            json.loads((newest(tmp_path) / "run.json").read_text())["fidelity"]["text"]["kl"]
        )
    assert found[0] != found[1]
    assert found[1] == pytest.approx(found[0], rel=0.2)


def test_calibration_reads_as_many_tokens_as_it_is_told(teacher, monkeypatch):
    read = []
    monkeypatch.setattr(
        "dmt.distillation.module.calibrate_memories",
        lambda student, teacher, windows: read.append(windows.shape),
    )
    module(teacher, stages=stages(1, 1)).calibrate(torch.randint(1, 300, (9, 16)))
    assert read == [(4, 16)]  # 64 tokens


def steps_of(teacher, count, begins=lambda made: None, **changes):
    """`count` training steps without a trainer, and the module they were made with; `begins` is given it before the first."""
    made = module(teacher, **changes)
    optimizer = made.configure_optimizers()
    state = {"step": 0}
    made.optimizers = lambda: optimizer  # type: ignore[method-assign]
    made.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign]
    made.log = made._write = lambda *a, **k: None  # type: ignore[method-assign]
    made.clip_gradients = lambda opt, clip, how: torch.nn.utils.clip_grad_norm_(
        made.parameters(), clip
    )  # type: ignore[method-assign]
    type(made).global_step = property(lambda self: state["step"])
    generator = torch.Generator().manual_seed(0)
    made.calibrate(torch.randint(1, 300, (6, 16), generator=generator))
    begins(made)
    try:
        for _ in range(count):
            made.training_step(torch.randint(1, 300, (4, 16), generator=generator), 0)
            state["step"] += 1
    finally:
        del type(made).global_step
    return made


def stages(layerwise, end_to_end):
    return StagesConfig(
        calibration_tokens=64, layerwise_steps=layerwise, end_to_end_steps=end_to_end
    )


@pytest.mark.parametrize("stage", [(3, 0), (0, 3)])
def test_micro_batches_change_nothing(teacher, stage):
    whole, pieces = (
        steps_of(
            teacher,
            1,
            stages=stages(*stage),
            data=DataConfig(seq_len=16, batch_size=4, micro_batch_size=size),
        ).student
        for size in (4, 1)
    )
    for (name, one), many in zip(whole.named_parameters(), pieces.parameters(), strict=True):
        if one.grad is None:
            assert many.grad is None, name
        else:
            torch.testing.assert_close(many.grad, one.grad, rtol=1e-4, atol=1e-6)


def test_layerwise_changes_memories_only_and_end_to_end_the_rest(teacher):
    start = module(teacher).student.state_dict()
    layerwise = steps_of(teacher, 2, stages=stages(2, 2)).student.state_dict()
    both = steps_of(teacher, 4, stages=stages(2, 2)).student.state_dict()
    memory_only = steps_of(
        teacher, 4, stages=stages(2, 2), student=StudentConfig(trainable="memory")
    ).student.state_dict()
    for name, value in start.items():
        changed = [not torch.equal(value, after[name]) for after in (layerwise, both, memory_only)]
        in_memory = ".mlp." in name
        assert changed == [in_memory, True, in_memory], name


def test_training_leaves_the_teacher_alone(teacher):
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    made = steps_of(teacher, 2, stages=stages(1, 1))
    made.train()
    assert not teacher.training
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not [name for name, _ in made.named_parameters() if not name.startswith("student.")]


def test_while_training_a_threshold_too_high_for_the_budget_sinks_and_stays_shared(teacher):
    before = []

    def begins(made):
        made.train()
        made.on_fit_start()
        for memory in get_memories(made.student).values():
            memory.threshold.mul_(2)
            before.append(float(memory.threshold))

    made = steps_of(teacher, 3, begins, each=FeaturalConfig(k="auto", mean_k=8), stages=stages(3, 0))
    after = [float(memory.threshold) for memory in get_memories(made.student).values()]
    assert len(set(before)) == len(set(after)) == 1
    assert 0 < after[0] < 0.98 * before[0]


def test_errors_are_those_of_each_layers_own_memory(teacher, tokens):
    made = module(teacher, each=FeaturalConfig(k=SLOTS))
    seen = forward_teacher(teacher, tokens, capture_blocks=True)
    assert made._memory_fvu(seen, Batch.full_step(tokens)).abs().max() < 1e-6, (
        "slots that are all read say what the block says"
    )
    with torch.no_grad():
        get_memories(made.student)[1].output_bias += 1
    assert (made._memory_fvu(seen, Batch.full_step(tokens)) > 1e-2).tolist() == [False, True, False]


def test_what_a_teacher_says_is_in_no_graph_even_where_it_could_learn(teacher, tokens):
    teacher.requires_grad_(True)
    said = forward_teacher(teacher, tokens, capture_blocks=True)
    assert not any(
        state.requires_grad
        for state in (said.hidden, *said.block_inputs, *said.block_outputs, *said.layer_outputs)
    )
    assert forward_with_activations(teacher, tokens).hidden.requires_grad


@torch.no_grad()
def test_calibration_gives_every_memory_the_teachers_mean(teacher):
    made = module(teacher)
    windows = torch.randint(1, 300, (6, 16))
    wanted = forward_with_activations(teacher, windows, capture_blocks=True)
    before = forward_with_activations(made.student, windows, capture_blocks=True)
    made.calibrate(windows)
    after = forward_with_activations(made.student, windows, capture_blocks=True)
    for layer in range(LAYERS):
        mean = wanted.block_outputs[layer].flatten(0, 1).mean(0)
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
def test_scales_are_variances_of_the_teacher(teacher):
    windows = torch.randint(1, 300, (6, 16))
    scales = measure_scales(teacher, windows)
    signals = forward_with_activations(teacher, windows, capture_blocks=True)
    for layer in range(LAYERS):
        states = signals.block_outputs[layer].flatten(0, 1)
        torch.testing.assert_close(
            scales.block_variances[layer], (states - states.mean(0)).square().sum(-1).mean()
        )
    states = signals.hidden.flatten(0, 1)
    torch.testing.assert_close(
        scales.hidden_variance, (states - states.mean(0)).square().sum(-1).mean()
    )


def test_block_signals_are_what_the_blocks_saw_and_said(teacher, tokens):
    signals = forward_with_activations(teacher, tokens, capture_blocks=True)
    for layer, (given, said) in enumerate(
        zip(signals.block_inputs, signals.block_outputs, strict=True)
    ):
        torch.testing.assert_close(teacher.transformer.h[layer].mlp(given), said)
    torch.testing.assert_close(signals.logits, teacher(tokens).logits)
    assert not teacher.transformer.h[0].mlp._forward_hooks


def test_slots_read_fall_to_k_by_the_middle_and_the_step_is_the_same_afterwards(teacher):
    assert [k_schedule(step, 8, 4.0) for step in (0, 2, 4, 7)] == [4.0, 2.0, 1.0, 1.0]
    assert k_schedule(0, 8, 1.0) == 1.0
    made = steps_of(teacher, 1, stages=replace(stages(0, 4), k_warmup_factor=2.0))
    memories = get_memories(made.student)
    for step, multiplier in ((0, 2.0), (1, 2.0**0.5), (2, 1.0), (3, 1.0)):
        with made.step_context(step):
            assert {memory.k_multiplier for memory in memories.values()} == {multiplier}
        assert {memory.k_multiplier for memory in memories.values()} == {1.0}
    with made.step_context(0):
        for training, num_reads in ((True, 16), (False, 8)):  # measurements read k
            memory = memories[0].train(training)
            with memory.recording_usage() as usage:
                memory(torch.randn(10, WIDTH))
            assert usage.reads.sum() == 10 * num_reads


def test_values_have_a_rate_of_their_own(teacher):
    made = module(teacher, optim=OptimConfig(value_lr_scale=3.0, weight_decay=0.1))
    groups = made.configure_optimizers().param_groups
    values = {id(memory.values) for memory in get_memories(made.student).values()}
    for group in groups:
        assert group["lr_scale"] == (3.0 if {id(p) for p in group["params"]} <= values else 1.0)
        assert all((p.dim() > 1) == bool(group["weight_decay"]) for p in group["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(made.student.parameters()))


def test_raw_errors_weigh_layers_by_their_variance(teacher):
    tokens = Batch.full_step(torch.randint(1, 300, (4, 16)))
    shares, raw = (
        module(teacher, stages=replace(stages(2, 0), layerwise_loss=kind))
        for kind in ("fvu", "mse")
    )
    for made in (shares, raw):
        made.calibrate(torch.randint(1, 300, (6, 16), generator=torch.Generator().manual_seed(0)))
    errors = shares._memory_fvu(
        forward_teacher(teacher, tokens.tokens, capture_blocks=True), tokens
    )
    torch.testing.assert_close(
        raw.layerwise_loss(tokens)[0], (errors * raw.block_scales).sum()
    )
    torch.testing.assert_close(shares.layerwise_loss(tokens)[0], errors.sum())


def test_learning_rate_warms_up_and_falls():
    optim = OptimConfig(warmup_steps=10, min_lr_ratio=0.1)
    rates = [lr_schedule(step, 100, 2.0, optim) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(0.2)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert lr_schedule(0, 1, 2.0, optim) == pytest.approx(2.0)
