"""What is measured before training: what slots are worth, where the budget goes, and nothing from outliers."""

import pytest
import torch
from conftest import LAYERS, SLOTS, WIDTH, make_llama, make_teacher

from dmt.config import DenseConfig, FeaturalConfig
from dmt.distillation.calibration import (
    calibrate_memories,
    measure_fisher,
    measure_scales,
)
from dmt.distillation.losses import inlier_mask, outlier_threshold
from dmt.evaluation.metrics import measure_fidelity
from dmt.memory.sparsity_budget import initialize_threshold
from dmt.memory.usage import record_usage
from dmt.models.architectures import get_architecture
from dmt.models.conversion import convert_blocks, get_memories
from dmt.models.forward import forward_with_activations
from dmt.ops import symmetric_root


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_sensitivity_foretells_the_kl_of_a_small_change(layer):
    teacher = make_teacher().double()
    tokens = torch.randint(1, 300, (2, 8))
    metric = measure_fisher(teacher, tokens.repeat(300, 1), batch_size=100)[layer].double()
    block = get_architecture("gpt2").blocks(teacher)[layer]
    before = teacher(tokens).logits.log_softmax(-1)
    for seed in range(3):
        change = (
            torch.randn(WIDTH, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
            * 1e-3
        )
        nats = []
        for position in range(8):

            def push(_, __, answered, position=position, change=change):
                answered = answered.clone()
                answered[:, position] += change
                return answered

            hook = block.register_forward_hook(push)
            after = teacher(tokens).logits.log_softmax(-1)
            nats.append(float((before.exp() * (before - after)).sum((-2, -1)).mean()))
            hook.remove()
        assert sum(nats) / 8 == pytest.approx(float(change @ metric @ change) / 2, rel=0.15)


def test_the_root_of_a_metric_measures_as_it_does():
    half = torch.randn(WIDTH, WIDTH - 3)
    metric, states = half @ half.t(), torch.randn(5, WIDTH)
    torch.testing.assert_close(
        (states @ symmetric_root(metric)).square().sum(-1),
        (states @ metric * states).sum(-1),
        rtol=1e-3,
        atol=1e-3,
    )


@pytest.mark.parametrize("family", [make_teacher, make_llama])
def test_calibration_spends_the_budget_and_beats_the_same_k_for_all(family):
    teacher = family()
    windows = torch.randint(1, 300, (24, 20))
    found = {}
    for name, memory in {
        "auto": FeaturalConfig(mean_k=SLOTS // 4),
        "uniform": FeaturalConfig(k=SLOTS // 4),
    }.items():
        student, _ = convert_blocks(teacher, [memory] * LAYERS)
        calibrate_memories(student, teacher, windows)
        memories = get_memories(student)
        with record_usage(memories) as usage:
            found[name] = measure_fidelity(student, teacher, windows).kl
        reads = [counts.mean_reads for counts in usage.values()]
        assert sum(reads) / LAYERS == pytest.approx(SLOTS // 4, rel=0.1)
        if name == "auto":
            assert len({float(each.threshold) for each in memories.values()}) == 1
            assert max(reads) > min(reads) + 1, "layers differ in what they need"
            assert not any(each.budget_counts.any() for each in memories.values())
    assert found["auto"] < found["uniform"]


def test_one_absurd_token_moves_no_statistic():
    plain, absurd = make_teacher(), make_teacher()
    windows = torch.randint(1, 299, (8, 20))
    for teacher in (plain, absurd):
        teacher.requires_grad_(False)

    def explode(_, given, answered):
        answered = answered.clone()
        answered[0, 0] *= 1e5
        return answered

    hook = get_architecture("gpt2").blocks(absurd)[1].register_forward_hook(explode)
    quiet, loud = measure_scales(plain, windows), measure_scales(absurd, windows)
    assert float(loud.block_variances[1]) == pytest.approx(float(quiet.block_variances[1]), rel=0.2)
    student, _ = convert_blocks(plain, [FeaturalConfig(k=8)] * LAYERS)
    calibrate_memories(student, absurd, windows)
    hook.remove()
    assert get_memories(student)[1].output_bias.abs().max() < 50
    assert all(parameter.isfinite().all() for parameter in student.parameters())


@torch.no_grad()
def test_limits_are_those_of_each_layers_own_outputs():
    teacher, windows = make_teacher(), torch.randint(1, 300, (8, 20))
    outputs = forward_with_activations(teacher, windows, capture_blocks=True).block_outputs
    torch.testing.assert_close(
        measure_scales(teacher, windows).outlier_norms,
        torch.stack([outlier_threshold(each) for each in outputs]),
    )


def test_a_budget_is_met_although_the_first_threshold_misses_it(monkeypatch):
    def too_high(memories, hidden):
        initialize_threshold(memories, hidden)
        for memory in memories:
            memory.threshold.mul_(1.3)

    monkeypatch.setattr("dmt.distillation.calibration.initialize_threshold", too_high)
    teacher, windows = make_teacher(), torch.randint(1, 300, (24, 20))
    student, _ = convert_blocks(teacher, [FeaturalConfig(mean_k=8)] * LAYERS)
    calibrate_memories(student, teacher, windows)
    with record_usage(get_memories(student)) as usage:
        forward_with_activations(student, windows)
    assert sum(counts.mean_reads for counts in usage.values()) == pytest.approx(
        8 * LAYERS, rel=0.05
    )


def test_the_first_threshold_is_found_with_means_on_ordinary_inputs_of_the_memories_own_layers(
    monkeypatch,
):
    teacher, windows, found = make_teacher(), torch.randint(1, 300, (8, 20)), []

    def look(memories, hidden):
        for memory, states in zip(memories, hidden, strict=True):
            found.append(states)
            torch.testing.assert_close(
                memory.compute_weights(states, memory.compute_scores(states)).mean(0),
                torch.zeros(SLOTS),
                atol=1e-5,
                rtol=0,
            )

    def explode(_, given, answered):
        return answered.index_put((torch.tensor(0), torch.tensor(0)), answered[0, 0] * 1e5)

    monkeypatch.setattr("dmt.distillation.calibration.initialize_threshold", look)
    hook = get_architecture("gpt2").blocks(teacher)[2].register_forward_hook(explode)
    student, _ = convert_blocks(
        teacher, [DenseConfig(), *[FeaturalConfig(selection="centered")] * 2]
    )
    calibrate_memories(student, teacher, windows)
    signals = forward_with_activations(teacher, windows, capture_blocks=True)
    hook.remove()
    for states, layer in zip(found, (1, 2), strict=True):
        assert torch.equal(
            states, signals.block_inputs[layer][inlier_mask(signals.block_outputs[layer])]
        )
    assert [len(states) for states in found] == [160, 159]


@torch.no_grad()
def test_means_and_biases_are_settled_for_what_is_read_in_the_end():
    teacher, windows = make_teacher(), torch.randint(1, 300, (24, 20))
    student, _ = convert_blocks(teacher, [FeaturalConfig(mean_k=8, selection="centered")] * LAYERS)
    calibrate_memories(student, teacher, windows)
    said, wanted = (
        forward_with_activations(model, windows, capture_blocks=True)
        for model in (student, teacher)
    )
    for layer, memory in get_memories(student).items():
        hidden = said.block_inputs[layer].flatten(0, 1)
        torch.testing.assert_close(
            memory.compute_weights(hidden, memory.compute_scores(hidden)).mean(0),
            torch.zeros(SLOTS),
            atol=1e-4,
            rtol=0,
        )
        means = [signals.block_outputs[layer].mean((0, 1)) for signals in (said, wanted)]
        torch.testing.assert_close(*means, atol=1e-4, rtol=1e-4)
