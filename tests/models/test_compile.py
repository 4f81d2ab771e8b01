"""Compiled and exported students compute what they compute otherwise."""

import pytest
import torch
from conftest import make_llama, make_teacher

import dmt
from dmt import ops
from dmt.config import AssociativeConfig, FeaturalConfig
from dmt.memory.associative import enable_writes
from dmt.models.memories import get_associative_memories

# Warnings of torch about what it does itself while it traces.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
)
MEMORIES = {
    "threshold": FeaturalConfig(),
    "top": FeaturalConfig(k=8),
    "int8": FeaturalConfig(search="int8"),
    "associative": AssociativeConfig(min_distance=0.01, value_target="projection"),
    "none": dmt.NoMemoryConfig(),
    "low_rank": dmt.LowRankConfig(),
    "pruned": dmt.PrunedConfig(),
    "experts": dmt.ExpertsConfig(expert_size=4),
    "product_key": dmt.ProductKeyConfig(silu_gate=True),
    "peer": dmt.PeerConfig(k=8, heads=2),
    "transcoder": dmt.TranscoderConfig(),
    "token": dmt.TokenConfig(),
    "ngram": dmt.NgramConfig(num_rows=50),
    "sum": dmt.SumConfig(parts=[dmt.FeaturalConfig(k=8), dmt.NgramConfig(num_rows=50)]),
}


def make_student(teacher, memory, tokens):
    student = dmt.convert(teacher, memory, calibration=tokens).eval()
    memories = get_associative_memories(student).values()
    with torch.no_grad(), enable_writes(memories):
        student(tokens)
    for memory in memories:
        memory.commit_step()
        assert len(memory.rows)
    return student


@pytest.fixture(params=MEMORIES)
def student(request, tokens):
    return make_student(make_teacher(), MEMORIES[request.param], tokens)


def count_graphs(model, inputs, **options):
    """Compile a model, compare its logits for each of the inputs, and return the graphs it has."""
    graphs = []

    def record_graph(module, example_inputs):
        graphs.append(module)
        return module

    torch.compiler.reset()
    compiled = torch.compile(model, backend=record_graph, **options)
    for ids in inputs:
        logits = compiled(ids, use_cache=False).logits
        torch.testing.assert_close(logits, model(ids, use_cache=False).logits)
    return len(graphs)


@torch.no_grad()
def test_a_student_is_one_graph_for_each_shape(student, tokens):
    inputs = [tokens[:1, :9].clone(), tokens[:1, :1].clone()]
    assert count_graphs(student, inputs, fullgraph=True) == 2


@torch.no_grad()
def test_a_llama_student_is_one_graph(tokens):
    student = make_student(make_llama(), MEMORIES["associative"], tokens)
    assert count_graphs(student, [tokens[:1, :9].clone()], fullgraph=True) == 1


@torch.no_grad()
def test_an_exported_student_takes_other_lengths_and_batches(student, tokens, monkeypatch):
    monkeypatch.setattr(ops, "ONEDNN_MIN_OPERATIONS", 0)
    auto = torch.export.Dim.AUTO
    exported = torch.export.export(
        student,
        (tokens[:2, :9].clone(),),
        {"use_cache": False},
        dynamic_shapes={"input_ids": {0: auto, 1: auto}, "use_cache": None},
        strict=False,
    )
    assert not [node for node in exported.graph.nodes if "mkldnn" in str(node.target)]
    for ids in (tokens[:3, :7].clone(), tokens[:2, :2].clone()):
        logits = exported.module()(ids, use_cache=False).logits
        expected = student(ids, use_cache=False).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_compiled_training_has_the_same_gradients(student, tokens):
    student.train()
    parameters = [p for p in student.parameters() if p.requires_grad]
    losses = [
        model(tokens, labels=tokens, use_cache=False).loss
        for model in (student, torch.compile(student, backend="eager"))
    ]
    expected, grads = (torch.autograd.grad(loss, parameters, allow_unused=True) for loss in losses)
    for grad, expected_grad in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, expected_grad)


@torch.no_grad()
def test_slots_in_a_file_are_read_outside_of_the_graph(tokens, tmp_path):
    from transformers import AutoModelForCausalLM

    student = dmt.convert(make_teacher(), FeaturalConfig(k=8, offload="values"))
    student.save_pretrained(tmp_path)
    mapped = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert count_graphs(mapped, [tokens]) > 1
