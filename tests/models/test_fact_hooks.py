"""Facts in what other people do with a model: threads, packed rows, copies, caches, offloading."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import LAYERS, WIDTH, make_llama, make_teacher
from test_edit_memory import (
    ALWAYS_FIRES,
    END,
    attach_rows,
    few_tokens,
    random_rows,
    record_passes,
    store_with_facts,
)
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

from dmt.config import FeaturalConfig
from dmt.models.conversion import convert_blocks
from dmt.models.fact_hooks import FACTS_FILE, FactRow, disabled, get_fact_hooks
from dmt.models.fingerprint import hash_model

NAME = FactRow(1, torch.ones(WIDTH), torch.ones(WIDTH), ALWAYS_FIRES, ((1, 2),))


@pytest.mark.parametrize("num_threads", [2, 6])
def test_threads_that_share_a_model_get_the_answers_of_one(any_teacher, num_threads):
    attach_rows(any_teacher, random_rows(60, 4, alphabet=20, min_threshold=-0.2), 0, 1)
    prompts = [few_tokens(1, 4 + index, 20, seed=index) for index in range(num_threads)]

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


def test_rows_written_during_a_pass_count_from_the_next_one(teacher):
    hooks = attach_rows(teacher, random_rows(40, 7))
    tokens = few_tokens()
    expected = teacher(tokens).logits
    remove = teacher.transformer.h[2].register_forward_pre_hook(lambda *_: hooks.set_rows(()))
    assert torch.equal(teacher(tokens).logits, expected)
    remove.remove()
    assert not torch.equal(teacher(tokens).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("packing", ["position_ids", "cu_seq_lens_q"])
def test_facts_of_a_packed_row_are_those_of_each_document(packing):
    model = make_llama()
    hooks = attach_rows(model, [NAME])
    documents = [[3, 1, 2, 3], [3, 3, 1], [2, 3], [4, 1, 2]]
    positions = torch.cat([torch.arange(len(document)) for document in documents])[None]
    starts = torch.tensor([0, 4, 7, 9, 12], dtype=torch.int32)
    with record_passes(hooks) as passes:
        model(
            torch.tensor([[token for document in documents for token in document]]),
            **({"position_ids": positions} if packing == "position_ids" else {packing: starts}),
        )
        for document in documents:
            model(torch.tensor([document]))
    packed, *alone = passes
    offsets = starts.tolist()
    assert packed == {
        offsets[index] + position: row
        for index, fired in enumerate(alone)
        for position, row in fired.items()
    }
    assert sorted(packed) == [2, 3, 11], "a name that spans two documents is none"


@torch.no_grad()
def test_a_packed_row_gives_the_logits_of_its_documents(any_teacher):
    attach_rows(any_teacher, [NAME])
    documents = [torch.tensor([[3, 1, 2, 3]]), torch.tensor([[3, 3, 4]])]
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]
    packed = any_teacher(torch.cat(documents, 1), position_ids=positions, use_cache=False).logits
    alone = torch.cat([any_teacher(document).logits for document in documents], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_packed_text_is_continued_from_its_last_document(any_teacher):
    hooks, cache = attach_rows(any_teacher, [NAME]), DynamicCache()
    any_teacher(
        torch.tensor([[1, 2, 3, 3, 3]]),
        position_ids=torch.tensor([[0, 1, 0, 1, 2]]),
        past_key_values=cache,
    )
    with record_passes(hooks) as passes:
        any_teacher(
            torch.tensor([[3, 1, 2]]),
            position_ids=torch.tensor([[3, 4, 5]]),
            past_key_values=cache,
        )
    assert passes == [{2: 1}]


def test_continuous_batching_answers_without_facts_and_says_so(caplog):
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    model = make_llama()
    prompts = [[3, 1, 2, 3], [4, 4, 5]]

    def generate_batch():
        outputs = model.generate_batch(
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
    attach_rows(model, [FactRow(1, torch.ones(WIDTH), 99 * torch.randn(WIDTH), ALWAYS_FIRES)])
    tokens = torch.tensor(prompts[:1])
    before = model(tokens).logits
    assert generate_batch() == plain
    warnings = [record.message for record in caplog.records if "switched off" in record.message]
    assert warnings == [
        "facts are switched off: the pass holds parts of several texts (continuous batching)"
    ]
    assert torch.equal(model(tokens).logits, before), "and only there"


@torch.no_grad()
def test_a_copy_of_a_model_has_its_own_facts(any_teacher):
    hooks, tokens = attach_rows(any_teacher, random_rows(40, 7)), few_tokens()
    with_facts = any_teacher(tokens).logits
    with disabled(any_teacher):
        without_facts = any_teacher(tokens).logits
    copied = copy.deepcopy(any_teacher)
    hooks.set_rows(())
    assert torch.equal(copied(tokens).logits, with_facts)
    assert torch.equal(any_teacher(tokens).logits, without_facts)
    with disabled(copied):
        assert torch.equal(copied(tokens).logits, without_facts)
    get_fact_hooks(copied).set_rows(())
    assert torch.equal(copied(tokens).logits, without_facts)


@torch.no_grad()
def test_a_model_with_facts_is_pickled_and_replicated(any_teacher, tmp_path):
    attach_rows(any_teacher, random_rows(40, 7))
    tokens = few_tokens()
    expected = any_teacher(tokens).logits
    with disabled(any_teacher):
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
def test_a_cache_has_as_many_layers_as_the_model(any_teacher):
    hooks = attach_rows(any_teacher, [NAME])
    cache = any_teacher(torch.tensor([[3, 1, 2]])).past_key_values
    assert len(cache) == len(cache.layers) == LAYERS
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicLayer"] * LAYERS
    copies = [cache, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    with record_passes(hooks) as passes:
        for copied in copies:
            any_teacher(torch.tensor([[3]]), past_key_values=copied)
        cache.reset()
        any_teacher(torch.tensor([[3]]), past_key_values=cache)
    assert passes == [{0: 1}] * 3 + [{}]


@torch.no_grad()
def test_rows_of_a_cache_keep_their_text(any_teacher):
    hooks = attach_rows(any_teacher, [NAME])
    cache = any_teacher(torch.tensor([[3, 1, 2], [3, 3, 3]])).past_key_values
    for change, expected in (
        (lambda: cache.reorder_cache(torch.tensor([1, 0])), {1: 1}),
        (lambda: cache.batch_repeat_interleave(2), {2: 1, 3: 1}),
        (lambda: cache.batch_select_indices(torch.tensor([3, 0, 2])), {0: 1, 2: 1}),
    ):
        change()
        batch = cache.layers[0].keys.shape[0]
        with record_passes(hooks) as passes:
            any_teacher(torch.full((batch, 1), 3), past_key_values=cache)
        assert passes == [expected]


@torch.no_grad()
def test_text_of_a_cache_built_by_hand_is_unknown_and_said_so_once(any_teacher, caplog):
    hooks = attach_rows(any_teacher, [NAME])
    cache = any_teacher(torch.tensor([[3, 1, 2]])).past_key_values
    with record_passes(hooks) as passes:
        for _ in range(2):
            rebuilt = DynamicCache()
            for index, layer in enumerate(cache.layers):
                rebuilt.update(layer.keys, layer.values, index)
            any_teacher(torch.tensor([[3]]), past_key_values=rebuilt)
    assert passes == [{}, {}]
    (record,) = caplog.records
    assert "in a cache that was built by hand" in record.message


@torch.no_grad()
def test_embeddings_of_tokens_are_recognized_and_others_are_unknown(any_teacher):
    hooks, tokens = attach_rows(any_teacher, random_rows(40, 12)), few_tokens()
    embeddings = any_teacher.get_input_embeddings()(tokens)
    with record_passes(hooks) as passes:
        expected = any_teacher(tokens).logits
        logits = any_teacher(inputs_embeds=embeddings).logits
    assert passes[0] == passes[1] != {}
    torch.testing.assert_close(logits, expected)
    attach_rows(any_teacher, [NAME])
    for changed, fired in ((0, {2: 1, 3: 1}), (1, {})):  # before the name, and within
        prompt = any_teacher.get_input_embeddings()(torch.tensor([[3, 1, 2, 3]]))
        prompt[0, changed] += 0.5
        with record_passes(get_fact_hooks(any_teacher)) as passes:
            any_teacher(inputs_embeds=prompt)
        assert passes == [fired]


@torch.no_grad()
def test_facts_are_no_buffers_of_the_model(teacher):
    """Transformers would initialize them anew, and cast them to the model's dtype."""
    buffers = {name for name, _ in teacher.named_buffers()}
    attach_rows(teacher, [NAME])
    assert {name for name, _ in teacher.named_buffers()} == buffers
    assert not list(get_fact_hooks(teacher).parameters())


@torch.no_grad()
def test_a_half_written_name_before_a_document_end_is_none():
    model = make_teacher()
    hooks = attach_rows(model, [NAME])
    with record_passes(hooks) as passes:
        model(torch.tensor([[3, 1, END, 2, 3]]))
    assert passes == [{}]


@torch.no_grad()
def test_facts_are_loaded_with_weights_that_are_left_on_the_disk(teacher, tmp_path):
    pytest.importorskip("accelerate")
    student, _ = convert_blocks(teacher, [FeaturalConfig()] * LAYERS)
    student.save_pretrained(tmp_path / "student")
    store_with_facts(tmp_path / "student" / FACTS_FILE, student)[0].close()
    tokens = torch.tensor([[3, 1, 2, 3]])
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "student")(tokens).logits
    names = [name for name, _ in student.transformer.named_children() if name != "h"]
    device_map = {f"transformer.{name}": "cpu" for name in names} | {"lm_head": "cpu"}
    device_map |= {f"transformer.h.{layer}": "disk" for layer in range(LAYERS)}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "student", device_map=device_map, offload_folder=tmp_path / "offloaded"
    )
    assert offloaded.transformer.h[0].ln_1.weight.is_meta
    assert hash_model(offloaded) == hash_model(student)
    assert torch.equal(offloaded(tokens).logits, expected)


def test_loading_facts_leaves_no_files_beside_them(teacher, tmp_path):
    student, _ = convert_blocks(teacher, [FeaturalConfig()] * LAYERS)
    student.save_pretrained(tmp_path)
    store_with_facts(tmp_path / FACTS_FILE, student)[0].close()
    before = sorted(path.name for path in tmp_path.iterdir())
    assert not any(name.endswith(("-wal", "-shm")) for name in before)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
