"""The sparsity sweep: a finished student measured with other numbers of active slots."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import LAYERS

from dmt.config import FeaturalConfig
from dmt.evaluation.metrics import measure_fidelity
from dmt.memory.sparsity_budget import initialize_threshold
from dmt.memory.usage import record_usage
from dmt.models.conversion import convert_blocks
from dmt.models.forward import forward_with_activations
from dmt.models.memories import get_featural_memories

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.sparsity import K_FACTORS, sparsity_sweep


def _student(teacher, **memory):
    student, _ = convert_blocks(
        teacher, [replace(FeaturalConfig(k=8, mean_k=None), **memory)] * LAYERS
    )
    return student.eval()


@pytest.mark.parametrize(
    "memory",
    [
        {},
        {"k": "auto", "mean_k": 8},
        {"k": "auto", "mean_k": 8, "search": "int8"},
        {"search": "ivf"},
        {"k": 4, "heads": 2, "projections": True},
    ],
    ids=str,
)
def test_a_sweep_restores_the_memories(teacher, tokens, memory):
    student = _student(teacher, **memory)
    memories = get_featural_memories(student)
    block_inputs = forward_with_activations(student, tokens, capture_blocks=True).block_inputs
    initialize_threshold(
        memories.values(), [block_inputs[layer].flatten(0, -2) for layer in memories]
    )
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    own = measure_fidelity(student, teacher, tokens)
    with record_usage(memories) as usage:
        sweep = sparsity_sweep(student, teacher, {"a": tokens, "b": tokens[:1]}, tokens)
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())
    assert all(layer.k == (4 if "heads" in memory else 8) for layer in memories.values())
    assert not any(counts.tokens for counts in usage.values()), "an outer recording is paused"
    assert sweep["tokens"] == 4 * 19
    points = {point["factor"]: point for point in sweep["points"]}
    assert list(points) == [
        factor for factor in K_FACTORS if "heads" not in memory or factor != 0.5
    ], "half of 4 is 2, as a quarter"
    assert points[1.0]["corpora"]["a"]["kl"] == pytest.approx(own.kl, rel=1e-6)
    read = [point["read"] for point in sweep["points"]]
    assert read == sorted(read)
    if "auto" not in str(memory):
        assert read == [point["k"] for point in sweep["points"]]
    else:
        assert points[4.0]["read"] == pytest.approx(32, rel=0.3), (
            "a threshold of its own for each budget"
        )
        assert points[0.25]["read"] == pytest.approx(2, rel=0.3)


def test_a_budget_of_everything_is_the_teacher(teacher, tokens):
    student = _student(teacher, k=16, skip_connection=False)
    points = sparsity_sweep(student, teacher, {"a": tokens}, tokens)["points"]
    assert [point["k"] for point in points] == [4, 8, 16, 32, 64]
    assert points[-1]["corpora"]["a"]["kl"] == pytest.approx(0, abs=1e-5)
    assert points[0]["corpora"]["a"]["kl"] > points[2]["corpora"]["a"]["kl"] > 1e-3
    all_read = sparsity_sweep(_student(teacher, k=64), teacher, {"a": tokens}, tokens)["points"]
    assert [point["factor"] for point in all_read] == [0.25, 0.5, 1.0], (
        "more than all there are is nothing else"
    )
