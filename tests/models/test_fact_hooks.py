"""Facts in what other people do with a model: threads, packed rows, copies, caches, offloading."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import LAYERS, WIDTH, make_llama, make_teacher
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig
from unsaved_facts import (
    ANSWER,
    BORN,
    attach_facts,
    encode,
    make_fact,
    make_hooks,
    make_relations,
    read_matches,
)

from dmt.config import FeaturalConfig
from dmt.models.architectures import get_architecture
from dmt.models.conversion import convert_blocks
from dmt.models.fact_files import FACTS_FILE, pack_calibration
from dmt.models.fact_hooks import attach, detach, disabled, get_fact_hooks, record_matches
from dmt.models.fingerprint import hash_model
from dmt.store import RowStore
from dmt.store.facts import FactTable

POSITIONS = 160
OTHER = "the quick brown fox jumps over the dog"


@pytest.fixture
def teacher(tokenizer):
    return make_teacher(len(tokenizer), n_positions=POSITIONS)


@pytest.fixture
def llama(tokenizer):
    return make_llama(len(tokenizer), max_position_embeddings=POSITIONS)


@pytest.fixture(params=["teacher", "llama"])
def any_teacher(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def born(tokenizer):
    """Token ids of the prompt; the fact fires at its last two."""
    return encode(tokenizer, BORN)


@pytest.mark.parametrize("num_threads", [2, 6])
def test_threads_that_share_a_model_get_the_answers_of_one(any_teacher, tokenizer, num_threads):
    names = ["Ada Holbrook", "Bob Stone", "Cid Marlow", "Dot Fenwick", "Eve Harlan", "Finn Osgood"]
    texts = [f"{name} was born in the town of" for name in names[:num_threads]]
    facts = [
        make_fact(tokenizer, text, subject=name, fact_id=index + 1)
        for index, (text, name) in enumerate(zip(texts, names, strict=False))
    ]
    attach_facts(any_teacher, tokenizer, facts, key_layer=0, value_layer=1)
    prompts = [torch.tensor([encode(tokenizer, text)]) for text in texts]

    def generate(prompt):
        return any_teacher.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        ).tolist()

    alone = [generate(prompt) for prompt in prompts]
    with disabled(any_teacher):
        assert [generate(prompt) for prompt in prompts] != alone
        with ThreadPoolExecutor(num_threads) as pool:
            others = list(pool.map(generate, prompts * 2))
    assert others == alone * 2, "the facts are disabled in one thread only"


@torch.no_grad()
def test_facts_removed_during_a_pass_count_in_it_to_its_end(teacher, tokenizer, born):
    hooks = attach_facts(teacher, tokenizer)
    tokens = torch.tensor([born])
    expected = teacher(tokens).logits
    remove = teacher.transformer.h[2].register_forward_pre_hook(
        lambda *_: hooks.index.set_unsaved(())
    )
    assert torch.equal(teacher(tokens).logits, expected)
    remove.remove()
    assert not torch.equal(teacher(tokens).logits, expected)


@pytest.mark.parametrize("packing", ["position_ids", "cu_seq_lens_q"])
def test_facts_of_a_packed_row_are_those_of_each_document(llama, tokenizer, born, packing):
    attach_facts(llama, tokenizer)
    documents = [encode(tokenizer, OTHER), born, born[:4], born[4:], born]
    positions = torch.cat([torch.arange(len(document)) for document in documents])[None]
    starts = np.cumsum([0, *map(len, documents)]).tolist()
    arguments = (
        {"position_ids": positions}
        if packing == "position_ids"
        else {packing: torch.tensor(starts, dtype=torch.int32)}
    )
    packed = read_matches(
        llama, [[token for document in documents for token in document]], **arguments
    )
    alone = [read_matches(llama, [document]) for document in documents]
    assert packed == {
        offset + token: match
        for offset, matches in zip(starts, alone, strict=False)
        for token, match in matches.items()
    }
    ends = [starts[2], starts[5]]
    assert sorted(packed) == [end + offset for end in ends for offset in (-2, -1)], (
        "a name that spans two documents is none"
    )


@torch.no_grad()
def test_a_packed_row_gives_the_logits_of_its_documents(any_teacher, tokenizer, born):
    attach_facts(any_teacher, tokenizer)
    documents = [torch.tensor([born]), torch.tensor([encode(tokenizer, OTHER)])]
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]
    packed = any_teacher(torch.cat(documents, 1), position_ids=positions, use_cache=False).logits
    alone = torch.cat([any_teacher(document).logits for document in documents], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


def test_a_packed_text_is_continued_from_its_last_document(any_teacher, tokenizer, born):
    attach_facts(any_teacher, tokenizer)
    for first, last, expected in ((born, [5, 6], {}), ([5, 6], born[:-1], {0: (1, 0)})):
        cache = DynamicCache()
        positions = torch.tensor([[*range(len(first)), *range(len(last))]])
        read_matches(any_teacher, [[*first, *last]], position_ids=positions, past_key_values=cache)
        end = torch.tensor([[len(last)]])
        matches = read_matches(any_teacher, [born[-1:]], position_ids=end, past_key_values=cache)
        assert matches == expected


def test_continuous_batching_answers_without_facts_and_says_so(llama, tokenizer, born, caplog):
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    prompts = [born, encode(tokenizer, OTHER)]

    def generate_batch():
        outputs = llama.generate_batch(
            prompts,
            generation_config=GenerationConfig(
                max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=-1
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=16, num_blocks=16, max_batch_tokens=64, use_cuda_graph=False
            ),
            progress_bar=False,
        )
        return sorted(output.generated_tokens for output in outputs.values())

    plain = generate_batch()
    attach_facts(llama, tokenizer, [make_fact(tokenizer, scale=99.0)])
    tokens = torch.tensor(prompts[:1])
    before = llama(tokens).logits
    assert generate_batch() == plain
    warnings = [record.message for record in caplog.records if "switched off" in record.message]
    assert warnings == [
        "facts are switched off: the pass holds parts of several texts (continuous batching)"
    ]
    assert torch.equal(llama(tokens).logits, before), "and only there"


@torch.no_grad()
def test_facts_change_the_logits_where_they_fire_and_not_where_they_are_disabled(
    any_teacher, tokenizer, born
):
    tokens = torch.tensor([born])
    plain = any_teacher(tokens).logits
    attach_facts(any_teacher, tokenizer)
    with_facts = any_teacher(tokens).logits
    assert torch.equal(with_facts[:, :-2], plain[:, :-2])
    assert not torch.isclose(with_facts[:, -1], plain[:, -1]).any()
    with disabled(any_teacher), record_matches(any_teacher) as passes:
        assert torch.equal(any_teacher(tokens).logits, plain)
    assert passes == []
    detach(any_teacher)
    assert torch.equal(any_teacher(tokens).logits, plain)


@torch.no_grad()
def test_a_copy_of_a_model_has_its_own_facts(any_teacher, tokenizer, born):
    hooks, tokens = attach_facts(any_teacher, tokenizer), torch.tensor([born])
    with_facts = any_teacher(tokens).logits
    with disabled(any_teacher):
        without_facts = any_teacher(tokens).logits
    copied = copy.deepcopy(any_teacher)
    hooks.index.set_unsaved(())
    assert torch.equal(copied(tokens).logits, with_facts)
    assert torch.equal(any_teacher(tokens).logits, without_facts)
    with disabled(copied):
        assert torch.equal(copied(tokens).logits, without_facts)
    get_fact_hooks(copied).index.set_unsaved(())
    assert torch.equal(copied(tokens).logits, without_facts)


@torch.no_grad()
def test_a_model_with_facts_is_pickled_and_replicated(any_teacher, tokenizer, born, tmp_path):
    attach_facts(any_teacher, tokenizer)
    tokens = torch.tensor([born])
    expected = any_teacher(tokens).logits
    with disabled(any_teacher):
        assert not torch.equal(any_teacher(tokens).logits, expected)
        assert torch.equal(pickle.loads(pickle.dumps(any_teacher))(tokens).logits, expected)
    torch.save(any_teacher, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(loaded(tokens).logits, expected)
    # As `torch.nn.DataParallel` runs it: shallow copies of the modules, a thread each.
    replica = any_teacher._replicate_for_data_parallel()
    answers = []
    thread = threading.Thread(target=lambda: answers.append(replica(tokens).logits.detach()))
    thread.start()
    thread.join()
    assert torch.equal(answers[0], expected)


@torch.no_grad()
def test_a_cache_has_as_many_layers_as_the_model(any_teacher, tokenizer, born):
    attach_facts(any_teacher, tokenizer)
    cache = any_teacher(torch.tensor([born[:-1]])).past_key_values
    assert len(cache) == len(cache.layers) == LAYERS
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicLayer"] * LAYERS
    for copied in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache):
        assert read_matches(any_teacher, [born[-1:]], past_key_values=copied) == {0: (1, 0)}
    cache.reset()
    assert read_matches(any_teacher, [born[-1:]], past_key_values=cache) == {}


@torch.no_grad()
def test_cropping_a_cache_removes_the_text(any_teacher, tokenizer, born):
    attach_facts(any_teacher, tokenizer)
    for num_removed, rest in ((3, born[-3:]), (len(born) - 4, born[-3:])):
        cache = DynamicCache()
        any_teacher(torch.tensor([born]), past_key_values=cache)
        cache.crop(-num_removed)
        logits = any_teacher(torch.tensor([rest]), past_key_values=cache).logits
        whole = torch.tensor([[*born[:-num_removed], *rest]])
        torch.testing.assert_close(logits, any_teacher(whole).logits[:, -3:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_rows_of_a_cache_keep_their_text(any_teacher, tokenizer, born):
    attach_facts(any_teacher, tokenizer)
    other = [*encode(tokenizer, OTHER), *[born[-4]] * len(born)][: len(born)]
    cache = any_teacher(torch.tensor([born[:-1], other[:-1]])).past_key_values
    for change, expected in (
        (lambda: cache.reorder_cache(torch.tensor([1, 0])), [1]),
        (lambda: cache.batch_repeat_interleave(2), [2, 3]),
        (lambda: cache.batch_select_indices(torch.tensor([3, 0, 2])), [0, 2]),
    ):
        change()
        tokens = [[born[-1]]] * cache.layers[0].keys.shape[0]
        matches = read_matches(any_teacher, tokens, past_key_values=copy.deepcopy(cache))
        assert matches == dict.fromkeys(expected, (1, 0))


@torch.no_grad()
def test_text_of_a_cache_built_by_hand_is_unknown_and_said_so_once(
    any_teacher, tokenizer, born, caplog
):
    attach_facts(any_teacher, tokenizer)
    cache = any_teacher(torch.tensor([born[:-1]])).past_key_values
    for _ in range(2):
        rebuilt = DynamicCache()
        for index, layer in enumerate(cache.layers):
            rebuilt.update(layer.keys, layer.values, index)
        assert read_matches(any_teacher, [born[-1:]], past_key_values=rebuilt) == {}
    (record,) = caplog.records
    assert "in a cache that was built by hand" in record.message


@torch.no_grad()
def test_text_read_before_the_hooks_were_attached_is_unknown(any_teacher, tokenizer, born):
    cache = DynamicCache()
    any_teacher(torch.tensor([born[:-1]]), past_key_values=cache)
    attach_facts(any_teacher, tokenizer)
    again = encode(tokenizer, f". {BORN}")
    end = len(again) - 1
    for piece, expected in (
        (born[-1:], {}),
        (again, {end - 1: (1, 0), end: (1, 0)}),
        (encode(tokenizer, ANSWER)[:1], {0: (1, 1)}),
    ):
        assert read_matches(any_teacher, [piece], past_key_values=cache) == expected


@torch.no_grad()
def test_embeddings_of_tokens_are_recognized_and_others_are_unknown(any_teacher, tokenizer, born):
    attach_facts(any_teacher, tokenizer)
    before = encode(tokenizer, ". ")
    tokens = torch.tensor([[*before, *born]])
    expected = any_teacher(tokens).logits
    with disabled(any_teacher):
        assert not torch.equal(any_teacher(tokens).logits, expected)
    embed, end = any_teacher.get_input_embeddings(), tokens.shape[1] - 1
    torch.testing.assert_close(any_teacher(inputs_embeds=embed(tokens)).logits, expected)
    for changed, fired in (
        (0, [end - 1, end]),
        (len(before) + 1, []),
    ):  # before the name, and within
        prompt = embed(tokens)
        prompt[0, changed] += 0.5
        with record_matches(any_teacher) as passes:
            any_teacher(inputs_embeds=prompt)
        assert [match.token for match in passes[0]] == fired


def test_facts_are_no_buffers_of_the_model(teacher, tokenizer):
    """Transformers would initialize them anew, and cast them to the model's dtype."""
    buffers = {name for name, _ in teacher.named_buffers()}
    attach_facts(teacher, tokenizer)
    assert {name for name, _ in teacher.named_buffers()} == buffers
    assert not list(get_fact_hooks(teacher).parameters())


def test_a_half_written_name_before_a_document_end_is_none(teacher, tokenizer, born):
    attach_facts(teacher, tokenizer)
    assert read_matches(teacher, [born]) != {}
    assert read_matches(teacher, [[*born[:2], tokenizer.eos_token_id, *born[2:]]]) == {}


def compute_gradients(model, tokens):
    """Return the gradients of the parameters by name."""
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_gradients_treat_values_as_constants(any_teacher, tokenizer, born, checkpointing):
    any_teacher.requires_grad_(True)
    tokens = torch.tensor([[*born, *encode(tokenizer, ANSWER)]])
    hooks = attach_facts(any_teacher, tokenizer, key_layer=0, value_layer=1)
    with record_matches(any_teacher) as passes:
        any_teacher(tokens)
    detach(any_teacher)
    plain = compute_gradients(any_teacher, tokens)
    block = get_architecture(any_teacher.config.model_type).blocks(any_teacher)[1]
    constant = torch.zeros(tokens.shape[1], WIDTH)
    for match in passes[0]:
        constant[match.token] = torch.from_numpy(match.value)
    hook = block.register_forward_hook(lambda _, __, output: output + constant.view_as(output))
    expected = compute_gradients(any_teacher, tokens)
    hook.remove()
    assert any(not torch.allclose(expected[name], plain[name]) for name in plain)
    attach(any_teacher, hooks)
    if checkpointing is not None:
        any_teacher.train()
        any_teacher.config.use_cache = False
        for module in any_teacher.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        any_teacher.activation_checkpointing_enable({"use_reentrant": checkpointing})
        any_teacher.enable_input_require_grads()
    actual = compute_gradients(any_teacher, tokens)
    assert expected.keys() == actual.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_failed_pass_leaves_no_state(any_teacher, tokenizer, born):
    attach_facts(any_teacher, tokenizer)
    tokens = torch.tensor([born])
    expected = any_teacher(tokens).logits
    with pytest.raises((RuntimeError, IndexError)):
        any_teacher(torch.tensor([[*born, 9_999]]))
    assert torch.equal(any_teacher(tokens).logits, expected)


def save_facts(path, model, tokenizer):
    """Create a store with the fact of `make_fact`."""
    fact = make_fact(tokenizer)
    hooks = make_hooks(tokenizer, [])
    with RowStore(str(path), hash_model(model)) as store:
        table = FactTable(store)
        calibration = pack_calibration(make_relations(), hooks.matcher.codec)
        table.create(fact.keys.shape[1], 1, 2, calibration)
        table.add([(fact.record, fact.keys, fact.values)])


@torch.no_grad()
def test_facts_are_loaded_with_weights_that_are_left_on_the_disk(
    teacher, tokenizer, born, tmp_path
):
    pytest.importorskip("accelerate")
    student, _ = convert_blocks(teacher, [FeaturalConfig()] * LAYERS)
    student.save_pretrained(tmp_path / "student")
    save_facts(tmp_path / "student" / FACTS_FILE, student, tokenizer)
    tokens = torch.tensor([born])
    with_facts = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    expected = with_facts(tokens).logits
    with disabled(with_facts):
        assert not torch.equal(with_facts(tokens).logits, expected)
    names = [name for name, _ in student.transformer.named_children() if name != "h"]
    device_map = {f"transformer.{name}": "cpu" for name in names} | {"lm_head": "cpu"}
    device_map |= {f"transformer.h.{layer}": "disk" for layer in range(LAYERS)}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "student", device_map=device_map, offload_folder=tmp_path / "offloaded"
    )
    assert offloaded.transformer.h[0].ln_1.weight.is_meta
    assert hash_model(offloaded) == hash_model(student)
    assert torch.equal(offloaded(tokens).logits, expected)


def test_loading_facts_leaves_no_files_beside_them(teacher, tokenizer, tmp_path):
    student, _ = convert_blocks(teacher, [FeaturalConfig()] * LAYERS)
    student.save_pretrained(tmp_path)
    save_facts(tmp_path / FACTS_FILE, student, tokenizer)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert not any(name.endswith(("-wal", "-shm")) for name in before)
    assert get_fact_hooks(AutoModelForCausalLM.from_pretrained(tmp_path)) is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == before
