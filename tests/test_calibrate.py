"""What is measured before training: what slots are worth, where the budget goes, and nothing from outliers."""

import pytest
import torch
from conftest import LAYERS, SLOTS, WIDTH, make_llama, make_teacher

from dmt.config import MemoryConfig
from dmt.distill.calibrate import calibrate, measure_scales
from dmt.distill.sensitivity import measure_sensitivity, root
from dmt.evaluate import compare
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
