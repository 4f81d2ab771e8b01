"""Memories that read token ids have those of their own text, however the model is called."""

import copy
import io
import threading

import pytest
import torch
from conftest import make_llama, make_teacher
from transformers import AutoModel, StaticCache
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

import dmt
from dmt.errors import UserError
from dmt.memory.token_context import PADDING_TOKEN, UNKNOWN_TOKEN, list_contexts, peek_contexts
from dmt.models.memories import get_memories

CONFIG = dmt.SumConfig(
    parts=[
        dmt.FeaturalConfig(k=8),
        dmt.NgramConfig(num_rows=512, context_gate=True),
        dmt.TokenConfig(),
    ]
)


@pytest.fixture(params=[make_teacher, make_llama])
def student(request, tokens):
    student = dmt.convert(request.param(), CONFIG, calibration=tokens).eval()
    with torch.no_grad():  # a hidden state decides nothing yet
        for name, parameter in student.named_parameters():
            if "gate_weight" in name:
                parameter.normal_()
    return student


def compute_logits(student, tokens, **kwargs):
    with torch.no_grad():
        return student(tokens, **kwargs).logits


def assert_close(logits, expected):
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def test_contexts_are_the_last_ids_of_the_same_text():
    tokens = torch.tensor([[5, 6, 7, 8]])
    unknown = UNKNOWN_TOKEN
    assert list_contexts(tokens, 3).tolist() == [
        [[unknown, unknown, 5], [unknown, 5, 6], [5, 6, 7], [6, 7, 8]]
    ]
    positions = torch.tensor([[3, 4, 0, 1]])
    assert list_contexts(tokens, 2, positions).tolist() == [
        [[unknown, 5], [5, 6], [unknown, 7], [7, 8]]
    ]
    padding = PADDING_TOKEN
    assert list_contexts(torch.tensor([[padding, 5, padding, padding, 6]]), 2).tolist() == [
        [[unknown] * 2, [unknown, 5], [unknown] * 2, [unknown] * 2, [5, 6]]
    ]


def record_contexts(student, *args, **kwargs):
    """Return the contexts of the first memory in a pass."""
    contexts = []
    handle = get_memories(student)[0].register_forward_hook(
        lambda *_: contexts.append(peek_contexts())
    )
    compute_logits(student, *args, **kwargs)
    handle.remove()
    assert peek_contexts() is None, "nothing is left after the pass"
    return contexts[0]


def test_a_memory_is_told_the_last_three_tokens(student, tokens):
    assert torch.equal(record_contexts(student, tokens), list_contexts(tokens, 3))


def test_padding_is_no_text(student, tokens):
    padded = torch.cat([torch.full((3, 4), 7), tokens], 1)
    mask = torch.ones_like(padded)
    mask[:, :4] = 0
    contexts = record_contexts(student, padded, attention_mask=mask)
    assert torch.equal(contexts[:, 4:], list_contexts(tokens, 3))


def test_padding_on_the_left_changes_no_answer(student, tokens):
    expected = compute_logits(student, tokens)
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), tokens], 1)
    mask = torch.ones_like(padded)
    mask[:, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    logits = compute_logits(student, padded, attention_mask=mask, position_ids=positions)
    assert_close(logits[:, 4:], expected)


def test_padding_on_the_right_changes_no_answer(student, tokens):
    """Texts of unequal length are read together, then each is continued after its own end."""
    lengths, padded = torch.tensor([9, 5, 1]), tokens[:, :9]
    mask = (torch.arange(9) < lengths.unsqueeze(1)).long()
    with torch.no_grad():
        cache = student(padded.where(mask == 1, 7), attention_mask=mask, use_cache=True)
        cache, logits = cache.past_key_values, []
        for step in range(3):
            mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
            output = student(
                tokens[:, 9 + step].unsqueeze(1),
                attention_mask=mask,
                position_ids=(lengths + step).unsqueeze(1),
                past_key_values=cache,
                use_cache=True,
            )
            logits.append(output.logits[:, 0])
    for row, length in enumerate(lengths.tolist()):
        alone = torch.cat([tokens[row, :length], tokens[row, 9:12]]).unsqueeze(0)
        expected = compute_logits(student, alone)[0, length:]
        assert_close(torch.stack(logits)[:, row], expected)


def test_documents_in_one_window_do_not_see_each_other(student, tokens):
    """Where positions begin anew, another text begins."""
    if not hasattr(student, "model"):
        pytest.skip("GPT-2 with eager attention masks no packed documents")
    first, second = tokens[:1, :8], tokens[1:2, :8]
    packed = torch.cat([first, second], 1)
    positions = torch.cat([torch.arange(8), torch.arange(8)]).unsqueeze(0)
    logits = compute_logits(student, packed, position_ids=positions, use_cache=False)
    assert_close(logits[:, 8:], compute_logits(student, second, use_cache=False))


def test_a_cache_that_is_cut_copied_and_sorted_has_the_text_with_it(student, tokens):
    expected = compute_logits(student, tokens)
    with torch.no_grad():
        cache = student(tokens[:, :12], use_cache=True).past_key_values
    cache.crop(-3)
    copied = copy.deepcopy(cache)
    order = torch.tensor([2, 0, 1])
    cache.reorder_cache(order)
    logits = compute_logits(student, tokens[order, 9:], past_key_values=cache)
    assert_close(logits, expected[order, 9:])
    assert_close(compute_logits(student, tokens[:, 9:], past_key_values=copied), expected[:, 9:])


def test_a_cache_of_one_text_serves_several_continuations(student, tokens):
    with torch.no_grad():
        cache = student(tokens[:1, :9], use_cache=True).past_key_values
    cache.batch_repeat_interleave(3)
    texts = torch.cat([tokens[:1, :9].expand(3, -1), tokens[:, 9:]], 1)
    logits = compute_logits(student, tokens[:, 9:], past_key_values=cache)
    assert_close(logits, compute_logits(student, texts)[:, 9:])


def test_a_cache_that_is_reset_has_no_text(student, tokens):
    cache = StaticCache(student.config, max_cache_len=tokens.shape[1])
    compute_logits(student, tokens[:, :9], past_key_values=cache)
    cache.reset()
    logits = compute_logits(student, tokens.flip(1), past_key_values=cache)
    assert_close(logits, compute_logits(student, tokens.flip(1)))


def test_a_cache_in_a_tuple_has_the_text_too(student, tokens):
    with torch.no_grad():
        hidden, cache = student.base_model(tokens[:, :12], return_dict=False)[:2]
        rest = student.base_model(tokens[:, 12:], past_key_values=cache, return_dict=False)[0]
        logits = student.get_output_embeddings()(torch.cat([hidden, rest], 1))
    assert_close(logits, compute_logits(student, tokens))


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static"}],
)
def test_generation_is_that_without_a_cache(student, tokens, options):
    prompt = tokens[:1, :6]
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 299}
    expected = student.generate(
        prompt, **settings, use_cache=False, num_beams=options.get("num_beams", 1)
    )
    assert torch.equal(student.generate(prompt, **settings, **options), expected)


def test_embeddings_in_place_of_ids_are_recognized(student, tokens):
    embeddings = student.get_input_embeddings()(tokens)
    assert_close(
        compute_logits(student, None, inputs_embeds=embeddings), compute_logits(student, tokens)
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_see_the_text_of_their_own_pass(student, tokens, reentrant):
    """Two passes before one backward pass: each layer is computed again with its own tokens."""

    def compute_gradients():
        student.zero_grad()
        passes = [student(text, use_cache=False).logits for text in tokens.split(1)]
        torch.cat(passes).logsumexp(-1).sum().backward()
        return [parameter.grad for parameter in student.parameters()]

    student.train()
    expected = [None if grad is None else grad.clone() for grad in compute_gradients()]
    student.activation_checkpointing_enable({"use_reentrant": reentrant})
    for grad, expected_grad in zip(compute_gradients(), expected, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-3)
    assert peek_contexts() is None


def test_threads_do_not_mix_their_texts(student, tokens):
    expected = [compute_logits(student, text) for text in tokens.split(1)]
    results = {}

    def run(index):
        results[index] = [compute_logits(student, tokens[index : index + 1]) for _ in range(10)]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, logits in results.items():
        for result in logits:
            assert_close(result, expected[index])


def test_a_copy_a_backbone_and_a_loaded_student_look_up_too(student, tokens, tmp_path):
    expected = compute_logits(student, tokens)
    assert_close(compute_logits(copy.deepcopy(student), tokens), expected)
    student.save_pretrained(tmp_path)
    backbone = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        hidden = backbone(tokens).last_hidden_state
        assert_close(student.get_output_embeddings()(hidden), expected)


def test_an_error_within_a_pass_leaves_nothing_behind(student, tokens):
    def fail(module, args):
        raise ValueError("a test")

    handle = get_memories(student)[1].register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="a test"):
        student(tokens)
    handle.remove()
    assert peek_contexts() is None


def test_continuous_batching_is_refused(student, tokens):
    with pytest.raises(UserError, match="which continuous batching does not tell it"):
        student(tokens, cache=object())


def test_a_student_is_pickled_with_its_lookups(student, tokens):
    buffer = io.BytesIO()
    torch.save(student, buffer)
    buffer.seek(0)
    assert_close(
        compute_logits(torch.load(buffer, weights_only=False), tokens),
        compute_logits(student, tokens),
    )


def test_students_without_lookups_are_not_changed():
    student = dmt.convert(make_teacher(), dmt.FeaturalConfig(k=8)).eval()
    assert not any(module._forward_pre_hooks for module in student.modules())
    assert type(student.transformer.h[0]) is GPT2Block
