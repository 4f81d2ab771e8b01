"""The edit memory and its hooks: which rows fire, and a model unchanged where none does."""

import math
import random
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import LAYERS, POSITIONS, WIDTH, make_teacher
from transformers import AutoModelForCausalLM, DynamicCache

from dmt.config import AssociativeConfig, DenseConfig, FeaturalConfig
from dmt.errors import UserError
from dmt.memory import AssociativeMemory
from dmt.memory.edit_memory import (
    ANSWER_WINDOW,
    HASH_BASE,
    NO_SUBJECT,
    EditMemory,
    EditRows,
    PhraseMatcher,
    match_phrases,
)
from dmt.models.architectures import get_architecture
from dmt.models.conversion import convert_blocks
from dmt.models.fact_hooks import (
    FACTS_FILE,
    SUBJECT_WINDOW,
    FactHooks,
    FactRow,
    attach,
    detach,
    disabled,
    get_fact_hooks,
    load_facts,
)
from dmt.models.fingerprint import hash_model
from dmt.models.forward import forward_with_activations
from dmt.store import RowStore
from dmt.store.facts import FactTable
from dmt.store.records import FactRecord, StepChanges

END = 0
ALWAYS_FIRES = -2.0  # a threshold below every cosine


def phrase_ends(phrase, tokens):
    """Return the positions at which `phrase` ends, by definition."""
    return [
        t
        for t in range(len(tokens))
        if t + 1 >= len(phrase) and tuple(tokens[t + 1 - len(phrase) : t + 1]) == tuple(phrase)
    ]


def subject_ends(phrase, phrases, tokens):
    """Return the positions at which `way` ends and no longer one of `ways` does."""
    longer = {
        e for other in phrases if len(other) > len(phrase) for e in phrase_ends(other, tokens)
    }
    return [e for e in phrase_ends(phrase, tokens) if e not in longer]


def reference_rows(tokens, cosines, parts, window, end):
    """Return the row that fires at each position of a sequence, or None: the definition.

    `cosines` is `(time, rows)`.
    """
    answers = []
    for t in range(len(tokens)):
        best = None
        for number, part in enumerate(parts):
            age = math.inf
            if part.subject_ids:
                phrases = {phrase for other in parts for phrase in other.subject_ids}
                named = [
                    e
                    for phrase in part.subject_ids
                    for e in subject_ends(phrase, phrases, tokens)
                    if 0 <= t - e < window
                ]
                named = [e for e in named if end not in tokens[e + 1 : t + 1]]
                if not named:
                    continue
                age = t - max(named)
            if part.prefix_ids and t not in phrase_ends(part.prefix_ids, tokens):
                continue
            completed = [
                e
                for e in phrase_ends(part.answer_ids, tokens)
                if 0 <= t - e < ANSWER_WINDOW and end not in tokens[e + 1 : t + 1]
            ]
            if part.answer_ids and completed and not part.prefix_ids:
                continue
            if cosines[t, number] < part.threshold:
                continue
            rank = bool(part.prefix_ids), -age, cosines[t, number]
            if best is None or rank > best[0]:
                best = rank, number
        answers.append(None if best is None else best[1])
    return answers


def random_rows(count, seed, alphabet=5, min_threshold=-0.6, width=WIDTH, scale=8.0):
    """Draw rows whose subjects and prefixes occur often."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def phrase(longest):
        return tuple(rng.randrange(1, alphabet) for _ in range(rng.randint(1, longest)))

    parts = []
    for row in range(count):
        subject = (
            ()
            if rng.random() < 0.3
            else tuple(sorted({phrase(3) for _ in range(rng.randint(1, 2))}))
        )
        prefix = () if rng.random() < 0.5 else phrase(2)
        answer = () if rng.random() < 0.3 else (*prefix, *phrase(2), *phrase(2))
        key, value = torch.randn(2, width, generator=generator)
        parts.append(
            FactRow(
                100 + row,
                key,
                value * scale,
                rng.uniform(min_threshold, 0.7),
                subject,
                prefix,
                answer,
            )
        )
    return parts


def attach_rows(
    model, parts, key_layer=1, value_layer=2, end=END, window=SUBJECT_WINDOW, **options
):
    hooks = FactHooks(EditMemory(WIDTH, **options), key_layer, value_layer, end, window)
    hooks.set_rows(parts)
    attach(model, hooks)
    return hooks


@contextmanager
def record_passes(hooks):
    """Record which rows fire in each pass: a list of `{position: row id}`."""
    passes = []
    with hooks.memory.recording_matches() as log:
        yield passes
    row_ids = hooks.memory.rows.ids
    passes += [
        dict(zip(matches.tokens.tolist(), row_ids[matches.rows].tolist(), strict=True))
        for matches in log
    ]


def few_tokens(batch=3, time=20, alphabet=5, seed=0):
    """Draw token ids of a small alphabet without end tokens, so that phrases occur."""
    return torch.randint(1, alphabet, (batch, time), generator=torch.Generator().manual_seed(seed))


# --- matching of phrases ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_phrases_match_exactly_where_they_end(seed):
    rng = random.Random(seed)
    # Some phrases are equal.
    phrases = [tuple(rng.randrange(3) for _ in range(rng.randint(1, 4))) for _ in range(12)]
    tokens = torch.randint(0, 3, (4, 9))
    expected = {
        (b, t, n)
        for b in range(4)
        for n, phrase in enumerate(phrases)
        for t in phrase_ends(phrase, tokens[b].tolist())
    }
    matches = list(
        zip(*(column.tolist() for column in PhraseMatcher(phrases).find_ends(tokens)), strict=True)
    )
    assert sorted(matches) == sorted(expected)
    assert PhraseMatcher(phrases).max_length == max(map(len, phrases))


def test_phrases_with_equal_hashes_are_distinguished():
    matcher = PhraseMatcher([(HASH_BASE + 4, 3), (4, 4), (4, 4)])
    assert sorted(matcher.find_ends(torch.tensor([[4, 4, 9]]))[2].tolist()) == [1, 2]
    assert matcher.find_ends(torch.tensor([[HASH_BASE + 4, 3]]))[2].tolist() == [0]


def test_short_streams_and_no_phrases_have_no_matches():
    assert [
        len(column) for column in PhraseMatcher([(1, 2, 3)]).find_ends(torch.tensor([[1, 2]]))
    ] == [
        0,
        0,
        0,
    ]
    assert [len(column) for column in PhraseMatcher().find_ends(torch.tensor([[1, 2]]))] == [
        0,
        0,
        0,
    ]
    assert PhraseMatcher().max_length == 0


@pytest.mark.parametrize("new", [12, 5, 1])
@pytest.mark.parametrize("end", [0, None])
def test_subjects_ages_prefixes_and_answers_equal_the_definition(new, end, monkeypatch):
    monkeypatch.setattr("dmt.memory.edit_memory.ANSWER_WINDOW", 3)
    window, time = 4, 12
    phrases, subject_of, prefixes = (
        [(1, 2), (2,), (3, 1), (2,)],
        torch.tensor([0, 0, 1, 2]),
        [(1,), (2, 3)],
    )
    tokens = torch.randint(0, 4, (6, time))
    matches = match_phrases(
        tokens, new, PhraseMatcher(phrases), subject_of, PhraseMatcher(prefixes), window, end
    )
    expected, expected_prefixes, expected_answers = {}, set(), set()
    for b, line in enumerate(tokens.tolist()):
        for t in range(time - new, time):
            position = b * new + t - (time - new)
            for phrase, subject in zip(phrases, subject_of.tolist(), strict=True):
                for e in subject_ends(phrase, phrases, line):
                    if 0 <= t - e < window and (end is None or end not in line[e + 1 : t + 1]):
                        expected[position, subject] = min(
                            t - e, expected.get((position, subject), window)
                        )
            expected_prefixes |= {
                (position, n) for n, prefix in enumerate(prefixes) if t in phrase_ends(prefix, line)
            }
            ends = {
                (n, e)
                for n, prefix in enumerate(prefixes)
                for e in phrase_ends(prefix, line)
                if 0 <= t - e < 3
            }
            expected_answers |= {
                (position, n) for n, e in ends if end is None or end not in line[e + 1 : t + 1]
            }
    matched = list(zip(matches.subject_positions.tolist(), matches.subjects.tolist(), strict=True))
    assert len(matched) == len(set(matched))
    assert dict(zip(matched, matches.subject_ages.tolist(), strict=True)) == expected
    assert (
        set(zip(matches.prefix_positions.tolist(), matches.prefixes.tolist(), strict=True))
        == expected_prefixes
    )
    assert (
        set(zip(matches.answer_positions.tolist(), matches.recent_answers.tolist(), strict=True))
        == expected_answers
    )


# --- which row fires ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("new", [None, 3])
def test_the_row_that_fires_is_the_one_of_the_definition(seed, new):
    window, time, batch = 6, 18, 3
    parts = random_rows(40, seed)
    mean, metric = torch.randn(WIDTH), torch.randn(WIDTH, WIDTH)
    tokens, hidden = torch.randint(0, 5, (batch, time)), torch.randn(batch, time, WIDTH)
    hooks = FactHooks(EditMemory(WIDTH, mean, metric), 0, 0, END, window)
    hooks.set_rows(parts)
    new = new or time
    cache = DynamicCache()
    if new < time:
        hooks.begin_pass(tokens[:, :-new], cache)
        # As attention does, which ends with the keys of the text in the cache.
        keys = torch.zeros(batch, 1, time - new, 2)
        cache.update(keys, keys, 0)
        hooks.end_pass(cache)
    block_output = torch.zeros(batch, new, WIDTH)
    with record_passes(hooks) as passes:
        hooks.begin_pass(tokens[:, -new:], cache if new < time else None)
        hooks.match_rows(hidden[:, -new:])
        output = hooks.add_values(block_output)
        hooks.end_pass(None)
    keys = torch.nn.functional.normalize(
        (torch.stack([part.key for part in parts]) - mean) @ metric, dim=-1
    )
    states = torch.nn.functional.normalize((hidden - mean) @ metric, dim=-1)
    expected = {}
    for b, line in enumerate(tokens.tolist()):
        for t, number in enumerate(
            reference_rows(line, (states[b] @ keys.t()).numpy(), parts, window, END)
        ):
            if number is not None and t >= time - new:
                expected[b * new + t - (time - new)] = number
    assert len(expected) > 5, "hardly any row fires"
    assert passes[0] == {position: parts[number].row_id for position, number in expected.items()}
    for position in range(batch * new):
        value = parts[expected[position]].value if position in expected else torch.zeros(WIDTH)
        assert torch.equal(output.flatten(0, 1)[position], value)
    assert not block_output.any(), "the output of the block is not changed in place"


def test_a_row_below_its_threshold_does_not_block_another_without_a_subject():
    near, far = (
        FactRow(1, torch.tensor([1.0, 0.1]), torch.ones(2), 0.999),
        FactRow(2, torch.tensor([1.0, 1.0]), torch.ones(2), 0.5),
    )
    hooks = FactHooks(EditMemory(2), 0, 0, None)
    hooks.set_rows([near, far])
    with record_passes(hooks) as passes:
        hooks.begin_pass(torch.tensor([[5]]), None)
        hooks.match_rows(torch.tensor([[[1.0, 0.3]]]))
        hooks.add_values(torch.zeros(1, 1, 2))
    assert passes == [{0: 2}]


@pytest.mark.parametrize("pairs", [1, 7])
def test_comparing_pairs_in_chunks_changes_nothing(pairs, monkeypatch):
    parts, tokens, hidden = random_rows(40, 3), few_tokens(), torch.randn(3, 20, WIDTH)
    outputs = []
    for _ in range(2):
        hooks = FactHooks(EditMemory(WIDTH), 0, 0, END)
        hooks.set_rows(parts)
        hooks.begin_pass(tokens, None)
        hooks.match_rows(hidden)
        outputs.append(hooks.add_values(torch.zeros(3, 20, WIDTH)))
        monkeypatch.setattr("dmt.memory.edit_memory.MAX_PAIRS", pairs)
    assert torch.equal(*outputs)
    assert outputs[0].any()


def test_a_row_fires_from_its_threshold_on():
    memory = EditMemory(4)
    absent, ones = torch.tensor([NO_SUBJECT]), torch.ones(1, 4)
    for threshold, count in ((1.0 - 1e-6, 1), (1.0 + 1e-3, 0)):
        memory.set_rows(
            EditRows(
                torch.tensor([7]), ones, ones, torch.tensor([threshold]), absent, absent, absent
            )
        )
        phrases = match_phrases(
            torch.ones(1, 1).long(), 1, PhraseMatcher(), torch.zeros(0).long(), PhraseMatcher(), 4
        )
        assert len(memory.find_matches(3 * torch.ones(1, 4), phrases).tokens) == count
    assert "rows=1" in repr(memory)


# --- hooks on a model ---------------------------------------------------------------------------


def test_the_value_is_added_to_the_output_of_the_value_layer(any_teacher):
    tokens = torch.tensor([[3, 1, 2, 4, 4, 5]])
    before = forward_with_activations(any_teacher, tokens, capture_blocks=True)
    part = FactRow(1, before.block_inputs[1][0, 3], torch.randn(WIDTH), 0.9999, ((1, 2),))
    attach_rows(any_teacher, [part])
    after = forward_with_activations(any_teacher, tokens, capture_blocks=True)
    expected = before.block_outputs[2].clone()
    expected[0, 3] += part.value
    assert torch.equal(after.block_outputs[2], expected)
    detach(any_teacher)
    seen = []
    hook = (
        get_architecture(any_teacher.config.model_type)
        .blocks(any_teacher)[2]
        .register_forward_hook(lambda *args: seen.append(args[2]))
    )
    attach_rows(any_teacher, [part])
    any_teacher(tokens)
    hook.remove()
    assert torch.equal(seen[0], expected), (
        "hooks registered earlier see the output with its facts too"
    )
    for layer in range(LAYERS):
        assert torch.equal(after.block_inputs[layer], before.block_inputs[layer])


def test_rows_match_and_fire_in_the_given_layers(any_teacher):
    tokens = torch.tensor([[3, 1, 2, 4]])
    before = forward_with_activations(any_teacher, tokens, capture_blocks=True)
    for key_layer, value_layer in ((0, 0), (0, 1), (1, 1), (2, 2)):
        part = FactRow(1, before.block_inputs[key_layer][0, 3], torch.ones(WIDTH), 0.9999)
        with record_passes(attach_rows(any_teacher, [part], key_layer, value_layer)) as passes:
            after = forward_with_activations(any_teacher, tokens, capture_blocks=True)
        assert passes == [{3: 1}]
        assert torch.equal(
            after.layer_outputs[value_layer][0, :3], before.layer_outputs[value_layer][0, :3]
        )
        torch.testing.assert_close(
            after.layer_outputs[value_layer][0, 3], before.layer_outputs[value_layer][0, 3] + 1
        )
        for layer in range(value_layer):
            assert torch.equal(after.layer_outputs[layer], before.layer_outputs[layer])
    with pytest.raises(ValueError, match="value_layer must be key_layer"):
        FactHooks(EditMemory(WIDTH), 2, 1, END)


@torch.no_grad()
def test_the_future_never_leaks(any_teacher):
    hooks, tokens = attach_rows(any_teacher, random_rows(40, 0), 0, 1), few_tokens()
    with record_passes(hooks) as passes:
        before = any_teacher(tokens).logits
    assert len(passes[0]) > 20
    for position in range(1, tokens.shape[1]):
        changed = tokens.clone()
        changed[:, position] = (tokens[:, position] + 1) % 5
        after = any_teacher(changed).logits
        assert torch.equal(before[:, :position], after[:, :position])
        assert not torch.equal(before[:, position:], after[:, position:])


@torch.no_grad()
def test_sequences_of_a_batch_are_independent(any_teacher):
    attach_rows(any_teacher, random_rows(40, 1), 0, 1)
    tokens = few_tokens(4)
    changed = tokens.clone()
    changed[1] = tokens[1] % 4 + 1
    together = any_teacher(tokens).logits
    assert torch.equal(together[[0, 2, 3]], any_teacher(changed).logits[[0, 2, 3]])
    for which in ([2], [3, 0], [1, 2, 3]):
        torch.testing.assert_close(
            any_teacher(tokens[which]).logits, together[which], rtol=1e-4, atol=1e-4
        )


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[1] * 20, [9, 11], [3, 1, 7, 9]])
def test_passes_with_a_cache_equal_one_pass(any_teacher, pieces):
    attach_rows(any_teacher, random_rows(40, 2), 0, 1, window=6)
    tokens = few_tokens()
    tokens[1, 7] = tokens[2, 12] = END
    expected, cache, logits = any_teacher(tokens).logits, DynamicCache(), []
    for piece in tokens.split(pieces, dim=1):
        logits.append(any_teacher(piece, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 20
    with disabled(any_teacher):
        assert (any_teacher(tokens).logits - expected).abs().max() > 1


@torch.no_grad()
def test_a_subject_of_an_earlier_pass_matches_within_the_window(any_teacher):
    part = FactRow(1, torch.ones(WIDTH), torch.ones(WIDTH), ALWAYS_FIRES, ((1, 2, 3),), (4, 5, 6))
    hooks = attach_rows(any_teacher, [part], window=10)
    tokens = torch.tensor([[1, 2, 3, 9, 9, 9, 9, 9, 9, 4, 5, 6, 4, 5, 6]])
    for pieces in ([15], [1] * 15, [11, 4], [12, 3]):
        cache = DynamicCache()
        with record_passes(hooks) as passes:
            for piece in tokens.split(pieces, dim=1):
                any_teacher(piece, past_key_values=cache)
        starts = np.cumsum([0, *pieces])
        positions = [
            int(start) + position
            for start, rows in zip(starts, passes, strict=False)
            for position in rows
        ]
        assert positions == [11], "the subject ends at 2; it matches 9 tokens later, not 10"


@torch.no_grad()
def test_cropping_a_cache_removes_its_subjects(any_teacher):
    attach_rows(
        any_teacher, [FactRow(1, torch.ones(WIDTH), 5 * torch.ones(WIDTH), ALWAYS_FIRES, ((1, 2),))]
    )
    cache = DynamicCache()
    any_teacher(torch.tensor([[4, 4, 1, 2, 3]]), past_key_values=cache)
    cache.crop(-3)
    logits = any_teacher(torch.tensor([[6, 7]]), past_key_values=cache).logits
    torch.testing.assert_close(
        logits, any_teacher(torch.tensor([[4, 4, 6, 7]])).logits[:, 2:], rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_text_read_before_the_hooks_were_attached_has_no_matches(any_teacher):
    cache = DynamicCache()
    any_teacher(torch.tensor([[4, 1, 2]]), past_key_values=cache)
    hooks = attach_rows(
        any_teacher, [FactRow(1, torch.ones(WIDTH), torch.ones(WIDTH), ALWAYS_FIRES, ((1, 2),))]
    )
    for piece, expected in (([[3, 3]], {}), ([[1, 2, 3]], {1: 1, 2: 1}), ([[3]], {0: 1})):
        with record_passes(hooks) as passes:
            any_teacher(torch.tensor(piece), past_key_values=cache)
        assert passes == [expected]


GENERATION = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.5, "top_k": 0},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled beams": {"do_sample": True, "num_beams": 2, "top_k": 0},
}


@torch.no_grad()
@pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION)
def test_generation_with_and_without_cache_is_equal(any_teacher, options):
    parts = random_rows(60, 4, alphabet=40, min_threshold=-0.2)
    prompts = few_tokens(3, 10)
    subjects = [
        replace(part, subject_ids=((int(prompts[i % 3, 5]), int(prompts[i % 3, 6])),))
        for i, part in enumerate(parts)
    ]
    attach_rows(any_teacher, subjects, 0, 1, window=15)
    generated = []
    for cached in (True, False):
        torch.manual_seed(7)
        generated.append(
            any_teacher.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                use_cache=cached,
                max_new_tokens=14,
                pad_token_id=0,
                eos_token_id=None,
                **options,
            )
        )
    assert torch.equal(*generated)
    with disabled(any_teacher):
        torch.manual_seed(7)
        plain = any_teacher.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=14,
            pad_token_id=0,
            eos_token_id=None,
            **options,
        )
    assert not torch.equal(generated[0], plain)


@torch.no_grad()
@pytest.mark.parametrize("cached", [True, False])
def test_left_padding_changes_nothing(any_teacher, cached):
    attach_rows(any_teacher, random_rows(40, 5, alphabet=6), 0, 1, window=8)
    prompts = [few_tokens(1, time, seed=time) for time in (4, 10, 7)]
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        "use_cache": cached,
    }
    alone = [
        any_teacher.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[
            0, prompt.shape[1] :
        ]
        for prompt in prompts
    ]
    padded = torch.cat(
        [torch.nn.functional.pad(prompt, (10 - prompt.shape[1], 0)) for prompt in prompts]
    )
    together = any_teacher.generate(padded, attention_mask=(padded != 0).long(), **options)[:, 10:]
    assert torch.equal(torch.stack(alone), together)


@torch.no_grad()
def test_without_rows_or_hooks_the_model_is_unchanged(any_teacher):
    parts, tokens = random_rows(40, 6), few_tokens()
    original = any_teacher(tokens).logits
    state = {name: tensor.clone() for name, tensor in any_teacher.state_dict().items()}
    hooks = attach_rows(any_teacher, parts[:20])
    with_rows = any_teacher(tokens).logits
    hooks.set_rows(parts)
    assert len(hooks) == 40
    assert not torch.equal(any_teacher(tokens).logits, with_rows)
    hooks.set_rows(parts[:20])
    assert torch.equal(any_teacher(tokens).logits, with_rows)
    with disabled(any_teacher):
        assert torch.equal(any_teacher(tokens).logits, original)
        with disabled(any_teacher):
            pass
        assert torch.equal(any_teacher(tokens).logits, original), (
            "an inner block does not end the outer one"
        )
    assert torch.equal(any_teacher(tokens).logits, with_rows)
    hooks.set_rows(())
    assert torch.equal(any_teacher(tokens).logits, original)
    hooks.set_rows(parts)
    detach(any_teacher)
    assert torch.equal(any_teacher(tokens).logits, original)
    assert get_fact_hooks(any_teacher) is None
    detach(any_teacher)
    with disabled(any_teacher):
        assert torch.equal(any_teacher(tokens).logits, original)
    assert state.keys() == any_teacher.state_dict().keys()
    assert all(
        torch.equal(tensor, state[name]) for name, tensor in any_teacher.state_dict().items()
    )


@torch.no_grad()
def test_attaching_again_replaces_the_hooks(teacher):
    parts, tokens = random_rows(40, 7), few_tokens()
    hooks = attach_rows(teacher, parts)
    once = teacher(tokens).logits
    attach(teacher, hooks)
    assert torch.equal(teacher(tokens).logits, once)
    attach_rows(teacher, random_rows(40, 8))
    attach_rows(teacher, parts)
    assert torch.equal(teacher(tokens).logits, once)


@torch.no_grad()
def test_subjects_do_not_match_across_documents(any_teacher):
    part = FactRow(1, torch.ones(WIDTH), torch.ones(WIDTH), ALWAYS_FIRES, ((1, 2),))
    with record_passes(attach_rows(any_teacher, [part])) as passes:
        any_teacher(torch.tensor([[3, 1, 2, 3, END, 3, 1, 2], [1, END, 2, 3, 1, 2, END, END]]))
    assert sorted(passes[0]) == [2, 3, 7, 8 + 5]
    with record_passes(attach_rows(any_teacher, [part], end=None)) as passes:
        any_teacher(torch.tensor([[3, 1, 2, 3, END, 3]]))
    assert sorted(passes[0]) == [2, 3, 4, 5]


@torch.no_grad()
def test_all_end_tokens_of_a_model_are_used(teacher, tmp_path):
    part = FactRow(1, torch.ones(WIDTH), torch.ones(WIDTH), ALWAYS_FIRES, ((1, 2),))
    with record_passes(attach_rows(teacher, [part], end=[7, 9])) as passes:
        teacher(torch.tensor([[1, 2, 3, 7, 3, 1, 2, 9, 3, 0]]))
    assert sorted(passes[0]) == [1, 2, 6]


@torch.no_grad()
def test_of_two_subjects_the_last_one_fires(any_teacher):
    named = (1, ((11, 12),)), (2, ((13,),))
    ada, ben = (
        FactRow(row, torch.randn(WIDTH), torch.ones(WIDTH), ALWAYS_FIRES, subject)
        for row, subject in named
    )
    hooks = attach_rows(any_teacher, [ada, ben])
    for tokens, expected in (
        ([11, 12, 5, 13, 5], [1, 1, 2, 2]),
        ([13, 5, 11, 12, 5], [2, 2, 2, 1, 1]),
        ([11, 12, 13, 11, 5], [1, 2, 2, 2]),
        ([11, 12, 13, 11, 12], [1, 2, 2, 1]),
    ):
        with record_passes(hooks) as passes:
            any_teacher(torch.tensor([tokens]))
        assert list(passes[0].values()) == expected


@torch.no_grad()
def test_the_longest_name_matches(any_teacher):
    york = FactRow(1, torch.randn(WIDTH), torch.ones(WIDTH), ALWAYS_FIRES, ((11, 12),))
    city = replace(york, row_id=2, subject_ids=((11, 12, 13),))
    for parts in ([york, city], [city, york]):
        with record_passes(attach_rows(any_teacher, parts)) as passes:
            any_teacher(torch.tensor([[11, 12, 13, 5]]))
        assert passes == [{1: 1, 2: 2, 3: 2}]


@torch.no_grad()
def test_a_row_with_a_prefix_comes_first_and_needs_it(any_teacher):
    states = forward_with_activations(
        any_teacher, torch.tensor([[1, 2, 6, 7]]), capture_blocks=True
    ).block_inputs[1][0]
    first = FactRow(1, states[2], torch.ones(WIDTH), ALWAYS_FIRES, ((1, 2),))
    second = FactRow(2, -states[2], torch.ones(WIDTH), ALWAYS_FIRES, ((1, 2),), (6,))
    third = FactRow(3, -states[2], torch.ones(WIDTH), ALWAYS_FIRES, (), (6, 7))
    with record_passes(attach_rows(any_teacher, [third, second, first])) as passes:
        any_teacher(torch.tensor([[1, 2, 6, 7]]))
    assert passes == [{1: 1, 2: 2, 3: 3}]


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[24], [1] * 24, [5, 19]])
def test_a_completed_answer_does_not_start_again_within_the_window(any_teacher, pieces):
    first = FactRow(1, torch.ones(WIDTH), torch.ones(WIDTH), ALWAYS_FIRES, ((1, 2),), (), (6, 7))
    hooks = attach_rows(any_teacher, [first, replace(first, row_id=2, prefix_ids=(6,))])
    cache, fired, start = DynamicCache(), {}, 0
    for piece in torch.tensor([[1, 2, 6, 7] + [3] * 20]).split(pieces, dim=1):
        with record_passes(hooks) as passes:
            any_teacher(piece, past_key_values=cache)
        fired |= {start + position: row for position, row in passes[0].items()}
        start += piece.shape[1]
    assert fired == {1: 1, 2: 2} | dict.fromkeys(range(3 + ANSWER_WINDOW, 24), 1)
    with record_passes(hooks) as passes:
        any_teacher(torch.tensor([[1, 2, 6, 7, END, 1, 2, 3]]))
    assert sorted(passes[0]) == [1, 2, 6, 7], "an answer of another document does not count"


def test_a_row_with_a_completed_answer_does_not_block_another():
    completed = FactRow(1, torch.tensor([1.0, 0.1]), torch.ones(2), 0.5, answer_ids=(5,))
    other = FactRow(2, torch.tensor([1.0, 1.0]), torch.ones(2), 0.5, answer_ids=(6,))
    hooks = FactHooks(EditMemory(2), 0, 0, None)
    hooks.set_rows([completed, other])
    with record_passes(hooks) as passes:
        hooks.begin_pass(torch.tensor([[4, 5, 4, 6]]), None)
        hooks.match_rows(torch.tensor([[[1.0, 0.2]] * 4]))
        hooks.add_values(torch.zeros(1, 4, 2))
    assert passes == [{0: 1, 1: 2, 2: 2}]


# --- gradients and other uses of a model --------------------------------------------------------


def gradients(model, tokens, **options):
    model.zero_grad()
    model(tokens, labels=tokens, **options).loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def test_gradients_are_unchanged_where_no_row_fires(any_teacher):
    any_teacher.requires_grad_(True)
    tokens = few_tokens()
    expected = gradients(any_teacher, tokens)
    hooks = attach_rows(
        any_teacher, [replace(part, subject_ids=((200, 201),)) for part in random_rows(20, 9)]
    )
    with record_passes(hooks) as passes:
        actual = gradients(any_teacher, tokens)
    assert passes == [{}]
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_gradients_treat_values_as_constants(any_teacher, checkpointing):
    any_teacher.requires_grad_(True)
    parts, tokens = random_rows(30, 10), few_tokens()
    hooks = attach_rows(any_teacher, parts, 0, 1)
    with record_passes(hooks) as passes:
        any_teacher(tokens)
    detach(any_teacher)
    constant = torch.zeros(3 * 20, WIDTH)
    for position, row in passes[0].items():
        constant[position] = parts[row - 100].value
    block = get_architecture(any_teacher.config.model_type).blocks(any_teacher)[1]
    hook = block.register_forward_hook(lambda _, __, output: output + constant.view_as(output))
    expected = gradients(any_teacher, tokens)
    hook.remove()
    attach(any_teacher, hooks)
    if checkpointing is not None:
        any_teacher.train()
        any_teacher.config.use_cache = False
        for module in any_teacher.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        any_teacher.activation_checkpointing_enable({"use_reentrant": checkpointing})
        any_teacher.enable_input_require_grads()
    actual = gradients(any_teacher, tokens)
    assert expected.keys() == actual.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_similarity_is_in_full_precision_in_a_half_precision_model(any_teacher, dtype):
    mean, metric = torch.randn(WIDTH), torch.randn(WIDTH, WIDTH)
    hooks = attach_rows(
        any_teacher,
        [replace(part, threshold=ALWAYS_FIRES) for part in random_rows(30, 11)],
        mean=mean,
        metric=metric,
    )
    tokens = few_tokens()
    any_teacher.to(dtype)
    with record_passes(hooks) as passes:
        logits = any_teacher(tokens).logits
    assert logits.dtype == dtype
    assert passes[0]
    assert torch.equal(hooks.memory.metric, metric)
    assert torch.equal(hooks.memory.mean, mean)
    any_teacher.float()
    with record_passes(hooks) as passes, torch.autocast("cpu", dtype=torch.bfloat16):
        any_teacher(tokens)
    assert passes[0]


@torch.no_grad()
def test_a_failed_pass_leaves_no_state(any_teacher):
    attach_rows(any_teacher, random_rows(40, 13))
    tokens = few_tokens()
    before = any_teacher(tokens).logits
    with pytest.raises((IndexError, RuntimeError)):
        any_teacher(torch.full((3, 20), 10**6))
    assert torch.equal(any_teacher(tokens).logits, before)


# --- the hash of a model ------------------------------------------------------------------------


def test_the_model_hash_covers_weights_and_activation_but_no_facts(any_teacher):
    expected = hash_model(any_teacher)
    attach_rows(any_teacher, random_rows(5, 14))
    assert hash_model(any_teacher) == expected
    detach(any_teacher)
    name = get_architecture(any_teacher.config.model_type).activation
    activation = getattr(any_teacher.config, name)
    setattr(any_teacher.config, name, "relu")
    assert hash_model(any_teacher) != expected
    setattr(any_teacher.config, name, activation)
    for parameter in any_teacher.parameters():
        with torch.no_grad():
            first = parameter.flatten()[0].clone()
            parameter.view(-1)[0] += 1
            assert hash_model(any_teacher) != expected
            parameter.view(-1)[0] = first
    assert hash_model(any_teacher) == expected
    assert len(expected) == 64


def test_stored_rows_are_not_part_of_the_model_hash(teacher):
    student, _ = convert_blocks(teacher, [AssociativeConfig(), *[DenseConfig()] * 2])
    expected = hash_model(student)
    rows = [tensor for name, tensor in student.state_dict().items() if ".rows." in name]
    assert rows
    (memory,) = (part for part in student.modules() if isinstance(part, AssociativeMemory))
    for name, tensor in (
        ("keys", torch.randn(2, WIDTH)),
        ("values", torch.randn(2, WIDTH)),
        ("ids", torch.arange(2)),
    ):
        setattr(memory.rows, name, tensor)
    assert [
        tensor
        for name, tensor in student.state_dict().items()
        if ".rows." in name and tensor.numel()
    ]
    assert hash_model(student) == expected


# --- saving and loading -------------------------------------------------------------------------


def make_record(answer=(4, 5), subject=((1, 2),), **options):
    return FactRecord(
        0,
        "who is",
        " it",
        "Ada",
        "",
        "",
        1.0,
        subject,
        answer,
        thresholds=tuple([ALWAYS_FIRES] * len(answer)),
        **options,
    )


def store_with_facts(path, model, layers=(1, 2)):
    """Create a store with a fact that always fires after tokens 1 2."""
    store = RowStore(str(path), hash_model(model))
    rng = np.random.default_rng(0)
    tensors = {"mean": rng.normal(size=WIDTH), "metric": rng.normal(size=(WIDTH, WIDTH))}
    FactTable(store).create(
        WIDTH, *layers, {name: array.astype(np.float32) for name, array in tensors.items()}
    )
    keys, values = (rng.normal(size=(2, WIDTH)).astype(np.float32) * 5 for _ in range(2))
    FactTable(store).add([(make_record(), keys, values)])
    return store, keys, values


@torch.no_grad()
def test_facts_saved_beside_a_student_are_loaded_with_it(any_teacher, tmp_path):
    student, _ = convert_blocks(any_teacher, [FeaturalConfig()] * LAYERS)
    student.eval()
    tokens = torch.tensor([[3, 1, 2, 3, 4, 5]])
    original = student(tokens).logits
    store, keys, values = store_with_facts(tmp_path / "elsewhere.db", student)
    store.close()
    load_facts(student, tmp_path / "elsewhere.db")
    with_facts = student(tokens).logits
    hooks = get_fact_hooks(student)
    assert (hooks.key_layer, hooks.value_layer, hooks.eos_ids) == (
        1,
        2,
        student.config.eos_token_id,
    )
    assert torch.equal(hooks.memory.rows.keys, torch.from_numpy(keys))
    assert torch.equal(hooks.memory.rows.values, torch.from_numpy(values))
    with record_passes(hooks) as passes:
        student(tokens)
    first, second = hooks.memory.rows.ids.tolist()
    assert passes == [{2: first, 3: first, 4: second}], "and not again after the complete answer"
    assert not torch.equal(with_facts, original)

    student.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / FACTS_FILE).is_file()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(tokens).logits, with_facts)
    assert get_fact_hooks(loaded).source_path == tmp_path / "saved" / FACTS_FILE
    loaded.save_pretrained(tmp_path / "again")  # and from this copy, without the first files
    for folder in ("elsewhere.db", "saved/" + FACTS_FILE):
        (tmp_path / folder).unlink()
    loaded_again, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", output_loading_info=True
    )
    assert not any(loading.values())
    assert torch.equal(loaded_again(tokens).logits, with_facts)
    detach(loaded_again)
    assert torch.equal(loaded_again(tokens).logits, original)
    loaded_again.save_pretrained(tmp_path / "without")
    assert not (tmp_path / "without" / FACTS_FILE).exists()
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path / "without")(tokens).logits, original
    )


@torch.no_grad()
def test_saving_keeps_its_own_fact_file_and_backs_up_another(teacher, tmp_path):
    student, _ = convert_blocks(teacher, [FeaturalConfig()] * LAYERS)
    student.save_pretrained(tmp_path)
    store_with_facts(tmp_path / FACTS_FILE, student)[0].close()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    modified = (tmp_path / FACTS_FILE).stat().st_mtime_ns
    loaded.save_pretrained(tmp_path)
    assert (tmp_path / FACTS_FILE).stat().st_mtime_ns == modified
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / FACTS_FILE).write_text("of another user")
    loaded.save_pretrained(tmp_path / "other")
    (backup,) = (tmp_path / "other").glob("memory.before-*.db")
    assert backup.read_text() == "of another user", (
        "an existing fact file is backed up, never overwritten"
    )
    assert (tmp_path / "other" / FACTS_FILE).read_bytes()[:6] == b"SQLite"
    detach(loaded)
    # Without its facts, so that they do not return when the student is loaded.
    loaded.save_pretrained(tmp_path)
    assert not (tmp_path / FACTS_FILE).exists()
    assert len(list(tmp_path.glob("memory.before-*.db"))) == 1


@torch.no_grad()
def test_facts_are_loaded_in_half_precision_too(teacher, tmp_path):
    student, _ = convert_blocks(teacher, [FeaturalConfig()] * LAYERS)
    student.save_pretrained(tmp_path)
    store_with_facts(tmp_path / FACTS_FILE, student)[0].close()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    tokens = torch.tensor([[3, 1, 2, 3]])
    with_facts = loaded(tokens).logits
    assert with_facts.dtype == torch.bfloat16
    with disabled(loaded):
        assert not torch.equal(loaded(tokens).logits, with_facts)


def test_a_store_without_facts_attaches_no_hooks(teacher, tmp_path):
    with RowStore(str(tmp_path / FACTS_FILE), hash_model(teacher)) as store:
        assert not FactTable(store).exists
        store.commit("run", 1, {store.get_or_create_namespace("layer_9", 4, 6): StepChanges()})
    load_facts(teacher, tmp_path / FACTS_FILE)
    assert get_fact_hooks(teacher) is None


def test_the_default_window_is_64_tokens(teacher):
    model = make_teacher(300, n_positions=128)
    part = FactRow(1, torch.ones(WIDTH), torch.ones(WIDTH), ALWAYS_FIRES, ((1, 2),))
    assert POSITIONS < SUBJECT_WINDOW == 64
    hooks, tokens = attach_rows(model, [part]), torch.tensor([[1, 2] + [3] * 100])
    with record_passes(hooks) as passes, torch.no_grad():
        model(tokens)
    assert sorted(passes[0]) == list(range(1, 65))
    cache = DynamicCache()
    with record_passes(hooks) as passes, torch.no_grad():
        for token in tokens.split(1, dim=1):
            model(token, past_key_values=cache)
    assert [start for start, rows in enumerate(passes, 102 - len(passes)) if rows] == list(
        range(1, 65)
    )


@torch.no_grad()
def test_facts_of_another_model_are_rejected_on_loading(teacher, tmp_path):
    student, _ = convert_blocks(teacher, [FeaturalConfig()] * LAYERS)
    student.save_pretrained(tmp_path / "one")
    store_with_facts(tmp_path / "one" / FACTS_FILE, student)[0].close()
    next(student.parameters()).add_(1)
    student.save_pretrained(tmp_path / "two")
    (tmp_path / "one" / FACTS_FILE).rename(tmp_path / "two" / FACTS_FILE)
    with pytest.raises(UserError, match="belong to another model"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "two")


@torch.no_grad()
def test_saving_without_the_fact_file_is_an_error(teacher, tmp_path):
    student, _ = convert_blocks(teacher, [FeaturalConfig()] * LAYERS)
    student.save_pretrained(tmp_path / "one")
    store_with_facts(tmp_path / "one" / FACTS_FILE, student)[0].close()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    (tmp_path / "one" / FACTS_FILE).unlink()
    with pytest.raises(UserError, match="no longer exists"):
        loaded.save_pretrained(tmp_path / "two")
