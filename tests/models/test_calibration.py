"""Calibration: Fisher metrics, the shared budget of slots, and statistics without outliers."""

import pytest
import torch
from conftest import LAYERS, SLOTS, WIDTH, make_llama, make_teacher

from dmt.config import DenseConfig, FeaturalConfig
from dmt.distillation.losses import measure_scales
from dmt.evaluation.metrics import measure_fidelity
from dmt.memory.sparsity_budget import initialize_threshold
from dmt.memory.usage import record_usage
from dmt.models.architectures import get_architecture
from dmt.models.calibration import calibrate_memories, measure_fisher
from dmt.models.conversion import convert_blocks
from dmt.models.forward import forward_with_activations
from dmt.models.memories import get_memories
from dmt.ops import inlier_mask, outlier_threshold, symmetric_root


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_the_fisher_metric_predicts_the_kl_of_a_small_change(layer):
    teacher = make_teacher().double()
    tokens = torch.randint(1, 300, (2, 8))
    fisher = measure_fisher(teacher, tokens.repeat(300, 1), batch_size=100)[layer].double()
    block = get_architecture("gpt2").blocks(teacher)[layer]
    before = teacher(tokens).logits.log_softmax(-1)
    for seed in range(3):
        change = (
            torch.randn(WIDTH, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
            * 1e-3
        )
        kls = []
        for position in range(8):

            def add_change(_, __, block_output, position=position, change=change):
                block_output = block_output.clone()
                block_output[:, position] += change
                return block_output

            hook = block.register_forward_hook(add_change)
            after = teacher(tokens).logits.log_softmax(-1)
            kls.append(float((before.exp() * (before - after)).sum((-2, -1)).mean()))
            hook.remove()
        assert sum(kls) / 8 == pytest.approx(float(change @ fisher @ change) / 2, rel=0.15)


def test_norms_with_the_symmetric_root_equal_those_of_the_metric():
    half = torch.randn(WIDTH, WIDTH - 3)
    metric, states = half @ half.t(), torch.randn(5, WIDTH)
    torch.testing.assert_close(
        (states @ symmetric_root(metric)).square().sum(-1),
        (states @ metric * states).sum(-1),
        rtol=1e-3,
        atol=1e-3,
    )


@pytest.mark.parametrize("family", [make_teacher, make_llama])
def test_a_shared_budget_is_met_and_beats_a_uniform_k(family):
    teacher = family()
    windows = torch.randint(1, 300, (24, 20))
    kls = {}
    for name, memory in {
        "auto": FeaturalConfig(mean_k=SLOTS // 4),
        "uniform": FeaturalConfig(k=SLOTS // 4),
    }.items():
        student, _ = convert_blocks(teacher, [memory] * LAYERS)
        calibrate_memories(student, teacher, windows)
        memories = get_memories(student)
        with record_usage(memories) as usage:
            kls[name] = measure_fidelity(student, teacher, windows).kl
        reads = [counts.mean_reads for counts in usage.values()]
        assert sum(reads) / LAYERS == pytest.approx(SLOTS // 4, rel=0.1)
        if name == "auto":
            assert len({float(memory.threshold) for memory in memories.values()}) == 1
            assert max(reads) > min(reads) + 1, "layers read different numbers of slots"
            assert not any(memory.budget_tokens for memory in memories.values())
    assert kls["auto"] < kls["uniform"]


def test_one_outlier_token_changes_no_statistic():
    plain, absurd = make_teacher(), make_teacher()
    windows = torch.randint(1, 299, (8, 20))
    for teacher in (plain, absurd):
        teacher.requires_grad_(False)

    def explode(_, block_input, block_output):
        block_output = block_output.clone()
        block_output[0, 0] *= 1e5
        return block_output

    hook = get_architecture("gpt2").blocks(absurd)[1].register_forward_hook(explode)
    plain_scales, absurd_scales = measure_scales(plain, windows), measure_scales(absurd, windows)
    assert float(absurd_scales.block_variances[1]) == pytest.approx(
        float(plain_scales.block_variances[1]), rel=0.2
    )
    student, _ = convert_blocks(plain, [FeaturalConfig(k=8)] * LAYERS)
    calibrate_memories(student, absurd, windows)
    hook.remove()
    assert get_memories(student)[1].output_bias.abs().max() < 50
    assert all(parameter.isfinite().all() for parameter in student.parameters())


@torch.no_grad()
def test_outlier_norms_are_those_of_each_layer():
    teacher, windows = make_teacher(), torch.randint(1, 300, (8, 20))
    outputs = forward_with_activations(teacher, windows, capture_blocks=True).block_outputs
    torch.testing.assert_close(
        measure_scales(teacher, windows).outlier_norms,
        torch.stack([outlier_threshold(states) for states in outputs]),
    )


def test_the_budget_is_met_from_a_wrong_initial_threshold(monkeypatch):
    def too_high(memories, hidden):
        initialize_threshold(memories, hidden)
        for memory in memories:
            memory.threshold.mul_(1.3)

    monkeypatch.setattr("dmt.models.calibration.initialize_threshold", too_high)
    teacher, windows = make_teacher(), torch.randint(1, 300, (24, 20))
    student, _ = convert_blocks(teacher, [FeaturalConfig(mean_k=8)] * LAYERS)
    calibrate_memories(student, teacher, windows)
    with record_usage(get_memories(student)) as usage:
        forward_with_activations(student, windows)
    assert sum(counts.mean_reads for counts in usage.values()) == pytest.approx(
        8 * LAYERS, rel=0.05
    )


def test_the_initial_threshold_is_measured_with_means_on_inliers_of_each_layer(
    monkeypatch,
):
    teacher, windows, captured = make_teacher(), torch.randint(1, 300, (8, 20)), []

    def capture(memories, hidden):
        for memory, states in zip(memories, hidden, strict=True):
            captured.append(states)
            torch.testing.assert_close(
                memory.compute_weights(states, memory.compute_scores(states)).mean(0),
                torch.zeros(SLOTS),
                atol=1e-5,
                rtol=0,
            )

    def explode(_, block_input, block_output):
        return block_output.index_put((torch.tensor(0), torch.tensor(0)), block_output[0, 0] * 1e5)

    monkeypatch.setattr("dmt.models.calibration.initialize_threshold", capture)
    student, _ = convert_blocks(
        teacher, [DenseConfig(), *[FeaturalConfig(selection="centered")] * 2]
    )
    hook = get_architecture("gpt2").blocks(teacher)[2].register_forward_hook(explode)
    calibrate_memories(student, teacher, windows)
    outputs = forward_with_activations(teacher, windows, capture_blocks=True)
    hook.remove()
    for states, layer in zip(captured, (1, 2), strict=True):
        assert torch.equal(
            states, outputs.block_inputs[layer][inlier_mask(outputs.block_outputs[layer])]
        )
    assert [len(states) for states in captured] == [160, 159]


@torch.no_grad()
def test_means_and_biases_fit_the_final_selection():
    teacher, windows = make_teacher(), torch.randint(1, 300, (24, 20))
    student, _ = convert_blocks(teacher, [FeaturalConfig(mean_k=8, selection="centered")] * LAYERS)
    calibrate_memories(student, teacher, windows)
    student_outputs, teacher_outputs = (
        forward_with_activations(model, windows, capture_blocks=True)
        for model in (student, teacher)
    )
    for layer, memory in get_memories(student).items():
        hidden = student_outputs.block_inputs[layer].flatten(0, 1)
        torch.testing.assert_close(
            memory.compute_weights(hidden, memory.compute_scores(hidden)).mean(0),
            torch.zeros(SLOTS),
            atol=1e-4,
            rtol=0,
        )
        means = [
            outputs.block_outputs[layer].mean((0, 1))
            for outputs in (student_outputs, teacher_outputs)
        ]
        torch.testing.assert_close(*means, atol=1e-4, rtol=1e-4)
