"""The protocols of CounterFact and zsRE, and the methods of the literature that they measure."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dmt.models.forward import capture, encode_text, forward_with_activations
from dmt.models.loading import load_teacher

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import edit_protocols  # noqa: E402
import peer_side_memory  # noqa: E402
import peer_weights  # noqa: E402
from counterfactuals import make_edits  # noqa: E402


@pytest.fixture(scope="module")
def embedded():
    """The embedded teacher and its tokenizer."""
    return load_teacher("embedded")


@pytest.fixture
def people():
    """Edits about people."""
    return make_edits(8)[1::2]


def test_edits_have_a_subject_each_and_grow_at_the_end():
    edits = make_edits(300)
    subjects = {edit.fact.person for edit in edits}
    assert len(subjects) == 300
    assert make_edits(20) == edits[:20]
    for edit in edits:
        assert {probe.answer for probe in (*edit.paraphrases, *edit.neighbors)} == {
            edit.fact.answer
        }
        prompts = [edit.fact.prompt, *(probe.prompt for probe in edit.paraphrases)]
        assert len(set(prompts)) == 3
        assert all(edit.fact.person in prompt for prompt in prompts)
        assert not any(probe.person in subjects for probe in edit.neighbors)
        assert {probe.relation for probe in edit.neighbors} == {edit.fact.relation}


def test_ngram_entropy_by_hand():
    # Bigrams ab, ba, ab; trigrams aba, bab.
    assert edit_protocols.compute_ngram_entropy("abab") == pytest.approx((0.9183 + 2) / 3, abs=1e-4)
    assert edit_protocols.compute_ngram_entropy("aaaa") == 0


def test_scores_of_padded_answers_are_those_of_each_alone(embedded, people):
    model, tokenizer = embedded
    prompts = [encode_text(tokenizer, edit.fact.prompt) for edit in people]
    answers = [encode_text(tokenizer, edit.fact.answer, add_prefix=False) for edit in people]
    log_probs, generated = edit_protocols.score_answers(model, prompts, answers)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        with torch.no_grad():
            logits = forward_with_activations(model, torch.tensor([prompt + answer])).logits[0]
        predicted = logits[len(prompt) - 1 : -1].log_softmax(-1)
        expected = predicted[range(len(answer)), answer].mean()
        torch.testing.assert_close(log_probs[i], expected, atol=1e-4, rtol=0)
        assert generated[i] == (predicted.argmax(-1).tolist() == answer)


def test_scores_compare_old_and_new_answers(embedded, people, monkeypatch):
    """The unedited model generates its old answers; swapped, those that were written."""
    monkeypatch.setattr(edit_protocols, "TEXT_TOKENS", 32)
    model, tokenizer = embedded
    protocol = edit_protocols.Protocol(model, tokenizer, people)
    scores = protocol.measure(model)
    assert [scores.efficacy[1], scores.paraphrase[1], scores.neighborhood[1]] == [0, 0, 1]
    for name in ("facts", "paraphrases", "neighbors"):
        questions = getattr(protocol, name)
        swapped = [edit_protocols.Question(q.prompt, new=q.old, old=q.new) for q in questions]
        setattr(protocol, name, swapped)
    others = protocol.measure(model)
    assert [others.efficacy[1], others.paraphrase[1], others.neighborhood[1]] == [1, 1, 0]
    for name in ("efficacy", "paraphrase", "neighborhood"):
        assert getattr(scores, name)[0] + getattr(others, name)[0] == pytest.approx(1)
    assert scores.efficacy[0] <= 0.25
    assert scores.neighborhood[0] >= 0.75
    assert scores.fluency == others.fluency > 0


def test_rome_answers_the_key_of_the_fact_with_the_offset(embedded, people):
    model, tokenizer = embedded
    layer, fact = 1, people[0].fact
    contexts = peer_weights.sample_contexts(model, tokenizer)
    [offset] = peer_weights.train_offsets(model, tokenizer, [fact], contexts, layer)
    alone = peer_weights.encode_in_contexts(tokenizer, fact, ())
    before = peer_weights.read_states(model, alone, layer).outputs[0]
    edited = peer_weights.write_rome(model, tokenizer, [fact], layer).model
    after = peer_weights.read_states(edited, alone, layer).outputs[0]
    torch.testing.assert_close(after - before, offset, atol=1e-3, rtol=1e-3)
    difference = edited.transformer.h[layer].mlp.c_proj.weight - (
        model.transformer.h[layer].mlp.c_proj.weight
    )
    assert torch.linalg.matrix_rank(difference, rtol=1e-3) == 1
    assert not torch.equal(before, after)


def test_offsets_are_those_of_complete_forward_passes(embedded, people):
    """With an offset added by a hook in a complete pass, the model answers as the fact says."""
    model, tokenizer = embedded
    layer, facts = 1, [edit.fact for edit in people]
    contexts = peer_weights.sample_contexts(model, tokenizer)
    offsets = peer_weights.train_offsets(model, tokenizer, facts, contexts, layer)
    for fact, offset in zip(facts, offsets, strict=True):
        for row in peer_weights.encode_in_contexts(tokenizer, fact, contexts):
            position = len(row.before)

            def shift(_, hidden, position=position, offset=offset):
                hidden = hidden.clone()
                hidden[:, position] += offset
                return hidden

            blocks = {0: model.transformer.h[layer]}
            with torch.no_grad(), capture(blocks, on_output=shift):
                tokens = torch.tensor([row.before + row.after])
                logits = forward_with_activations(model, tokens).logits[0]
            assert logits[-len(row.answer) :].argmax(-1).tolist() == row.answer
    # Together or alone, an offset is the same.
    [alone] = peer_weights.train_offsets(model, tokenizer, facts[1:2], contexts, layer)
    torch.testing.assert_close(alone, offsets[1], atol=1e-2, rtol=1e-2)


def test_memit_solves_its_least_squares():
    generator = torch.Generator().manual_seed(0)
    prose = torch.randn(40, 12, generator=generator, dtype=torch.double)
    keys = torch.randn(3, 12, generator=generator, dtype=torch.double)
    missing = torch.randn(3, 5, generator=generator, dtype=torch.double)
    moment = prose.T @ prose / len(prose)
    update = peer_weights.solve_memit(moment, keys, missing).requires_grad_(True)
    weight = peer_weights.MOMENT_WEIGHT * 12
    loss = (keys @ update - missing).square().sum() + weight * (update.T @ moment @ update).trace()
    loss.backward()
    assert update.grad.abs().max() < 1e-8


def test_alphaedit_leaves_prose_and_earlier_facts_as_they_are():
    generator = torch.Generator().manual_seed(0)
    prose = torch.randn(40, 4, generator=generator, dtype=torch.double)
    prose = prose @ torch.randn(4, 12, generator=generator, dtype=torch.double)
    earlier_keys, keys = 1e3 * torch.randn(2, 3, 12, generator=generator, dtype=torch.double)
    missing = torch.randn(3, 5, generator=generator, dtype=torch.double)
    projection = peer_weights.find_null_space(prose.T @ prose / len(prose))
    earlier = earlier_keys.T @ earlier_keys
    update = peer_weights.solve_alphaedit(projection, earlier, keys, missing)
    assert (prose @ update).abs().max() < 1e-10
    torch.testing.assert_close(keys @ update, missing, atol=1e-3, rtol=0)
    assert (earlier_keys @ update).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["ROME", "MEMIT", "AlphaEdit", "WISE"])
def test_a_method_writes_a_fact_into_a_copy(embedded, people, name):
    model, tokenizer = embedded
    facts = [people[0].fact]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    method = (peer_weights.METHODS | peer_side_memory.METHODS)[name]
    edited = method(model, tokenizer, facts).model
    prompt = encode_text(tokenizer, facts[0].prompt)
    answer = encode_text(tokenizer, facts[0].answer, add_prefix=False)
    (old,), _ = edit_protocols.score_answers(model, [prompt], [answer])
    (new,), _ = edit_protocols.score_answers(edited, [prompt], [answer])
    assert new > old + 0.5
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_a_side_memory_answers_only_beyond_its_threshold():
    matrix = torch.nn.Linear(6, 4, bias=False)
    memory = peer_side_memory.SideMemory(matrix).requires_grad_(False)
    keys = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    side = memory.add_side()
    side.weight += 1
    assert torch.equal(memory(keys), matrix(keys)), "a new one answers nothing"
    distances = (side(keys) - matrix(keys)).norm(dim=-1)
    memory.thresholds[0] = float(distances.median())
    expected = torch.where((distances >= distances.median())[..., None], side(keys), matrix(keys))
    assert torch.equal(memory(keys), expected)
    memory.add_side()
    assert torch.equal(memory(keys), expected), "the earlier one still answers"


def test_the_table_has_a_row_for_each_method_and_number():
    command = [sys.executable, "benchmarks/edit_protocols.py", "--model", "embedded"]
    process = subprocess.run(
        [*command, "--edits", "1,3", "--methods", "unedited;ours"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    rows = [line for line in process.stdout.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[:2] for row in rows[1:]] == [
        ["| unedited", "1"],
        ["| ours", "1"],
        ["| unedited", "3"],
        ["| ours", "3"],
    ]
    assert " | 1.000 / 1.000 | " in rows[2]
    process = subprocess.run(
        [*command, "--methods", "Rome"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 2
    assert "--methods Rome: there are unedited; ours" in process.stderr
