"""Losses by definition: hand-made numbers, the library's own loss, and independence of padding and splitting."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import make_teacher

from dmt.config import LOSS_TERMS, LossConfig
from dmt.distillation.losses import (
    TERMS_WITH_GRAD,
    Batch,
    LossScales,
    block_fvu,
    compute_loss_terms,
    inlier_mask,
    kl,
    next_token_mask,
    outlier_threshold,
    outlier_weights,
    reverse_kl,
    squared_error,
    sum_weighted_terms,
)
from dmt.models.forward import ForwardOutputs, forward_with_activations

ALL = LossConfig(
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
def pair():
    return make_teacher(300, initializer_range=0.3).requires_grad_(True), make_teacher(300)


def loss(student, teacher, tokens, mask=None, weights=ALL, batch=None):
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
def test_kl_against_its_sum_with_temperature_squared(temperature):
    student, teacher = torch.randn(2, 5, 7) * 3, torch.randn(2, 5, 7) * 3
    p, q = (F.softmax(x / temperature, -1) for x in (teacher, student))
    torch.testing.assert_close(
        kl(student, teacher, temperature), temperature**2 * (p * (p / q).log()).sum(-1)
    )


def test_ce_is_the_librarys_shifted_loss(pair, tokens):
    student, teacher = pair
    weights = LossConfig(hidden_mse=0, block_fvu=0, kl=0, ce=1)
    labels = tokens.clone()
    torch.testing.assert_close(
        loss(student, teacher, tokens, weights=weights), student(tokens, labels=labels).loss
    )
    copied = F.cross_entropy(student(tokens).logits.flatten(0, 1), tokens.flatten())
    assert abs((copied - loss(student, teacher, tokens, weights=weights)).item()) > 0.1


def test_kl_term_is_a_mean_over_tokens(pair, tokens):
    student, teacher = pair
    expected = kl(student(tokens).logits, teacher(tokens).logits).mean()
    torch.testing.assert_close(
        loss(student, teacher, tokens, weights=LossConfig(hidden_mse=0, block_fvu=0, kl=1)),
        expected,
    )
    doubled = tokens.repeat(2, 1)
    torch.testing.assert_close(
        loss(student, teacher, doubled, weights=LossConfig(hidden_mse=0, block_fvu=0, kl=1)),
        expected,
    )


def test_padding_changes_neither_value_nor_gradient(pair, tokens):
    student, teacher = pair
    padded = F.pad(tokens, (0, 7), value=5)
    mask = F.pad(torch.ones_like(tokens), (0, 7))
    plain, masked = loss(student, teacher, tokens), loss(student, teacher, padded, mask)
    torch.testing.assert_close(masked, plain)
    for got, want in zip(gradients(student, masked), gradients(student, plain), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_splitting_a_ragged_batch_changes_neither_value_nor_gradient(pair, tokens):
    student, teacher = pair
    mask = torch.ones_like(tokens)
    mask[0, 4:] = 0  # a short row: a mean of means would give it too much weight
    whole = loss(student, teacher, tokens, mask)
    counts = Batch.full_step(tokens, mask)
    pieces = [
        loss(
            student,
            teacher,
            t,
            m,
            batch=Batch(t, m.bool(), counts.tokens_in_step, counts.targets_in_step),
        )
        for t, m in zip(tokens.split(1), mask.split(1), strict=True)
    ]
    torch.testing.assert_close(sum(pieces), whole)
    for got, want in zip(gradients(student, sum(pieces)), gradients(student, whole), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "terms", [{"kl": 1}, {"reverse_kl": 1}, {"ce": 1}, {"kl": 1, "reverse_kl": 0.5, "ce": 0.3}]
)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_change_neither_value_nor_gradient(pair, tokens, chunk, temperature, terms):
    student, teacher = pair
    mask = torch.ones_like(tokens)
    mask[0, 4:] = 0
    nothing = {"hidden_mse": 0, "block_fvu": 0, "kl": 0, "temperature": temperature}
    plain, pieces = (
        loss(
            student, teacher, tokens, mask, weights=LossConfig(**(nothing | terms), chunk_size=each)
        )
        for each in (0, chunk)
    )
    torch.testing.assert_close(pieces, plain)
    for got, want in zip(
        gradients(student, 3 * pieces), gradients(student, 3 * plain), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_chunks_leave_a_frozen_head_alone(pair, tokens):
    student, teacher = pair
    student.get_output_embeddings().weight.requires_grad_(False)
    found = loss(
        student, teacher, tokens, weights=LossConfig(hidden_mse=0, block_fvu=0, chunk_size=5)
    )
    found.backward()
    assert student.get_output_embeddings().weight.grad is None
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad and p.dim() > 1)


@pytest.mark.parametrize("term", LOSS_TERMS)
def test_each_weight_scales_its_own_term_and_nothing_else(pair, tokens, term):
    student, teacher = pair
    nothing = dict.fromkeys(LOSS_TERMS, 0.0)
    alone = LossConfig(**(nothing | {term: 1.0}))
    signals = (
        forward_with_activations(student, tokens, capture_blocks=True),
        forward_with_activations(teacher, tokens, capture_blocks=True),
    )
    assert set(compute_loss_terms(*signals, Batch.full_step(tokens), alone, SCALES)) == {term}
    once, thrice = (
        loss(student, teacher, tokens, weights=LossConfig(**(nothing | {term: w})))
        for w in (1.0, 3.0)
    )
    torch.testing.assert_close(thrice, 3 * once)
    assert once.item() > 0.01
    if term != "ce":
        assert loss(teacher, teacher, tokens, weights=alone).item() == pytest.approx(0, abs=1e-5)


def test_state_terms_by_definition(tokens):
    mine, theirs = (torch.randn(3, 20, 4) for _ in range(2))
    student, teacher = (
        ForwardOutputs(x, torch.nn.Identity(), block_outputs=(x, 2 * x, 3 * x))
        for x in (mine, theirs)
    )
    terms = compute_loss_terms(
        student,
        teacher,
        Batch.full_step(tokens),
        LossConfig(kl=0, hidden_mse=1, block_fvu=1, hidden_cosine=1),
        SCALES,
    )
    squared = (mine - theirs).square().sum(-1).mean()
    torch.testing.assert_close(terms["hidden_mse"], squared / 5)
    torch.testing.assert_close(terms["block_fvu"], squared * (1 / 2 + 4 / 3 + 9 / 4) / 3)
    torch.testing.assert_close(
        terms["hidden_cosine"], 1 - F.cosine_similarity(mine, theirs, dim=-1).mean()
    )


def test_outliers_count_less_and_only_they(tokens):
    wanted = torch.randn(3, 20, 4)
    wanted[0, 0] *= 1e5
    limit, length = outlier_threshold(wanted), wanted[0, 0].norm()
    assert inlier_mask(wanted).sum() == 59
    given = wanted + torch.randn(3, 20, 4)
    errors = (given - wanted).square().sum(-1)
    errors[0, 0] *= (limit / length) ** 2
    mask = torch.ones(3, 20)
    torch.testing.assert_close(squared_error(given, wanted, mask, 60, limit), errors.mean())
    scales = LossScales(torch.tensor([2.0]), torch.tensor(1.0), limit.unsqueeze(0))
    torch.testing.assert_close(
        block_fvu((given,), (wanted,), mask, 60, scales)[0], errors.mean() / 2
    )


def test_next_token_mask():
    mask = torch.tensor([[True, True, True, False], [False, True, True, True]])
    assert next_token_mask(mask).tolist() == [
        [True, True, False, False],
        [False, True, True, False],
    ]


def test_the_block_term_is_about_the_layers_it_is_given(tokens):
    mine, theirs = (torch.randn(3, 20, 4) for _ in range(2))
    student, teacher = (
        ForwardOutputs(x, torch.nn.Identity(), block_outputs=(x, 2 * x, 3 * x))
        for x in (mine, theirs)
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
        terms["block_fvu"], (mine - theirs).square().sum(-1).mean() * (1 / 2 + 9 / 4) / 2
    )


def test_text_without_a_next_token_costs_nothing(pair):
    weights = LossConfig(hidden_mse=0, block_fvu=0, kl=0, ce=1)
    assert loss(*pair, torch.randint(1, 300, (2, 1)), weights=weights).item() == 0


@pytest.mark.parametrize("name", TERMS_WITH_GRAD)
def test_half_precision_logits_are_judged_in_full_precision(name):
    given, wanted, targets = (
        torch.randn(5, 50).bfloat16(),
        torch.randn(5, 50).bfloat16(),
        torch.randint(50, (5,)),
    )
    found, full = (
        TERMS_WITH_GRAD[name](a, b, targets, 2.0)
        for a, b in ((given, wanted), (given.float(), wanted.float()))
    )
    for mine, wants in zip(found, full, strict=True):
        assert torch.equal(mine, wants)


def test_an_outlier_is_longer_than_ten_medians_whatever_the_longest_are():
    states = torch.ones(9, 4)
    states[0] *= 1e6
    assert outlier_threshold(states) == 20
    assert inlier_mask(states).tolist() == [False] + [True] * 8
    assert inlier_mask(torch.zeros(5, 4)).all(), "silence is no outlier"


def test_an_outlier_counts_less_by_the_square_of_how_much_too_long_it_is():
    states = torch.tensor([[3.0, 4.0], [30.0, 40.0], [0.0, 0.0]])
    torch.testing.assert_close(
        outlier_weights(states, torch.tensor(10.0)), torch.tensor([1.0, 0.04, 1.0])
    )


def test_what_a_student_makes_too_long_counts_in_full():
    wanted, given, mask = torch.ones(1, 4, 2), torch.ones(1, 4, 2), torch.ones(1, 4)
    given[0, 0] *= 1e3
    torch.testing.assert_close(
        squared_error(given, wanted, mask, 4, outlier_threshold(wanted)),
        squared_error(given, wanted, mask, 4),
    )
