"""Which facts fire does not depend on how a text reaches the model, and reading leaves no trace."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import LAYERS, WIDTH, make_llama, make_teacher
from transformers import DynamicCache
from unsaved_facts import (
    ANSWER,
    BORN,
    NEVER,
    STATES,
    attach_facts,
    encode,
    make_fact,
    make_relations,
)

from dmt.config import FeaturalConfig
from dmt.memory.token_context import UNKNOWN_TOKEN
from dmt.memory.usage import record_usage
from dmt.models.architectures import get_architecture
from dmt.models.conversion import convert_blocks
from dmt.models.fact_hooks import TrainedValues, disabled, record_matches
from dmt.models.fact_matching import (
    ANSWER_WINDOW,
    CONTEXT_WINDOW,
    SUBJECT_WINDOW,
    FactMatcher,
    TextCodec,
    parse_prompt,
)
from dmt.models.forward import capture, collect_hidden_states

POSITIONS = 160
TEXT = (
    "the dog runs. Ada Holbrook was born in the town of Ravenhill and Bob Stone lives in the town"
    " of Rows. Where was Ada Holbrook born?"
)
LONG_ANSWER = " Ravenhill, a town of every row and of the lazy dog that jumps over a table at noon"
SCORE_ERROR = 1e-5


@pytest.fixture(params=[make_teacher, make_llama])
def model(request, tokenizer):
    name = "n_positions" if request.param is make_teacher else "max_position_embeddings"
    return request.param(len(tokenizer), **{name: POSITIONS})


@pytest.fixture
def facts(tokenizer):
    return [
        make_fact(tokenizer),
        make_fact(tokenizer, "Bob Stone lives in the town of", " Rows", "Bob Stone", 2),
    ]


@pytest.fixture
def text(tokenizer):
    """Token ids of a text that asks for two facts, with room for each to be answered."""
    return encode(tokenizer, TEXT)


def run_pass(model, ids, **arguments):
    """Run one pass on token ids `(batch, time)`; return its matches and logits."""
    with record_matches(model) as passes, torch.no_grad():
        logits = model(torch.tensor(ids), **arguments).logits
    (matches,) = passes
    return matches, logits


def shift(matches, offset):
    """Return what fires, by the tokens of a text that begins at `offset` of its row."""
    return {match.token - offset: (match.fact.id, match.position) for match in matches}


def list_scores(matches):
    return [match.score for match in matches]


# With these the states decide whether a clause with some of a prompt's words matches.
BY_STATES = {"weights": ((0.6, 0.4, 0.0, 0.0), NEVER, NEVER), "lowest_match": 0.5}


@pytest.mark.parametrize("calibration", [{}, BY_STATES])
def test_facts_fire_alike_in_one_pass_token_by_token_padded_and_packed(
    model, tokenizer, facts, text, calibration
):
    attach_facts(model, tokenizer, facts, relations=make_relations(**calibration))
    matches, logits = run_pass(model, [text])
    expected, scores = shift(matches, 0), list_scores(matches)
    assert {(1, 0), (2, 0)} <= set(expected.values())

    cache, tokenwise, step_logits = DynamicCache(), [], []
    for position, token in enumerate(text):
        matches, token_logits = run_pass(model, [[token]], past_key_values=cache)
        tokenwise += [(position, match.fact.id, match.position, match.score) for match in matches]
        step_logits.append(token_logits)
    assert {token: (fact, position) for token, fact, position, _ in tokenwise} == expected
    np.testing.assert_allclose([score for *_, score in tokenwise], scores, atol=SCORE_ERROR)
    torch.testing.assert_close(torch.cat(step_logits, 1), logits, rtol=1e-3, atol=1e-3)

    other = encode(tokenizer, "Bob Stone lives in the town of")
    num_padding = len(text) - len(other)
    mask = torch.ones(2, len(text), dtype=torch.long)
    mask[1, :num_padding] = 0
    padded = [text, [tokenizer.eos_token_id] * num_padding + other]
    matches, _ = run_pass(
        model, padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)
    )
    first = [match for match in matches if match.token < len(text)]
    second = [match for match in matches if match.token >= len(text)]
    assert shift(first, 0) == expected
    np.testing.assert_allclose(list_scores(first), scores, atol=SCORE_ERROR)
    alone, _ = run_pass(model, [other])
    assert shift(second, len(text) + num_padding) == shift(alone, 0) != {}

    packed = [*other, *text]
    positions = torch.tensor([[*range(len(other)), *range(len(text))]])
    matches, _ = run_pass(model, [packed], position_ids=positions)
    assert shift(matches, 0) == {
        **shift(alone, 0),
        **{token + len(other): match for token, match in expected.items()},
    }


def test_a_long_answer_is_followed_to_its_end_with_a_cache(model, tokenizer):
    fact = make_fact(tokenizer, answer=LONG_ANSWER + LONG_ANSWER)
    answer = list(fact.record.answer_ids)
    assert len(answer) >= 80
    attach_facts(model, tokenizer, [fact])
    cache = DynamicCache()
    matches, _ = run_pass(model, [encode(tokenizer, BORN)], past_key_values=cache)
    assert matches[-1].position == 0
    fired = []
    for token in answer:
        matches, _ = run_pass(model, [[token]], past_key_values=cache)
        fired.append([(match.row_id, match.position) for match in matches])
    assert fired == [[(100 + position, position)] for position in range(1, len(answer))] + [[]]


def test_an_answer_that_goes_on_differently_is_not_followed(model, tokenizer):
    attach_facts(model, tokenizer)
    prompt, answer = encode(tokenizer, BORN), encode(tokenizer, ANSWER)
    matches, _ = run_pass(model, [[*prompt, *answer[:2], 7, *answer[3:]]])
    end = len(prompt) - 1
    assert shift(matches, end) == {-1: (1, 0), 0: (1, 0), 1: (1, 1), 2: (1, 2)}


def test_a_prompt_that_is_matched_as_it_is_is_about_the_same_name(model, tokenizer):
    prompt = "Ada Holbrook met Bob Stone, who lives in the town of"
    attach_facts(model, tokenizer, [make_fact(tokenizer, prompt)])
    for text, fires in ((prompt, True), (f"So {prompt}", True), (f"Mary {prompt}", False)):
        ids = encode(tokenizer, text)
        matches, _ = run_pass(model, [ids])
        assert (len(ids) - 1 in shift(matches, 0)) == fires


def test_the_newest_of_facts_that_match_alike_fires(model, tokenizer):
    first, *others = [make_fact(tokenizer, fact_id=fact_id) for fact_id in (1, 3, 2)]
    attach_facts(model, tokenizer, [first, *(replace(fact, keys=first.keys) for fact in others)])
    matches, _ = run_pass(model, [encode(tokenizer, BORN)])
    assert {match.fact.id for match in matches} == {3}


def test_an_answer_in_another_document_neither_goes_on_nor_counts(model, tokenizer):
    attach_facts(model, tokenizer, [make_fact(tokenizer, "Ada is", " it", "Ada")])
    prompt, answer = encode(tokenizer, "Ada is"), encode(tokenizer, " it")
    assert len(prompt) <= ANSWER_WINDOW
    documents = [prompt, answer, [*prompt, *answer], prompt]
    ids = [token for document in documents for token in document]
    positions = [position for document in documents for position in range(len(document))]
    packed, _ = run_pass(model, [ids], position_ids=torch.tensor([positions]))
    offset, expected = 0, {}
    for document in documents:
        alone, _ = run_pass(model, [document])
        expected |= shift(alone, -offset)
        offset += len(document)
    assert shift(packed, 0) == expected
    assert {len(prompt) - 1, len(ids) - 1} <= set(expected)
    assert len(prompt) not in expected


def test_a_subject_that_was_named_long_ago_is_not_asked_about(model, tokenizer):
    attach_facts(model, tokenizer)
    for num_words, fires in ((2, True), (30, False)):
        ids = encode(tokenizer, "Ada Holbrook" + " is" * num_words + " was born in the town of")
        assert (len(ids) < SUBJECT_WINDOW) == fires
        assert len(ids) < CONTEXT_WINDOW
        matches, _ = run_pass(model, [ids])
        assert (len(ids) - 1 in shift(matches, 0)) == fires


def test_a_completed_answer_does_not_fire_again_at_once(model, tokenizer, monkeypatch):
    attach_facts(model, tokenizer, [make_fact(tokenizer, answer=" it")])
    prompt, answer = encode(tokenizer, BORN), encode(tokenizer, " it")
    soon = encode(tokenizer, " of the town of")
    later = encode(tokenizer, f". {BORN}")
    assert len(soon) < ANSWER_WINDOW < len(later)
    ids = [[*prompt, *answer, *soon, *later]]
    answered = len(prompt) + len(answer) - 1
    matches, _ = run_pass(model, ids)
    fired = [token - answered for token in shift(matches, 0)]
    assert max(token for token in fired if token <= len(soon)) == -1, "within the answer"
    assert max(fired) == len(soon) + len(later), "but where it is asked again"
    monkeypatch.setattr(FactMatcher, "_is_answered", lambda *_: False)
    matches, _ = run_pass(model, ids)
    assert answered + len(soon) in shift(matches, 0), "the text asks for it at once"


def test_the_answer_of_a_deleted_fact_is_not_followed(model, tokenizer):
    hooks = attach_facts(model, tokenizer)
    cache, (first, second, *_) = DynamicCache(), encode(tokenizer, ANSWER)
    matches, _ = run_pass(model, [encode(tokenizer, BORN)], past_key_values=cache)
    assert matches[-1].position == 0
    matches, _ = run_pass(model, [[first]], past_key_values=cache)
    assert [match.position for match in matches] == [1]
    hooks.index.set_unsaved([make_fact(tokenizer, "Bob Stone lives in", " Rows", "Bob Stone", 2)])
    matches, _ = run_pass(model, [[second]], past_key_values=cache)
    assert not matches


def test_a_clause_is_read_with_the_present_weights(model, tokenizer):
    relations = make_relations(weights=(STATES, NEVER, NEVER), lowest_match=0.99)
    hooks = attach_facts(model, tokenizer, relations=relations)
    clause = hooks.matcher.codec.encode_clause("{s} was born in the town of")
    key = collect_hidden_states(model, [clause], [[len(clause) - 1]], [hooks.key_layer])
    fact = make_fact(tokenizer)
    keys = key[hooks.key_layer].float().numpy().repeat(len(fact.keys), 0)
    hooks.index.set_unsaved([replace(fact, keys=keys)])
    ids = [encode(tokenizer, BORN)]
    matches, _ = run_pass(model, ids)
    assert matches, "the key is the state itself"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    matches, _ = run_pass(model, ids)
    assert not matches


def test_a_prompt_that_asks_nothing_is_matched_from_a_word_on(model, tokenizer):
    prompt = "he and Ada Holbrook and Bob Stone went to"
    assert parse_prompt(prompt, "Ada Holbrook").question is None
    attach_facts(model, tokenizer, [make_fact(tokenizer, prompt)])
    for text, is_matched in ((prompt, True), (f"the dog. {prompt}", True), (f"s{prompt}", False)):
        matches, _ = run_pass(model, [encode(tokenizer, text)])
        assert bool(matches) == is_matched, text


def test_reading_a_clause_counts_as_no_use_and_is_not_captured(model, tokenizer, monkeypatch):
    tokens = torch.tensor([encode(tokenizer, BORN)])
    student, _ = convert_blocks(model, [FeaturalConfig()] * LAYERS)
    hooks = attach_facts(student.train(), tokenizer, key_layer=0, value_layer=LAYERS - 1)
    blocks = get_architecture(student.config.model_type).blocks(student)
    blocks[1].eval()
    modes = [module.training for module in student.modules()]
    read_texts, encode_texts = [], hooks._encode_texts

    def record_texts(backbone, texts, device):
        read_texts.extend(texts)
        return encode_texts(backbone, texts, device)

    monkeypatch.setattr(hooks, "_encode_texts", record_texts)
    counts = []
    for is_disabled in (False, True):
        shapes = []
        torch.manual_seed(0)  # of dropout
        with (
            torch.no_grad(),
            disabled(student) if is_disabled else nullcontext(),
            record_usage(dict(enumerate(blocks))) as usages,
            capture(
                dict(enumerate(blocks)),
                on_input=lambda _, value, log=shapes: log.append(value.shape),
            ) as activations,
        ):
            student(tokens)
        assert shapes == [(1, tokens.shape[1], WIDTH)] * LAYERS, "of the outer pass alone"
        assert [output.shape for output in activations.outputs.values()] == shapes
        assert [module.training for module in student.modules()] == modes
        counts.append([(usage.tokens, usage.reads.tolist()) for usage in usages.values()])
        assert read_texts, "a clause was read in the first pass"
    assert counts[0] == counts[1]
    assert {num_tokens for num_tokens, _ in counts[0]} == {tokens.shape[1]}


def test_trained_values_receive_gradients(model, tokenizer):
    hooks = attach_facts(model, tokenizer)
    tokens = torch.tensor([[*encode(tokenizer, BORN), *encode(tokenizer, ANSWER)]])
    expected = model(tokens).logits
    (fact,) = hooks.index.lookup(["ada holbrook"])["ada holbrook"]
    values = torch.from_numpy(fact.values).clone().requires_grad_()
    trained = {row: index for index, row in enumerate(fact.record.rows) if index < 2}
    hooks.trained_values = TrainedValues(trained, values)
    logits = model(tokens).logits
    torch.testing.assert_close(logits, expected)
    torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:]).backward()
    norms = values.grad.norm(dim=-1)
    assert (norms[:2] > 0).all()
    assert (norms[2:] == 0).all(), "the other rows keep the values that are stored"
    with torch.no_grad():
        values[0] += 1
        assert not torch.isclose(model(tokens).logits, expected).all()


def test_special_and_unknown_tokens_end_a_paragraph_and_half_a_letter_is_no_text(tokenizer):
    codec = TextCodec.from_transformers(tokenizer, [0])
    ids = encode(tokenizer, "é")
    assert codec.decode(ids) == "é"
    assert codec.decode(ids[:1]) == ""
    assert codec.decode([*encode(tokenizer, "a dog"), 0, *encode(tokenizer, "a fox")]) == (
        "a dog\n\na fox"
    )
    assert codec.decode([*encode(tokenizer, "a"), UNKNOWN_TOKEN, *encode(tokenizer, "b")]) == (
        "a\n\nb"
    )
    assert codec.decode(codec.encode_clause("{s} was")) == "\n\nClara Winfield was"
