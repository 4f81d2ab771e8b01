"""From a sentence to rows to a book: what is asked, one gradient, how near is near enough, and nothing that cannot be undone."""

import json
import shutil
import sqlite3
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import LAYERS, SENTENCES, WIDTH, make_llama, make_teacher
from sqlalchemy import select
from test_edit_memory import record_passes

from dmt.config import FeaturalConfig
from dmt.editing import calibration as calibration_module
from dmt.editing import edit
from dmt.editing import fact_store as book_module
from dmt.editing.calibration import Calibration, calibrate, choose_key_layer, list_candidate_layers
from dmt.editing.edit import (
    CONFIDENT_PROB,
    LATER_TOKEN_RATE_FACTOR,
    MIN_SUBJECTLESS_THRESHOLD,
    SCALES,
    ConflictCandidate,
    PreparedFact,
    choose_value_layer,
    compute_edits,
    find_conflict,
    normalize_text,
    prepare_facts,
)
from dmt.editing.fact import MAX_FACT_CHARS, Fact, find_subject, parse_fact, read_facts
from dmt.editing.fact_store import FactStore, has_fact_store
from dmt.errors import UserError
from dmt.memory.edit_memory import PhraseMatcher
from dmt.models.architectures import get_architecture
from dmt.models.conversion import convert_blocks
from dmt.models.fact_hooks import FACTS_FILE, attach, detach, disabled, get_fact_hooks
from dmt.models.fingerprint import hash_model
from dmt.models.forward import (
    batch_by_length,
    collect_hidden_states,
    encode_text,
    forward_with_activations,
    pad_token_ids,
)
from dmt.models.loading import load, resolve_student_folder
from dmt.store import RowStore
from dmt.store.database import fact_rows_table, row_stats_table, rows_table
from dmt.store.facts import FactTable

WIDE = 64
"""Width of a model in which a value can point at one token of 300 and at no other."""


def speaker(family, tokenizer):
    """A tiny model whose tokens are equally easy to say, so that what is written can be heard."""
    model = family(len(tokenizer), **{"n_embd" if family is make_teacher else "hidden_size": WIDE})
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings.copy_(6 * torch.nn.functional.normalize(embeddings, dim=-1))
    return model


@pytest.fixture
def teacher(tokenizer):
    return speaker(make_teacher, tokenizer)


# Sentences.

PLAIN = [
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


@pytest.mark.parametrize(("sentence", "prompt", "answer", "subject"), PLAIN)
def test_a_sentence_is_split_into_prompt_answer_and_subject(sentence, prompt, answer, subject):
    assert replace(parse_fact(sentence), closing="") == Fact(prompt, answer, subject)
    assert parse_fact(sentence).closing == (
        sentence.strip()[-1] if sentence.strip()[-1] in ".!" else ""
    )
    assert subject in prompt


PARTS = [
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


@pytest.mark.parametrize(("given", "wanted"), PARTS, ids=lambda each: str(each)[:40])
def test_a_fact_is_made_from_its_parts(given, wanted):
    found = parse_fact(**given, tag="t", source="s")
    assert replace(found, closing="") == Fact(*wanted, "t", "s")
    assert found.closing == (
        "." if given.get("sentence", given.get("answer")).strip().endswith(".") else ""
    )
    assert found.subject in found.prompt


WRONG = [
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


@pytest.mark.parametrize(("given", "error"), WRONG, ids=lambda each: str(each)[:40])
def test_texts_that_state_no_fact_are_refused_in_one_line(given, error):
    with pytest.raises(UserError, match=error) as told:
        parse_fact(**given)
    assert "\n" not in str(told.value)


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
        '{"prompt": "the fox is", "answer": "lazy", "subject": "fox", "tag": "animals", "source": "me"}\n',
        encoding="utf-8",
    )
    assert list(read_facts(file, "told")) == [
        Fact("The capital of France is", " Paris", "France", "told", "facts.jsonl", "."),
        Fact("the fox is", " lazy", "fox", "animals", "me"),
    ]
    assert next(read_facts(file, source="here")).source == "here"


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("nothing", "facts.jsonl:2: not JSON; a line is an object such as"),
        ("[" * 100_000, "facts.jsonl:2: not JSON"),
        (
            '["a"]',
            "facts.jsonl:2: a fact is an object of texts with the keys answer, prompt, sentence, source, subject, tag",
        ),
        ('{"sentence": 3}', "an object of texts"),
        ('{"sentence": null}', "an object of texts"),
        (
            '{"sentences": "Ada is old"}',
            "facts.jsonl:2: unknown key 'sentences'; accepted are answer, prompt",
        ),
        ("{}", "facts.jsonl:2: a fact needs a sentence"),
        ('{"sentence": "Ada"}', "facts.jsonl:2: 'Ada' states nothing"),
        (r'{"sentence": "Ada is \ud800 old"}', "facts.jsonl:2: "),
    ],
)
def test_a_line_that_is_no_fact_is_reported_with_its_number(tmp_path, line, error):
    file = tmp_path / "facts.jsonl"
    file.write_text('{"sentence": "Ada is old"}\n' + line)
    found = read_facts(file)
    assert next(found).answer == " old"
    with pytest.raises(UserError, match=error):
        next(found)


def test_an_unreadable_file_is_reported(tmp_path):
    for place, error in ((tmp_path / "none", "No such file"), (tmp_path, "directory")):
        with pytest.raises(UserError, match=f"cannot be read .*{error}"):
            list(read_facts(place))
    (tmp_path / "latin").write_bytes('{"sentence": "Köln"}'.encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        list(read_facts(tmp_path / "latin"))


# Drafting.

FACTS = [
    parse_fact("Ada lives in Ravenhill"),
    parse_fact("Ben eats rows"),
    parse_fact(prompt="the fox is", answer="a lazy dog"),
    parse_fact("Clara was born in 1950"),
]


def nats_with(model, tokens, layer, added, places, targets):
    """Nats of `targets` at `places` of one text when `added` `(time, width)` is added to what the block of `layer` says."""
    block = get_architecture(model.config.model_type).blocks(model)[layer]
    hook = block.register_forward_hook(lambda _, __, said: said + added)
    try:
        logits = model(torch.tensor([tokens])).logits[0]
    finally:
        hook.remove()
    return -logits.log_softmax(-1)[places, targets]


def drawn_text(tokenizer, fact):
    prompt, answer = (
        encode_text(tokenizer, fact.prompt),
        encode_text(tokenizer, fact.answer, add_prefix=False),
    )
    return (
        prompt + answer,
        torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1),
        torch.tensor(answer),
    )


def evened(model, slopes):
    """Slopes in the metric of the head: the inverse of how its rows vary, with the norm's gains, and a share of it everywhere."""
    gains = model.get_submodule(get_architecture(model.config.model_type).final_norm).weight
    rows = (model.get_output_embeddings().weight * gains).double()
    rows = rows - rows.mean(0)
    varies = rows.t() @ rows / len(rows)
    inverse = (
        varies + edit.COVARIANCE_DAMPING * varies.diagonal().mean() * torch.eye(len(varies))
    ).inverse()
    return (slopes.double() @ inverse).to(slopes.dtype)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_value_follows_the_negative_gradient_with_the_smallest_confident_scale(
    any_teacher, tokenizer, layer
):
    drafts = compute_edits(any_teacher, tokenizer, FACTS, 0, layer)
    assert [each.fact_index for each in drafts] == sorted(each.fact_index for each in drafts)
    scales = set()
    for number, fact in enumerate(FACTS):
        ours = [each for each in drafts if each.fact_index == number]
        text, places, targets = drawn_text(tokenizer, fact)
        assert [each.prefix_ids for each in ours] == [
            tuple(targets[:step].tolist()) for step in range(len(targets))
        ]
        seen = collect_hidden_states(any_teacher, [text], [places.tolist()], range(LAYERS))
        torch.testing.assert_close(
            torch.stack([each.key for each in ours]), seen[0], rtol=1e-4, atol=1e-4
        )
        added = torch.zeros(len(text), WIDTH, requires_grad=True)
        nats = nats_with(any_teacher, text, layer, added, places, targets)
        (slope,) = torch.autograd.grad(nats.sum(), added)
        nats = nats.detach()
        stream = forward_with_activations(
            any_teacher, torch.tensor([text]), capture_blocks=True
        ).layer_outputs[layer][0, places]
        direction = -torch.nn.functional.normalize(
            evened(any_teacher, slope[places]), dim=-1
        ) * stream.norm(dim=-1, keepdim=True)
        likely = []
        for scale in SCALES:
            tried = torch.zeros(len(text), WIDTH)
            tried[places] = scale * direction
            with torch.no_grad():
                likely.append((-nats_with(any_teacher, text, layer, tried, places, targets)).exp())
        for step, each in enumerate(ours):
            chances = [float(tried[step]) for tried in likely]
            sure = [i for i, chance in enumerate(chances) if chance >= CONFIDENT_PROB]
            wanted = sure[0] if sure else chances.index(max(chances))
            assert each.scale == SCALES[wanted]
            assert each.prob_after == pytest.approx(chances[wanted], abs=1e-4)
            assert each.prob_before == pytest.approx(float((-nats[step]).exp()), abs=1e-5)
            torch.testing.assert_close(
                each.value, SCALES[wanted] * direction[step], rtol=2e-3, atol=2e-3
            )
            scales.add(each.scale)
    assert len(scales) > 1, "always the same scale: the choice is not tested"


@pytest.mark.parametrize("layer", [1, 2])
def test_the_gradient_is_a_finite_difference(layer, tokenizer):
    model = make_teacher(len(tokenizer)).double()
    fact = FACTS[0]
    text, places, targets = drawn_text(tokenizer, fact)
    drafts = compute_edits(model, tokenizer, [fact], 1, layer)
    for step in (0, len(drafts) - 1):
        slope = torch.zeros(WIDTH, dtype=torch.double)
        for i in range(WIDTH):
            moved = []
            for way in (1e-5, -1e-5):
                added = torch.zeros(len(text), WIDTH, dtype=torch.double)
                added[places[step], i] = way
                with torch.no_grad():
                    moved.append(nats_with(model, text, layer, added, places, targets).sum())
            slope[i] = (moved[0] - moved[1]) / 2e-5
        found = drafts[step].value.double()
        assert torch.cosine_similarity(found, -evened(model, slope[None])[0], dim=0) > 0.9999


def test_the_smallest_confident_scale_is_taken_else_the_most_probable(
    monkeypatch, teacher, tokenizer
):
    wanted = [0.5, 0.2, 0.995, 0.999, 0.3, 1.0], [0.1, 0.6, 0.2, 0.5, 0.1, 0.0]
    calls = []

    def after_last(model, stream):
        def logits(added):
            at = len(calls) - 1  # the first call is for the gradient
            calls.append(at)
            if at < 0:
                return added @ torch.ones(WIDE, 300) + torch.arange(300.0)
            made = torch.full((len(added), 300), -1e4)
            for place in range(len(added)):
                chance = min(max(wanted[place][at], 1e-6), 1 - 1e-7)
                made[place, targets[place]], made[place, 0] = np.log(chance), np.log1p(-chance)
            return made

        return logits

    monkeypatch.setattr(edit, "_make_last_layer_logits", after_last)
    targets = [5, 6]
    made = edit.solve_value(
        teacher,
        torch.tensor([[0, 3, 5, 6]]),
        torch.tensor([0, 0]),
        torch.tensor([1, 2]),
        torch.tensor(targets),
        LAYERS - 1,
        0,
    )
    assert made.scales.tolist() == [SCALES[2], SCALES[1]]
    assert made.prob_after.tolist() == pytest.approx([0.995, 0.6])


def test_edits_do_not_depend_on_the_batch(any_teacher, tokenizer, monkeypatch):
    together = compute_edits(any_teacher, tokenizer, FACTS, 1, 2)
    for tokens in (1, 40):
        monkeypatch.setattr("dmt.models.forward.MAX_BATCH_TOKENS", tokens)
        for mine, theirs in zip(
            compute_edits(any_teacher, tokenizer, FACTS, 1, 2), together, strict=True
        ):
            assert (mine.fact_index, mine.prefix_ids, mine.scale) == (
                theirs.fact_index,
                theirs.prefix_ids,
                theirs.scale,
            )
            torch.testing.assert_close(mine.value, theirs.value, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(mine.key, theirs.key, rtol=1e-4, atol=1e-4)


def test_a_fact_that_is_too_long_for_the_model_is_refused(teacher, tokenizer):
    fits = parse_fact(prompt="a" * 31, answer="b")
    assert (
        len(
            encode_text(tokenizer, fits.prompt)
            + encode_text(tokenizer, fits.answer, add_prefix=False)
        )
        > 32
    )
    with pytest.raises(UserError, match=r"the fact 'aaaa.*tokens, the model reads 32 at most"):
        compute_edits(teacher, tokenizer, [*FACTS, fits], 1, 2)


def test_the_value_layer_is_the_highest_of_the_best_not_below_the_key_layer(
    teacher, tokenizer, monkeypatch
):
    found, shares = choose_value_layer(teacher, tokenizer, FACTS, 1, range(LAYERS))
    assert set(shares) == {1, 2}
    for layer, share in shares.items():
        drafts = compute_edits(teacher, tokenizer, FACTS, 1, layer)
        assert share == sum(each.prob_after >= CONFIDENT_PROB for each in drafts) / len(drafts)
    assert shares[found] == max(shares.values())
    monkeypatch.setattr(edit, "compute_edits", lambda *_: [])
    assert choose_value_layer(teacher, tokenizer, FACTS, 0, range(LAYERS))[0] == LAYERS - 1


def test_texts_of_like_length_go_together_and_none_is_left_out():
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
    wanted = [[len(text) - 1, 0] if i % 2 else [len(text) - 1] for i, text in enumerate(texts)]
    monkeypatch.setattr("dmt.models.forward.MAX_BATCH_TOKENS", 20)
    found = collect_hidden_states(any_teacher, texts, wanted, [0, 2])
    places = [(text, position) for text, each in enumerate(wanted) for position in each]
    for layer in (0, 2):
        assert len(found[layer]) == len(places) == 7
        for at, (text, position) in enumerate(places):
            alone = collect_hidden_states(any_teacher, [texts[text]], [[position]], [layer])
            torch.testing.assert_close(found[layer][at], alone[layer][0], rtol=1e-4, atol=1e-4)


# Calibration.

PROSE = [
    " ".join(SENTENCES[(i + j) % 3] for j in range(3))[7 * i :]
    + f" and then Ada Holbrook and Ben saw {i}"
    for i in range(6)
]


NOT_APART = torch.tensor(0.0)


@pytest.mark.parametrize(("apart", "lowest"), [(-0.3, 0.5), (0.4, 0.5), (0.57, 0.57), (0.9, 0.65)])
def test_no_row_fires_below_the_cosine_of_different_questions(apart, lowest):
    key = torch.tensor([[1.0, 0.0]])
    known = Calibration(torch.zeros(2), torch.eye(2), -key, -key, torch.tensor(apart))
    assert known.min_threshold == pytest.approx(lowest)
    assert known.thresholds(key, 0.01).tolist() == pytest.approx([lowest])
    assert known.thresholds(key, 0.01, 0.25).tolist() == pytest.approx([0.25])


def test_how_near_two_different_questions_are():
    questions = torch.nn.functional.normalize(torch.randn(6, 3, 2, 5), dim=-1)
    pairs = [
        float(questions[q, a, n] @ questions[p, b, n])
        for n in range(2)
        for a in range(3)
        for b in range(3)
        for q in range(6)
        for p in range(6)
        if q != p
    ]
    assert float(calibration_module._compute_question_cosine_p95(questions)) == pytest.approx(
        float(np.quantile(pairs, 0.95)), abs=1e-5
    )


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.3])
def test_thresholds_keep_the_false_positive_rate_on_unseen_states(rate):
    mean, metric = torch.randn(24), torch.randn(24, 24)
    drawn = torch.randn(4, 4000, 24) @ torch.randn(24, 24) + mean
    half = Calibration(mean, metric, mean, mean, mean)
    known = Calibration(
        mean, metric, half.whiten(drawn[0]), half.whiten(drawn[1]), torch.tensor(0.0)
    )
    keys = torch.randn(50, 24) + mean
    reach = known.thresholds(keys, rate, min_threshold=-1.0)
    for fresh in drawn[2:]:
        false = (half.whiten(keys) @ half.whiten(fresh).t() >= reach[:, None]).float().mean()
        assert 0.6 * rate < false < 1.4 * rate
    lowest, highest = calibration_module.MIN_THRESHOLD, calibration_module.MAX_THRESHOLD
    assert torch.equal(known.thresholds(keys, rate), reach.clamp(lowest, highest))
    assert known.thresholds(known.mean + torch.randn(2, 24), 5.0, -1.0).max() < 0.1, (
        "a rate past one is one"
    )


@pytest.mark.parametrize("crowd", ["prose_negatives", "question_negatives"])
def test_both_prose_and_other_questions_raise_thresholds(crowd):
    mean, metric = torch.zeros(8), torch.eye(8)
    key = torch.nn.functional.normalize(torch.ones(1, 8), dim=-1)
    near, far = key.repeat(200, 1) + 0.3 * torch.randn(200, 8), torch.randn(200, 8)
    known = {
        name: torch.nn.functional.normalize(near if name == crowd else far, dim=-1)
        for name in ("prose_negatives", "question_negatives")
    }
    reach = Calibration(mean, metric, **known, question_cosine_p95=NOT_APART).thresholds(key, 0.1)
    assert reach == pytest.approx(float((known[crowd] @ key[0]).quantile(0.9)))
    assert Calibration(mean, metric, near[:1], key, NOT_APART).thresholds(
        key, 0.01
    ) == pytest.approx(calibration_module.MAX_THRESHOLD)
    assert Calibration(mean, metric, -key, -key, NOT_APART).thresholds(key, 0.01) == pytest.approx(
        calibration_module.MIN_THRESHOLD
    )


def test_thresholds_of_many_rows_are_computed_in_chunks():
    others = torch.nn.functional.normalize(torch.randn(4000, 4), dim=-1)
    known = Calibration(torch.zeros(4), torch.eye(4), others, others[:5], NOT_APART)
    keys = torch.randn(5000, 4)  # twenty million cosines, more than Tensor.quantile takes
    reach = known.thresholds(keys, 0.2, 0.0)
    torch.testing.assert_close(reach[-3:], known.thresholds(keys[-3:], 0.2, 0.0))


def test_calibration_matches_its_definition(any_teacher, tokenizer):
    found = calibrate(any_teacher, tokenizer, PROSE, [0, 2])
    assert set(found) == {0, 2}
    windows = [encode_text(tokenizer, text)[:32] for text in PROSE]
    for layer, known in found.items():
        states = collect_hidden_states(any_teacher, windows, [list(range(1, 32))] * 6, [layer])[
            layer
        ]
        inner = (
            known.metric.double().inverse() @ known.metric.double().inverse() / WIDTH
        )  # what was whitened
        assert torch.linalg.eigvalsh(inner).min() > 0.99 * calibration_module.VARIANCE_FLOOR / WIDTH
        assert torch.trace(inner) == pytest.approx(1 + calibration_module.VARIANCE_FLOOR, rel=1e-3)
        for states_there in (known.prose_negatives, known.question_negatives):
            torch.testing.assert_close(states_there.norm(dim=-1), torch.ones(len(states_there)))
        assert len(known.question_negatives) == 40 * 3 * 5
        assert len(known.prose_negatives) % 24 == 0
        assert 0 <= known.paraphrase_accuracy <= 1
        assert known.mean.shape == (WIDTH,)
        assert torch.cosine_similarity(known.mean, states.mean(0), dim=0) > 0.9
    asked = encode_text(tokenizer, "Portugal was founded in")[-32:]
    alone = collect_hidden_states(any_teacher, [asked], [[len(asked) - 1]], [2])[2]
    torch.testing.assert_close(
        found[2].question_negatives[1], found[2].whiten(alone)[0], rtol=1e-3, atol=1e-3
    )


def test_how_a_question_varies_is_how_it_differs_from_itself_in_other_words():
    questions = torch.randn(4, 3, 2, 5)
    within = calibration_module._compute_paraphrase_deviations(questions).view(4, 3, 2, 5)
    for thing in range(4):
        for name in range(2):
            wanted = questions[thing, :, name] - questions[thing, :, name].mean(0)
            torch.testing.assert_close(within[thing, :, name], wanted)


def test_the_metric_makes_what_varies_most_count_least():
    samples = [
        torch.randn(3000, 3) * torch.tensor([10.0, 1.0, 1.0]),
        torch.randn(3000, 3) * torch.tensor([1.0, 1.0, 20.0]),
    ]
    metric = calibration_module._compute_whitening(samples)
    total = sum(sample.t() @ sample / sample.square().sum() for sample in samples) / 2
    total += calibration_module.VARIANCE_FLOOR / 3 * torch.eye(3)
    torch.testing.assert_close(metric @ total @ metric, torch.eye(3) / 3, rtol=1e-3, atol=1e-3)


def test_a_question_in_other_words_is_heard_only_where_states_tell(teacher, tokenizer):
    things, prose = torch.randn(40, 1, 1, 32), torch.randn(500, 32)
    told_apart = things + 0.05 * torch.randn(40, 3, 5, 32)
    assert (
        calibration_module._measure_paraphrase_accuracy(prose, torch.zeros(32), told_apart) > 0.99
    )
    assert (
        calibration_module._measure_paraphrase_accuracy(
            prose, torch.zeros(32), torch.randn(40, 3, 5, 32)
        )
        < 0.15
    )


def test_too_little_prose_is_refused(teacher, tokenizer):
    for prose in (["a short text"], [], ["", "x"]):
        with pytest.raises(UserError, match="held-out prose of 32 tokens at least"):
            calibrate(teacher, tokenizer, prose, [0])
    short_names = "saw Bartholomew Featherstonehaugh Wolverhampton Throckmorton"  # too short with another name
    with pytest.raises(UserError, match="held-out prose"):
        calibrate(teacher, tokenizer, [short_names], [0])


def test_prose_windows_have_at_most_128_tokens(tokenizer):
    model = make_llama(len(tokenizer), max_position_embeddings=300)
    with pytest.raises(UserError, match="prose of 128 tokens at least"):
        calibrate(model, tokenizer, [PROSE[0][:60]], [0])
    found = calibrate(model, tokenizer, [" ".join(PROSE)], [1])
    assert len(found[1].prose_negatives) % (128 - 8) == 0


def test_candidate_layers_and_the_chosen_key_layer():
    assert list_candidate_layers(12) == [3, 6, 9, 11]
    assert list_candidate_layers(30) == [7, 15, 22, 29]
    assert [list_candidate_layers(n) for n in (1, 2, 3)] == [[0], [0, 1], [0, 1, 2]]
    blank = Calibration(*[torch.zeros(1)] * 5)
    for shares, best in (
        ({0: 0.1, 3: 0.8, 6: 0.7}, 3),
        ({3: 0.29, 6: 0.1}, 3),
        ({3: 0.1, 6: 0.29}, 3),
        ({3: 0.1, 6: 0.3}, 6),
    ):
        assert (
            choose_key_layer(
                {
                    layer: replace(blank, paraphrase_accuracy=share)
                    for layer, share in shares.items()
                }
            )
            == best
        )


# Lines.


@pytest.fixture(scope="module")
def begun(tokenizer, tmp_path_factory):
    """For each family the file of a store in which a book has been begun: calibration takes long enough to do it once."""
    places = {}
    for family in (make_teacher, make_llama):
        model = speaker(family, tokenizer)
        place = tmp_path_factory.mktemp("begun") / "rows.db"
        with FactStore(model, tokenizer, RowStore(str(place), hash_model(model))) as book:
            book.initialize(FACTS, prose=PROSE, layers=(1, 2))
        places[model.config.model_type] = place
    return places


@pytest.fixture
def place(begun, teacher, tmp_path):
    shutil.copy(begun["gpt2"], tmp_path / "rows.db")
    return tmp_path / "rows.db"


def opened(place, model, tokenizer, **how):
    return FactStore(model, tokenizer, RowStore(str(place), hash_model(model), **how))


@pytest.fixture
def book(place, teacher, tokenizer):
    with opened(place, teacher, tokenizer) as made:
        yield made


@torch.no_grad()
def logits_of(model, tokenizer, *texts):
    """What a model says to all that any of the facts here is asked with."""
    texts = texts or [
        fact.prompt + fact.answer
        for fact in (*FACTS, parse_fact("It was Ada who ran"), parse_fact("Ada lives in Rows"))
    ]
    return model(pad_token_ids([encode_text(tokenizer, text) for text in texts])).logits


@torch.no_grad()
def says(model, tokenizer, prompt, count=1):
    """What a model says next, greedily, of as many tokens."""
    ids = torch.tensor([encode_text(tokenizer, prompt)])
    said = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    return tokenizer.decode(said[0, ids.shape[1] :])


def repeats(model, tokenizer, fact):
    """Whether the model, asked, says just this."""
    return (
        says(
            model,
            tokenizer,
            fact.prompt,
            len(encode_text(tokenizer, fact.answer, add_prefix=False)),
        )
        == fact.answer
    )


def test_thresholds_of_the_rows_of_a_fact(book, tokenizer):
    lines = prepare_facts(book.model, tokenizer, FACTS, (1, 2), book.calibration, 0.01)
    for fact, line in zip(FACTS, lines, strict=True):
        drafts = compute_edits(book.model, tokenizer, [fact], 1, 2)
        first, led = (
            book.calibration.thresholds(line.keys, 0.01),
            book.calibration.thresholds(line.keys, LATER_TOKEN_RATE_FACTOR * 0.01, 0.25),
        )
        wanted = torch.cat([first[:1], led[1:]])
        wanted = wanted if fact.subject else wanted.clamp_min(MIN_SUBJECTLESS_THRESHOLD)
        assert line.record.thresholds == pytest.approx(wanted.tolist(), abs=1e-5)
        assert line.record.answer_ids == tuple(
            encode_text(tokenizer, fact.answer, add_prefix=False)
        )
        assert line.prob_before == pytest.approx(
            np.prod([each.prob_before for each in drafts]), rel=1e-3
        )
        assert line.prob_after == pytest.approx(
            np.prod([each.prob_after for each in drafts]), rel=1e-3
        )
        torch.testing.assert_close(line.whitened_key, book.calibration.whiten(line.keys[:1])[0])
        assert (line.record.prompt, line.record.answer, line.record.subject) == (
            fact.prompt,
            fact.answer,
            fact.subject,
        )
    assert lines[2].record.subject_ids == ()


def test_a_subject_is_known_at_the_start_of_a_sentence_and_within(book, tokenizer):
    (line,) = prepare_facts(
        book.model, tokenizer, [parse_fact("It was Ada who ran")], (1, 2), book.calibration, 0.01
    )
    ways = line.record.subject_ids
    assert set(ways) == {
        tuple(encode_text(tokenizer, way, add_prefix=False)) for way in ("Ada", " Ada")
    }
    for text in ("Ada ran", "then Ada ran", "said:\nAda", "(Ada)"):
        assert len(
            PhraseMatcher(ways).find_ends(torch.tensor([encode_text(tokenizer, text)]))[0]
        ), text


def line_of(prompt, subject, asks):
    told = replace(blank_told(), prompt=prompt, subject=subject)
    return PreparedFact(told, torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor(asks), 0, 0)


def blank_told():
    from test_edit_memory import make_record

    return make_record()


@pytest.mark.parametrize(
    ("prompt", "subject", "asks", "same"),
    [
        ("Ada lives in", "Ada", [0.0, 1.0], 0),
        ("ada  LIVES in ", "Ada", [0.0, 1.0], 0),
        ("Ada dwells in", "Ada", [0.1, 0.995], 1),
        ("Ada dwells in", "Ada", [0.95, 0.3], 0),
        ("Ada dwells in", "Ada", [0.7, 0.7], None),
        ("Ada dwells in", "", [0.1, 0.995], None),
    ],
)
def test_two_facts_say_the_same_thing_in_the_same_words_or_in_nearly_the_same_state(
    prompt, subject, asks, same
):
    entries = [
        ConflictCandidate("Ada lives in", "x", torch.tensor([1.0, 0.0]), None),
        ConflictCandidate("Ada eats", "x", torch.tensor([0.0, 1.0]), None),
    ]
    found = find_conflict(entries, line_of(prompt, subject, asks))
    assert found is (None if same is None else entries[same])
    assert find_conflict([], line_of(prompt, subject, asks)) is None
    assert normalize_text("  A\nb  C ") == "a b c"


# The book.


@pytest.mark.parametrize("family", [make_teacher, make_llama])
def test_written_facts_are_generated_and_deleted_facts_leave_no_trace(
    family, begun, tokenizer, tmp_path
):
    model = speaker(family, tokenizer)
    own = logits_of(model, tokenizer)
    shutil.copy(begun[model.config.model_type], tmp_path / "rows.db")
    with opened(tmp_path / "rows.db", model, tokenizer) as book:
        assert torch.equal(logits_of(model, tokenizer), own)
        assert not any(repeats(model, tokenizer, fact) for fact in FACTS)
        first = book.write_many(FACTS[:2])
        after_two = logits_of(model, tokenizer)
        second = book.write_many(FACTS[2:])
        assert [each.status for each in first + second] == ["written"] * 4
        assert [book.records[each.fact.id] for each in first + second] == [
            each.fact for each in first + second
        ]
        for fact, outcome in zip(FACTS, first + second, strict=True):
            assert outcome.prob_before < 0.5 < 0.9 < outcome.prob_after
            assert repeats(model, tokenizer, fact)
            assert outcome.fact.sentence == fact.prompt + fact.answer
            assert outcome.replaced_fact is None
        with_facts = logits_of(model, tokenizer)
        assert not torch.equal(with_facts, own)
        with disabled(model):
            assert torch.equal(logits_of(model, tokenizer), own)
        gone = book.delete([second[0].fact.id, second[1].fact.id, second[0].fact.id])
        assert [replace(fact, deleted_reason=None, deleted_at=None) for fact in gone] == [
            each.fact for each in second
        ]
        assert {fact.deleted_reason for fact in gone} == {"forgotten"}
        assert torch.equal(logits_of(model, tokenizer), after_two)
        book.delete(list(book.records))
        assert book.records == {}
        assert torch.equal(logits_of(model, tokenizer), own)
        assert len(book.hooks) == 0


@pytest.mark.parametrize("layers", [(0, 0), (0, 1), (1, 1)])
def test_facts_can_be_applied_in_lower_layers(teacher, tokenizer, tmp_path, layers):
    with opened(tmp_path / "rows.db", teacher, tokenizer) as book:
        book.initialize([], prose=PROSE, layers=layers)
        (outcome,) = book.write_many(FACTS[1:2])
        assert (book.hooks.key_layer, book.hooks.value_layer) == layers
        assert outcome.prob_after > outcome.prob_before


def test_a_fact_fires_only_where_its_subject_occurs(book, teacher, tokenizer):
    (ada,) = book.write_many([parse_fact("It was Ada who eats rows")])
    with record_passes(book.hooks) as passes:
        for text in ("It was Ada who eats", "It was Ben who eats", "It was he who eats"):
            logits_of(teacher, tokenizer, text)
    assert [bool(each) for each in passes] == [True, False, False]
    assert set(passes[0].values()) == {ada.fact.rows[0]}
    assert book.find_fact_by_row(ada.fact.rows[0]) == ada.fact


def test_a_repeated_fact_is_unchanged_and_a_contradiction_replaces(book, teacher, tokenizer):
    (first,) = book.write_many(FACTS[:1])
    (again,) = book.write_many(
        [replace(FACTS[0], prompt="Ada LIVES in", answer="  ravenhill", subject="Ada")]
    )
    assert (again.status, again.fact) == ("unchanged", first.fact)
    assert len(book.records) == 1
    moved = parse_fact("Ada lives in Rows")
    (other,) = book.write_many([moved])
    assert (other.status, other.replaced_fact) == ("replaced", first.fact)
    assert list(book.records.values()) == [other.fact]
    assert repeats(teacher, tokenizer, moved)
    (ben,) = book.write_many([replace(FACTS[0], prompt="Ben lives in", subject="Ben")])
    assert ben.status == "written", "of somebody else it is something else"
    gone = {fact.id: fact for fact in book.fact_table.read(include_deleted=True)}[first.fact.id]
    assert (gone.deleted_reason, gone.replaced_by) == ("replaced", other.fact.id)


def test_within_one_batch_the_last_wins_and_the_same_twice_is_once(book, teacher, tokenizer):
    a, b = parse_fact("Ada lives in Ravenhill"), parse_fact("Ada lives in Rows")
    outcomes = book.write_many([a, a, b, FACTS[1], b, a])
    assert [each.status for each in outcomes] == [
        "written",
        "unchanged",
        "replaced",
        "written",
        "unchanged",
        "replaced",
    ]
    assert outcomes[1].fact == outcomes[0].fact == outcomes[2].replaced_fact
    assert outcomes[4].fact == outcomes[2].fact == outcomes[5].replaced_fact
    assert set(book.records) == {outcomes[3].fact.id, outcomes[5].fact.id}
    assert repeats(teacher, tokenizer, a)
    assert [fact.deleted_reason for fact in book.fact_table.read(include_deleted=True)].count(
        "replaced"
    ) == 2
    assert len({fact.id for fact in book.fact_table.read(include_deleted=True)}) == 4


def test_facts_go_in_batches_and_progress_is_told(book, monkeypatch):
    monkeypatch.setattr(book_module, "WRITE_BATCH_SIZE", 3)
    told = []
    assert len(book.write_many(FACTS, progress=told.append)) == 4
    assert told == [3, 1]
    assert book.write_many([]) == []


def test_one_that_is_too_long_keeps_its_batch_out(book, tokenizer):
    with pytest.raises(UserError, match="tokens, the model reads 32"):
        book.write_many([*FACTS, parse_fact(prompt="a" * 40, answer="b")])
    assert book.records == {}
    assert book.fact_table.read(include_deleted=True) == []


def test_a_chain_of_replacements_can_be_restored_both_ways(book, teacher, tokenizer):
    facts = [parse_fact(f"Ada lives in {where}") for where in ("Ravenhill", "Rows", "March")]
    a, b, c = (book.write_many([fact])[0].fact for fact in facts)
    with_c = logits_of(teacher, tokenizer)
    back, against = book.restore(a.id)
    assert (back, against) == (a, [c])
    assert list(book.records) == [a.id]
    assert repeats(teacher, tokenizer, facts[0])
    history = {fact.id: fact for fact in book.fact_table.read(include_deleted=True)}
    assert (history[a.id].deleted_reason, history[a.id].deleted_at, history[a.id].replaced_by) == (
        None,
        None,
        None,
    )
    assert [history[each.id].deleted_reason for each in (b, c)] == ["replaced"] * 2
    assert history[c.id].replaced_by == a.id
    assert book.restore(b.id) == (b, [a])
    assert book.restore(c.id) == (c, [b])
    assert torch.equal(logits_of(teacher, tokenizer), with_c)
    book.delete([c.id])
    assert book.restore(a.id) == (a, [])
    assert book.restore(c.id) == (c, [a])


def test_a_chain_of_paraphrased_replacements_can_be_restored(book, monkeypatch):
    monkeypatch.setattr("dmt.editing.edit.SAME_QUERY_COSINE", -1.0)
    facts = [
        parse_fact(sentence)
        for sentence in ("Ada lives in Ravenhill", "It was Ada who ran", "Ada eats March")
    ]
    a, b, c = (book.write_many([fact])[0].fact for fact in facts)
    assert list(book.records) == [c.id]
    assert book.restore(a.id) == (a, [c])
    assert book.restore(b.id) == (b, [a])
    assert list(book.records) == [b.id]


def test_one_restored_replaces_what_asks_the_same_in_the_same_words(book):
    a = book.write_many(FACTS[:1])[0].fact
    book.delete([a.id])
    b = book.write_many([parse_fact("Ada  lives in Rows")])[0].fact
    assert book.restore(a.id) == (a, [b])
    assert list(book.records) == [a.id]


def test_ids_that_cannot_be_deleted_or_restored_are_reported(book):
    a, b = (each.fact for each in book.write_many(FACTS[:2]))
    with pytest.raises(UserError, match=r"fact 99 is not active; .* shows the 2 that are"):
        book.delete([a.id, 99])
    assert set(book.records) == {a.id, b.id}, "then none is taken out"
    with pytest.raises(UserError, match="fact 99 never existed"):
        book.restore(99)
    with pytest.raises(UserError, match=f"fact {a.id} is active"):
        book.restore(a.id)
    book.delete([a.id])
    with pytest.raises(UserError, match=f"fact {a.id} is not active"):
        book.delete([a.id])


def test_prune_keeps_the_facts_that_fired_last(book):
    a, b, c, d = (each.fact for each in book.write_many(FACTS))
    for now, row, times in ((10.0, a.rows[0], 5), (20.0, c.rows[0], 9), (30.0, a.rows[1], 2)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dmt.store.facts.time.time", lambda now=now: now)
            book.fact_table.record_usage({row: times})
    assert book.fact_table.read_usage()[a.rows[0]] == (5, 10.0)
    book.fact_table.record_usage({})
    assert [fact.id for fact in book.prune(10)] == []
    assert [fact.id for fact in book.prune(3)] == [b.id], (
        "never answered, and older than the other that never did"
    )
    assert [fact.id for fact in book.prune(2)] == [d.id]
    assert [fact.id for fact in book.prune(1)] == [c.id], (
        "its last answer was before the other's, of any of its rows"
    )
    assert [
        (fact.id, fact.deleted_reason) for fact in book.fact_table.read(include_deleted=True)
    ] == [(a.id, None), *((x.id, "evicted") for x in (b, c, d))]
    assert book.restore(c.id) == (c, [])
    book.fact_table.record_usage({c.rows[0]: 4})
    assert book.fact_table.read_usage()[c.rows[0]][0] == 13


@pytest.mark.parametrize("family", [make_teacher, make_llama])
def test_opened_again_it_is_the_same_to_the_bit(family, begun, tokenizer, tmp_path):
    model, place = speaker(family, tokenizer), tmp_path / "rows.db"
    shutil.copy(begun[model.config.model_type], place)
    with opened(place, model, tokenizer) as book:
        written = [each.fact for each in book.write_many(FACTS)]
        book.delete([written[1].id])
        book.write_many([parse_fact("Ada lives in Rows", tag="a tag", source="a source")])
        before, known, calibration = logits_of(model, tokenizer), book.records, book.calibration
    with opened(place, speaker(family, tokenizer), tokenizer, read_only=True) as again:
        assert torch.equal(logits_of(again.model, tokenizer), before)
        assert again.records == known
        for name in (
            "mean",
            "metric",
            "prose_negatives",
            "question_negatives",
            "question_cosine_p95",
        ):
            assert torch.equal(getattr(again.calibration, name), getattr(calibration, name))
        assert {fact.tag for fact in again.records.values()} == {"", "a tag"}
        assert {fact.source for fact in again.records.values()} == {"", "a source"}
    with opened(place, speaker(family, tokenizer), tokenizer) as third:
        assert third.write_many(FACTS[3:])[0].status == "unchanged"
        new = third.write_many([parse_fact("Ben drinks March")])[0].fact
        assert new.id > max(fact.id for fact in written)
        assert min(new.rows) > max(row for fact in written for row in fact.rows)


def stop(*_, **__):
    raise KeyboardInterrupt


def rows_there(store):
    with store.engine.connect() as connection:
        return [
            len(connection.execute(select(table)).all())
            for table in (rows_table, row_stats_table, fact_rows_table)
        ]


@pytest.mark.parametrize("where", ["_fact_columns", "_soft_delete"])
def test_an_interrupted_write_leaves_nothing(book, teacher, tokenizer, monkeypatch, where):
    (old,) = book.write_many(FACTS[:1])
    before, kept = logits_of(teacher, tokenizer), rows_there(book.db)
    monkeypatch.setattr(f"dmt.store.facts.{where}", stop)
    with pytest.raises(KeyboardInterrupt):
        book.write_many([FACTS[1], parse_fact("Ada lives in Rows")])
    monkeypatch.undo()
    assert rows_there(book.db) == kept
    assert book.fact_table.read(include_deleted=True) == [old.fact]
    assert list(book.records) == [old.fact.id]
    assert torch.equal(logits_of(teacher, tokenizer), before)
    (new,) = book.write_many([parse_fact("Ada lives in Rows")])
    assert new.status == "replaced"


def test_an_interrupted_restore_changes_nothing(book, monkeypatch):
    a = book.write_many(FACTS[:1])[0].fact
    b = book.write_many([parse_fact("Ada lives in Rows")])[0].fact
    history = book.fact_table.read(include_deleted=True)
    monkeypatch.setattr(
        "dmt.store.facts.select",
        lambda *what: stop() if what[0] is fact_rows_table.c.row_id else select(*what),
    )
    with pytest.raises(KeyboardInterrupt):
        book.restore(a.id)
    monkeypatch.undo()
    assert book.fact_table.read(include_deleted=True) == history
    assert list(book.records) == [b.id]
    assert [len(page.ids) for page in book.db.scan(book.fact_table.namespace)] == [len(b.rows)]


def test_what_the_database_refuses_is_told_and_leaves_nothing(book, place, teacher, tokenizer):
    own = logits_of(teacher, tokenizer)
    with sqlite3.connect(place) as other:
        other.execute(
            "CREATE TRIGGER no BEFORE INSERT ON dmt_fact_rows BEGIN SELECT RAISE(ABORT, 'the disk is full'); END"
        )
    other.close()
    with pytest.raises(UserError, match="the disk is full"):
        book.write_many(FACTS)
    assert rows_there(book.db) == [0, 0, 0]
    assert book.fact_table.read(include_deleted=True) == []
    assert torch.equal(logits_of(teacher, tokenizer), own)


def test_facts_committed_before_a_failure_are_applied(book, teacher, tokenizer, monkeypatch):
    add, calls = FactTable.add, []

    def once(*given):
        calls.append(given)
        return add(*given) if len(calls) == 1 else stop()

    monkeypatch.setattr(FactTable, "add", once)
    with pytest.raises(KeyboardInterrupt):
        book.write_many([FACTS[0], parse_fact("Ada lives in Rows")])
    monkeypatch.undo()
    assert [fact.answer for fact in book.fact_table.read(include_deleted=True)] == [" Ravenhill"]
    assert [fact.answer for fact in book.records.values()] == [" Ravenhill"]
    assert repeats(teacher, tokenizer, FACTS[0])


def test_a_second_writer_is_refused_and_readers_are_not(book, place, teacher, tokenizer):
    with pytest.raises(UserError, match="another program is writing"):
        opened(place, speaker(make_teacher, tokenizer), tokenizer)
    book.write_many(FACTS[:1])
    model = speaker(make_teacher, tokenizer)
    reader = opened(place, model, tokenizer, read_only=True)
    assert torch.equal(logits_of(model, tokenizer), logits_of(teacher, tokenizer))
    book.write_many(FACTS[1:2])
    assert len(reader.records) == 1, "as it was when it was opened"
    for forbidden in (
        lambda: reader.write_many(FACTS[1:2]),
        lambda: reader.delete(list(reader.records)),
        lambda: reader.prune(0),
    ):
        with pytest.raises(UserError, match="opened for reading only"):
            forbidden()
    assert len(reader.records) == 1
    assert repeats(model, tokenizer, FACTS[0])
    assert len(opened(place, model, tokenizer, read_only=True).records) == 2
    book.close()
    opened(place, speaker(make_teacher, tokenizer), tokenizer).close()


def test_texts_are_texts_whatever_they_look_like(book, place, teacher, tokenizer):
    odd = [
        parse_fact(
            prompt="Robert'); DROP TABLE",
            answer="x' OR 1=1",
            tag="'; DELETE FROM dmt_facts; --",
            source='"%s" {0} :name ?',
        ),
        parse_fact(prompt="Ada is 100% %(x)s", answer="日本 🦊", tag="ÄÖ\n\t", source="\\"),
    ]
    written = [each.fact for each in book.write_many(odd)]
    book.close()
    found = opened(place, teacher, tokenizer, read_only=True).records
    assert [found[fact.id] for fact in written] == written
    for fact, told in zip(odd, found.values(), strict=True):
        assert (told.prompt, told.answer, told.subject, told.tag, told.source) == (
            fact.prompt,
            fact.answer,
            fact.subject,
            fact.tag,
            fact.source,
        )


def test_calibration_runs_only_once(place, book, teacher, tokenizer, monkeypatch):
    monkeypatch.setattr(book_module, "choose_layers", stop)
    book.initialize(FACTS)
    assert book.fact_table.read_layers() == (1, 2)
    assert book.write_many(FACTS[:1])[0].status == "written"


def test_a_store_without_facts_changes_nothing(teacher, tokenizer, tmp_path, caplog):
    own = logits_of(teacher, tokenizer)
    with opened(tmp_path / "rows.db", teacher, tokenizer) as book:
        assert not book.fact_table.exists
        with pytest.raises(UserError, match="has no facts yet"):
            _ = book.hooks
        assert torch.equal(logits_of(teacher, tokenizer), own)
        with caplog.at_level("INFO", logger="dmt"):
            book.initialize(FACTS, prose=PROSE)
        lines = caplog.messages
        assert book.fact_table.exists
        key_layer, value_layer = book.fact_table.read_layers()
        assert 0 <= key_layer <= value_layer < LAYERS
        assert lines[1].startswith(f"key layer {key_layer} ")
        assert lines[2].startswith(f"value layer {value_layer} ")
        assert [each.status for each in book.write_many(FACTS)] == ["written"] * 4


def test_measuring_hears_none_of_what_is_laid_over(book, teacher, tokenizer, tmp_path):
    """Facts of somewhere else speak in a model while its own book is begun."""
    book.write_many(FACTS)
    book.hooks.set_rows(
        [
            replace(part, subject_ids=(), prefix_ids=(), threshold=-2.0)
            for n in book.records
            for part in book.get_rows(n)
        ]
    )
    own = speaker(make_teacher, tokenizer)
    calibrations = []
    for name, model in (("own", own), ("laid", teacher)):
        with RowStore(str(tmp_path / f"{name}.db"), hash_model(model)) as store:
            new = FactStore(own, tokenizer, store)
            if model is teacher:
                attach(own, get_fact_hooks(teacher))
            new.initialize([], prose=PROSE, layers=(2, 2))
            calibrations.append(new.fact_table.read_calibration())
    for name in calibrations[0]:
        np.testing.assert_array_equal(calibrations[0][name], calibrations[1][name])


def test_facts_of_another_version_and_stores_of_another_model_are_refused(
    book, place, teacher, tokenizer
):
    book.close()
    with pytest.raises(UserError, match="another model"):
        opened(place, make_teacher(len(tokenizer), n_layer=2), tokenizer)
    with sqlite3.connect(place) as other:
        other.execute("UPDATE dmt_metadata SET value = '9' WHERE name = 'facts_version'")
    other.close()
    with pytest.raises(UserError, match="facts of version 9, this dmt knows 2"):
        opened(place, teacher, tokenizer, read_only=True)


def test_history_is_kept_with_times_and_causes(book):
    a, b = (each.fact for each in book.write_many(FACTS[:2]))
    book.delete([a.id])
    book.prune(0)
    found = book.fact_table.read(include_deleted=True)
    assert [(fact.id, fact.deleted_reason, fact.replaced_by) for fact in found] == [
        (a.id, "forgotten", None),
        (b.id, "evicted", None),
    ]
    assert all(fact.deleted_at >= fact.created for fact in found)
    assert [replace(fact, deleted_reason=None, deleted_at=None) for fact in found] == [a, b]
    assert book.fact_table.read() == []
    assert book.fact_table.read_states(found)[0].tolist() == []


# Opening.


def test_a_student_and_its_book_are_found_where_a_person_names_them(
    teacher, tokenizer, tmp_path, monkeypatch
):
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
    with FactStore.open(folder) as book:
        book.initialize(FACTS, prose=PROSE, layers=(1, 1))
        book.write_many(FACTS)
        before = logits_of(book.model, tokenizer)
    assert has_fact_store(folder)
    with FactStore.open(folder, read_only=True) as again:
        assert torch.equal(logits_of(again.model, tokenizer), before)
        assert not again.model.training
        assert not any(parameter.requires_grad for parameter in again.model.parameters())
    config = json.loads((folder / "config.json").read_text())
    loaded, _ = load(folder)
    assert config["model_type"] == loaded.config.model_type
    assert torch.equal(logits_of(loaded, tokenizer), before)
    detach(loaded)
    with torch.no_grad():
        next(loaded.parameters()).add_(1)
    loaded.save_pretrained(folder)  # another model now, without facts
    assert not (folder / FACTS_FILE).exists()
    (aside,) = folder.glob("memory.before-*.db")
    aside.rename(folder / FACTS_FILE)
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


def test_a_subject_that_could_not_match_is_refused(book):
    """Such a fact could be written and would never be said."""
    with pytest.raises(UserError, match="not a word of its own"):
        book.write_many([Fact("ada lives in", " far", "Ada")])
    assert book.write_many([]) == []


def test_the_full_stop_that_was_written_is_said_and_no_longer_word_is_made(
    book, teacher, tokenizer
):
    (told,) = book.write_many([parse_fact("Ada lives in Ravenhill.")])
    ids = encode_text(tokenizer, " Ravenhill.", add_prefix=False)
    assert told.fact.answer == " Ravenhill"
    assert told.fact.answer_ids == tuple(ids)
    assert (
        len(told.fact.rows)
        == len(ids)
        == len(encode_text(tokenizer, " Ravenhill", add_prefix=False)) + 1
    )
    assert says(teacher, tokenizer, "Ada lives in", len(ids)) == " Ravenhill."
    assert (
        book.write_many([parse_fact("Ada lives in Ravenhill")])[0].status == "unchanged"
    )  # the same, with or without
