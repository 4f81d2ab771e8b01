"""Linear maps by oneDNN and deterministic layer norms: values and gradients equal torch's."""

import copy
import operator

import pytest
import torch
import torch.nn.functional as F
from conftest import LAYERS, make_llama, make_teacher
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from dmt import ops
from dmt.config import Config, DataConfig, FeaturalConfig
from dmt.config_io import resolve_layer_memories
from dmt.distillation import losses
from dmt.distillation.losses import Batch
from dmt.distillation.module import DistillationModule
from dmt.models.conversion import convert_blocks
from dmt.models.loading import load_teacher
from dmt.ops import (
    DeterministicLayerNorm,
    OneDNNConv1D,
    OneDNNLinear,
    linear,
    move_together,
    run_copy_tasks,
    set_layer_norms,
    use_onednn_linear,
)
from dmt.training.trainer import use_training_kernels

has_onednn = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available()
needs_onednn = pytest.mark.skipif(not has_onednn, reason="this torch has no oneDNN")

ROWS, WIDTH = (8, 128), 96


@pytest.fixture
def onednn(monkeypatch):
    """Use oneDNN for products of any size; list its calls."""
    calls = []
    inner = ops.onednn_linear
    monkeypatch.setattr(ops, "gemm_library", "onednn")
    monkeypatch.setattr(ops, "ONEDNN_MIN_OPERATIONS", 1)
    monkeypatch.setattr(ops, "onednn_linear", lambda *args: calls.append(1) or inner(*args))
    return calls


@needs_onednn
@pytest.mark.parametrize("shape", [(1, 12), (7, 12), (2, 5, 12), (3, 2, 5, 12)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_equals_torch_in_value_and_gradient(onednn, shape, bias, transposed):
    hidden = torch.randn(shape, requires_grad=True)
    weight = torch.randn((12, 9) if transposed else (9, 12), requires_grad=True)
    bias_vector = torch.randn(9, requires_grad=True) if bias else None
    leaves = [hidden, weight, *([bias_vector] if bias else [])]
    matrix = weight.t() if transposed else weight
    actual, expected = linear(hidden, matrix, bias_vector), F.linear(hidden, matrix, bias_vector)
    torch.testing.assert_close(actual, expected)
    direction = torch.randn_like(actual)
    for grad, expected_grad in zip(
        torch.autograd.grad(actual, leaves, direction),
        torch.autograd.grad(expected, leaves, direction),
        strict=True,
    ):
        torch.testing.assert_close(grad, expected_grad)
    assert len(onednn) == 3
    with torch.no_grad():
        torch.testing.assert_close(linear(hidden, matrix, bias_vector), expected.detach())


@needs_onednn
def test_unneeded_gradients_are_not_computed(onednn):
    hidden, weight = torch.randn(4, 6, requires_grad=True), torch.randn(5, 6)
    linear(hidden, weight).sum().backward()
    assert len(onednn) == 2
    assert weight.grad is None


@needs_onednn
def test_unsupported_inputs_use_torch(onednn):
    weight = torch.randn(5, 6)
    for hidden in (torch.randn(6), torch.randn(0, 6), torch.randn(3, 6, dtype=torch.double)):
        assert torch.equal(
            linear(hidden, weight.to(hidden.dtype)), F.linear(hidden, weight.to(hidden.dtype))
        )
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(3, 6), weight).dtype == torch.bfloat16
    assert not onednn


def test_small_products_and_other_machines_use_torch(monkeypatch):
    monkeypatch.setattr(ops, "onednn_linear", lambda *_: pytest.fail("oneDNN was called"))
    monkeypatch.setattr(ops, "gemm_library", "onednn")
    linear(torch.randn(2, 6), torch.randn(5, 6))
    monkeypatch.setattr(ops, "gemm_library", "torch")
    monkeypatch.setattr(ops, "ONEDNN_MIN_OPERATIONS", 0)
    linear(torch.randn(2, 6), torch.randn(5, 6))


def test_the_library_is_chosen_by_the_processor(monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for vendor, capability, is_faster in (
        ("AuthenticAMD", "AVX512", True),
        ("GenuineIntel", "AVX512", False),
        ("AuthenticAMD", "AVX2", False),
    ):
        monkeypatch.setattr(ops, "read_cpu_field", lambda _, vendor=vendor: vendor)
        monkeypatch.setattr(
            torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability
        )
        assert ops.onednn_is_faster() == (is_faster and has_onednn)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not ops.onednn_is_faster()


@needs_onednn
@pytest.mark.parametrize("make", [make_teacher, make_llama])
def test_onednn_maps_leave_a_model_the_same(onednn, make):
    plain = make()
    converted = copy.deepcopy(plain)
    assert use_onednn_linear(converted) is converted
    assert list(converted.state_dict()) == list(plain.state_dict())
    assert {type(m) for m in converted.modules()} & {OneDNNLinear, OneDNNConv1D}
    assert converted.get_output_embeddings().weight is converted.get_input_embeddings().weight
    tokens = torch.randint(0, 300, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(
            converted(tokens).logits, plain(tokens).logits, rtol=1e-4, atol=1e-4
        )
    assert onednn


def test_loaded_teachers_and_students_use_onednn_maps(teacher_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(ops, "gemm_library", "onednn")
    teacher = load_teacher(str(teacher_folder))[0]
    student = convert_blocks(teacher, [FeaturalConfig(k=8)] * LAYERS)[0]
    student.save_pretrained(tmp_path / "student")
    for model in (teacher, student, AutoModelForCausalLM.from_pretrained(tmp_path / "student")):
        maps = [
            module for module in model.modules() if isinstance(module, torch.nn.Linear | Conv1D)
        ]
        assert len(maps) > LAYERS
        assert {type(module) for module in maps} == {OneDNNLinear, OneDNNConv1D}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantizers_know_linear_maps_where_torch_multiplies(monkeypatch):
    monkeypatch.setattr(ops, "gemm_library", "torch")
    model = use_onednn_linear(make_llama())
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    assert not [module for module in quantized.modules() if type(module) is torch.nn.Linear]


def test_an_onednn_head_counts_as_a_plain_linear_map():
    hidden = torch.randn(4, 8)
    assert losses._is_plain_linear(OneDNNLinear(8, 5, bias=False), hidden)
    assert not losses._is_plain_linear(OneDNNLinear(8, 5), hidden)


# --- layer norms --------------------------------------------------------------------------------


@pytest.fixture
def threads():
    """Return a function that sets the number of threads; restore the number afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def norm(dtype=torch.float32, **options):
    layer = nn.LayerNorm(WIDTH, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def gradients(module, hidden, direction):
    hidden = hidden.clone().requires_grad_()
    output = module(hidden)
    (output * direction).sum().backward()
    return [output.detach(), hidden.grad, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [ROWS, (5,), ()], ids=str)
def test_values_and_gradients_equal_those_of_torch(options, dtype, shape):
    plain = norm(torch.float32 if dtype is torch.bfloat16 else dtype, **options)
    deterministic = nn.Sequential(copy.deepcopy(plain))
    set_layer_norms(deterministic, deterministic=True)
    assert type(deterministic[0]) is DeterministicLayerNorm
    hidden, direction = torch.randn(2, *shape, WIDTH, dtype=torch.float64).to(dtype)
    if dtype is torch.bfloat16 and not options.get("elementwise_affine", True):
        pytest.skip("without parameters all types are equal")
    exact = gradients(copy.deepcopy(plain).double(), hidden.double(), direction.double())
    for actual, native, expected in zip(
        gradients(deterministic, hidden, direction),
        gradients(plain, hidden, direction),
        exact,
        strict=True,
    ):
        assert actual.dtype == native.dtype
        tolerance = {torch.bfloat16: 2e-2, torch.float32: 1e-4, torch.float64: 1e-9}[actual.dtype]
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def test_frozen_parameters_get_no_gradient():
    model = nn.Sequential(norm())
    set_layer_norms(model, deterministic=True)
    model[0].weight.requires_grad_(False)
    model(torch.randn(*ROWS, WIDTH)).sum().backward()
    assert model[0].weight.grad is None
    assert model[0].bias.grad.equal(torch.full((WIDTH,), float(ROWS[0] * ROWS[1])))


def test_gradients_do_not_depend_on_the_number_of_threads(threads):
    model = nn.Sequential(norm())
    set_layer_norms(model, deterministic=True)
    hidden, direction = torch.randn(2, *ROWS, WIDTH)
    threads(1)
    one_thread = gradients(model, hidden, direction)
    for count in (2, 3, 4, 8):
        model.zero_grad()
        threads(count)
        for actual, expected in zip(gradients(model, hidden, direction), one_thread, strict=True):
            assert actual.equal(expected), count


@pytest.mark.parametrize("half", [False, True])
def test_a_training_step_does_not_depend_on_the_number_of_threads(threads, half):
    """Sizes in the default config are powers of two; products of other sizes may depend on it."""
    if half and torch.cpu._is_amx_tile_supported():
        pytest.skip("oneDNN's bfloat16 products on AMX depend on the number of threads")
    config = Config(data=DataConfig(micro_batch_size=2))
    teacher, _ = load_teacher("embedded")
    student, _ = convert_blocks(teacher, resolve_layer_memories(config, 4), None)
    module = DistillationModule(config, student, teacher)
    windows = torch.randint(2_048, (8, 256))
    threads(1)
    module.calibrate(windows)
    student.train()
    grads = []
    with use_training_kernels(config, student, teacher):
        assert not [m for m in (*student.modules(), *teacher.modules()) if type(m) is nn.LayerNorm]
        for count in (1, 2):
            threads(count)
            student.zero_grad()
            for tokens in windows[:4].split(2):
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    loss, _ = module.end_to_end_loss(
                        Batch(tokens, torch.ones_like(tokens, dtype=torch.bool), 1024.0, 1020.0)
                    )
                loss.backward()
            grads.append(
                {
                    name: p.grad.clone()
                    for name, p in student.named_parameters()
                    if p.grad is not None
                }
            )
    assert not [
        m for m in (*student.modules(), *teacher.modules()) if type(m) is DeterministicLayerNorm
    ], "replaced only during training"
    assert len(grads[0]) > 50
    assert not [name for name in grads[0] if not grads[0][name].equal(grads[1][name])]


def test_tensors_of_any_types_move_in_one_copy():
    tensors = [torch.zeros(3, dtype=torch.bool), torch.zeros(2, 2), torch.arange(4)]
    moved = move_together(tensors, torch.device("meta"))
    assert [(part.dtype, part.shape) for part in moved] == [
        (tensor.dtype, tensor.shape) for tensor in tensors
    ]
    assert all(map(operator.is_, tensors, move_together(tensors, torch.device("cpu"))))


def test_tasks_share_copies_and_keep_their_order(monkeypatch):
    copies, turns = [], []

    def move(tensors, device):
        copies.append((torch.cat(list(tensors)).tolist(), device.type))
        return [tensor + 1 for tensor in tensors]

    def run(name, rounds):
        total = 0
        for number in range(rounds):
            turns.append((name, number))
            first, second = yield (
                [torch.tensor([name]), torch.tensor([10 * name])],
                torch.device("cpu" if number % 2 else "meta"),
            )
            total += int(first) + int(second)
        return total

    monkeypatch.setattr(ops, "move_together", move)
    assert run_copy_tasks([run(1, 2), run(2, 3), run(3, 0)]) == [26, 72, 0]
    assert copies == [([1, 10, 2, 20], "meta"), ([1, 10, 2, 20], "cpu"), ([2, 20], "meta")]
    assert turns == [(1, 0), (2, 0), (1, 1), (2, 1), (2, 2)]


@pytest.mark.parametrize("num_rows", [5, 60])
def test_sparse_ridge_regression_is_that_of_the_dense_matrix(num_rows, monkeypatch):
    monkeypatch.setattr(ops, "KERNEL_CHUNK_SAMPLES", 4)
    ids, weights = torch.randint(num_rows, (30, 3)), torch.randn(30, 3).double()
    targets = torch.randn(30, 2).double()
    dense = torch.zeros(30, num_rows).double().scatter_add(1, ids, weights)
    penalty = 0.1 * dense.square().sum() / num_rows
    gram = dense.T @ dense + penalty * torch.eye(num_rows)
    expected = torch.linalg.solve(gram, dense.T @ targets)
    solution = ops.solve_sparse_ridge(ids, weights, targets, num_rows, ridge=0.1)
    assert torch.allclose(solution, expected)
