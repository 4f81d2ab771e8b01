"""What is measured before training: what slots are worth, where the budget goes, and nothing from outliers."""

import pytest
import torch
from conftest import LAYERS, SLOTS, WIDTH, make_llama, make_teacher

from dmt.config import MemoryConfig
from dmt.distill.calibrate import calibrate, measure_scales
from dmt.distill.outliers import longest, ordinary
from dmt.distill.sensitivity import measure_sensitivity, root
from dmt.distill.signals import observe
from dmt.evaluate import compare
from dmt.memory.budget import first_threshold
from dmt.models.architectures import architecture_of
from dmt.models.surgery import memories_of, transplant


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_sensitivity_foretells_the_kl_of_a_small_change(layer):
    teacher = make_teacher().double()
    tokens = torch.randint(1, 300, (2, 8))
    metric = measure_sensitivity(teacher, tokens.repeat(300, 1), batch=100)[layer].double()
    block = architecture_of("gpt2").blocks(teacher)[layer]
    before = teacher(tokens).logits.log_softmax(-1)
    for seed in range(3):
        change = torch.randn(WIDTH, dtype=torch.double, generator=torch.Generator().manual_seed(seed)) * 1e-3
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
    torch.testing.assert_close((states @ root(metric)).square().sum(-1), (states @ metric * states).sum(-1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", [make_teacher, make_llama])
def test_calibration_spends_the_budget_and_beats_the_same_k_for_all(family):
    teacher = family()
    windows = torch.randint(1, 300, (24, 20))
    found = {}
    for name, memory in {"auto": MemoryConfig(budget=SLOTS // 4), "uniform": MemoryConfig(k=SLOTS // 4)}.items():
        student, _ = transplant(teacher, [memory] * LAYERS)
        calibrate(student, teacher, windows)
        memories = memories_of(student)
        for each in memories.values():
            each.count_reads()
        found[name] = compare(student, teacher, windows).kl
        reads = [float(each.reads.sum()) / each.reads_tokens for each in memories.values()]
        assert sum(reads) / LAYERS == pytest.approx(SLOTS // 4, rel=0.1)
        if name == "auto":
            assert len({float(each.threshold) for each in memories.values()}) == 1
            assert max(reads) > min(reads) + 1, "layers differ in what they need"
            assert not any(each.spent.any() for each in memories.values())
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

    hook = architecture_of("gpt2").blocks(absurd)[1].register_forward_hook(explode)
    quiet, loud = measure_scales(plain, windows), measure_scales(absurd, windows)
    assert float(loud.blocks[1]) == pytest.approx(float(quiet.blocks[1]), rel=0.2)
    student, _ = transplant(plain, [MemoryConfig(k=8)] * LAYERS)
    calibrate(student, absurd, windows)
    hook.remove()
    assert memories_of(student)[1].output_bias.abs().max() < 50
    assert all(parameter.isfinite().all() for parameter in student.parameters())


@torch.no_grad()
def test_limits_are_those_of_each_layers_own_outputs():
    teacher, windows = make_teacher(), torch.randint(1, 300, (8, 20))
    outputs = observe(teacher, windows, blocks=True).block_outputs
    torch.testing.assert_close(measure_scales(teacher, windows).limits, torch.stack([longest(each) for each in outputs]))


def test_a_budget_is_met_although_the_first_threshold_misses_it(monkeypatch):
    def too_high(memories, hidden):
        first_threshold(memories, hidden)
        for memory in memories:
            memory.threshold.mul_(1.3)

    monkeypatch.setattr("dmt.distill.calibrate.first_threshold", too_high)
    teacher, windows = make_teacher(), torch.randint(1, 300, (24, 20))
    student, _ = transplant(teacher, [MemoryConfig(budget=8)] * LAYERS)
    calibrate(student, teacher, windows)
    memories = memories_of(student).values()
    for memory in memories:
        memory.count_reads()
    observe(student, windows)
    assert sum(float(m.reads.sum()) / m.reads_tokens for m in memories) == pytest.approx(8 * LAYERS, rel=0.05)


def test_the_first_threshold_is_found_with_means_on_ordinary_inputs_of_the_memories_own_layers(monkeypatch):
    teacher, windows, found = make_teacher(), torch.randint(1, 300, (8, 20)), []

    def look(memories, hidden):
        for memory, states in zip(memories, hidden, strict=True):
            found.append(states)
            torch.testing.assert_close(memory.weights(states, memory.scores(states)).mean(0), torch.zeros(SLOTS), atol=1e-5, rtol=0)

    def explode(_, given, answered):
        return answered.index_put((torch.tensor(0), torch.tensor(0)), answered[0, 0] * 1e5)

    monkeypatch.setattr("dmt.distill.calibrate.first_threshold", look)
    hook = architecture_of("gpt2").blocks(teacher)[2].register_forward_hook(explode)
    student, _ = transplant(teacher, [MemoryConfig(kind="dense"), *[MemoryConfig(ranking="centred")] * 2])
    calibrate(student, teacher, windows)
    signals = observe(teacher, windows, blocks=True)
    hook.remove()
    for states, layer in zip(found, (1, 2), strict=True):
        assert torch.equal(states, signals.block_inputs[layer][ordinary(signals.block_outputs[layer])])
    assert [len(states) for states in found] == [160, 159]


@torch.no_grad()
def test_means_and_biases_are_settled_for_what_is_read_in_the_end():
    teacher, windows = make_teacher(), torch.randint(1, 300, (24, 20))
    student, _ = transplant(teacher, [MemoryConfig(budget=8, ranking="centred")] * LAYERS)
    calibrate(student, teacher, windows)
    said, wanted = (observe(model, windows, blocks=True) for model in (student, teacher))
    for layer, memory in memories_of(student).items():
        hidden = said.block_inputs[layer].flatten(0, 1)
        torch.testing.assert_close(memory.weights(hidden, memory.scores(hidden)).mean(0), torch.zeros(SLOTS), atol=1e-4, rtol=0)
        means = [signals.block_outputs[layer].mean((0, 1)) for signals in (said, wanted)]
        torch.testing.assert_close(*means, atol=1e-4, rtol=1e-4)
