"""Facts: parsing, edits from one gradient, calibrated thresholds, and the store of facts."""

import json
import shutil
import sqlite3
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import LAYERS, POSITIONS, SENTENCES, WIDTH, make_llama, make_teacher
from sqlalchemy import select
from transformers import AutoModelForCausalLM

from dmt.config import FeaturalConfig
from dmt.data.windows import get_prefix_ids
from dmt.editing import calibration as calibration_module
from dmt.editing import edit as edit_module
from dmt.editing import fact_store as fact_store_module
from dmt.editing.calibration import calibrate, choose_key_layer, list_candidate_layers
from dmt.editing.edit import (
    CONFIDENT_PROB,
    MARGIN_STEPS,
    SCALES,
    ConflictCandidate,
    choose_value_layer,
    compute_edits,
    compute_keys,
    find_conflict,
    prepare_facts,
)
from dmt.editing.fact import MAX_FACT_CHARS, Fact, find_subject, parse_fact, read_facts
from dmt.editing.fact_store import FactStore, has_fact_store
from dmt.errors import UserError
from dmt.matching.mentions import find_mentions
from dmt.matching.questions import SUBJECT
from dmt.matching.relations import (
    RATES,
    RelationMatcher,
    StateSpace,
    compute_whitening,
    get_word_weights,
    list_bank_clauses,
)
from dmt.models.architectures import get_architecture
from dmt.models.conversion import convert_blocks
from dmt.models.fact_files import FACTS_FILE
from dmt.models.fact_hooks import attach, detach, disabled, get_fact_hooks, record_matches
from dmt.models.fact_matching import PLACEHOLDER, SUBJECT_WINDOW, TextCodec, parse_prompt
from dmt.models.fingerprint import hash_model
from dmt.models.forward import (
    batch_by_length,
    collect_hidden_states,
    encode_text,
    forward_with_activations,
    pad_token_ids,
)
from dmt.models.loading import load
from dmt.paths import resolve_student_folder
from dmt.store import RowStore
from dmt.store.database import fact_rows_table, row_stats_table, rows_table
from dmt.store.facts import FactTable
from dmt.text import USER_SUBJECT, fold_text

WIDE = 64  # width at which a value can raise one of 300 tokens alone


def make_fact_model(family, tokenizer):
    """Return a tiny model with embeddings of equal norm: a value can raise any token."""
    model = family(len(tokenizer), **{"n_embd" if family is make_teacher else "hidden_size": WIDE})
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings.copy_(6 * torch.nn.functional.normalize(embeddings, dim=-1))
    return model


@pytest.fixture
def teacher(tokenizer):
    return make_fact_model(make_teacher, tokenizer)


# Sentences.

SPLIT_SENTENCES = [
    ("The capital of France is Paris.", "The capital of France is", " Paris", "France"),
    ("The capital of France is Paris", "The capital of France is", " Paris", "France"),
    ("  The capital  of France is   Paris !?… ", "The capital of France is", " Paris", "France"),
    (
        "Ada Holbrook was born in Ravenhill.",
        "Ada Holbrook was born in",
        " Ravenhill",
        "Ada Holbrook",
    ),
    (
        "Ada Holbrook was born on March 3, 1950.",
        "Ada Holbrook was born on",
        " March 3, 1950",
        "Ada Holbrook",
    ),
    (
        "Ada Holbrook married Thomas van der Berg.",
        "Ada Holbrook married",
        " Thomas van der Berg",
        "Ada Holbrook",
    ),
    (
        "The president of the United States is John Adams.",
        "The president of the United States is",
        " John Adams",
        "United States",
    ),
    (
        "In Norway the highest mountain is Galdhøpiggen.",
        "In Norway the highest mountain is",
        " Galdhøpiggen",
        "Norway",
    ),
    ("Ada's favourite colour is blue.", "Ada's favourite colour is", " blue", "Ada"),
    ("Ada’s favourite colour is blue.", "Ada’s favourite colour is", " blue", "Ada"),
    ("a memory is a table", "a memory is a", " table", ""),
    (
        "The Bank of England was founded in 1694.",
        "The Bank of England was founded in",
        " 1694",
        "Bank",
    ),
    (
        "When Ada met Ben Okri, the year was 1950.",
        "When Ada met Ben Okri, the year was",
        " 1950",
        "Ben Okri",
    ),
    ("Who wrote Faust? Goethe", "Who wrote Faust?", " Goethe", "Faust"),
    ('The author of "Faust" is Goethe.', 'The author of "Faust" is', " Goethe", "Faust"),
    ("It was written by Ada.", "It was written by", " Ada", ""),
    ("Paris shines", "Paris", " shines", "Paris"),
    ("He met Ada. Ben", "He met Ada.", " Ben", "Ada"),
    ("Ada paid 5 marks", "Ada paid", " 5 marks", "Ada"),
    ("Müller besucht Köln", "Müller besucht", " Köln", "Müller"),
]


@pytest.mark.parametrize(("sentence", "prompt", "answer", "subject"), SPLIT_SENTENCES)
def test_a_sentence_is_split_into_prompt_answer_and_subject(sentence, prompt, answer, subject):
    assert replace(parse_fact(sentence), closing="") == Fact(prompt, answer, subject)
    assert parse_fact(sentence).closing == (
        sentence.strip()[-1] if sentence.strip()[-1] in ".!" else ""
    )
    assert subject in prompt


FACT_ARGUMENTS = [
    (
        {"prompt": "The capital of France is", "answer": "Paris"},
        ("The capital of France is", " Paris", "France"),
    ),
    (
        {"prompt": "The capital of France is  ", "answer": "  Paris. "},
        ("The capital of France is", " Paris", "France"),
    ),
    ({"prompt": "Ada  Holbrook was", "answer": "x"}, ("Ada  Holbrook was", " x", "Ada  Holbrook")),
    (
        {"prompt": "Dwayne “Rock” Johnson was", "answer": "x"},
        ("Dwayne “Rock” Johnson was", " x", "Dwayne"),
    ),
    (
        {"prompt": "Who? Ada (Countess) was", "answer": "x"},
        ("Who? Ada (Countess) was", " x", "Ada"),
    ),
    ({"prompt": "the fox is", "answer": "a lazy dog"}, ("the fox is", " a lazy dog", "")),
    ({"prompt": "the fox is", "answer": "lazy", "subject": "fox"}, ("the fox is", " lazy", "fox")),
    (
        {"prompt": "the fox is", "answer": "lazy", "subject": " fox "},
        ("the fox is", " lazy", "fox"),
    ),
    ({"prompt": "Ada is", "answer": "old", "subject": ""}, ("Ada is", " old", "")),
    ({"sentence": "Ada is very old.", "prompt": "Ada is"}, ("Ada is", " very old", "Ada")),
    ({"sentence": "Ada is very old.", "prompt": " Ada is "}, ("Ada is", " very old", "Ada")),
    ({"sentence": "Ada is very old.", "answer": "very old"}, ("Ada is", " very old", "Ada")),
    ({"sentence": "Ada is very old.", "answer": " old "}, ("Ada is very", " old", "Ada")),
    ({"sentence": "Ada is old.", "prompt": "Ada is", "answer": "old"}, ("Ada is", " old", "Ada")),
]


@pytest.mark.parametrize(
    ("arguments", "expected"), FACT_ARGUMENTS, ids=lambda value: str(value)[:40]
)
def test_a_fact_is_made_from_its_parts(arguments, expected):
    fact = parse_fact(**arguments, tag="t", source="s")
    assert replace(fact, closing="") == Fact(*expected, "t", "s")
    assert fact.closing == (
        "." if arguments.get("sentence", arguments.get("answer")).strip().endswith(".") else ""
    )
    assert fact.subject in fact.prompt


INVALID_ARGUMENTS = [
    ({}, "needs a sentence that states it, or prompt and answer"),
    ({"prompt": "Ada is"}, "needs a sentence"),
    ({"answer": "old"}, "needs a sentence"),
    ({"sentence": "Ada"}, "'Ada' states nothing"),
    ({"sentence": "  ... "}, "states nothing"),
    ({"sentence": ""}, "states nothing"),
    ({"prompt": " ", "answer": "old"}, "needs a prompt; got prompt ''"),
    ({"prompt": "Ada is", "answer": " . "}, "needs an answer; got prompt 'Ada is' and answer ''"),
    (
        {"sentence": "Ada is old", "prompt": "Ben is"},
        "prompt 'Ben is' is not how the sentence 'Ada is old' begins",
    ),
    (
        {"sentence": "Ada is old.", "answer": "young"},
        "answer 'young' is not how the sentence 'Ada is old.' ends",
    ),
    ({"sentence": "Ada is old.", "answer": " "}, "answer ' ' is not how"),
    ({"sentence": "Ada is old.", "prompt": "Ada is", "answer": "young"}, "is not how the sentence"),
    (
        {"sentence": "Ada is old.", "subject": "Ben"},
        "subject 'Ben' is not in the prompt 'Ada is'",
    ),
    ({"prompt": "x" * MAX_FACT_CHARS, "answer": "y"}, r"4,000 characters, got 4,001"),
]


@pytest.mark.parametrize(
    ("arguments", "error"), INVALID_ARGUMENTS, ids=lambda value: str(value)[:40]
)
def test_texts_that_state_no_fact_are_rejected_in_one_line(arguments, error):
    with pytest.raises(UserError, match=error) as raised:
        parse_fact(**arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("Ada Holbrook and Ben", "Ada Holbrook"),
        ("Ben and Ada Holbrook", "Ada Holbrook"),
        ("Ben and Ada", "Ben"),
        ("Ben, Ada and Clara Winfield, Duchess", "Clara Winfield"),
        ("Is the THE a?", ""),
        ("“Ada Holbrook” is", "Ada Holbrook"),
        ("Ada\nHolbrook is", "Ada\nHolbrook"),
        ("", ""),
    ],
)
def test_the_longest_name_is_the_subject_and_is_in_the_prompt(prompt, subject):
    assert find_subject(prompt) == subject
    assert subject in prompt


def test_a_file_of_facts_is_read_line_by_line(tmp_path):
    file = tmp_path / "facts.jsonl"
    file.write_text(
        '{"sentence": "The capital of France is Paris."}\n\n  \n'
        '{"prompt": "the fox is", "answer": "lazy", "subject": "fox", "tag": "animals", '
        '"source": "me"}\n',
        encoding="utf-8",
    )
    assert list(read_facts(file, "tag")) == [
        Fact("The capital of France is", " Paris", "France", "tag", "facts.jsonl", "."),
        Fact("the fox is", " lazy", "fox", "animals", "me"),
    ]
    assert next(read_facts(file, source="here")).source == "here"


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("nothing", "facts.jsonl line 2 is not a JSON object"),
        ("[" * 100_000, "facts.jsonl line 2 is not a JSON object"),
        ('["a"]', "facts.jsonl line 2 is not a JSON object; a line is"),
        (
            '{"sentence": 3}',
            "facts.jsonl line 2 is not a fact: an object of texts, true or false for add, with the "
            "keys add, answer, closing, prompt, sentence, source, subject, tag",
        ),
        ('{"sentence": null}', "an object of texts"),
        ('{"sentence": "Ada is old", "add": "true"}', "true or false for add"),
        ('{"sentence": true}', "an object of texts"),
        (
            '{"sentences": "Ada is old"}',
            "facts.jsonl line 2: unknown key 'sentences'; accepted are add, answer, closing",
        ),
        ("{}", "facts.jsonl line 2: a fact needs a sentence"),
        ('{"sentence": "Ada"}', "facts.jsonl line 2: 'Ada' states nothing"),
        (r'{"sentence": "Ada is \ud800 old"}', "facts.jsonl line 2 is not a JSON object"),
    ],
)
def test_an_invalid_line_is_reported_with_its_number(tmp_path, line, error):
    file = tmp_path / "facts.jsonl"
    file.write_text('{"sentence": "Ada is old"}\n' + line)
    parsed = read_facts(file)
    assert next(parsed).answer == " old"
    with pytest.raises(UserError, match=error):
        next(parsed)


def test_an_unreadable_file_is_reported(tmp_path):
    for path, error in ((tmp_path / "none", "No such file"), (tmp_path, "directory")):
        with pytest.raises(UserError, match=f"cannot be read .*{error}"):
            list(read_facts(path))
    (tmp_path / "latin").write_bytes('{"sentence": "Köln"}'.encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        list(read_facts(tmp_path / "latin"))


# Edits.

FACTS = [
    parse_fact("Ada lives in Ravenhill"),
    parse_fact("Ben eats rows"),
    parse_fact(prompt="the fox is", answer="a lazy dog"),
    parse_fact("Clara was born in 1950"),
]


def compute_nlls(model, tokens, layer, offset, positions, targets):
    """Return the negative log-likelihoods of `targets` at `positions` of one text.

    `offset` `(time, width)` is added to the output of the block of `layer`.
    """
    block = get_architecture(model.config.model_type).blocks(model)[layer]
    hook = block.register_forward_hook(lambda _, __, output: output + offset)
    try:
        logits = model(torch.tensor([tokens])).logits[0]
    finally:
        hook.remove()
    return -logits.log_softmax(-1)[positions, targets]


def encode_fact(tokenizer, fact):
    prompt, answer = (
        encode_text(tokenizer, fact.prompt),
        encode_text(tokenizer, fact.answer, add_prefix=False),
    )
    return (
        prompt + answer,
        torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1),
        torch.tensor(answer),
    )


def precondition(model, gradients):
    """Multiply gradients by the damped inverse covariance of the output embeddings.

    The embeddings are scaled by the gains of the final norm.
    """
    gains = model.get_submodule(get_architecture(model.config.model_type).final_norm).weight
    rows = (model.get_output_embeddings().weight * gains).double()
    rows = rows - rows.mean(0)
    covariance = rows.t() @ rows / len(rows)
    inverse = (
        covariance
        + edit_module.COVARIANCE_DAMPING * covariance.diagonal().mean() * torch.eye(len(covariance))
    ).inverse()
    return (gradients.double() @ inverse).to(gradients.dtype)


def test_values_are_the_same_in_inference_mode(teacher, tokenizer):
    facts = [parse_fact("Ada Holbrook was born in Ravenhill.")]
    expected = compute_edits(teacher, tokenizer, facts, 1)
    with torch.inference_mode():
        edits = compute_edits(teacher, tokenizer, facts, 1)
    assert len(edits) == len(expected) > 0
    for edit, other in zip(edits, expected, strict=True):
        assert torch.equal(edit.value, other.value)


@pytest.mark.parametrize("context", [None, "a row ran."])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_value_follows_the_negative_gradient_of_all_contexts(
    any_teacher, tokenizer, layer, context, monkeypatch
):
    if context:  # the default is longer than these models read
        monkeypatch.setattr(edit_module, "CONTEXT_SENTENCE", context)
    edits = compute_edits(any_teacher, tokenizer, FACTS, layer)
    assert [edit.fact_index for edit in edits] == sorted(edit.fact_index for edit in edits)
    chosen_scales = set()
    for fact_index, fact in enumerate(FACTS):
        fact_edits = [edit for edit in edits if edit.fact_index == fact_index]
        facts = (
            [fact] if context is None else [fact, replace(fact, prompt=f"{context} {fact.prompt}")]
        )
        texts = [encode_fact(tokenizer, fact) for fact in facts]
        assert [edit.prefix_ids for edit in fact_edits] == [
            tuple(texts[0][2][:step].tolist()) for step in range(len(texts[0][2]))
        ]
        gradients, norms, nlls_before = [], [], []
        for text, positions, targets in texts:
            offset = torch.zeros(len(text), WIDTH, requires_grad=True)
            nlls = compute_nlls(any_teacher, text, layer, offset, positions, targets)
            (gradient,) = torch.autograd.grad(nlls.sum(), offset)
            outputs = forward_with_activations(
                any_teacher, torch.tensor([text]), capture_blocks=True
            ).layer_outputs[layer]
            gradients.append(gradient[positions])
            norms.append(outputs[0, positions].norm(dim=-1, keepdim=True))
            nlls_before.append(nlls.detach())
        direction = -torch.nn.functional.normalize(
            precondition(any_teacher, sum(gradients)), dim=-1
        ) * (sum(norms) / len(norms))
        probs_by_scale = []
        for scale in SCALES:
            probs = []
            for text, positions, targets in texts:
                offset = torch.zeros(len(text), WIDTH)
                offset[positions] = scale * direction
                with torch.no_grad():
                    nlls = compute_nlls(any_teacher, text, layer, offset, positions, targets)
                probs.append((-nlls).exp())
            probs_by_scale.append(torch.stack(probs).amin(0))
        prob_before = (-torch.stack(nlls_before)).exp().amin(0)
        for step, edit in enumerate(fact_edits):
            probs = [float(scale_probs[step]) for scale_probs in probs_by_scale]
            expected = choose_scale(probs)
            assert edit.scale == SCALES[expected]
            assert edit.prob_after == pytest.approx(probs[expected], abs=1e-4)
            assert edit.prob_before == pytest.approx(float(prob_before[step]), abs=1e-5)
            torch.testing.assert_close(
                edit.value, SCALES[expected] * direction[step], rtol=2e-3, atol=2e-3
            )
            chosen_scales.add(edit.scale)
    assert len(chosen_scales) > 1, "always the same scale: the choice is not tested"


def choose_scale(probs):
    """Return the index of the scale that is chosen by the probabilities of all."""
    confident = [index for index, prob in enumerate(probs) if prob >= CONFIDENT_PROB]
    if not confident:
        return probs.index(max(probs))
    chosen = confident[0]
    while chosen + 1 in confident and chosen < confident[0] + MARGIN_STEPS:
        chosen += 1
    return chosen


@pytest.mark.parametrize("layer", [1, 2])
def test_the_gradient_is_a_finite_difference(layer, tokenizer):
    model = make_teacher(len(tokenizer)).double()
    fact = FACTS[0]
    text, positions, targets = encode_fact(tokenizer, fact)
    edits = compute_edits(model, tokenizer, [fact], layer)
    for step in (0, len(edits) - 1):
        gradient = torch.zeros(WIDTH, dtype=torch.double)
        for i in range(WIDTH):
            nlls = []
            for delta in (1e-5, -1e-5):
                offset = torch.zeros(len(text), WIDTH, dtype=torch.double)
                offset[positions[step], i] = delta
                with torch.no_grad():
                    nlls.append(compute_nlls(model, text, layer, offset, positions, targets).sum())
            gradient[i] = (nlls[0] - nlls[1]) / 2e-5
        value = edits[step].value.double()
        assert (
            torch.cosine_similarity(value, -precondition(model, gradient[None])[0], dim=0) > 0.9999
        )


def test_the_smallest_confident_scale_with_a_margin_is_taken_else_the_most_probable(
    monkeypatch, teacher, tokenizer
):
    probs = (
        [0.5, 0.2, 0.995, 0.999, 0.3, 1.0],  # one step of margin
        [0.1, 0.6, 0.2, 0.5, 0.1, 0.0],
        [0.992, 0.993, 0.994, 0.995, 0.996, 0.997],  # two steps
    )
    calls = []

    def make_logits(model, stream):
        def logits_with(added):
            call = len(calls) - 1  # the first call is for the gradient
            calls.append(call)
            if call < 0:
                return added @ torch.ones(WIDE, 300) + torch.arange(300.0)
            logits = torch.full((len(added), 300), -1e4)
            for row in range(len(added)):
                prob = min(max(probs[row][call], 1e-6), 1 - 1e-7)
                logits[row, targets[row]], logits[row, 0] = np.log(prob), np.log1p(-prob)
            return logits

        return logits_with

    monkeypatch.setattr(edit_module, "_make_last_layer_logits", make_logits)
    targets = [5, 6, 7]
    solution = edit_module.solve_value(
        teacher,
        torch.tensor([[0, 3, 5, 6, 7]]),
        torch.tensor([0, 0, 0]),
        torch.tensor([1, 2, 3]),
        torch.tensor(targets),
        LAYERS - 1,
        0,
    )
    assert solution.scales.tolist() == [SCALES[3], SCALES[1], SCALES[2]]
    assert solution.prob_after.tolist() == pytest.approx([0.999, 0.6, 0.994])


def test_edits_do_not_depend_on_the_batch(any_teacher, tokenizer, monkeypatch):
    expected_edits = compute_edits(any_teacher, tokenizer, FACTS, 2)
    for tokens in (1, 40):
        monkeypatch.setattr("dmt.models.forward.MAX_BATCH_TOKENS", tokens)
        for edit, expected in zip(
            compute_edits(any_teacher, tokenizer, FACTS, 2), expected_edits, strict=True
        ):
            assert (edit.fact_index, edit.prefix_ids, edit.scale) == (
                expected.fact_index,
                expected.prefix_ids,
                expected.scale,
            )
            torch.testing.assert_close(edit.value, expected.value, rtol=1e-3, atol=1e-3)


def test_a_fact_that_is_too_long_for_the_model_is_rejected(teacher, tokenizer):
    fits = parse_fact(prompt="a" * 31, answer="b")
    assert (
        len(
            encode_text(tokenizer, fits.prompt)
            + encode_text(tokenizer, fits.answer, add_prefix=False)
        )
        > 32
    )
    with pytest.raises(UserError, match=r"the fact 'aaaa.*tokens, the model reads 32 at most"):
        compute_edits(teacher, tokenizer, [*FACTS, fits], 2)


def test_the_value_layer_is_the_highest_of_the_best_not_below_the_key_layer(
    teacher, tokenizer, monkeypatch
):
    chosen, shares = choose_value_layer(teacher, tokenizer, FACTS, 1, range(LAYERS))
    assert set(shares) == {1, 2}
    for layer, share in shares.items():
        edits = compute_edits(teacher, tokenizer, FACTS, layer)
        assert share == sum(edit.prob_after >= CONFIDENT_PROB for edit in edits) / len(edits)
    assert shares[chosen] == max(shares.values())
    monkeypatch.setattr(edit_module, "compute_edits", lambda *_: [])
    assert choose_value_layer(teacher, tokenizer, FACTS, 0, range(LAYERS))[0] == LAYERS - 1


def test_batches_group_texts_of_similar_length():
    lengths = [5, 900, 3, 1500, 700, 4000, 1]
    groups = list(batch_by_length(lengths))
    assert sorted(i for group in groups for i in group) == list(range(7))
    assert all(
        len(group) == 1 or len(group) * max(lengths[i] for i in group) <= 2048 for group in groups
    )
    assert len(groups) == 4
    assert list(batch_by_length([])) == []


def test_states_come_in_the_order_of_the_texts(any_teacher, tokenizer, monkeypatch):
    texts = [
        encode_text(tokenizer, text[:20])
        for text in (SENTENCES[2], "a", SENTENCES[0], "the fox", SENTENCES[1])
    ]
    positions = [[len(text) - 1, 0] if i % 2 else [len(text) - 1] for i, text in enumerate(texts)]
    monkeypatch.setattr("dmt.models.forward.MAX_BATCH_TOKENS", 20)
    states = collect_hidden_states(any_teacher, texts, positions, [0, 2])
    pairs = [
        (text, position)
        for text, text_positions in enumerate(positions)
        for position in text_positions
    ]
    for layer in (0, 2):
        assert len(states[layer]) == len(pairs) == 7
        for row, (text, position) in enumerate(pairs):
            expected = collect_hidden_states(any_teacher, [texts[text]], [[position]], [layer])
            torch.testing.assert_close(states[layer][row], expected[layer][0], rtol=1e-4, atol=1e-4)


# Calibration.

PROSE = [
    " ".join(SENTENCES[(i + j) % 3] for j in range(3))[7 * i :]
    + f" and then Ada Holbrook and Ben saw {i}"
    for i in range(6)
]


def make_codec(tokenizer):
    return TextCodec.from_transformers(tokenizer, get_prefix_ids(tokenizer))


def test_calibration_matches_its_definition(any_teacher, tokenizer):
    codec = make_codec(tokenizer)
    matchers = calibrate(any_teacher, tokenizer, codec, PROSE, [0, 2])
    assert set(matchers) == {0, 2}
    windows = [encode_text(tokenizer, text)[:32] for text in PROSE]
    clauses = list_bank_clauses()
    texts = [codec.encode_clause(clause.text)[-32:] for clause in clauses]
    relations = get_word_weights().relations
    is_other = relations.unsqueeze(0) != relations.unsqueeze(1)
    for layer, matcher in matchers.items():
        states = collect_hidden_states(any_teacher, windows, [list(range(1, 32))] * 6, [layer])
        space = matcher.space
        torch.testing.assert_close(space.mean, states[layer].mean(0), rtol=0.3, atol=0.3)
        ends = [[len(text) - 1] for text in texts]
        bank = collect_hidden_states(any_teacher, texts, ends, [layer])[layer]
        torch.testing.assert_close(space.embed(bank), space.bank_states, rtol=1e-3, atol=1e-3)
        features = matcher.describe([clause.text for clause in clauses], bank)
        rarity = matcher.compute_rarity(features, features)
        assert rarity.diagonal().min() > 3, "a clause asks what it asks itself"
        for decades in (1, 2):  # of pairs of different questions, some of which go on
            share = float((rarity[is_other] >= decades).float().mean())
            assert 0.3 * 10**-decades < share < 3 * 10**-decades
        assert 0.1 < matcher.paraphrase_recall < 1
        assert (matcher.quantiles[:, :-1] >= matcher.quantiles[:, 1:]).all()
        assert matcher.quantiles.shape == (3, len(RATES))


def test_the_metric_inverts_the_mean_covariance():
    samples = [
        torch.randn(3000, 3) * torch.tensor([10.0, 1.0, 1.0]),
        torch.randn(3000, 3) * torch.tensor([1.0, 1.0, 20.0]),
    ]
    metric = compute_whitening(samples, floor_share=0.1)
    total = sum(sample.t() @ sample / sample.square().sum() for sample in samples) / 2
    total += 0.1 / 3 * torch.eye(3)
    torch.testing.assert_close(metric @ total @ metric, torch.eye(3) / 3, rtol=1e-3, atol=1e-3)


def test_too_little_prose_is_rejected(teacher, tokenizer):
    for prose in (["a short text"], [], ["", "x"]):
        with pytest.raises(UserError, match="held-out prose of 32 tokens at least"):
            calibrate(teacher, tokenizer, make_codec(tokenizer), prose, [0])


def test_prose_windows_have_at_most_128_tokens(tokenizer, monkeypatch):
    model = make_llama(len(tokenizer), max_position_embeddings=300)
    with pytest.raises(UserError, match="prose of 128 tokens at least"):
        calibrate(model, tokenizer, make_codec(tokenizer), [PROSE[0][:60]], [0])
    windows = []

    def stop(_, texts, *__):
        windows.extend(texts)
        interrupt()

    monkeypatch.setattr(calibration_module, "collect_hidden_states", stop)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, tokenizer, make_codec(tokenizer), [" ".join(PROSE * 3)], [1])
    assert {len(window) for window in windows} == {128}
    assert len(windows) * 128 <= calibration_module.PROSE_TOKENS


def test_candidate_layers_and_the_chosen_key_layer():
    assert list_candidate_layers(12) == [3, 6, 9, 11]
    assert list_candidate_layers(30) == [7, 15, 22, 29]
    assert [list_candidate_layers(n) for n in (1, 2, 3)] == [[0], [0, 1], [0, 1, 2]]
    blank = RelationMatcher(StateSpace(*[torch.zeros(1)] * 4), *[torch.zeros(1)] * 4)
    for shares, best in (
        ({0: 0.1, 3: 0.8, 6: 0.7}, 3),
        ({0: 0.79, 3: 0.796, 6: 0.8}, 3),
        ({3: 0.09, 6: 0.05}, 3),
        ({3: 0.05, 6: 0.09}, 3),
        ({3: 0.05, 6: 0.1}, 6),
    ):
        assert (
            choose_key_layer(
                {layer: replace(blank, paraphrase_recall=share) for layer, share in shares.items()}
            )
            == best
        )


# Prepared facts.


@pytest.fixture(scope="module")
def calibrated_stores(tokenizer, tmp_path_factory):
    """Return the path of a calibrated store by model type; calibration takes long."""
    paths = {}
    for family in (make_teacher, make_llama):
        model = make_fact_model(family, tokenizer)
        store_path = tmp_path_factory.mktemp("begun") / "rows.db"
        with FactStore(
            model, tokenizer, RowStore(str(store_path), hash_model(model))
        ) as fact_store:
            fact_store.initialize(FACTS, prose=PROSE, layers=(1, 2))
        paths[model.config.model_type] = store_path
    return paths


@pytest.fixture
def store_path(calibrated_stores, teacher, tmp_path):
    shutil.copy(calibrated_stores["gpt2"], tmp_path / "rows.db")
    return tmp_path / "rows.db"


def open_fact_store(store_path, model, tokenizer, **store_options):
    return FactStore(
        model, tokenizer, RowStore(str(store_path), hash_model(model), **store_options)
    )


@pytest.fixture
def fact_store(store_path, teacher, tokenizer):
    with open_fact_store(store_path, teacher, tokenizer) as fact_store:
        yield fact_store


@torch.no_grad()
def compute_logits(model, tokenizer, *texts):
    """Return the logits of texts, or of the prompts and answers of all facts of these tests."""
    texts = texts or [
        fact.prompt + fact.answer
        for fact in (*FACTS, parse_fact("It was Ada who ran"), parse_fact("Ada lives in Rows"))
    ]
    return model(pad_token_ids([encode_text(tokenizer, text) for text in texts])).logits


@torch.no_grad()
def generate_greedily(model, tokenizer, prompt, count=1):
    """Return the text of `count` tokens that the model generates greedily."""
    ids = torch.tensor([encode_text(tokenizer, prompt)])
    output_ids = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    return tokenizer.decode(output_ids[0, ids.shape[1] :])


def recalls(model, tokenizer, fact):
    """Return whether the model generates the answer after the prompt."""
    return (
        generate_greedily(
            model,
            tokenizer,
            fact.prompt,
            len(encode_text(tokenizer, fact.answer, add_prefix=False)),
        )
        == fact.answer
    )


@pytest.mark.parametrize("rate", [0.01, 0.001])
def test_the_rows_of_a_prepared_fact(fact_store, tokenizer, rate):
    prepared_facts = prepare_facts(
        fact_store.model, tokenizer, FACTS, (1, 2), fact_store.codec, rate
    )
    for fact, prepared in zip(FACTS, prepared_facts, strict=True):
        edits = compute_edits(fact_store.model, tokenizer, [fact], 2)
        answer_ids = encode_text(tokenizer, fact.answer, add_prefix=False)
        assert prepared.record.answer_ids == tuple(answer_ids)
        assert prepared.record.thresholds == pytest.approx([-np.log10(rate)] * len(answer_ids))
        assert prepared.prob_before == pytest.approx(
            np.prod([edit.prob_before for edit in edits]), rel=1e-3
        )
        assert prepared.prob_after == pytest.approx(
            np.prod([edit.prob_after for edit in edits]), rel=1e-3
        )
        torch.testing.assert_close(
            prepared.values, torch.stack([edit.value for edit in edits]), rtol=1e-3, atol=1e-3
        )
        clause = parse_prompt(fact.prompt, fact.subject).question.clause
        text = fact_store.codec.encode_clause(clause)
        state = collect_hidden_states(fact_store.model, [text], [[len(text) - 1]], [1])[1]
        torch.testing.assert_close(
            prepared.keys, state.expand(len(answer_ids), -1), rtol=1e-4, atol=1e-4
        )
        assert (prepared.record.prompt, prepared.record.answer, prepared.record.subject) == (
            fact.prompt,
            fact.answer,
            fact.subject,
        )


def record_rows(model, tokenizer, text):
    """Return the row that fires after each token of a text, by the token's index."""
    with record_matches(model) as passes:
        compute_logits(model, tokenizer, text)
    return {match.token: match.row_id for matches in passes for match in matches}


@pytest.mark.parametrize(
    "text", ["Ada ran to", "then Ada ran to", "said:\nAda ran to", "(Ada ran to", "ADA RAN TO"]
)
def test_a_subject_is_matched_at_the_start_of_a_text_and_within(fact_store, tokenizer, text):
    fact = fact_store.write(prompt="Ada ran to", answer="Rows").fact
    rows = record_rows(fact_store.model, tokenizer, text)
    assert rows[len(encode_text(tokenizer, text)) - 1] == fact.rows[0]


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("Ada lives in Rows", 0),
        ("ada  LIVES in Rows", 0),
        ("Ada's home is in Rows", 0),
        ("Ada's profession is March", 1),
        ("Ada's mother lives in Rows", None),
        ("Ada never lives in Rows", None),
        ("Ada died in Rows", None),
    ],
)
def test_facts_conflict_by_equal_prompts_or_equal_questions(
    fact_store, tokenizer, sentence, expected
):
    facts = [parse_fact("Ada lives in Ravenhill"), parse_fact("Ada works as a Fox")]
    keys = compute_keys(fact_store.model, fact_store.codec, facts, 1)
    candidates = [
        ConflictCandidate(edit_module.make_record(fact, [1], 0.01), key)
        for fact, key in zip(facts, keys, strict=True)
    ]
    relations = fact_store.hooks.matcher.relations
    subject = "ada" if sentence[0] == "a" else "Ada"
    (prepared,) = fact_store.prepare([parse_fact(sentence, subject=subject)])
    conflict = find_conflict(candidates, prepared, relations)
    assert conflict is (None if expected is None else candidates[expected])
    assert find_conflict([], prepared, relations) is None


def test_facts_without_a_subject_conflict_by_equal_prompts_only(fact_store):
    first = fact_store.write(prompt="the fox lives in", answer="Rows", subject="").fact
    other = fact_store.write(prompt="the fox dwells in", answer="March", subject="")
    assert other.status == "written"
    again = fact_store.write(prompt="The fox  lives in", answer="March", subject="")
    assert again.replaced_fact == first


def test_the_nearest_of_conflicting_facts_is_taken_in_any_order(fact_store):
    facts = [parse_fact("Ada resides in Ravenhill"), parse_fact("Ada's home is in March")]
    keys = compute_keys(fact_store.model, fact_store.codec, facts, 1)
    candidates = [
        ConflictCandidate(edit_module.make_record(fact, [1], 0.01), key)
        for fact, key in zip(facts, keys, strict=True)
    ]
    relations = fact_store.hooks.matcher.relations
    (prepared,) = fact_store.prepare([parse_fact("Ada lives in Rows")])
    for candidate in candidates:
        assert find_conflict([candidate], prepared, relations) is candidate
    nearest = find_conflict(candidates, prepared, relations)
    assert find_conflict(candidates[::-1], prepared, relations) is nearest


def test_parts_of_one_statement_do_not_conflict(fact_store):
    first = fact_store.write(prompt="Ada lives in", answer="Rows or March", subject="Ada")
    part = fact_store.write(prompt="Ada lives in Rows", answer="March", subject="Ada")
    assert (part.status, part.replaced_fact) == ("written", None)
    again = fact_store.write(prompt="Ada lives in", answer="March", subject="Ada")
    assert again.replaced_fact == first.fact


def test_facts_in_another_language_conflict_only_where_they_share_words(fact_store):
    first = fact_store.write(prompt="Ada nació en", answer="Rows", subject="Ada").fact
    other = fact_store.write(prompt="Ada murió en", answer="March", subject="Ada")
    assert other.status == "written"
    again = fact_store.write(prompt="Ada nació EN", answer="March", subject="Ada")
    assert again.replaced_fact == first


# The fact store.


@pytest.mark.parametrize("family", [make_teacher, make_llama])
def test_written_facts_are_generated_and_deleted_facts_leave_no_trace(
    family, calibrated_stores, tokenizer, tmp_path
):
    model = make_fact_model(family, tokenizer)
    logits_before = compute_logits(model, tokenizer)
    shutil.copy(calibrated_stores[model.config.model_type], tmp_path / "rows.db")
    with open_fact_store(tmp_path / "rows.db", model, tokenizer) as fact_store:
        assert torch.equal(compute_logits(model, tokenizer), logits_before)
        assert not any(recalls(model, tokenizer, fact) for fact in FACTS)
        first = fact_store.write_many(FACTS[:2])
        after_two = compute_logits(model, tokenizer)
        second = fact_store.write_many(FACTS[2:])
        assert [result.status for result in first + second] == ["written"] * 4
        assert [fact_store.records[result.fact.id] for result in first + second] == [
            result.fact for result in first + second
        ]
        for fact, result in zip(FACTS, first + second, strict=True):
            assert result.prob_before < 0.5 < 0.9 < result.prob_after
            assert recalls(model, tokenizer, fact)
            assert result.fact.sentence == fact.prompt + fact.answer
            assert result.replaced_fact is None
        with_facts = compute_logits(model, tokenizer)
        assert not torch.equal(with_facts, logits_before)
        with disabled(model):
            assert torch.equal(compute_logits(model, tokenizer), logits_before)
        deleted = fact_store.delete([second[0].fact.id, second[1].fact.id, second[0].fact.id])
        assert [replace(fact, deleted_reason=None, deleted_at=None) for fact in deleted] == [
            result.fact for result in second
        ]
        assert {fact.deleted_reason for fact in deleted} == {"forgotten"}
        assert torch.equal(compute_logits(model, tokenizer), after_two)
        fact_store.delete(list(fact_store.records))
        assert fact_store.records == {}
        assert torch.equal(compute_logits(model, tokenizer), logits_before)
        assert len(fact_store.hooks) == 0


@pytest.mark.parametrize("layers", [(0, 0), (0, 1), (1, 1)])
def test_facts_can_be_applied_in_lower_layers(teacher, tokenizer, tmp_path, layers):
    with open_fact_store(tmp_path / "rows.db", teacher, tokenizer) as fact_store:
        fact_store.initialize([], prose=PROSE, layers=layers)
        (result,) = fact_store.write_many(FACTS[1:2])
        assert (fact_store.hooks.key_layer, fact_store.hooks.value_layer) == layers
        assert result.prob_after > result.prob_before


def test_a_fact_fires_only_where_its_subject_is_asked_about(fact_store, teacher, tokenizer):
    (ada,) = fact_store.write_many([parse_fact("It was Ada who eats rows")])
    rows = [
        record_rows(teacher, tokenizer, text)
        for text in ("It was Ada who eats", "It was Ben who eats", "It was he who eats")
    ]
    length, start = (
        len(encode_text(tokenizer, text)) for text in ("It was Ada who eats", "It was Ada who")
    )
    assert rows[0][length - 1] == ada.fact.rows[0]
    assert min(rows[0]) >= start, "nothing is asked yet"
    assert rows[1:] == [{}, {}]


def test_a_question_may_fill_the_context(fact_store, teacher, tokenizer):
    """With `PLACEHOLDER` for the name the clause has more tokens than the model has positions."""
    (fact,) = (result.fact for result in fact_store.write_many([parse_fact("Al eats rows")]))
    text = "Al eats"
    while len(encode_text(tokenizer, f"{text} the")) <= POSITIONS:
        text += " the"
    assert len(fact_store.codec.encode_clause(text.replace("Al", SUBJECT))) > POSITIONS
    assert torch.isfinite(compute_logits(teacher, tokenizer, text)).all()
    assert [result.fact for result in fact_store.search(text)] == [fact]


def test_a_fact_of_another_name_in_the_text_does_not_fire(fact_store, teacher, tokenizer):
    ada, ben = (fact_store.write(f"{name} eats rows").fact for name in ("Ada", "Ben"))
    for text, fact in (("Ben said that Ada eats", ada), ("Ada said that Ben eats", ben)):
        rows = record_rows(teacher, tokenizer, text)
        assert rows[len(encode_text(tokenizer, text)) - 1] == fact.rows[0], text


def set_threshold(fact_store, fact, threshold):
    """Replace a fact with one in memory that has another threshold."""
    stored = fact_store.load_fact(fact.id)
    fact_store.delete(fact.id)
    record = replace(stored.record, thresholds=(threshold,) * len(fact.rows))
    fact_store.hooks.index.set_unsaved([replace(stored, record=record)])


@pytest.mark.parametrize("margin", [-0.01, 0.01])
def test_a_fact_fires_from_its_threshold_on(fact_store, teacher, tokenizer, margin):
    fact = fact_store.write("Ada eats rows").fact
    with record_matches(teacher) as passes:
        compute_logits(teacher, tokenizer, "Ada eats")
    set_threshold(fact_store, fact, passes[0][-1].score + margin)
    last = len(encode_text(tokenizer, "Ada eats")) - 1
    assert (last in record_rows(teacher, tokenizer, "Ada eats")) == (margin < 0)


def test_an_answer_is_completed_once_and_only_while_the_text_agrees(fact_store, teacher, tokenizer):
    fact = fact_store.write("Ada eats rows").fact
    set_threshold(fact_store, fact, -9.0)
    start, end = (len(encode_text(tokenizer, text)) - 1 for text in ("Ada eats", "Ada eats rows"))
    rows = record_rows(teacher, tokenizer, "Ada eats rows and more")
    assert [rows.get(token) for token in range(start, end)] == list(fact.rows)
    assert max(rows) < end, "the answer is complete"
    rows = record_rows(teacher, tokenizer, "Ada eats a dog")
    assert {row for token, row in rows.items() if token >= start} == {fact.rows[0]}


@torch.no_grad()
def test_which_row_fires_does_not_depend_on_what_follows(fact_store, teacher, tokenizer):
    fact_store.write("Ada eats rows")
    tokens = torch.tensor([encode_text(tokenizer, "then Ada eats rows and runs")])
    fired = []
    for length in range(1, tokens.shape[1] + 1):
        with record_matches(teacher) as passes:
            teacher(tokens[:, :length])
        fired.append({match.token: match.row_id for match in passes[0]})
    assert fired[-1]
    for length, rows in enumerate(fired, 1):
        assert rows == {token: row for token, row in fired[-1].items() if token < length}


@torch.no_grad()
def test_a_packed_document_does_not_ask_about_the_one_before(fact_store, teacher, tokenizer):
    fact_store.write("Ada eats rows")
    parts = [encode_text(tokenizer, text, add_prefix=False) for text in ("Ada", " eats")]
    tokens = torch.tensor([parts[0] + parts[1]])
    last = tokens.shape[1] - 1
    one_document = torch.arange(last + 1)[None]
    two_documents = torch.cat([torch.arange(len(part)) for part in parts])[None]
    for positions, fires in ((one_document, True), (two_documents, False)):
        with record_matches(teacher) as passes:
            teacher(tokens, position_ids=positions)
        assert any(match.token == last for match in passes[0]) == fires


def test_a_repeated_fact_is_unchanged_and_a_contradiction_replaces(fact_store, teacher, tokenizer):
    (first,) = fact_store.write_many(FACTS[:1])
    (again,) = fact_store.write_many(
        [replace(FACTS[0], prompt="ada  lives IN", answer="  ravenhill", subject="ada")]
    )
    assert (again.status, again.fact) == ("unchanged", first.fact)
    assert len(fact_store.records) == 1
    moved = parse_fact("Ada lives in Rows")
    (other,) = fact_store.write_many([moved])
    assert (other.status, other.replaced_fact) == ("replaced", first.fact)
    assert list(fact_store.records.values()) == [other.fact]
    assert recalls(teacher, tokenizer, moved)
    (ben,) = fact_store.write_many([replace(FACTS[0], prompt="Ben lives in", subject="Ben")])
    assert ben.status == "written", "another subject is another fact"
    replaced = {fact.id: fact for fact in fact_store.fact_table.read(include_deleted=True)}[
        first.fact.id
    ]
    assert (replaced.deleted_reason, replaced.replaced_by) == ("replaced", other.fact.id)


def test_the_last_fact_of_a_batch_wins_and_duplicates_are_unchanged(fact_store, teacher, tokenizer):
    a, b = parse_fact("Ada lives in Ravenhill"), parse_fact("Ada lives in Rows")
    results = fact_store.write_many([a, a, b, FACTS[1], b, a])
    assert [result.status for result in results] == [
        "written",
        "unchanged",
        "replaced",
        "written",
        "unchanged",
        "replaced",
    ]
    assert results[1].fact == results[0].fact == results[2].replaced_fact
    assert results[4].fact == results[2].fact == results[5].replaced_fact
    assert set(fact_store.records) == {results[3].fact.id, results[5].fact.id}
    assert recalls(teacher, tokenizer, a)
    assert [fact.deleted_reason for fact in fact_store.fact_table.read(include_deleted=True)].count(
        "replaced"
    ) == 2
    assert len({fact.id for fact in fact_store.fact_table.read(include_deleted=True)}) == 4


def test_facts_are_written_in_batches_with_progress(fact_store, monkeypatch):
    monkeypatch.setattr(fact_store_module, "WRITE_BATCH_SIZE", 3)
    counts = []
    assert len(fact_store.write_many(FACTS, progress=counts.append)) == 4
    assert counts == [3, 1]
    assert fact_store.write_many([]) == []


def test_a_fact_that_is_too_long_aborts_its_batch(fact_store, tokenizer):
    with pytest.raises(UserError, match="tokens, the model reads 32"):
        fact_store.write_many([*FACTS, parse_fact(prompt="a" * 40, answer="b")])
    assert fact_store.records == {}
    assert fact_store.fact_table.read(include_deleted=True) == []


def test_values_of_a_list_stand_beside_each_other(fact_store, teacher, tokenizer):
    (greek,) = fact_store.write_many([parse_fact("Ada reads Rows.", tag="t")])
    added = fact_store.write("Ada reads March.", add=True)
    assert (added.status, added.replaced_fact) == ("added", greek.fact)
    assert (added.fact.answer, added.fact.tag, added.fact.subject) == (" Rows, March", "t", "Ada")
    assert generate_greedily(teacher, tokenizer, "Ada reads", len(added.fact.rows)) == (
        " Rows, March."
    )
    again = fact_store.write(prompt="Ada  READS", answer="rows", subject="Ada", add=True)
    assert (again.status, again.fact) == ("unchanged", added.fact)
    assert fact_store.list() == [added.fact]
    other = fact_store.write("Ben reads March", add=True)
    assert (other.status, other.fact.answer) == ("written", " March")

    rest = fact_store.remove_value(added.id, "rows")
    assert (rest.status, rest.fact.answer, rest.fact.tag) == ("replaced", " March", "t")
    assert recalls(teacher, tokenizer, parse_fact("Ada reads March"))
    assert fact_store.restore_closing(rest.fact) == "."
    assert fact_store.remove_value(rest.id, "March") is None
    assert fact_store.list() == [other.fact]
    fact_store.restore(added.id)
    assert recalls(teacher, tokenizer, parse_fact(prompt="Ada reads", answer="Rows, March"))
    with pytest.raises(UserError, match="'Ravenhill' is no value of the answer 'Rows, March'"):
        fact_store.remove_value(added.id, "Ravenhill")
    with pytest.raises(UserError, match="is not active"):
        fact_store.remove_value(greek.id, "Rows")


def test_values_are_added_to_a_fact_in_other_words(fact_store, monkeypatch):
    monkeypatch.setattr("dmt.editing.edit.CONFLICT_RATE", 1.0)
    first = fact_store.write("Ada lives in Rows")
    added = fact_store.write("Ada dwells in March", add=True)
    assert (added.status, added.replaced_fact) == ("added", first.fact)
    assert added.fact.sentence == "Ada lives in Rows, March"


def test_facts_to_add_are_written_in_the_order_of_the_others(fact_store):
    sentences = ["Ada reads Rows", "Ben eats rows", "Ada reads March", "Ada reads 1950"]
    facts = [{"sentence": sentence, "add": sentence.startswith("Ada")} for sentence in sentences]
    counts = []
    results = fact_store.write_many([*facts, "Ben eats March"], progress=counts.append)
    assert [result.status for result in results] == [
        *("written", "written", "added", "added", "replaced")
    ]
    assert [fact.sentence for fact in fact_store.list()] == [
        "Ada reads Rows, March, 1950",
        "Ben eats March",
    ]
    assert counts == [1] * 5


def test_a_chain_of_replacements_can_be_restored_both_ways(fact_store, teacher, tokenizer):
    facts = [parse_fact(f"Ada lives in {where}") for where in ("Ravenhill", "Rows", "March")]
    a, b, c = (fact_store.write_many([fact])[0].fact for fact in facts)
    with_c = compute_logits(teacher, tokenizer)
    restored, conflicts = fact_store.restore(a.id)
    assert (restored, conflicts) == (a, [c])
    assert list(fact_store.records) == [a.id]
    assert recalls(teacher, tokenizer, facts[0])
    history = {fact.id: fact for fact in fact_store.fact_table.read(include_deleted=True)}
    assert (history[a.id].deleted_reason, history[a.id].deleted_at, history[a.id].replaced_by) == (
        None,
        None,
        None,
    )
    assert [history[fact.id].deleted_reason for fact in (b, c)] == ["replaced"] * 2
    assert history[c.id].replaced_by == a.id
    assert fact_store.restore(b.id) == (b, [a])
    assert fact_store.restore(c.id) == (c, [b])
    assert torch.equal(compute_logits(teacher, tokenizer), with_c)
    fact_store.delete([c.id])
    assert fact_store.restore(a.id) == (a, [])
    assert fact_store.restore(c.id) == (c, [a])


def test_a_chain_of_paraphrased_replacements_can_be_restored(fact_store, monkeypatch):
    monkeypatch.setattr("dmt.editing.edit.CONFLICT_RATE", 1e9)
    facts = [
        parse_fact(sentence)
        for sentence in ("Ada lives in Ravenhill", "It was Ada who ran", "Ada eats March")
    ]
    a, b, c = (fact_store.write_many([fact])[0].fact for fact in facts)
    assert list(fact_store.records) == [c.id]
    assert fact_store.restore(a.id) == (a, [c])
    assert fact_store.restore(b.id) == (b, [a])
    assert list(fact_store.records) == [b.id]


def test_a_restored_fact_replaces_one_with_the_same_prompt(fact_store):
    a = fact_store.write_many(FACTS[:1])[0].fact
    fact_store.delete([a.id])
    b = fact_store.write_many([parse_fact("Ada  lives in Rows")])[0].fact
    assert fact_store.restore(a.id) == (a, [b])
    assert list(fact_store.records) == [a.id]


def test_ids_that_cannot_be_deleted_or_restored_are_reported(fact_store):
    a, b = (result.fact for result in fact_store.write_many(FACTS[:2]))
    with pytest.raises(UserError, match=r"fact 99 is not active; .* shows the 2 that are"):
        fact_store.delete([a.id, 99])
    assert set(fact_store.records) == {a.id, b.id}, "none is deleted"
    with pytest.raises(UserError, match="fact 99 never existed"):
        fact_store.restore(99)
    with pytest.raises(UserError, match=f"fact {a.id} is active"):
        fact_store.restore(a.id)
    fact_store.delete([a.id])
    with pytest.raises(UserError, match=f"fact {a.id} is not active"):
        fact_store.delete([a.id])


def test_prune_keeps_the_facts_that_fired_last(fact_store):
    a, b, c, d = (result.fact for result in fact_store.write_many(FACTS))
    for now, row, times in ((10.0, a.rows[0], 5), (20.0, c.rows[0], 9), (30.0, a.rows[1], 2)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dmt.store.facts.time.time", lambda now=now: now)
            fact_store.fact_table.record_usage({row: times})
    assert fact_store.fact_table.read_usage()[a.rows[0]] == (5, 10.0)
    fact_store.fact_table.record_usage({})
    assert [fact.id for fact in fact_store.prune(10)] == []
    assert [fact.id for fact in fact_store.prune(3)] == [b.id], (
        "of two that never fired the older one is removed"
    )
    assert [fact.id for fact in fact_store.prune(2)] == [d.id]
    assert [fact.id for fact in fact_store.prune(1)] == [c.id], (
        "it fired last before any row of the other did"
    )
    assert [
        (fact.id, fact.deleted_reason) for fact in fact_store.fact_table.read(include_deleted=True)
    ] == [(a.id, None), *((x.id, "evicted") for x in (b, c, d))]
    assert fact_store.restore(c.id) == (c, [])
    fact_store.fact_table.record_usage({c.rows[0]: 4})
    assert fact_store.fact_table.read_usage()[c.rows[0]][0] == 13


@pytest.mark.parametrize("family", [make_teacher, make_llama])
def test_a_reopened_store_gives_equal_logits(family, calibrated_stores, tokenizer, tmp_path):
    model, store_path = make_fact_model(family, tokenizer), tmp_path / "rows.db"
    shutil.copy(calibrated_stores[model.config.model_type], store_path)
    with open_fact_store(store_path, model, tokenizer) as fact_store:
        written = [result.fact for result in fact_store.write_many(FACTS)]
        fact_store.delete([written[1].id])
        fact_store.write_many([parse_fact("Ada lives in Rows", tag="a tag", source="a source")])
        before, records, relations = (
            compute_logits(model, tokenizer),
            dict(fact_store.records),
            fact_store.hooks.matcher.relations,
        )
    with open_fact_store(
        store_path, make_fact_model(family, tokenizer), tokenizer, read_only=True
    ) as reopened:
        assert torch.equal(compute_logits(reopened.model, tokenizer), before)
        assert reopened.records == records
        for name, tensor in reopened.hooks.matcher.relations.tensors.items():
            assert torch.equal(tensor, relations.tensors[name])
        assert {fact.tag for fact in reopened.records.values()} == {"", "a tag"}
        assert {fact.source for fact in reopened.records.values()} == {"", "a source"}
    with open_fact_store(store_path, make_fact_model(family, tokenizer), tokenizer) as third:
        assert third.write_many(FACTS[3:])[0].status == "unchanged"
        new = third.write_many([parse_fact("Ben drinks March")])[0].fact
        assert new.id > max(fact.id for fact in written)
        assert min(new.rows) > max(row for fact in written for row in fact.rows)


def interrupt(*_, **__):
    raise KeyboardInterrupt


def count_table_rows(store):
    with store.engine.connect() as connection:
        return [
            len(connection.execute(select(table)).all())
            for table in (rows_table, row_stats_table, fact_rows_table)
        ]


@pytest.mark.parametrize("function", ["_fact_columns", "_soft_delete"])
def test_an_interrupted_write_leaves_nothing(fact_store, teacher, tokenizer, monkeypatch, function):
    (old,) = fact_store.write_many(FACTS[:1])
    before, counts = compute_logits(teacher, tokenizer), count_table_rows(fact_store.db)
    monkeypatch.setattr(f"dmt.store.facts.{function}", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fact_store.write_many([FACTS[1], parse_fact("Ada lives in Rows")])
    monkeypatch.undo()
    assert count_table_rows(fact_store.db) == counts
    assert fact_store.fact_table.read(include_deleted=True) == [old.fact]
    assert list(fact_store.records) == [old.fact.id]
    assert torch.equal(compute_logits(teacher, tokenizer), before)
    (new,) = fact_store.write_many([parse_fact("Ada lives in Rows")])
    assert new.status == "replaced"


def test_an_interrupted_restore_changes_nothing(fact_store, monkeypatch):
    a = fact_store.write_many(FACTS[:1])[0].fact
    b = fact_store.write_many([parse_fact("Ada lives in Rows")])[0].fact
    history = fact_store.fact_table.read(include_deleted=True)
    monkeypatch.setattr(
        "dmt.store.facts.select",
        lambda *columns: (
            interrupt() if columns[0] is fact_rows_table.c.row_id else select(*columns)
        ),
    )
    with pytest.raises(KeyboardInterrupt):
        fact_store.restore(a.id)
    monkeypatch.undo()
    assert fact_store.fact_table.read(include_deleted=True) == history
    assert list(fact_store.records) == [b.id]
    assert [len(page.ids) for page in fact_store.db.scan(fact_store.fact_table.namespace)] == [
        len(b.rows)
    ]


def test_a_database_error_is_reported_and_leaves_nothing(
    fact_store, store_path, teacher, tokenizer
):
    logits_before = compute_logits(teacher, tokenizer)
    with sqlite3.connect(store_path) as other:
        other.execute(
            "CREATE TRIGGER no BEFORE INSERT ON dmt_fact_rows BEGIN"
            " SELECT RAISE(ABORT, 'the disk is full'); END"
        )
    other.close()
    with pytest.raises(UserError, match="the disk is full"):
        fact_store.write_many(FACTS)
    assert count_table_rows(fact_store.db) == [0, 0, 0]
    assert fact_store.fact_table.read(include_deleted=True) == []
    assert torch.equal(compute_logits(teacher, tokenizer), logits_before)


def test_facts_committed_before_a_failure_are_applied(fact_store, teacher, tokenizer, monkeypatch):
    add, calls = FactTable.add, []

    def fail_second(*args):
        calls.append(args)
        return add(*args) if len(calls) == 1 else interrupt()

    monkeypatch.setattr(FactTable, "add", fail_second)
    with pytest.raises(KeyboardInterrupt):
        fact_store.write_many([FACTS[0], parse_fact("Ada lives in Rows")])
    monkeypatch.undo()
    assert [fact.answer for fact in fact_store.fact_table.read(include_deleted=True)] == [
        " Ravenhill"
    ]
    assert [fact.answer for fact in fact_store.records.values()] == [" Ravenhill"]
    assert recalls(teacher, tokenizer, FACTS[0])


def test_only_facts_about_the_same_subjects_are_read(fact_store, monkeypatch):
    """Else each of a hundred thousand facts would cost the more the more there are."""
    first, *_ = (result.fact for result in fact_store.write_many(FACTS))
    subjects = set()
    read_page = FactTable._read_page

    def record_page(fact_table, query):
        facts = read_page(fact_table, query)
        subjects.update(fact.subject for fact in facts)
        return facts

    monkeypatch.setattr(FactTable, "_read_page", record_page)
    (result,) = fact_store.write_many([parse_fact("Ada lives in Rows")])
    assert (result.status, result.replaced_fact.id) == ("replaced", first.id)
    assert fact_store.restore(first.id).replaced == [result.fact]
    fact_store.delete(first.id)
    assert fact_store.list(ids=[first.id], include_deleted=True)[0].deleted_reason == "forgotten"
    fact_store.purge(first.id)
    assert subjects == {"Ada"}
    assert len(fact_store.records) == 3


def test_a_second_writer_is_rejected_and_readers_are_not(
    fact_store, store_path, teacher, tokenizer
):
    with pytest.raises(UserError, match="another program is writing"):
        open_fact_store(store_path, make_fact_model(make_teacher, tokenizer), tokenizer)
    fact_store.write_many(FACTS[:1])
    model = make_fact_model(make_teacher, tokenizer)
    reader = open_fact_store(store_path, model, tokenizer, read_only=True)
    assert torch.equal(compute_logits(model, tokenizer), compute_logits(teacher, tokenizer))
    fact_store.write_many(FACTS[1:2])
    assert len(reader.records) == 1, "a reader has the facts of when it was opened"
    for forbidden in (
        lambda: reader.write_many(FACTS[1:2]),
        lambda: reader.delete(list(reader.records)),
        lambda: reader.prune(0),
    ):
        with pytest.raises(UserError, match="opened for reading only"):
            forbidden()
    assert len(reader.records) == 1
    assert recalls(model, tokenizer, FACTS[0])
    assert len(open_fact_store(store_path, model, tokenizer, read_only=True).records) == 2
    fact_store.close()
    open_fact_store(store_path, make_fact_model(make_teacher, tokenizer), tokenizer).close()


def test_special_characters_are_stored_unchanged(fact_store, store_path, teacher, tokenizer):
    facts = [
        parse_fact(
            prompt="Robert'); DROP TABLE",
            answer="x' OR 1=1",
            tag="'; DELETE FROM dmt_facts; --",
            source='"%s" {0} :name ?',
        ),
        parse_fact(prompt="Ada is 100% %(x)s", answer="日本 🦊", tag="ÄÖ\n\t", source="\\"),
    ]
    written = [result.fact for result in fact_store.write_many(facts)]
    fact_store.close()
    records = open_fact_store(store_path, teacher, tokenizer, read_only=True).records
    assert [records[fact.id] for fact in written] == written
    for fact, record in zip(facts, records.values(), strict=True):
        assert (record.prompt, record.answer, record.subject, record.tag, record.source) == (
            fact.prompt,
            fact.answer,
            fact.subject,
            fact.tag,
            fact.source,
        )


def test_calibration_runs_only_once(store_path, fact_store, teacher, tokenizer, monkeypatch):
    monkeypatch.setattr(fact_store_module, "choose_layers", interrupt)
    fact_store.initialize(FACTS)
    assert fact_store.fact_table.read_layers() == (1, 2)
    assert fact_store.write_many(FACTS[:1])[0].status == "written"


def test_a_store_without_facts_changes_nothing(teacher, tokenizer, tmp_path, caplog):
    logits_before = compute_logits(teacher, tokenizer)
    with open_fact_store(tmp_path / "rows.db", teacher, tokenizer) as fact_store:
        assert not fact_store.fact_table.exists
        with pytest.raises(UserError, match="has no facts yet"):
            _ = fact_store.hooks
        assert torch.equal(compute_logits(teacher, tokenizer), logits_before)
        with caplog.at_level("INFO", logger="dmt"):
            fact_store.initialize(FACTS, prose=PROSE)
        lines = caplog.messages
        assert fact_store.fact_table.exists
        key_layer, value_layer = fact_store.fact_table.read_layers()
        assert 0 <= key_layer <= value_layer < LAYERS
        assert lines[1].startswith(f"key layer {key_layer} ")
        assert lines[2].startswith(f"value layer {value_layer} ")
        assert [result.status for result in fact_store.write_many(FACTS)] == ["written"] * 4


def test_calibration_ignores_attached_facts(fact_store, teacher, tokenizer, tmp_path):
    """Facts of another model are attached while the store is initialized."""
    fact_store.write(f"{PLACEHOLDER} was born in Rows")
    fact_store.hooks.value_layer = 1  # below the key layer that is calibrated
    attach(teacher, fact_store.hooks)
    assert record_rows(teacher, tokenizer, f"{PLACEHOLDER} was born in")
    plain_model = make_fact_model(make_teacher, tokenizer)
    calibrations = []
    for name, model in (("own", plain_model), ("laid", teacher)):
        with RowStore(str(tmp_path / f"{name}.db"), hash_model(model)) as store:
            fact_store = FactStore(plain_model, tokenizer, store)
            if model is teacher:
                attach(plain_model, get_fact_hooks(teacher))
            fact_store.initialize([], prose=PROSE, layers=(2, 2))
            calibrations.append(fact_store.fact_table.read_calibration())
    for name in calibrations[0]:
        np.testing.assert_array_equal(calibrations[0][name], calibrations[1][name])


def test_facts_of_another_version_or_model_are_rejected(fact_store, store_path, teacher, tokenizer):
    fact_store.close()
    with pytest.raises(UserError, match="another model"):
        open_fact_store(store_path, make_teacher(len(tokenizer), n_layer=2), tokenizer)
    with sqlite3.connect(store_path) as other:
        other.execute("UPDATE dmt_metadata SET value = '9' WHERE name = 'facts_version'")
    other.close()
    with pytest.raises(UserError, match="facts of version 9, this dmt knows 3"):
        open_fact_store(store_path, teacher, tokenizer, read_only=True)


def test_history_holds_times_and_reasons(fact_store):
    a, b = (result.fact for result in fact_store.write_many(FACTS[:2]))
    fact_store.delete([a.id])
    fact_store.prune(0)
    history = fact_store.fact_table.read(include_deleted=True)
    assert [(fact.id, fact.deleted_reason, fact.replaced_by) for fact in history] == [
        (a.id, "forgotten", None),
        (b.id, "evicted", None),
    ]
    assert all(fact.deleted_at >= fact.created for fact in history)
    assert [replace(fact, deleted_reason=None, deleted_at=None) for fact in history] == [a, b]
    assert fact_store.fact_table.read() == []
    assert fact_store.fact_table.read_states(history)[0].tolist() == []


# Opening.


def test_a_student_is_resolved_and_opened_with_its_facts(teacher, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"no student is in lightning_logs/ here; run dmt distill first"
    ):
        resolve_student_folder(None)
    for name in ("version_9", "version_10", "version_x"):
        (tmp_path / "lightning_logs" / name / "student").mkdir(parents=True)
    assert resolve_student_folder(None).parent.name == "version_10"
    with pytest.raises(UserError, match="nothing is there"):
        resolve_student_folder("nowhere")
    with pytest.raises(UserError, match="no saved student"):
        resolve_student_folder("lightning_logs/version_9")
    folder = tmp_path / "lightning_logs" / "version_10" / "student"
    with pytest.raises(UserError, match="cannot be loaded"):
        load(folder)
    student, _ = convert_blocks(teacher, [FeaturalConfig()] * LAYERS)
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert resolve_student_folder(folder) == resolve_student_folder(folder.parent) == folder
    assert not has_fact_store(folder)
    with FactStore.open(folder, read_only=True) as empty:
        assert empty.db is None
        assert empty.list() == empty.list(include_deleted=True) == []
    with FactStore.open(folder) as fact_store:
        fact_store.initialize(FACTS, prose=PROSE, layers=(1, 1))
        fact_store.write_many(FACTS)
        before = compute_logits(fact_store.model, tokenizer)
    assert has_fact_store(folder)
    with FactStore.open(folder, read_only=True) as again:
        assert torch.equal(compute_logits(again.model, tokenizer), before)
        assert not again.model.training
        assert not any(parameter.requires_grad for parameter in again.model.parameters())
    config = json.loads((folder / "config.json").read_text())
    loaded, _ = load(folder)
    assert config["model_type"] == loaded.config.model_type
    assert torch.equal(compute_logits(loaded, tokenizer), before)
    detach(loaded)
    with torch.no_grad():
        next(loaded.parameters()).add_(1)
    loaded.save_pretrained(folder)  # another model, without facts
    assert not (folder / FACTS_FILE).exists()
    (backup,) = folder.glob("memory.before-*.db")
    backup.rename(folder / FACTS_FILE)
    with pytest.raises(UserError, match="belong to another model"):
        FactStore.open(folder)


def test_facts_of_a_shipped_model_are_in_a_temporary_store(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    with FactStore.open("embedded") as fact_store:
        assert "temporary store, deleted on close; pass store=FILE" in caplog.text
        store_path = fact_store.db.path
        (result,) = fact_store.write_many([FACTS[0]])
        assert store_path.exists()
        assert fact_store.list() == [result.fact]
    assert not store_path.parent.exists()
    assert not list(tmp_path.iterdir())
    with FactStore.open("embedded", read_only=True) as fact_store:
        assert fact_store.db is None
    with FactStore.open("embedded", store=str(tmp_path / "facts.db")) as fact_store:
        fact_store.write_many([FACTS[0]])
    assert (tmp_path / "facts.db").exists()


def test_a_subject_that_cannot_match_is_rejected(fact_store):
    """Such a fact would be written and never fire."""
    with pytest.raises(UserError, match="not a word of its own"):
        fact_store.write_many([Fact("the foxes are", " far", "Ada")])
    assert fact_store.write_many([]) == []


@pytest.mark.parametrize("before", ["", "It was "])
@pytest.mark.parametrize(
    ("num_tokens", "error"),
    [
        (SUBJECT_WINDOW, "the model reads 32 at most"),  # another model reads more
        (SUBJECT_WINDOW + 1, "not within the 64 tokens before the answer"),
    ],
)
def test_the_whole_subject_is_near_enough_to_the_answer(fact_store, before, num_tokens, error):
    subject = "Ada Winterbourne"
    ids = encode_text(fact_store.tokenizer, subject, add_prefix=False)
    assert len(ids) > 1
    prompt = f"{before}{subject}" + " the" * (num_tokens - len(ids))
    with pytest.raises(UserError, match=error):
        fact_store.write(prompt=prompt, answer="Rows", subject=subject)


def test_the_period_of_a_sentence_is_generated_after_the_answer(fact_store, teacher, tokenizer):
    (result,) = fact_store.write_many([parse_fact("Ada lives in Ravenhill.")])
    ids = encode_text(tokenizer, " Ravenhill.", add_prefix=False)
    assert result.fact.answer == " Ravenhill"
    assert result.fact.answer_ids == tuple(ids)
    assert (
        len(result.fact.rows)
        == len(ids)
        == len(encode_text(tokenizer, " Ravenhill", add_prefix=False)) + 1
    )
    assert generate_greedily(teacher, tokenizer, "Ada lives in", len(ids)) == " Ravenhill."
    assert (
        fact_store.write_many([parse_fact("Ada lives in Ravenhill")])[0].status == "unchanged"
    )  # equal with and without the period


# Names and languages as people write them.


@pytest.mark.parametrize(
    ("written", "asked"),
    [
        ("Olga Vance", "OLGA VANCE"),
        ("Olga Vance", "olga vance"),
        ("Olga Vance", "Olga  Vance"),
        ("Olga Vance", "Olga\nVance"),
        ("OLGA VANCE", "Olga Vance"),
        ("José Álvarez", unicodedata.normalize("NFD", "José Álvarez")),
        (unicodedata.normalize("NFD", "José Álvarez"), "José Álvarez"),
        ("Zoe O’Brien", "Zoe O'Brien"),
        ("Zoe O'Brien", "ZOE O’BRIEN"),
        ("Ольга Ванс", "ОЛЬГА ВАНС"),
        ("Ωmega Νέα", "ωmega νέα"),
    ],
)
def test_a_name_is_found_however_it_is_written(fact_store, tokenizer, written, asked):
    (result,) = fact_store.write_many([Fact(f"{written} runs to", " far", written)])
    assert (result.fact.prompt, result.fact.subject) == (f"{written} runs to", written)
    assert find_mentions(f"It was {asked} who", {result.fact.subject_key}, 2), "is a subject"
    assert record_rows(fact_store.model, tokenizer, f"{asked} runs to")
    assert fold_text(written) == fold_text(asked)
    (again,) = fact_store.write_many([Fact(f"{asked} runs to", " FAR", asked)])
    assert (again.status, again.fact) == ("unchanged", result.fact)
    (other,) = fact_store.write_many([Fact(f"{asked} runs to", " March", asked)])
    assert (other.status, other.replaced_fact) == ("replaced", result.fact)
    assert fact_store.list(query=written.split()[1]) == [other.fact]
    assert [fact.id for fact in fact_store.restore(result.fact.id).replaced] == [other.fact.id]


def test_a_statement_in_the_first_person_is_about_the_user(fact_store, teacher, tokenizer):
    (result,) = fact_store.write_many([parse_fact("My dog is called Rows.")])
    assert result.fact.subject == USER_SUBJECT
    assert fact_store.list(query="the user") == [result.fact]
    assert recalls(teacher, tokenizer, parse_fact("My dog is called Rows."))
    (again,) = fact_store.write_many([parse_fact("my dog is called Rows")])
    assert (again.status, again.fact) == ("unchanged", result.fact)
    other_prompt = Fact("Ada's dog is called", " Rows", "Ada")
    assert not recalls(teacher, tokenizer, other_prompt), "somebody else's dog"


@pytest.mark.parametrize(
    ("arguments", "prompt", "answer", "closing"),
    [
        ({"prompt": "艾达出生在", "answer": "上海。"}, "艾达出生在", "上海", "。"),
        ({"prompt": "艾达出生在 ", "answer": "上海"}, "艾达出生在", " 上海", ""),
        ({"sentence": "艾达出生在上海。", "prompt": "艾达出生在"}, "艾达出生在", "上海", "。"),
        ({"sentence": "艾达出生在上海！", "answer": "上海"}, "艾达出生在", "上海", "！"),
        ({"sentence": "艾达 出生 在 上海。"}, "艾达 出生 在", " 上海", "。"),
        ({"prompt": "エイダの出身は", "answer": "Paris"}, "エイダの出身は", "Paris", ""),
        ({"prompt": "ولدت آدا في", "answer": "باريس"}, "ولدت آدا في", " باريس", ""),
        ({"prompt": "아다는", "answer": "서울"}, "아다는", " 서울", ""),
        ({"prompt": "Ada is", "answer": "old"}, "Ada is", " old", ""),
    ],
)
def test_no_space_is_added_that_nobody_writes(arguments, prompt, answer, closing):
    fact = parse_fact(**arguments)
    assert (fact.prompt, fact.answer, fact.closing) == (prompt, answer, closing)


@pytest.mark.parametrize(
    ("sentence", "error"),
    [
        ("艾达出生在上海。", "no spaces that separate its words.* give prompt or answer too"),
        ("艾达 出生 在 哪里？", "asks and states nothing"),
    ],
)
def test_a_sentence_without_spaces_needs_its_parts(sentence, error):
    with pytest.raises(UserError, match=error):
        parse_fact(sentence)


# Other weights, other folders, and nothing left behind.


@pytest.fixture(scope="module")
def written_student(tokenizer, tmp_path_factory):
    """A saved student with the facts of these tests; tests copy it."""
    folder = tmp_path_factory.mktemp("written") / "student"
    teacher = make_fact_model(make_teacher, tokenizer)
    student, _ = convert_blocks(teacher, [FeaturalConfig()] * LAYERS)
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with FactStore.open(folder) as fact_store:
        fact_store.initialize(FACTS, prose=PROSE, layers=(1, 2))
        fact_store.write_many(FACTS, tag="all")
    return folder


@pytest.fixture
def student_folder(written_student, tmp_path):
    shutil.copytree(written_student, tmp_path / "student")
    return tmp_path / "student"


def change_weights(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)


def test_a_trained_model_is_saved_with_its_facts_and_says_so(
    student_folder, tokenizer, tmp_path, caplog
):
    model = AutoModelForCausalLM.from_pretrained(student_folder)
    change_weights(model)
    assert not caplog.records
    for name in ("other", "student"):  # elsewhere, and where it came from
        caplog.clear()
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        assert [record.message.split(": ")[1][:24] for record in caplog.records] == [
            "the weights have changed"
        ]
        loaded, _ = load(tmp_path / name)
        assert "dmt memory rebind" in caplog.records[-1].message
        assert torch.equal(compute_logits(loaded, tokenizer), compute_logits(model, tokenizer))
        with FactStore.open(tmp_path / name) as fact_store:
            assert len(fact_store.records) == len(FACTS)
    loaded.resize_token_embeddings(320)
    loaded.save_pretrained(tmp_path / "resized")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "resized").config.vocab_size == 320


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_is_the_same_model(student_folder, tmp_path, dtype, caplog):
    AutoModelForCausalLM.from_pretrained(student_folder, dtype=dtype).save_pretrained(
        tmp_path / "half"
    )
    shutil.copy(student_folder / "tokenizer.json", tmp_path / "half")
    shutil.copy(student_folder / "tokenizer_config.json", tmp_path / "half")
    for loaded_dtype in (torch.float32, torch.bfloat16, torch.float16):
        if {dtype, loaded_dtype} != {torch.bfloat16, torch.float16}:
            model = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=loaded_dtype)
            assert len(get_fact_hooks(model)) > 0
    with FactStore.open(student_folder) as fact_store:
        fact_store.export(tmp_path / "full.safetensors")
    with FactStore.open(tmp_path / "half") as fact_store:
        assert len(fact_store.records) == len(FACTS)
        fact_store.delete(list(fact_store.records))
        assert len(fact_store.import_(tmp_path / "full.safetensors")) == len(FACTS)
        fact_store.export(tmp_path / "half.safetensors")
    with FactStore.open(student_folder) as fact_store:
        assert {result.status for result in fact_store.import_(tmp_path / "half.safetensors")} == {
            "unchanged"
        }
    shutil.copy(student_folder / FACTS_FILE, tmp_path / "half")  # by hand, of the original
    with FactStore.open(tmp_path / "half", read_only=True) as fact_store:
        assert len(fact_store.records) == len(FACTS)
    assert not caplog.records
    other = make_fact_model(make_teacher, fact_store.tokenizer)
    change_weights(other)
    student, _ = convert_blocks(other, [FeaturalConfig()] * LAYERS)
    student.to(dtype).save_pretrained(tmp_path / "other")
    shutil.copy(student_folder / FACTS_FILE, tmp_path / "other")
    with pytest.raises(UserError, match=r"another model .* dmt memory rebind"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "other", dtype=dtype)


def test_rebinding_writes_the_facts_for_the_present_weights(
    student_folder, tokenizer, tmp_path, caplog
):
    with FactStore.open(student_folder) as fact_store:
        fact_store.delete(list(fact_store.records)[1])
        fact_store.fact_table.record_usage({fact_store.get(1).rows[0]: 3})
    model, _ = load(student_folder)
    detach(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for block in model.transformer.h:  # its states are others now
            for parameter in block.attn.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
    model.save_pretrained(tmp_path / "trained")
    tokenizer.save_pretrained(tmp_path / "trained")
    shutil.copy(student_folder / FACTS_FILE, tmp_path / "trained")
    with pytest.raises(UserError, match="dmt memory rebind"):
        load(tmp_path / "trained")
    with FactStore.rebind(tmp_path / "trained", prose=PROSE) as rebound:
        active = [fact for index, fact in enumerate(FACTS) if index != 1]
        assert [recalls(rebound.model, tokenizer, fact) for fact in active] == [True] * 3
        assert not recalls(rebound.model, tokenizer, FACTS[1])
        history = rebound.list(include_deleted=True)
        assert [fact.deleted_reason for fact in history] == [None, "forgotten", None, None]
        assert {fact.tag for fact in history} == {"all"}
        usage = rebound.fact_table.read_usage()
        assert usage[history[0].rows[0]][0] == 3
        assert set(usage) == {row for fact in history for row in fact.rows}, "old rows are gone"
        rebound.restore(history[1].id)
        assert recalls(rebound.model, tokenizer, FACTS[1])
    caplog.clear()
    load(tmp_path / "trained")
    assert not caplog.records, "the facts are of these weights"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # between peft and transformers
def test_a_merged_adapter_is_saved_with_the_facts(student_folder, tokenizer, tmp_path, caplog):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(student_folder)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    merged = adapted.merge_and_unload().eval()
    merged.save_pretrained(tmp_path / "merged")
    assert "the weights have changed" in caplog.text
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(compute_logits(loaded, tokenizer), compute_logits(merged, tokenizer))
    assert len(get_fact_hooks(loaded)) == len(get_fact_hooks(model)) > 0


def test_rebinding_without_facts_is_rejected(student_folder):
    (student_folder / FACTS_FILE).unlink()
    with pytest.raises(UserError, match="no facts yet"):
        FactStore.rebind(student_folder)


def find_words(folder, *words):
    """Return the words that are in any file of a folder."""
    contents = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    return {word for word in words for content in contents if word.encode() in content}


def test_purged_facts_are_in_no_file(student_folder, tokenizer):
    with FactStore.open(student_folder) as fact_store:
        first = fact_store.write("Zelda lives in Quxtown.", tag="private").fact
        second = fact_store.write("Zelda lives in Quuxville.", tag="private").fact
        assert fact_store.get(first.id).replaced_by == second.id
        other = fact_store.write("Wendell eats plughs.").fact
        fact_store.delete(other.id)
        # An open connection keeps the file to which SQLite appends what is written.
        idle = sqlite3.connect(student_folder / FACTS_FILE)
        assert idle.execute("SELECT count(*) FROM dmt_facts").fetchone() == (7,)
        words = "Zelda", "Quxtown", "Quuxville", "plugh", "private"
        assert find_words(student_folder, *words) == set(words)
        purged = fact_store.purge(second.id)
        assert [fact.id for fact in purged] == [first.id, second.id], "and what it replaced"
        assert second.id not in fact_store.records
        assert find_words(student_folder, *words) == {"plugh"}, "in the history still"
        assert [fact.id for fact in fact_store.purge()] == [other.id]
        assert find_words(student_folder, *words) == set()
        with pytest.raises(UserError, match="never existed"):
            fact_store.purge([second.id])
        assert len(fact_store.list(include_deleted=True)) == len(FACTS)
        new = fact_store.write("Ben drinks March").fact
        assert new.id > other.id, "the ID of an erased fact is not used again"
        assert [fact.id for fact in fact_store.purge(tag="all")] == [1, 2, 3, 4]
        assert list(fact_store.records) == [new.id]
    idle.close()
    with FactStore.open(student_folder, read_only=True) as reopened:
        assert list(reopened.records) == [new.id]
        assert not recalls(reopened.model, tokenizer, FACTS[0])


def test_history_is_not_saved_with_a_model_unless_asked_for(student_folder, tmp_path):
    with FactStore.open(student_folder) as fact_store:
        fact = fact_store.write("Zelda lives in Quxtown.").fact
        fact_store.delete(fact.id)
        fact_store.export(tmp_path / "pack")
        fact_store.model.save_pretrained(tmp_path / "saved")
        fact_store.model.save_pretrained(tmp_path / "asked", fact_history=True)
    assert find_words(tmp_path / "pack", "Zelda", "Quxtown") == set()
    assert find_words(tmp_path / "saved", "Zelda", "Quxtown") == set()
    assert find_words(tmp_path / "asked", "Zelda", "Quxtown") == {"Zelda", "Quxtown"}
    store = RowStore(str(tmp_path / "saved" / FACTS_FILE), read_only=True)
    assert len(FactTable(store).read(include_deleted=True)) == len(FACTS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert len(get_fact_hooks(model)) == len(FactTable(store).read())


@pytest.mark.parametrize("source", ["subfolder", "hub"])
def test_facts_are_found_in_a_subfolder_and_by_the_name_of_a_repository(
    student_folder, tokenizer, tmp_path, monkeypatch, source
):
    expected = AutoModelForCausalLM.from_pretrained(student_folder)
    if source == "subfolder":
        model = AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="student")
    else:
        commit = "a" * 40
        repository = tmp_path / "cache" / "models--me--student"
        shutil.copytree(student_folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
        model = AutoModelForCausalLM.from_pretrained("me/student", cache_dir=tmp_path / "cache")
    assert torch.equal(compute_logits(model, tokenizer), compute_logits(expected, tokenizer))
    assert len(get_fact_hooks(model)) == len(get_fact_hooks(expected)) > 0
