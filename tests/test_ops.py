"""Products by either library: the same values and gradients, the same model."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import LAYERS, make_llama, make_teacher
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from dmt import ops
from dmt.config import FeaturalConfig
from dmt.distillation import losses
from dmt.models.conversion import convert_blocks
from dmt.models.loading import load_teacher
from dmt.ops import OneDNNConv1D, OneDNNLinear, linear, use_onednn_linear

has_onednn = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available()
needs_onednn = pytest.mark.skipif(not has_onednn, reason="this torch has no oneDNN")


@pytest.fixture
def onednn(monkeypatch):
    """oneDNN for products of any size, and how often it was called."""
    calls = []
    inner = ops.onednn_linear
    monkeypatch.setattr(ops, "gemm_library", "onednn")
    monkeypatch.setattr(ops, "ONEDNN_MIN_OPERATIONS", 1)
    monkeypatch.setattr(ops, "onednn_linear", lambda *given: calls.append(1) or inner(*given))
    return calls


@needs_onednn
@pytest.mark.parametrize("shape", [(1, 12), (7, 12), (2, 5, 12), (3, 2, 5, 12)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("turned", [True, False])
def test_equals_torch_in_value_and_gradient(onednn, shape, bias, turned):
    hidden = torch.randn(shape, requires_grad=True)
    weight = torch.randn((12, 9) if turned else (9, 12), requires_grad=True)
    added = torch.randn(9, requires_grad=True) if bias else None
    leaves = [hidden, weight, *([added] if bias else [])]
    told = weight.t() if turned else weight
    mine, theirs = linear(hidden, told, added), F.linear(hidden, told, added)
    torch.testing.assert_close(mine, theirs)
    direction = torch.randn_like(mine)
    for one, other in zip(
        torch.autograd.grad(mine, leaves, direction),
        torch.autograd.grad(theirs, leaves, direction),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    assert len(onednn) == 3
    with torch.no_grad():
        torch.testing.assert_close(linear(hidden, told, added), theirs.detach())


@needs_onednn
def test_unneeded_gradients_are_not_computed(onednn):
    hidden, weight = torch.randn(4, 6, requires_grad=True), torch.randn(5, 6)
    linear(hidden, weight).sum().backward()
    assert len(onednn) == 2
    assert weight.grad is None


@needs_onednn
def test_unsupported_inputs_use_torch(onednn):
    weight = torch.randn(5, 6)
    for odd in (torch.randn(6), torch.randn(0, 6), torch.randn(3, 6, dtype=torch.double)):
        assert torch.equal(linear(odd, weight.to(odd.dtype)), F.linear(odd, weight.to(odd.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(3, 6), weight).dtype == torch.bfloat16
    assert not onednn


def test_small_products_and_other_machines_use_torch(monkeypatch):
    monkeypatch.setattr(ops, "onednn_linear", lambda *_: pytest.fail("oneDNN was asked"))
    monkeypatch.setattr(ops, "gemm_library", "onednn")
    linear(torch.randn(2, 6), torch.randn(5, 6))
    monkeypatch.setattr(ops, "gemm_library", "torch")
    monkeypatch.setattr(ops, "ONEDNN_MIN_OPERATIONS", 0)
    linear(torch.randn(2, 6), torch.randn(5, 6))


def test_the_library_is_chosen_by_the_processor(monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for vendor, wide, wanted in (
        ("AuthenticAMD", "AVX512", True),
        ("GenuineIntel", "AVX512", False),
        ("AuthenticAMD", "AVX2", False),
    ):
        monkeypatch.setattr(ops, "read_cpu_field", lambda _, vendor=vendor: vendor)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda wide=wide: wide)
        assert ops.onednn_is_faster() == (wanted and has_onednn)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not ops.onednn_is_faster()


@needs_onednn
@pytest.mark.parametrize("make", [make_teacher, make_llama])
def test_onednn_maps_leave_a_model_the_same(onednn, make):
    plain = make()
    quick = copy.deepcopy(plain)
    assert use_onednn_linear(quick) is quick
    assert list(quick.state_dict()) == list(plain.state_dict())
    assert {type(m) for m in quick.modules()} & {OneDNNLinear, OneDNNConv1D}
    assert quick.get_output_embeddings().weight is quick.get_input_embeddings().weight
    tokens = torch.randint(0, 300, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(quick(tokens).logits, plain(tokens).logits, rtol=1e-4, atol=1e-4)
    assert onednn


def test_loaded_teachers_and_students_use_onednn_maps(teacher_folder, tmp_path):
    teacher = load_teacher(str(teacher_folder))[0]
    student = convert_blocks(teacher, [FeaturalConfig(k=8)] * LAYERS)[0]
    student.save_pretrained(tmp_path / "student")
    for model in (teacher, student, AutoModelForCausalLM.from_pretrained(tmp_path / "student")):
        maps = [
            module for module in model.modules() if isinstance(module, torch.nn.Linear | Conv1D)
        ]
        assert len(maps) > LAYERS
        assert {type(module) for module in maps} == {OneDNNLinear, OneDNNConv1D}


def test_an_onednn_head_counts_as_a_plain_linear_map():
    hidden = torch.randn(4, 8)
    assert losses._is_plain_linear(OneDNNLinear(8, 5, bias=False), hidden)
    assert not losses._is_plain_linear(OneDNNLinear(8, 5), hidden)
