"""Losses by definition, and their independence of padding, splitting and chunks."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import make_teacher

from dmt.config import LOSS_TERMS, LossConfig
from dmt.distillation import losses
from dmt.distillation.losses import (
    TERMS_WITH_GRAD,
    Batch,
    LossScales,
    block_fvu,
    compute_loss_terms,
    kl,
    next_token_mask,
    outlier_weights,
    register_loss,
    reverse_kl,
    squared_error,
    sum_weighted_terms,
)
from dmt.errors import UserError
from dmt.models.forward import ForwardOutputs, forward_with_activations
from dmt.ops import inlier_mask, outlier_threshold

ALL_TERMS = LossConfig(
    kl=1.0,
    reverse_kl=0.7,
    ce=0.5,
    hidden_mse=0.3,
    block_fvu=0.2,
    hidden_cosine=0.9,
    temperature=2.0,
)
SCALES = LossScales(torch.tensor([2.0, 3.0, 4.0]), torch.tensor(5.0))


@pytest.fixture
def models():
    return make_teacher(300, initializer_range=0.3).requires_grad_(True), make_teacher(300)


def compute_loss(student, teacher, tokens, mask=None, weights=ALL_TERMS, batch=None):
    batch = batch or Batch.full_step(tokens, mask)
    signals = (
        forward_with_activations(student, tokens, mask, capture_blocks=True),
        forward_with_activations(teacher, tokens, mask, capture_blocks=True),
    )
    return sum_weighted_terms(compute_loss_terms(*signals, batch, weights, SCALES), weights)


def gradients(student, value):
    return torch.autograd.grad(
        value, list(student.parameters()), allow_unused=True, materialize_grads=True
    )


def test_kl_of_two_coins():
    teacher, student = torch.tensor([0.75, 0.25]).log(), torch.tensor([0.5, 0.5]).log()
    assert kl(student, teacher) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert reverse_kl(student, teacher) == pytest.approx(
        0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_kl_is_the_sum_times_the_squared_temperature(temperature):
    student, teacher = torch.randn(2, 5, 7) * 3, torch.randn(2, 5, 7) * 3
    p, q = (F.softmax(x / temperature, -1) for x in (teacher, student))
    torch.testing.assert_close(
        kl(student, teacher, temperature), temperature**2 * (p * (p / q).log()).sum(-1)
    )


def test_ce_is_the_shifted_loss_of_transformers(models, tokens):
    student, teacher = models
    weights = LossConfig(hidden_mse=0, block_fvu=0, kl=0, ce=1)
    labels = tokens.clone()
    torch.testing.assert_close(
        compute_loss(student, teacher, tokens, weights=weights), student(tokens, labels=labels).loss
    )
    copied = F.cross_entropy(student(tokens).logits.flatten(0, 1), tokens.flatten())
    assert abs((copied - compute_loss(student, teacher, tokens, weights=weights)).item()) > 0.1


def test_kl_term_is_a_mean_over_tokens(models, tokens):
    student, teacher = models
    expected = kl(student(tokens).logits, teacher(tokens).logits).mean()
    torch.testing.assert_close(
        compute_loss(student, teacher, tokens, weights=LossConfig(hidden_mse=0, block_fvu=0, kl=1)),
        expected,
    )
    doubled = tokens.repeat(2, 1)
    torch.testing.assert_close(
        compute_loss(
            student, teacher, doubled, weights=LossConfig(hidden_mse=0, block_fvu=0, kl=1)
        ),
        expected,
    )


def test_padding_changes_neither_value_nor_gradient(models, tokens):
    student, teacher = models
    padded = F.pad(tokens, (0, 7), value=5)
    mask = F.pad(torch.ones_like(tokens), (0, 7))
    plain, masked = (
        compute_loss(student, teacher, tokens),
        compute_loss(student, teacher, padded, mask),
    )
    torch.testing.assert_close(masked, plain)
    for actual_grad, expected_grad in zip(
        gradients(student, masked), gradients(student, plain), strict=True
    ):
        torch.testing.assert_close(actual_grad, expected_grad, rtol=1e-4, atol=1e-5)


def test_splitting_a_ragged_batch_changes_neither_value_nor_gradient(models, tokens):
    student, teacher = models
    mask = torch.ones_like(tokens)
    mask[0, 4:] = 0  # a short row, which a mean of means would weight too much
    full = compute_loss(student, teacher, tokens, mask)
    counts = Batch.full_step(tokens, mask)
    pieces = [
        compute_loss(
            student,
            teacher,
            t,
            m,
            batch=Batch(t, m.bool(), counts.tokens_in_step, counts.targets_in_step),
        )
        for t, m in zip(tokens.split(1), mask.split(1), strict=True)
    ]
    torch.testing.assert_close(sum(pieces), full)
    for actual_grad, expected_grad in zip(
        gradients(student, sum(pieces)), gradients(student, full), strict=True
    ):
        torch.testing.assert_close(actual_grad, expected_grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "terms", [{"kl": 1}, {"reverse_kl": 1}, {"ce": 1}, {"kl": 1, "reverse_kl": 0.5, "ce": 0.3}]
)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_change_neither_value_nor_gradient(models, tokens, chunk, temperature, terms):
    student, teacher = models
    mask = torch.ones_like(tokens)
    mask[0, 4:] = 0
    base = {"hidden_mse": 0, "block_fvu": 0, "kl": 0, "temperature": temperature}
    plain, chunked = (
        compute_loss(
            student,
            teacher,
            tokens,
            mask,
            weights=LossConfig(**(base | terms), chunk_size=chunk_size),
        )
        for chunk_size in (0, chunk)
    )
    torch.testing.assert_close(chunked, plain)
    for actual_grad, expected_grad in zip(
        gradients(student, 3 * chunked), gradients(student, 3 * plain), strict=True
    ):
        torch.testing.assert_close(actual_grad, expected_grad, rtol=1e-4, atol=1e-6)


def test_a_frozen_head_gets_no_gradient_from_chunks(models, tokens):
    student, teacher = models
    student.get_output_embeddings().weight.requires_grad_(False)
    loss = compute_loss(
        student, teacher, tokens, weights=LossConfig(hidden_mse=0, block_fvu=0, chunk_size=5)
    )
    loss.backward()
    assert student.get_output_embeddings().weight.grad is None
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad and p.dim() > 1)


@pytest.mark.parametrize("term", LOSS_TERMS)
def test_a_weight_scales_only_its_own_term(models, tokens, term):
    student, teacher = models
    zeros = dict.fromkeys(LOSS_TERMS, 0.0)
    config = LossConfig(**(zeros | {term: 1.0}))
    signals = (
        forward_with_activations(student, tokens, capture_blocks=True),
        forward_with_activations(teacher, tokens, capture_blocks=True),
    )
    assert set(compute_loss_terms(*signals, Batch.full_step(tokens), config, SCALES)) == {term}
    once, thrice = (
        compute_loss(student, teacher, tokens, weights=LossConfig(**(zeros | {term: w})))
        for w in (1.0, 3.0)
    )
    torch.testing.assert_close(thrice, 3 * once)
    assert once.item() > 0.01
    if term != "ce":
        assert compute_loss(teacher, teacher, tokens, weights=config).item() == pytest.approx(
            0, abs=1e-5
        )


def test_a_registered_loss_is_a_weighted_mean_over_valid_tokens(models, tokens, monkeypatch):
    def top_gap(student, teacher, batch):
        assert len(student.block_outputs) == len(teacher.block_outputs)
        return (student.logits - teacher.logits).abs().amax(-1)

    monkeypatch.setattr(losses, "_LOSSES", {})
    register_loss("top_gap", top_gap)
    student, teacher = models
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, -3:] = False
    gaps = (student(tokens).logits - teacher(tokens).logits).abs().amax(-1)
    weights = LossConfig(**dict.fromkeys(LOSS_TERMS, 0.0), extra={"top_gap": 0.5})
    value = compute_loss(student, teacher, tokens, mask, weights)
    torch.testing.assert_close(value, 0.5 * gaps[mask].mean())
    with pytest.raises(UserError, match="taken or not a word"):
        register_loss("top_gap", lambda *_: gaps)
    with pytest.raises(UserError, match=r"loss.extra has no loss no_module:gap .* or name it as"):
        compute_loss(student, teacher, tokens, weights=LossConfig(extra={"no_module:gap": 1}))
    monkeypatch.setitem(losses._LOSSES, "top_gap", lambda *_: torch.ones(()))
    with pytest.raises(UserError, match=r"loss.extra.top_gap must return a value per token"):
        compute_loss(student, teacher, tokens, weights=weights)
    for extra, message in (
        ({"a:kl": 1}, "two losses are named kl"),
        ({"top_gap": -1}, "extra.top_gap must be at least 0, got -1"),
        ({"top_gap": "much"}, "extra.top_gap must be a number, got much"),
    ):
        with pytest.raises(UserError, match=message):
            LossConfig(extra=extra)


def test_state_terms_by_definition(tokens):
    student_states, teacher_states = (torch.randn(3, 20, 4) for _ in range(2))
    student, teacher = (
        ForwardOutputs(x, torch.nn.Identity(), block_outputs=(x, 2 * x, 3 * x))
        for x in (student_states, teacher_states)
    )
    terms = compute_loss_terms(
        student,
        teacher,
        Batch.full_step(tokens),
        LossConfig(kl=0, hidden_mse=1, block_fvu=1, hidden_cosine=1),
        SCALES,
    )
    squared = (student_states - teacher_states).square().sum(-1).mean()
    torch.testing.assert_close(terms["hidden_mse"], squared / 5)
    torch.testing.assert_close(terms["block_fvu"], squared * (1 / 2 + 4 / 3 + 9 / 4) / 3)
    torch.testing.assert_close(
        terms["hidden_cosine"],
        1 - F.cosine_similarity(student_states, teacher_states, dim=-1).mean(),
    )


def test_only_outliers_are_weighted_down(tokens):
    target = torch.randn(3, 20, 4)
    target[0, 0] *= 1e5
    limit, length = outlier_threshold(target), target[0, 0].norm()
    assert inlier_mask(target).sum() == 59
    output = target + torch.randn(3, 20, 4)
    errors = (output - target).square().sum(-1)
    errors[0, 0] *= (limit / length) ** 2
    mask = torch.ones(3, 20)
    torch.testing.assert_close(squared_error(output, target, mask, 60, limit), errors.mean())
    scales = LossScales(torch.tensor([2.0]), torch.tensor(1.0), limit.unsqueeze(0))
    torch.testing.assert_close(
        block_fvu((output,), (target,), mask, 60, scales)[0], errors.mean() / 2
    )


def test_next_token_mask():
    mask = torch.tensor([[True, True, True, False], [False, True, True, True]])
    assert next_token_mask(mask).tolist() == [
        [True, True, False, False],
        [False, True, True, False],
    ]


def test_the_block_term_covers_the_chosen_layers(tokens):
    student_states, teacher_states = (torch.randn(3, 20, 4) for _ in range(2))
    student, teacher = (
        ForwardOutputs(x, torch.nn.Identity(), block_outputs=(x, 2 * x, 3 * x))
        for x in (student_states, teacher_states)
    )
    terms = compute_loss_terms(
        student,
        teacher,
        Batch.full_step(tokens),
        LossConfig(kl=0, hidden_mse=0, block_fvu=1),
        SCALES,
        [0, 2],
    )
    torch.testing.assert_close(
        terms["block_fvu"],
        (student_states - teacher_states).square().sum(-1).mean() * (1 / 2 + 9 / 4) / 2,
    )


def test_ce_of_text_without_a_next_token_is_zero(models):
    weights = LossConfig(hidden_mse=0, block_fvu=0, kl=0, ce=1)
    assert compute_loss(*models, torch.randint(1, 300, (2, 1)), weights=weights).item() == 0


@pytest.mark.parametrize("name", TERMS_WITH_GRAD)
def test_losses_of_bf16_logits_are_computed_in_float32(name):
    student, teacher, targets = (
        torch.randn(5, 50).bfloat16(),
        torch.randn(5, 50).bfloat16(),
        torch.randint(50, (5,)),
    )
    half, full = (
        TERMS_WITH_GRAD[name](student_logits, teacher_logits, targets, 2.0)
        for student_logits, teacher_logits in (
            (student, teacher),
            (student.float(), teacher.float()),
        )
    )
    for actual, expected in zip(half, full, strict=True):
        assert torch.equal(actual, expected)


def test_the_outlier_threshold_is_ten_times_the_median_norm():
    states = torch.ones(9, 4)
    states[0] *= 1e6
    assert outlier_threshold(states) == 20
    assert inlier_mask(states).tolist() == [False] + [True] * 8
    assert inlier_mask(torch.zeros(5, 4)).all(), "zeros are no outliers"


def test_outlier_weights_are_squared_ratios_to_the_threshold():
    states = torch.tensor([[3.0, 4.0], [30.0, 40.0], [0.0, 0.0]])
    torch.testing.assert_close(
        outlier_weights(states, torch.tensor(10.0)), torch.tensor([1.0, 0.04, 1.0])
    )


def test_outliers_of_the_student_count_in_full():
    target, output, mask = torch.ones(1, 4, 2), torch.ones(1, 4, 2), torch.ones(1, 4)
    output[0, 0] *= 1e3
    torch.testing.assert_close(
        squared_error(output, target, mask, 4, outlier_threshold(target)),
        squared_error(output, target, mask, 4),
    )
