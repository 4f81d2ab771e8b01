"""Generation with whatever settings a model's `generation_config.json` has."""

import json

import pytest
from conftest import make_teacher
from transformers import AutoModelForCausalLM

from dmt.errors import UserError
from dmt.evaluation.metrics import generate_greedy
from dmt.models.generation import generate_text

PROMPT = "the quick brown"
# Settings that choose another way of decoding, which transformers refuses with a streamer, without
# code from a hub, or for one sequence.
OTHER_DECODING = {
    "beams": {"num_beams": 3},
    "groups of beams": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "contrast of layers": {"dola_layers": "low"},
    "forced words": {"num_beams": 2, "force_words_ids": [[5]]},
    "several answers": {"num_return_sequences": 2, "do_sample": True},
    "a dictionary": {"return_dict_in_generate": True, "output_scores": True},
    "healing": {"token_healing": True},
    "an assistant": {"is_assistant": True},
}


@pytest.fixture
def load_with(teacher, tmp_path):
    """A function that saves the teacher with generation settings, and loads it."""

    def load(settings):
        teacher.save_pretrained(tmp_path)
        (tmp_path / "generation_config.json").write_text(json.dumps(settings))
        return AutoModelForCausalLM.from_pretrained(tmp_path).eval()

    return load


@pytest.mark.parametrize("name", OTHER_DECODING)
def test_text_is_generated_token_by_token(load_with, teacher, tokenizer, tokens, name):
    model, pieces = load_with(OTHER_DECODING[name]), []
    text = generate_text(model, tokenizer, PROMPT, 6, on_text=pieces.append)
    assert text == generate_text(teacher, tokenizer, PROMPT, 6) == "".join(pieces)
    sampled = generate_text(model, tokenizer, PROMPT, 6, temperature=0.7)
    assert isinstance(sampled, str)
    assert generate_greedy(model, tokens, 4).equal(generate_greedy(teacher, tokens, 4))


def test_a_text_ends_where_the_settings_say(load_with, teacher, tokenizer, tokens):
    text = generate_text(teacher, tokenizer, PROMPT, 12)
    first_token = tokenizer(PROMPT + text)["input_ids"][len(tokenizer(PROMPT)["input_ids"])]
    model = load_with({"eos_token_id": [0, first_token]})
    assert len(generate_text(model, tokenizer, PROMPT, 12)) < len(text)
    stopped = load_with({"stop_strings": [text[4:6]]})
    assert generate_text(stopped, tokenizer, PROMPT, 12) == text[: text.index(text[4:6]) + 2]
    assert generate_greedy(stopped, tokens, 4).equal(generate_greedy(teacher, tokens, 4))


def test_settings_that_do_not_work_are_one_line(load_with, tokenizer):
    model = load_with({"repetition_penalty": 0})
    with pytest.raises(UserError, match=r"settings do not work \(.penalty.*generation_config.json"):
        generate_text(model, tokenizer, PROMPT, 6)


def test_an_error_of_the_model_itself_is_not_blamed_on_its_settings(tokenizer, monkeypatch):
    model = make_teacher(len(tokenizer))

    def fail(*args, **kwargs):
        raise TypeError("a defect")

    monkeypatch.setattr(model.transformer, "forward", fail)
    with pytest.raises(TypeError, match="a defect"):
        generate_text(model, tokenizer, PROMPT, 6)
