"""The tokenizer of a saved student begins a text as training texts and facts began."""

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GPT2Tokenizer

from dmt.data.tokenizer import save_tokenizer
from dmt.models.forward import encode_text


def make_gpt2_tokenizer(tokenizer):
    return GPT2Tokenizer(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")


@pytest.mark.parametrize("make", [lambda tokenizer: tokenizer, make_gpt2_tokenizer])
def test_a_saved_tokenizer_adds_what_begins_a_document(tokenizer, tmp_path, make):
    original = make(tokenizer)
    plain = original("a fox")["input_ids"]
    assert plain[0] != original.eos_token_id
    save_tokenizer(original, tmp_path / "once")
    saved = AutoTokenizer.from_pretrained(tmp_path / "once")
    assert saved("a fox")["input_ids"] == [original.eos_token_id, *plain]
    assert saved("a fox")["input_ids"] == encode_text(saved, "a fox")
    assert saved("a fox", add_special_tokens=False)["input_ids"] == plain
    assert saved.decode(saved("a fox")["input_ids"], skip_special_tokens=True) == "a fox"
    assert original("a fox")["input_ids"] == plain, "the teacher's stays as it is"
    save_tokenizer(saved, tmp_path / "twice")
    again = AutoTokenizer.from_pretrained(tmp_path / "twice")
    assert again("a fox")["input_ids"] == saved("a fox")["input_ids"], "it is added once"


def test_a_tokenizer_that_adds_a_token_of_its_own_is_saved_as_it_is(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path / "copy")
    own = AutoTokenizer.from_pretrained(tmp_path / "copy")
    fox = own("fox", add_special_tokens=False)["input_ids"][0]
    token = own.convert_ids_to_tokens(fox)
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, fox)]
    )
    save_tokenizer(own, tmp_path / "own")
    assert AutoTokenizer.from_pretrained(tmp_path / "own")("a")["input_ids"][0] == fox
