"""Packs of facts: saving, validation before loading, import, temporary packs, diff and merge."""

# ruff: noqa: F811  (fixtures are imported)
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import WIDTH, make_llama, make_teacher
from safetensors.numpy import save_file
from test_fact_store import (  # noqa: F401  (`calibrated_stores` is a fixture)
    FACTS,
    PROSE,
    calibrated_stores,
    compute_logits,
    make_fact_model,
    open_fact_store,
    recalls,
)

from dmt.editing import packs
from dmt.editing.fact import parse_fact
from dmt.editing.fact_store import FactStore
from dmt.editing.packs import (
    MANIFEST_FILE,
    PACK_VERSION,
    TENSORS_FILE,
    check_fact_pack_fits,
    diff_facts,
    import_pack,
    load_fact_pack,
    load_packs,
    make_fact_pack,
    merge_packs,
    unpack_facts,
)
from dmt.errors import UserError
from dmt.matching.relations import list_tensor_shapes
from dmt.models.fingerprint import hash_model
from dmt.store import RowStore


@pytest.fixture
def teacher(tokenizer):
    return make_fact_model(make_teacher, tokenizer)


@pytest.fixture
def fact_store(calibrated_stores, teacher, tokenizer, tmp_path):
    shutil.copy(calibrated_stores["gpt2"], tmp_path / "rows.db")
    with open_fact_store(tmp_path / "rows.db", teacher, tokenizer) as fact_store:
        yield fact_store


def open_copy(calibrated_stores, tokenizer, path):
    """Return a copy of the model with a calibrated store without facts."""
    shutil.copy(calibrated_stores["gpt2"], path)
    return open_fact_store(path, make_fact_model(make_teacher, tokenizer), tokenizer)


@pytest.fixture
def pack(fact_store):
    fact_store.write_many([replace(fact, tag="a tag", source="here") for fact in FACTS])
    return make_fact_pack(
        fact_store,
        list(fact_store.records.values()),
        "a pack",
        "CC0-1.0",
        hash_model(fact_store.model),
    )


@pytest.fixture(params=["pack", "pack.safetensors"])
def path(request, tmp_path):
    return tmp_path / "deep" / request.param


def read_manifest(path):
    if path.is_dir():
        return json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return json.loads(file.metadata()["manifest"])


def save_altered(pack, path, change=lambda manifest: None, **tensors):
    """Save a pack with an altered manifest or altered tensors."""
    pack.save(path)
    manifest = read_manifest(path)
    manifest = change(manifest) or manifest
    arrays = {"keys": pack.keys, "values": pack.values} | pack.calibration | tensors
    arrays = {
        name: np.ascontiguousarray(array) for name, array in arrays.items() if array is not None
    }
    if path.is_dir():
        (path / MANIFEST_FILE).write_text(json.dumps(manifest), encoding="utf-8")
        save_file(arrays, path / TENSORS_FILE)
    else:
        save_file(arrays, path, metadata={"manifest": json.dumps(manifest)})


def assert_equal_packs(first, second):
    assert first.manifest == second.manifest
    assert first.facts == second.facts
    assert first.calibration.keys() == second.calibration.keys() == set(list_tensor_shapes(1))
    for name in ("keys", "values"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    for name, array in first.calibration.items():
        np.testing.assert_array_equal(array, second.calibration[name])


def test_a_pack_holds_the_stored_facts(fact_store, pack):
    records = list(fact_store.records.values())
    assert pack.manifest["counts"] == {"facts": 4, "rows": sum(len(fact.rows) for fact in records)}
    assert {
        name: pack.manifest[name]
        for name in ("kind", "name", "license", "model_type", "key_layer", "value_layer")
    } == {
        "kind": "facts",
        "name": "a pack",
        "license": "CC0-1.0",
        "model_type": "gpt2",
        "key_layer": 1,
        "value_layer": 2,
    }
    assert pack.manifest["tags"] == ["a tag"]
    assert pack.manifest["width"] == 64
    assert pack.manifest["model_fingerprint"] == hash_model(fact_store.model)
    assert [fact.id for fact in pack.facts] == [0, 1, 2, 3]
    assert [row for fact in pack.facts for row in fact.rows] == list(range(len(pack.keys)))
    for fact, record in zip(pack.facts, records, strict=True):
        assert replace(fact, id=record.id, rows=record.rows) == record
        stored = fact_store.load_fact(record.id)
        np.testing.assert_array_equal(pack.keys[list(fact.rows)], stored.keys)
        np.testing.assert_array_equal(pack.values[list(fact.rows)], stored.values)
    for name, tensor in fact_store.hooks.matcher.relations.tensors.items():
        np.testing.assert_array_equal(pack.calibration[name], tensor.numpy())


def test_a_pack_is_loaded_from_a_folder_or_a_file(pack, path):
    pack.save(path)
    assert path.is_dir() == (path.suffix != ".safetensors")
    assert_equal_packs(load_fact_pack(path), pack)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "no partial file is left"
    if path.is_dir():
        assert {entry.name for entry in path.iterdir()} == {MANIFEST_FILE, TENSORS_FILE}


def test_a_pack_may_be_empty(fact_store, path):
    empty = make_fact_pack(fact_store, [], "nothing")
    empty.save(path)
    assert_equal_packs(load_fact_pack(path), empty)
    assert load_fact_pack(path).keys.shape == (0, 64)


def test_special_characters_survive_saving(fact_store, path):
    facts = [parse_fact(prompt='Ada "is" \\ {0}', answer="日本 🦊\n", tag="'; --", source="\t</b>")]
    written = [result.fact for result in fact_store.write_many(facts)]
    make_fact_pack(fact_store, written, "ö").save(path)
    (fact,) = load_fact_pack(path).facts
    assert (fact.prompt, fact.answer, fact.tag, fact.source) == (
        facts[0].prompt,
        facts[0].answer,
        facts[0].tag,
        facts[0].source,
    )


def test_an_existing_path_is_never_overwritten(pack, path, tmp_path):
    pack.save(path)
    before = {file: file.read_bytes() for file in path.parent.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match="is there already; give a new name, or remove it first"):
        replace(pack, facts=[]).save(path)
    assert before == {file: file.read_bytes() for file in path.parent.rglob("*") if file.is_file()}
    (tmp_path / "a file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        pack.save(tmp_path / "a file" / path.name)


def test_a_partial_pack_is_replaced_or_reported(pack, tmp_path):
    (tmp_path / "pack.partial").mkdir()
    (tmp_path / "pack.partial" / TENSORS_FILE).write_text("half")
    pack.save(tmp_path / "pack")
    assert_equal_packs(load_fact_pack(tmp_path / "pack"), pack)
    (tmp_path / "other.partial").write_text("half")
    (tmp_path / "other.safetensors.partial").mkdir()
    for name in ("other", "other.safetensors"):
        with pytest.raises(UserError, match="cannot be written"):
            pack.save(tmp_path / name)
        assert not (tmp_path / name).exists()


def test_other_files_are_rejected_as_packs(tmp_path):
    with pytest.raises(UserError, match="nothing is there; name a pack"):
        load_fact_pack(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match=f"no {TENSORS_FILE} is in it"):
        load_fact_pack(tmp_path)
    (tmp_path / "text").write_text("this is not a pack, only a text that is long enough")
    with pytest.raises(UserError, match="damaged or no pack"):
        load_fact_pack(tmp_path / "text")
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no manifest of a pack is in it"):
        load_fact_pack(tmp_path / "model.safetensors")
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / TENSORS_FILE)
    with pytest.raises(UserError, match="cannot be read"):
        load_fact_pack(tmp_path)


def test_a_truncated_pack_is_rejected(pack, path):
    pack.save(path)
    file = path / TENSORS_FILE if path.is_dir() else path
    content = file.read_bytes()
    for length in (0, 4, 8, 50, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(UserError, match="damaged or no pack") as raised:
            load_fact_pack(path)
        assert "\n" not in str(raised.value)
    file.write_bytes(content)
    if path.is_dir():
        manifest = (path / MANIFEST_FILE).read_bytes()
        for length in (0, 10, len(manifest) // 2):
            (path / MANIFEST_FILE).write_bytes(manifest[:length])
            with pytest.raises(UserError, match="damaged or no pack"):
                load_fact_pack(path)


def set_fact_key(name, value):
    """Return a function that sets a key of the first fact of a manifest; None removes the key."""

    def change(manifest):
        manifest["facts"][0][name] = value
        if value is None:
            del manifest["facts"][0][name]

    return change


def set_manifest_key(name, value):
    """Return a function that sets a key of the manifest; None removes the key."""

    def change(manifest):
        manifest[name] = value
        if value is None:
            del manifest[name]

    return change


INVALID_FACT = "fact 0 of its manifest is not one"
DAMAGED = "is damaged or no pack"
ALTERED_MANIFESTS = {
    "another format": (set_manifest_key("format", "zip"), "no manifest of a pack"),
    "no format": (set_manifest_key("format", None), "no manifest of a pack"),
    "a list": (lambda manifest: [manifest], "no manifest of a pack"),
    "a newer version": (
        set_manifest_key("version", PACK_VERSION + 1),
        f"version {PACK_VERSION + 1}, this dmt knows {PACK_VERSION}",
    ),
    "no version": (set_manifest_key("version", None), "version nothing, this dmt knows 3"),
    "no facts": (set_manifest_key("facts", None), DAMAGED),
    "facts that are a text": (
        set_manifest_key("facts", "abc"),
        "fact 0 of its manifest is not one",
    ),
    "facts that are numbers": (
        set_manifest_key("facts", [1, 2]),
        "fact 0 of its manifest is not one",
    ),
    "a missing fact": (lambda manifest: manifest["facts"].pop() and None, "not F32"),
    "no width": (set_manifest_key("width", None), DAMAGED),
    "another width": (set_manifest_key("width", 32), "not F32"),
    "no text": (set_fact_key("prompt", None), DAMAGED),
    "a number for a text": (set_fact_key("answer", 3), INVALID_FACT),
    "null for a text": (lambda manifest: manifest["facts"][0].update(tag=None), INVALID_FACT),
    "a text that is too long": (set_fact_key("source", "x" * 8_001), INVALID_FACT),
    "a lone surrogate": (set_fact_key("tag", "\ud800"), DAMAGED),
    "no tokens": (set_fact_key("answer_ids", []), "not one|not F32"),
    "a token that is a text": (set_fact_key("answer_ids", "abcdef"), INVALID_FACT),
    "a token below zero": (
        lambda manifest: manifest["facts"][0]["answer_ids"].__setitem__(0, -1),
        INVALID_FACT,
    ),
    "a token that is huge": (
        lambda manifest: manifest["facts"][0]["answer_ids"].__setitem__(0, 2**31),
        INVALID_FACT,
    ),
    "a token that is a fraction": (
        lambda manifest: manifest["facts"][0]["answer_ids"].__setitem__(0, 1.5),
        INVALID_FACT,
    ),
    "no thresholds": (set_fact_key("thresholds", []), INVALID_FACT),
    "one threshold too many": (
        lambda manifest: manifest["facts"][0]["thresholds"].append(0.5),
        INVALID_FACT,
    ),
    "a threshold that is NaN": (
        lambda manifest: manifest["facts"][0]["thresholds"].__setitem__(0, float("nan")),
        INVALID_FACT,
    ),
    "an infinite threshold": (
        lambda manifest: manifest["facts"][0]["thresholds"].__setitem__(0, float("-inf")),
        INVALID_FACT,
    ),
    "a threshold that is a text": (
        lambda manifest: manifest["facts"][0]["thresholds"].__setitem__(0, "1"),
        INVALID_FACT,
    ),
    "a date that is too large": (set_fact_key("created", 10**400), DAMAGED),
    "a date that is NaN": (set_fact_key("created", float("nan")), INVALID_FACT),
    "no model": (set_manifest_key("model_fingerprint", None), DAMAGED),
    "a model that is a list": (set_manifest_key("model_fingerprint", [1]), DAMAGED),
    "no family": (set_manifest_key("model_type", None), DAMAGED),
    "no license": (set_manifest_key("license", None), DAMAGED),
    "no name": (set_manifest_key("name", None), DAMAGED),
    "no layer": (set_manifest_key("key_layer", None), DAMAGED),
    "a layer that is a text": (set_manifest_key("value_layer", "2"), DAMAGED),
    "a layer below the first": (set_manifest_key("key_layer", -1), DAMAGED),
    "a value layer below the key layer": (set_manifest_key("key_layer", 3), DAMAGED),
    "a layer that is a fraction": (set_manifest_key("value_layer", 2.5), DAMAGED),
}


@pytest.mark.parametrize("name", ALTERED_MANIFESTS)
def test_an_altered_manifest_is_rejected(pack, path, name):
    change, error = ALTERED_MANIFESTS[name]
    save_altered(pack, path, change)
    with pytest.raises(UserError, match=error) as raised:
        load_fact_pack(path)
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)


ALTERED_TENSORS = {
    "float64": (lambda pack: {"keys": pack.keys.astype(np.float64)}, "keys are F64"),
    "float16": (lambda pack: {"values": pack.values.astype(np.float16)}, "values are F16"),
    "int32": (
        lambda pack: {"metric": pack.calibration["metric"].astype(np.int32)},
        "metric are I32",
    ),
    "too few rows": (lambda pack: {"keys": pack.keys[:-1]}, "keys are F32"),
    "one row too many": (
        lambda pack: {"values": np.concatenate([pack.values, pack.values[:1]])},
        "values are F32",
    ),
    "other widths": (lambda pack: {"keys": pack.keys[:, :5]}, "keys are F32"),
    "one dimension": (lambda pack: {"keys": pack.keys.ravel()}, "keys are F32"),
    "a mean of another width": (
        lambda pack: {"mean": pack.calibration["mean"][:5]},
        "mean are F32",
    ),
    "a metric that is not square": (
        lambda pack: {"metric": pack.calibration["metric"][:5]},
        "metric are F32",
    ),
    "the phrasings of another bank": (
        lambda pack: {"bank_states": pack.calibration["bank_states"][:-1]},
        "bank_states are F32",
    ),
    "weights of other features": (
        lambda pack: {"weights": pack.calibration["weights"][:, :-1]},
        "weights are F32",
    ),
    "no values": (lambda pack: {"values": None}, DAMAGED),
    "no quantiles": (lambda pack: {"quantiles": None}, DAMAGED),
    "quantiles that are NaN": (
        lambda pack: {"quantiles": pack.calibration["quantiles"] * np.nan},
        "quantiles are not all finite",
    ),
    "a key that is NaN": (
        lambda pack: {"keys": np.full_like(pack.keys, np.nan)},
        "keys are not all",
    ),
    "an infinite value": (
        lambda pack: {"values": pack.values * np.inf},
        "values are not all finite",
    ),
    "a mean that is NaN": (
        lambda pack: {"mean": pack.calibration["mean"] * np.nan},
        "mean are not all finite",
    ),
    "an infinite metric": (
        lambda pack: {"metric": np.full_like(pack.calibration["metric"], np.inf)},
        "metric are not all finite",
    ),
}


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("name", ALTERED_TENSORS)
def test_tensors_that_contradict_the_manifest_are_rejected(pack, path, name):
    change, error = ALTERED_TENSORS[name]
    save_altered(pack, path, **change(pack))
    with pytest.raises(UserError, match=error):
        load_fact_pack(path)


def test_an_oversized_pack_is_rejected_before_it_is_read(pack, path, monkeypatch):
    pack.save(path)
    file = path / TENSORS_FILE if path.is_dir() else path
    monkeypatch.setattr(packs, "MAX_TENSOR_BYTES", file.stat().st_size - 1)
    with pytest.raises(UserError, match="bytes, accepted are"):
        load_fact_pack(path)
    monkeypatch.undo()
    header = (
        b'{"keys":{"dtype":"F32","shape":[4000000000,4000000000],'
        b'"data_offsets":[0,64000000000000000000]}}'
    )
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match="damaged or no pack"):
        load_fact_pack(path)
    file.write_bytes((2**62).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match="damaged or no pack"):
        load_fact_pack(path)


def test_an_oversized_or_deeply_nested_manifest_is_rejected(pack, tmp_path, monkeypatch):
    pack.save(tmp_path / "pack")
    (tmp_path / "pack" / MANIFEST_FILE).write_text("[" * 100_000)
    with pytest.raises(UserError, match="damaged or no pack"):
        load_fact_pack(tmp_path / "pack")
    file = tmp_path / "pack" / TENSORS_FILE
    (tmp_path / "pack" / MANIFEST_FILE).write_text(" " * (file.stat().st_size // 16 + 1))
    monkeypatch.setattr(packs, "MAX_TENSOR_BYTES", file.stat().st_size)
    with pytest.raises(UserError, match=r"manifest\.json is too large"):
        load_fact_pack(tmp_path / "pack")


def test_texts_in_a_pack_are_not_executed(pack, path):
    """Python code and template syntax stay text."""
    save_altered(
        pack,
        path,
        lambda manifest: manifest["facts"][0].update(
            tag="__import__('os').abort()", source="{{7*7}}"
        ),
    )
    assert load_fact_pack(path).facts[0].tag == "__import__('os').abort()"


# Import.


def test_an_imported_pack_works_in_another_copy_of_the_model(
    pack, calibrated_stores, tokenizer, fact_store, tmp_path
):
    with open_copy(calibrated_stores, tokenizer, tmp_path / "other.db") as other:
        model_hash = hash_model(other.model)
        results = import_pack(other, pack, model_hash)
        assert [result.status for result in results] == ["written"] * 4
        for record, fact in zip(other.records.values(), pack.facts, strict=True):
            assert replace(record, id=0, rows=()) == replace(fact, id=0, rows=())
        assert torch.equal(
            compute_logits(other.model, tokenizer), compute_logits(fact_store.model, tokenizer)
        )
        assert all(recalls(other.model, tokenizer, fact) for fact in FACTS)
        assert [result.status for result in import_pack(other, pack, model_hash)] == [
            "unchanged"
        ] * 4
        assert len(other.records) == 4
        with_facts = compute_logits(other.model, tokenizer)
    with open_fact_store(
        tmp_path / "other.db",
        make_fact_model(make_teacher, tokenizer),
        tokenizer,
        read_only=True,
    ) as reopened:
        assert torch.equal(compute_logits(reopened.model, tokenizer), with_facts)


def test_an_imported_pack_replaces_contradicted_facts(pack, calibrated_stores, tokenizer, tmp_path):
    with open_copy(calibrated_stores, tokenizer, tmp_path / "other.db") as other:
        (old,) = other.write_many([parse_fact("Ada lives in Rows")])
        results = import_pack(other, pack, hash_model(other.model))
        assert [result.status for result in results] == ["replaced", *["written"] * 3]
        assert results[0].replaced_fact == old.fact
        assert results[0].fact.id in other.records
        assert old.fact.id not in other.records
        assert recalls(other.model, tokenizer, FACTS[0])
        history = {fact.id: fact for fact in other.fact_table.read(include_deleted=True)}
        assert (history[old.fact.id].deleted_reason, history[old.fact.id].replaced_by) == (
            "replaced",
            results[0].fact.id,
        )


WEIRD_FACTS = [
    parse_fact("Ada lives in Ravenhill.", tag="a tag", source="here"),
    parse_fact(prompt='Ada "is"', answer='"日本"\n 🦊', tag="'; --", source="\t</b>"),
    parse_fact(prompt="My cat is", answer="old?"),
    parse_fact(prompt="the fox: $", answer="5", closing="", subject=""),
]


def read_texts(fact_store):
    names = ("prompt", "answer", "subject", "tag", "source", "created")
    return [
        (*(getattr(fact, name) for name in names), fact_store.restore_closing(fact))
        for fact in fact_store.list()
    ]


def test_a_pack_is_rewritten_for_another_model(
    fact_store, calibrated_stores, tokenizer, tmp_path, path
):
    fact_store.write_many(WEIRD_FACTS)
    fact_store.export(path)
    shutil.copy(calibrated_stores["llama"], tmp_path / "llama.db")
    llama = make_fact_model(make_llama, tokenizer)
    with open_fact_store(tmp_path / "llama.db", llama, tokenizer) as other:
        with pytest.raises(UserError, match=r"another model .*import --rewrite writes"):
            other.import_(path)
        assert not other.list()
        results = other.import_(path, rewrite=True)
        assert [result.status for result in results] == ["written"] * len(WEIRD_FACTS)
        assert read_texts(other) == read_texts(fact_store)
        assert [texts[-1] for texts in read_texts(other)] == [".", "", "", ""]
        assert all(recalls(llama, tokenizer, fact) for fact in WEIRD_FACTS)
        assert {result.status for result in other.import_(path, rewrite=True)} == {"unchanged"}


def test_a_pack_is_rewritten_as_a_whole_or_not_at_all(pack, calibrated_stores, tokenizer, tmp_path):
    shutil.copy(calibrated_stores["llama"], tmp_path / "llama.db")
    llama = make_fact_model(make_llama, tokenizer)
    with open_fact_store(tmp_path / "llama.db", llama, tokenizer) as other:
        for changes, error in (
            ({"answer": " x" * 40}, "the model reads 32 at most"),
            ({"subject": "Zoe"}, "subject 'Zoe' is not in the prompt"),
            ({"prompt": " "}, "a fact needs a prompt"),
        ):
            facts = [*pack.facts[:3], replace(pack.facts[3], **changes)]
            with pytest.raises(UserError, match=f"pack a pack: .*{error}") as raised:
                other.import_(replace(pack, facts=facts), rewrite=True)
            assert "\n" not in str(raised.value)
            assert not other.list(include_deleted=True)
        empty = replace(pack, facts=[], keys=pack.keys[:0], values=pack.values[:0])
        assert other.import_(empty, rewrite=True) == []


def test_a_merged_pack_keeps_the_closings(fact_store, tmp_path):
    fact_store.write_many(WEIRD_FACTS)
    ids = list(fact_store.records)
    packs_by_half = [
        fact_store.export(tmp_path / "a", ids[:2]),
        fact_store.export(tmp_path / "b", ids[2:]),
    ]
    merged, _ = merge_packs(packs_by_half[::-1], "both")
    assert [merged.closings[fact.id] for fact in merged.facts] == ["", "", ".", ""]
    merged.save(tmp_path / "both")
    assert load_fact_pack(tmp_path / "both").closings == merged.closings


def test_a_pack_from_before_has_no_closings(pack, path):
    def remove_closings(manifest):
        for fact in manifest["facts"]:
            del fact["closing"]

    save_altered(pack, path, remove_closings)
    assert {*load_fact_pack(path).closings.values()} == {""}


@pytest.mark.parametrize("closing", [3, None, " and more"])
def test_a_closing_that_is_none_is_rejected(pack, path, closing):
    def change(manifest):
        manifest["facts"][1]["closing"] = closing

    save_altered(pack, path, change)
    with pytest.raises(UserError, match=r"pack .* fact 1 of its manifest is not one"):
        load_fact_pack(path)


def test_importing_into_an_empty_store_takes_the_layers_of_the_pack(
    pack, tokenizer, tmp_path, monkeypatch
):
    model = make_fact_model(make_teacher, tokenizer)
    monkeypatch.setattr(
        "dmt.editing.layer_selection.load_corpus",
        lambda _: type("corpus", (), {"validation": PROSE}),
    )
    with open_fact_store(tmp_path / "other.db", model, tokenizer) as other:
        import_pack(other, pack, hash_model(model))
        assert (other.hooks.key_layer, other.hooks.value_layer) == (1, 2)
        assert recalls(model, tokenizer, FACTS[0])


def test_a_pack_that_does_not_fit_the_model_is_rejected(pack, fact_store, tokenizer):
    model_hash = hash_model(fact_store.model)
    before = dict(fact_store.records)
    for changes, error in (
        ({"model_fingerprint": "0" * 64}, "belongs to another model .*dmt memory import --rewrite"),
        ({"key_layer": 0}, "key layer 0 and value layer 2, the facts of this model have 1 and 2"),
        ({"value_layer": 1}, "key layer 1 and value layer 1"),
    ):
        with pytest.raises(UserError, match=error):
            import_pack(fact_store, replace(pack, manifest=pack.manifest | changes), model_hash)
    with pytest.raises(UserError, match="belongs to another model"):
        import_pack(fact_store, pack, hash_model(make_fact_model(make_llama, tokenizer)))
    facts = [replace(pack.facts[0], answer_ids=(300, *pack.facts[0].answer_ids[1:]))]
    with pytest.raises(UserError, match="not in the model's vocabulary of 300"):
        import_pack(fact_store, replace(pack, facts=[*facts, *pack.facts[1:]]), model_hash)
    assert check_fact_pack_fits(pack, fact_store, model_hash, "here") is None
    assert fact_store.records == before
    assert len(fact_store.fact_table.read(include_deleted=True)) == 4


@pytest.mark.parametrize("has_calibration", [True, False])
def test_a_pack_with_a_wrong_width_or_layer_is_rejected(
    pack, calibrated_stores, tokenizer, tmp_path, has_calibration
):
    model = make_fact_model(make_teacher, tokenizer)
    if has_calibration:
        shutil.copy(calibrated_stores["gpt2"], tmp_path / "other.db")
    with open_fact_store(tmp_path / "other.db", model, tokenizer) as other:
        narrow = {name: getattr(pack, name)[:, :WIDTH].copy() for name in ("keys", "values")}
        for altered_pack, error in (
            (replace(pack, manifest=pack.manifest | {"width": WIDTH}, **narrow), "16 wide"),
            (replace(pack, manifest=pack.manifest | {"key_layer": 5, "value_layer": 7}), "layer"),
        ):
            with pytest.raises(UserError, match=error):
                import_pack(other, altered_pack, hash_model(model))
            with pytest.raises(UserError, match=error):
                load_packs(other, [altered_pack], hash_model(model))
        assert other.records == {}


# Temporary packs.


def pack_fact(calibrated_stores, tokenizer, tmp_path, sentence, name):
    with open_copy(calibrated_stores, tokenizer, tmp_path / f"{name}.db") as fact_store:
        return make_fact_pack(
            fact_store,
            [result.fact for result in fact_store.write_many([parse_fact(sentence)])],
            name,
            model_hash=hash_model(fact_store.model),
        )


@pytest.mark.parametrize("store", ["empty", "written", "none"])
def test_temporary_packs_leave_no_trace(store, calibrated_stores, tokenizer, tmp_path):
    first = pack_fact(calibrated_stores, tokenizer, tmp_path, "Ada lives in Ravenhill", "first")
    second = pack_fact(calibrated_stores, tokenizer, tmp_path, "Ben eats March", "second")
    model = make_fact_model(make_teacher, tokenizer)
    model_hash = hash_model(model)
    plain_logits = compute_logits(model, tokenizer)
    if store == "none":
        fact_store = FactStore(model, tokenizer, None)
    else:
        shutil.copy(calibrated_stores["gpt2"], tmp_path / "host.db")
        fact_store = open_fact_store(tmp_path / "host.db", model, tokenizer)
        if store == "written":
            fact_store.write_many([FACTS[3], parse_fact("It was Ada who ran")])
    with fact_store:
        logits_before, records = compute_logits(model, tokenizer), dict(fact_store.records)
        assert torch.equal(logits_before, plain_logits) == (store != "written")
        load_packs(fact_store, [first], model_hash)
        assert recalls(model, tokenizer, FACTS[0])
        assert not recalls(model, tokenizer, parse_fact("Ben eats March"))
        record = fact_store.load_fact(-1).record
        assert (record.answer, record.rows[0]) == (" Ravenhill", -1)
        load_packs(fact_store, [second], model_hash)
        assert recalls(model, tokenizer, parse_fact("Ben eats March"))
        assert not recalls(model, tokenizer, FACTS[0])
        with_second = compute_logits(model, tokenizer)
        load_packs(fact_store, [first, second], model_hash)
        assert recalls(model, tokenizer, FACTS[0])
        assert recalls(model, tokenizer, parse_fact("Ben eats March"))
        facts = [fact for entries in fact_store.temporary_packs.values() for fact in entries]
        rows = [row for fact in facts for row in fact.record.rows]
        assert len(rows) == len(set(rows))
        assert [fact.record.answer for fact in facts] == [" Ravenhill", " March"]
        load_packs(fact_store, [second], model_hash)
        assert torch.equal(compute_logits(model, tokenizer), with_second)
        load_packs(fact_store, [], model_hash)
        assert torch.equal(compute_logits(model, tokenizer), logits_before)
        assert fact_store.records == records
        if store != "none":
            assert len(fact_store.fact_table.read(include_deleted=True)) == len(records)
    if store != "none":
        with open_fact_store(
            tmp_path / "host.db",
            make_fact_model(make_teacher, tokenizer),
            tokenizer,
            read_only=True,
        ) as reopened:
            assert torch.equal(compute_logits(reopened.model, tokenizer), logits_before)


def test_temporary_packs_stay_while_facts_are_written(calibrated_stores, tokenizer, tmp_path):
    first = pack_fact(calibrated_stores, tokenizer, tmp_path, "Ada lives in Ravenhill", "first")
    with open_copy(calibrated_stores, tokenizer, tmp_path / "host.db") as fact_store:
        load_packs(fact_store, [first], hash_model(fact_store.model))
        fact_store.write_many(FACTS[1:2])
        assert recalls(fact_store.model, tokenizer, FACTS[0])
        assert recalls(fact_store.model, tokenizer, FACTS[1])
        fact_store.delete(list(fact_store.records))
        assert recalls(fact_store.model, tokenizer, FACTS[0])
        assert [fact.answer for fact in fact_store.fact_table.read(include_deleted=True)] == [
            " rows"
        ]


def test_a_temporary_pack_that_does_not_fit_changes_nothing(calibrated_stores, tokenizer, tmp_path):
    first = pack_fact(calibrated_stores, tokenizer, tmp_path, "Ada lives in Ravenhill", "first")
    with open_copy(calibrated_stores, tokenizer, tmp_path / "host.db") as fact_store:
        load_packs(fact_store, [first], hash_model(fact_store.model))
        with pytest.raises(UserError, match="another model"):
            load_packs(
                fact_store,
                [first, replace(first, manifest=first.manifest | {"model_fingerprint": "x"})],
                hash_model(fact_store.model),
            )
        assert recalls(fact_store.model, tokenizer, FACTS[0])


def test_ids_of_temporary_facts_and_rows_are_negative(pack):
    temporary_facts = unpack_facts(pack, 10)
    assert [stored.record.id for stored in temporary_facts] == [-11, -12, -13, -14]
    rows = [row for stored in temporary_facts for row in stored.record.rows]
    assert rows == list(range(-11, -11 - len(pack.keys), -1))
    for stored, fact in zip(temporary_facts, pack.facts, strict=True):
        assert replace(stored.record, id=fact.id, rows=fact.rows) == fact
        np.testing.assert_array_equal(stored.keys, pack.keys[list(fact.rows)])
        np.testing.assert_array_equal(stored.values, pack.values[list(fact.rows)])


# Diff and merge.


def variant(pack, changes, name="other", license=""):
    """Return the pack with changed facts, by index; facts whose changes are None are left out."""
    facts = [
        replace(fact, **(changes.get(index) or {}))
        for index, fact in enumerate(pack.facts)
        if changes.get(index, {}) is not None
    ]
    rows = [row for fact in facts for row in fact.rows]
    next_row, numbered_facts = 0, []
    for index, fact in enumerate(facts):
        numbered_facts.append(
            replace(fact, id=index, rows=tuple(range(next_row, next_row + len(fact.rows))))
        )
        next_row += len(fact.rows)
    return replace(
        pack,
        facts=numbered_facts,
        keys=pack.keys[rows] + 1,
        values=pack.values[rows] + 1,
        manifest=pack.manifest | {"name": name, "license": license},
    )


def test_diff_facts_compares_two_lists(pack):
    other = variant(
        pack,
        {
            0: {"answer": " Rows"},
            1: None,
            2: {"answer": "  a  lazy dog "},
            3: {"subject": "Somebody"},
        },
    )
    difference = diff_facts(pack.facts, other.facts)
    assert difference.only_first == [pack.facts[1], pack.facts[3]]
    assert difference.only_second == [other.facts[2]]
    assert difference.different == [(pack.facts[0], other.facts[0])]
    assert difference.num_same == 1
    assert diff_facts(pack.facts, pack.facts).num_same == 4
    assert diff_facts([], []).different == []
    uppercase = [replace(fact, prompt=fact.prompt.upper() + " ") for fact in pack.facts]
    assert diff_facts(pack.facts, uppercase).num_same == 4, "case and spaces do not matter"


@pytest.mark.parametrize(
    ("prefer", "newer", "kept_side"),
    [("newest", 1, 1), ("newest", -1, 0), ("first", 1, 0), ("first", -1, 0)],
)
def test_merge_keeps_one_of_two_contradicting_facts(pack, prefer, newer, kept_side):
    created = pack.facts[0].created + newer
    other = variant(
        pack,
        {0: {"answer": " Rows", "created": created}, 1: None, 3: {"subject": "X"}},
        license="MIT",
    )
    sides = (pack, pack.facts[0]), (other, other.facts[0])
    merged, conflicts = merge_packs([pack, other], "both", prefer)
    assert conflicts == [(sides[kept_side][1], sides[1 - kept_side][1])]
    assert [fact.prompt for fact in merged.facts] == [
        fact.prompt for fact in [*pack.facts, other.facts[2]]
    ]
    assert merged.facts[0].answer == sides[kept_side][1].answer
    assert [fact.id for fact in merged.facts] == list(range(5))
    assert [row for fact in merged.facts for row in fact.rows] == list(range(len(merged.keys)))
    from_pack, from_fact = sides[kept_side]
    for name in ("keys", "values"):
        tensor = getattr(merged, name)
        np.testing.assert_array_equal(
            tensor[list(merged.facts[0].rows)], getattr(from_pack, name)[list(from_fact.rows)]
        )
        np.testing.assert_array_equal(
            tensor[list(merged.facts[1].rows)], getattr(pack, name)[list(pack.facts[1].rows)]
        )
        np.testing.assert_array_equal(
            tensor[list(merged.facts[4].rows)], getattr(other, name)[list(other.facts[2].rows)]
        )
    assert merged.manifest["counts"] == {"facts": 5, "rows": len(merged.keys)}
    assert (merged.manifest["name"], merged.manifest["license"]) == ("both", "CC0-1.0 and MIT")
    assert pack.manifest["name"] == "a pack"


def test_the_same_fact_twice_is_no_conflict(pack):
    later = variant(
        pack, {index: {"created": fact.created + 1} for index, fact in enumerate(pack.facts)}
    )
    merged, conflicts = merge_packs([pack, later, pack], "one")
    assert conflicts == []
    assert [fact.created for fact in merged.facts] == [fact.created + 1 for fact in pack.facts]
    np.testing.assert_array_equal(merged.keys, later.keys)
    merged, _ = merge_packs([pack, later], "one", "first")
    np.testing.assert_array_equal(merged.keys, pack.keys)


def test_packs_of_different_models_cannot_be_merged(pack):
    for name, value in (
        ("model_fingerprint", "x"),
        ("key_layer", 0),
        ("value_layer", 1),
        ("width", 3),
    ):
        with pytest.raises(UserError, match=f"cannot be merged: {name} "):
            merge_packs([pack, replace(pack, manifest=pack.manifest | {name: value})], "both")


def test_a_merged_pack_can_be_saved_and_applied(pack, calibrated_stores, tokenizer, tmp_path):
    second = pack_fact(calibrated_stores, tokenizer, tmp_path, "Clara eats March", "second")
    merged, conflicts = merge_packs([pack, second], "both")
    assert conflicts == []
    merged.save(tmp_path / "both")
    with open_copy(calibrated_stores, tokenizer, tmp_path / "host.db") as fact_store:
        load_packs(fact_store, [load_fact_pack(tmp_path / "both")], hash_model(fact_store.model))
        assert all(
            recalls(fact_store.model, tokenizer, fact)
            for fact in [*FACTS, parse_fact("Clara eats March")]
        )
    empty, _ = merge_packs(
        [replace(pack, facts=[], keys=pack.keys[:0], values=pack.values[:0])] * 2, "nothing"
    )
    assert empty.keys.shape == (0, 64)


def test_loading_a_pack_opens_no_store(pack, path, monkeypatch):
    monkeypatch.setattr(RowStore, "__init__", lambda *_, **__: pytest.fail("a store was opened"))
    pack.save(path)
    assert load_fact_pack(path).facts == pack.facts
