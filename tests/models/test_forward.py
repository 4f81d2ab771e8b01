"""Forward passes after a context, with its cache or in front."""

import pytest
import torch
from conftest import make_llama, make_teacher
from factories import PERSON_TEXT

from dmt.consolidation.context import CONTEXT_SEPARATOR
from dmt.models.forward import (
    ContextTeacher,
    encode_text,
    forward_with_activations,
    forward_with_prefix,
)


@pytest.mark.parametrize("make", [make_teacher, make_llama])
def test_a_context_teacher_equals_a_forward_pass_with_the_context_in_front(make, tokenizer, tokens):
    positions = {"n_positions": 64} if make is make_teacher else {"max_position_embeddings": 64}
    model = make(len(tokenizer), **positions)
    context = [0, 5, 6, 7, 8]
    context_teacher = ContextTeacher(model, context)
    for _ in range(2):  # a pass leaves no state behind
        outputs = context_teacher.predict(tokens, blocks=True)
        expected = forward_with_activations(
            model, torch.cat([torch.tensor([context] * 3), tokens], 1), capture_blocks=True
        )
        torch.testing.assert_close(outputs.logits, expected.logits[:, 5:], rtol=1e-4, atol=1e-4)
        for predicted, reference in (
            (outputs.layer_outputs, expected.layer_outputs),
            (outputs.block_inputs, expected.block_inputs),
        ):
            assert len(predicted) == model.config.num_hidden_layers
            for a, b in zip(predicted, reference, strict=True):
                torch.testing.assert_close(a, b[:, 5:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        forward_with_prefix(model, context, tokens).logits,
        expected.logits[:, 5:],
        rtol=1e-4,
        atol=1e-4,
    )
    width = model.config.hidden_size // (2 if make is make_teacher else 4) * 2
    assert (
        context_teacher.cache_bytes == 2 * model.config.num_hidden_layers * width * len(context) * 4
    )


def test_gradients_reach_the_prefix(teacher, tokens):
    teacher.requires_grad_(True)
    forward_with_prefix(teacher, [0, 299], tokens).logits.sum().backward()
    assert teacher.get_input_embeddings().weight.grad[299].abs().sum() > 0


def test_samples_depend_on_the_seed_and_leave_the_global_generator_alone(embedded):
    model, tokenizer = embedded
    context_teacher = ContextTeacher(model, encode_text(tokenizer, PERSON_TEXT + CONTEXT_SEPARATOR))
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    samples = [
        context_teacher.sample(opener, 3, 20, 1.0, seed, 0)
        for seed, opener in ((1, []), (1, []), (2, []), (1, [5, 6]))
    ]
    assert torch.equal(torch.rand(2), expected)
    assert samples[0] == samples[1] != samples[2]
    assert all(len(text) <= 20 and 0 not in text for texts in samples for text in texts)
    assert all(text[:2] == [5, 6] for text in samples[3])
    assert context_teacher.sample([5] * 20, 3, 20, 1.0, 0, 0) == []


def test_samples_at_low_temperature_are_greedy_continuations_of_the_context(embedded):
    model, tokenizer = embedded
    context_teacher = ContextTeacher(model, encode_text(tokenizer, PERSON_TEXT + CONTEXT_SEPARATOR))
    [greedy] = context_teacher.sample([], 1, 8, 1e-4, 0, None)
    ids = torch.tensor([context_teacher.ids])
    for token in greedy:
        assert int(forward_with_activations(model, ids).logits[0, -1].argmax()) == token
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
