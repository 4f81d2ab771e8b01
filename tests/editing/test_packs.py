"""Packs: what is given away comes back the same, what is not a pack is refused before it costs anything, guests leave no trace."""

# ruff: noqa: F811  (fixtures are imported)
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import WIDTH, make_llama, make_teacher
from safetensors.numpy import save_file
from test_fact_store import (  # noqa: F401  (`begun` is a fixture)
    FACTS,
    PROSE,
    begun,
    logits_of,
    opened,
    repeats,
    speaker,
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
from dmt.models.fact_hooks import get_fact_hooks
from dmt.models.fingerprint import hash_model
from dmt.store import RowStore


@pytest.fixture
def teacher(tokenizer):
    return speaker(make_teacher, tokenizer)


@pytest.fixture
def book(begun, teacher, tokenizer, tmp_path):
    shutil.copy(begun["gpt2"], tmp_path / "rows.db")
    with opened(tmp_path / "rows.db", teacher, tokenizer) as made:
        yield made


def new_book(begun, tokenizer, place):
    """The same model again with a book of its own, in which nothing is written yet."""
    shutil.copy(begun["gpt2"], place)
    return opened(place, speaker(make_teacher, tokenizer), tokenizer)


@pytest.fixture
def pack(book):
    book.write_many([replace(fact, tag="told", source="here") for fact in FACTS])
    return make_fact_pack(
        book, list(book.records.values()), "a pack", "CC0-1.0", hash_model(book.model)
    )


@pytest.fixture(params=["pack", "pack.safetensors"])
def place(request, tmp_path):
    return tmp_path / "deep" / request.param


def manifest_of(place):
    if place.is_dir():
        return json.loads((place / MANIFEST_FILE).read_text(encoding="utf-8"))
    from safetensors import safe_open

    with safe_open(place, framework="numpy") as file:
        return json.loads(file.metadata()["manifest"])


def rewritten(pack, place, change=lambda manifest: None, **tensors):
    """A pack at `place` whose manifest and tensors somebody has changed."""
    pack.save(place)
    manifest = manifest_of(place)
    manifest = change(manifest) or manifest
    arrays = {name: getattr(pack, name) for name in ("keys", "values", "mean", "metric")} | tensors
    arrays = {
        name: np.ascontiguousarray(array) for name, array in arrays.items() if array is not None
    }
    if place.is_dir():
        (place / MANIFEST_FILE).write_text(json.dumps(manifest), encoding="utf-8")
        save_file(arrays, place / TENSORS_FILE)
    else:
        save_file(arrays, place, metadata={"manifest": json.dumps(manifest)})


def same(first, second):
    assert first.manifest == second.manifest
    assert first.facts == second.facts
    for name in ("keys", "values", "mean", "metric"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_a_pack_holds_the_stored_facts(book, pack):
    known = list(book.records.values())
    assert pack.manifest["counts"] == {"facts": 4, "rows": sum(len(fact.rows) for fact in known)}
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
    assert pack.manifest["tags"] == ["told"]
    assert pack.manifest["width"] == 64
    assert pack.manifest["model_fingerprint"] == hash_model(book.model)
    assert [fact.id for fact in pack.facts] == [0, 1, 2, 3]
    assert [row for fact in pack.facts for row in fact.rows] == list(range(len(pack.keys)))
    for fact, there in zip(pack.facts, known, strict=True):
        assert replace(fact, id=there.id, rows=there.rows) == there
        for row, part in zip(fact.rows, book.get_rows(there.id), strict=True):
            np.testing.assert_array_equal(pack.keys[row], part.key.numpy())
            np.testing.assert_array_equal(pack.values[row], part.value.numpy())
    np.testing.assert_array_equal(pack.metric, book.calibration.metric.numpy())
    np.testing.assert_array_equal(pack.mean, book.calibration.mean.numpy())


def test_a_pack_is_loaded_from_a_folder_or_a_file(pack, place):
    pack.save(place)
    assert place.is_dir() == (place.suffix != ".safetensors")
    same(load_fact_pack(place), pack)
    assert [entry.name for entry in place.parent.iterdir()] == [place.name], (
        "nothing half made is left"
    )
    if place.is_dir():
        assert {entry.name for entry in place.iterdir()} == {MANIFEST_FILE, TENSORS_FILE}


def test_no_facts_are_a_pack_too(book, place):
    empty = make_fact_pack(book, [], "nothing")
    empty.save(place)
    same(load_fact_pack(place), empty)
    assert load_fact_pack(place).keys.shape == (0, 64)


def test_texts_of_all_kinds_come_back(book, place):
    odd = [parse_fact(prompt='Ada "is" \\ {0}', answer="日本 🦊\n", tag="'; --", source="\t</b>")]
    written = [entry.fact for entry in book.write_many(odd)]
    make_fact_pack(book, written, "ö").save(place)
    (found,) = load_fact_pack(place).facts
    assert (found.prompt, found.answer, found.tag, found.source) == (
        odd[0].prompt,
        odd[0].answer,
        odd[0].tag,
        odd[0].source,
    )


def test_an_existing_path_is_never_overwritten(pack, place, tmp_path):
    pack.save(place)
    before = {file: file.read_bytes() for file in place.parent.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match="is there already; give a new name, or remove it first"):
        replace(pack, facts=[]).save(place)
    assert before == {file: file.read_bytes() for file in place.parent.rglob("*") if file.is_file()}
    (tmp_path / "a file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        pack.save(tmp_path / "a file" / place.name)


def test_where_a_half_made_one_is_in_the_way_it_is_made_anew_or_told(pack, tmp_path):
    (tmp_path / "pack.partial").mkdir()
    (tmp_path / "pack.partial" / TENSORS_FILE).write_text("half")
    pack.save(tmp_path / "pack")
    same(load_fact_pack(tmp_path / "pack"), pack)
    (tmp_path / "other.partial").write_text("half")
    (tmp_path / "other.safetensors.partial").mkdir()
    for name in ("other", "other.safetensors"):
        with pytest.raises(UserError, match="cannot be written"):
            pack.save(tmp_path / name)
        assert not (tmp_path / name).exists()


def test_nothing_and_something_else_are_no_packs(tmp_path):
    with pytest.raises(UserError, match="nothing is there; name a pack"):
        load_fact_pack(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match=f"no {TENSORS_FILE} is in it"):
        load_fact_pack(tmp_path)
    (tmp_path / "text").write_text("this is no pack at all, whatever one may think")
    with pytest.raises(UserError, match="damaged or no pack"):
        load_fact_pack(tmp_path / "text")
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no manifest of a pack is in it"):
        load_fact_pack(tmp_path / "model.safetensors")
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / TENSORS_FILE)
    with pytest.raises(UserError, match="cannot be read"):
        load_fact_pack(tmp_path)


def test_a_truncated_pack_is_refused(pack, place):
    pack.save(place)
    file = place / TENSORS_FILE if place.is_dir() else place
    whole = file.read_bytes()
    for length in (0, 4, 8, 50, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match="damaged or no pack") as told:
            load_fact_pack(place)
        assert "\n" not in str(told.value)
    file.write_bytes(whole)
    if place.is_dir():
        manifest = (place / MANIFEST_FILE).read_bytes()
        for length in (0, 10, len(manifest) // 2):
            (place / MANIFEST_FILE).write_bytes(manifest[:length])
            with pytest.raises(UserError, match="damaged or no pack"):
                load_fact_pack(place)


def fact(name, value):
    """A change to the first fact of a manifest; None takes the name away."""

    def change(manifest):
        manifest["facts"][0][name] = value
        if value is None:
            del manifest["facts"][0][name]

    return change


def top(name, value):
    """The same to the manifest."""

    def change(manifest):
        manifest[name] = value
        if value is None:
            del manifest[name]

    return change


NO_FACT = "fact 0 of its manifest is not one"
DAMAGED = "is damaged or no pack"
FORGED = {
    "another format": (top("format", "zip"), "no manifest of a pack"),
    "no format": (top("format", None), "no manifest of a pack"),
    "a list": (lambda manifest: [manifest], "no manifest of a pack"),
    "a newer version": (
        top("version", PACK_VERSION + 1),
        f"version {PACK_VERSION + 1}, this dmt knows {PACK_VERSION}",
    ),
    "no version": (top("version", None), "version nothing, this dmt knows 2"),
    "no facts": (top("facts", None), DAMAGED),
    "facts that are a text": (top("facts", "abc"), "fact 0 of its manifest is not one"),
    "facts that are numbers": (top("facts", [1, 2]), "fact 0 of its manifest is not one"),
    "too few facts": (lambda manifest: manifest["facts"].pop() and None, "not F32"),
    "no width": (top("width", None), DAMAGED),
    "another width": (top("width", 32), "not F32"),
    "no text": (fact("prompt", None), DAMAGED),
    "a number for a text": (fact("answer", 3), NO_FACT),
    "null for a text": (lambda manifest: manifest["facts"][0].update(tag=None), NO_FACT),
    "a text too long": (fact("source", "x" * 8_001), NO_FACT),
    "half a character": (fact("tag", "\ud800"), DAMAGED),
    "no tokens": (fact("answer_ids", []), "not one|not F32"),
    "a token that is a text": (fact("answer_ids", "abcdef"), NO_FACT),
    "a token below zero": (
        lambda manifest: manifest["facts"][0]["answer_ids"].__setitem__(0, -1),
        NO_FACT,
    ),
    "a token that is huge": (
        lambda manifest: manifest["facts"][0]["answer_ids"].__setitem__(0, 2**31),
        NO_FACT,
    ),
    "a token that is a fraction": (
        lambda manifest: manifest["facts"][0]["answer_ids"].__setitem__(0, 1.5),
        NO_FACT,
    ),
    "a subject of no tokens": (fact("subject_ids", [[]]), NO_FACT),
    "a subject that is no list": (fact("subject_ids", 7), DAMAGED),
    "a subject token that is huge": (fact("subject_ids", [[2**40]]), NO_FACT),
    "no reach": (fact("thresholds", []), NO_FACT),
    "a reach too many": (lambda manifest: manifest["facts"][0]["thresholds"].append(0.5), NO_FACT),
    "a reach that is none": (
        lambda manifest: manifest["facts"][0]["thresholds"].__setitem__(0, float("nan")),
        NO_FACT,
    ),
    "an endless reach": (
        lambda manifest: manifest["facts"][0]["thresholds"].__setitem__(0, float("-inf")),
        NO_FACT,
    ),
    "a reach that is a text": (
        lambda manifest: manifest["facts"][0]["thresholds"].__setitem__(0, "1"),
        NO_FACT,
    ),
    "a date past all dates": (fact("created", 10**400), DAMAGED),
    "no date": (fact("created", float("nan")), NO_FACT),
    "no model": (top("model_fingerprint", None), DAMAGED),
    "a model that is a list": (top("model_fingerprint", [1]), DAMAGED),
    "no family": (top("model_type", None), DAMAGED),
    "no licence": (top("license", None), DAMAGED),
    "no name": (top("name", None), DAMAGED),
    "no layer": (top("key_layer", None), DAMAGED),
    "a layer that is a text": (top("value_layer", "2"), DAMAGED),
    "a layer below the first": (top("key_layer", -1), DAMAGED),
    "answered before it is heard": (top("key_layer", 3), DAMAGED),
    "a layer that is a fraction": (top("value_layer", 2.5), DAMAGED),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_manifest_that_somebody_has_changed_is_refused(pack, place, name):
    change, error = FORGED[name]
    rewritten(pack, place, change)
    with pytest.raises(UserError, match=error) as told:
        load_fact_pack(place)
    assert "\n" not in str(told.value)
    assert str(place) in str(told.value)


TENSORS_FORGED = {
    "other numbers": (lambda pack: {"keys": pack.keys.astype(np.float64)}, "keys are F64"),
    "half numbers": (lambda pack: {"values": pack.values.astype(np.float16)}, "values are F16"),
    "whole numbers": (lambda pack: {"metric": pack.metric.astype(np.int32)}, "metric are I32"),
    "too few rows": (lambda pack: {"keys": pack.keys[:-1]}, "keys are F32"),
    "a row too many": (
        lambda pack: {"values": np.concatenate([pack.values, pack.values[:1]])},
        "values are F32",
    ),
    "other widths": (lambda pack: {"keys": pack.keys[:, :5]}, "keys are F32"),
    "one dimension": (lambda pack: {"keys": pack.keys.ravel()}, "keys are F32"),
    "a mean of another width": (lambda pack: {"mean": pack.mean[:5]}, "mean are F32"),
    "a metric that is not square": (lambda pack: {"metric": pack.metric[:5]}, "metric are F32"),
    "no values": (lambda pack: {"values": None}, DAMAGED),
    "a key that is no number": (
        lambda pack: {"keys": np.full_like(pack.keys, np.nan)},
        "keys are not all",
    ),
    "an endless value": (
        lambda pack: {"values": pack.values * np.inf},
        "values are not all finite",
    ),
    "a mean that is no number": (
        lambda pack: {"mean": pack.mean * np.nan},
        "mean are not all finite",
    ),
    "an endless metric": (
        lambda pack: {"metric": np.full_like(pack.metric, np.inf)},
        "metric are not all finite",
    ),
}


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("name", TENSORS_FORGED)
def test_tensors_that_are_not_what_the_manifest_says_are_refused(pack, place, name):
    change, error = TENSORS_FORGED[name]
    rewritten(pack, place, **change(pack))
    with pytest.raises(UserError, match=error):
        load_fact_pack(place)


def test_a_pack_of_absurd_size_is_refused_before_it_is_read(pack, place, monkeypatch):
    pack.save(place)
    file = place / TENSORS_FILE if place.is_dir() else place
    monkeypatch.setattr(packs, "MAX_TENSOR_BYTES", file.stat().st_size - 1)
    with pytest.raises(UserError, match="bytes, accepted are"):
        load_fact_pack(place)
    monkeypatch.undo()
    header = b'{"keys":{"dtype":"F32","shape":[4000000000,4000000000],"data_offsets":[0,64000000000000000000]}}'
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match="damaged or no pack"):
        load_fact_pack(place)
    file.write_bytes((2**62).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match="damaged or no pack"):
        load_fact_pack(place)


def test_a_manifest_of_absurd_size_or_depth_is_refused(pack, tmp_path, monkeypatch):
    pack.save(tmp_path / "pack")
    (tmp_path / "pack" / MANIFEST_FILE).write_text("[" * 100_000)
    with pytest.raises(UserError, match="damaged or no pack"):
        load_fact_pack(tmp_path / "pack")
    file = tmp_path / "pack" / TENSORS_FILE
    (tmp_path / "pack" / MANIFEST_FILE).write_text(" " * (file.stat().st_size // 16 + 1))
    monkeypatch.setattr(packs, "MAX_TENSOR_BYTES", file.stat().st_size)
    with pytest.raises(UserError, match=r"manifest\.json is too large"):
        load_fact_pack(tmp_path / "pack")


def test_nothing_in_a_pack_is_run(pack, place):
    """Names of Python's in every text stay texts."""
    rewritten(
        pack,
        place,
        lambda manifest: manifest["facts"][0].update(
            tag="__import__('os').abort()", source="{{7*7}}"
        ),
    )
    assert load_fact_pack(place).facts[0].tag == "__import__('os').abort()"


# Whose it is.


def test_an_imported_pack_works_in_another_copy_of_the_model(
    pack, begun, tokenizer, book, tmp_path
):
    with new_book(begun, tokenizer, tmp_path / "other.db") as other:
        model = hash_model(other.model)
        outcomes = import_pack(other, pack, model)
        assert [entry.status for entry in outcomes] == ["written"] * 4
        for there, fact in zip(other.records.values(), pack.facts, strict=True):
            assert replace(there, id=0, rows=()) == replace(fact, id=0, rows=())
        assert torch.equal(logits_of(other.model, tokenizer), logits_of(book.model, tokenizer))
        assert all(repeats(other.model, tokenizer, fact) for fact in FACTS)
        assert [entry.status for entry in import_pack(other, pack, model)] == ["unchanged"] * 4
        assert len(other.records) == 4
        with_facts = logits_of(other.model, tokenizer)
    with opened(
        tmp_path / "other.db", speaker(make_teacher, tokenizer), tokenizer, read_only=True
    ) as again:
        assert torch.equal(logits_of(again.model, tokenizer), with_facts)


def test_an_imported_pack_replaces_contradicted_facts(pack, begun, tokenizer, tmp_path):
    with new_book(begun, tokenizer, tmp_path / "other.db") as other:
        (old,) = other.write_many([parse_fact("Ada lives in Rows")])
        outcomes = import_pack(other, pack, hash_model(other.model))
        assert [entry.status for entry in outcomes] == ["replaced", *["written"] * 3]
        assert outcomes[0].replaced_fact == old.fact
        assert outcomes[0].fact.id in other.records
        assert old.fact.id not in other.records
        assert repeats(other.model, tokenizer, FACTS[0])
        history = {fact.id: fact for fact in other.fact_table.read(include_deleted=True)}
        assert (history[old.fact.id].deleted_reason, history[old.fact.id].replaced_by) == (
            "replaced",
            outcomes[0].fact.id,
        )


def test_a_book_not_begun_is_begun_in_the_layers_of_the_pack(
    pack, tokenizer, tmp_path, monkeypatch
):
    model = speaker(make_teacher, tokenizer)
    monkeypatch.setattr(
        "dmt.editing.layer_selection.load_corpus",
        lambda _: type("corpus", (), {"validation": PROSE}),
    )
    with opened(tmp_path / "other.db", model, tokenizer) as other:
        import_pack(other, pack, hash_model(model))
        assert (other.hooks.key_layer, other.hooks.value_layer) == (1, 2)
        assert repeats(model, tokenizer, FACTS[0])


def test_of_another_model_other_layers_or_unknown_tokens_it_is_refused(pack, book, tokenizer):
    model = hash_model(book.model)
    before = book.records
    for changes, error in (
        ({"model_fingerprint": "0" * 64}, "belongs to another model .*write its sentences instead"),
        ({"key_layer": 0}, "key layer 0 and value layer 2, the facts of this model have 1 and 2"),
        ({"value_layer": 1}, "key layer 1 and value layer 1"),
    ):
        with pytest.raises(UserError, match=error):
            import_pack(book, replace(pack, manifest=pack.manifest | changes), model)
    with pytest.raises(UserError, match="belongs to another model"):
        import_pack(book, pack, hash_model(speaker(make_llama, tokenizer)))
    for changes in (
        {"answer_ids": (300, *pack.facts[0].answer_ids[1:])},
        {"subject_ids": ((1, 300),)},
    ):
        facts = [replace(pack.facts[0], **changes), *pack.facts[1:]]
        with pytest.raises(UserError, match="not in the model's vocabulary of 300"):
            import_pack(book, replace(pack, facts=facts), model)
    assert check_fact_pack_fits(pack, book, model, "here") is None
    assert book.records == before
    assert len(book.fact_table.read(include_deleted=True)) == 4


@pytest.mark.parametrize("begin", [True, False])
def test_a_pack_that_lies_about_its_width_or_layers_is_refused(
    pack, begun, tokenizer, tmp_path, begin
):
    model = speaker(make_teacher, tokenizer)
    if begin:
        shutil.copy(begun["gpt2"], tmp_path / "other.db")
    with opened(tmp_path / "other.db", model, tokenizer) as other:
        narrow = {name: getattr(pack, name)[:, :WIDTH].copy() for name in ("keys", "values")}
        narrow |= {"mean": pack.mean[:WIDTH].copy(), "metric": pack.metric[:WIDTH, :WIDTH].copy()}
        for lie, error in (
            (replace(pack, manifest=pack.manifest | {"width": WIDTH}, **narrow), "16 wide"),
            (replace(pack, manifest=pack.manifest | {"key_layer": 5, "value_layer": 7}), "layer"),
        ):
            with pytest.raises(UserError, match=error):
                import_pack(other, lie, hash_model(model))
            with pytest.raises(UserError, match=error):
                load_packs(other, [lie], hash_model(model))
        assert other.records == {}


# Guests.


def one_fact_pack(begun, tokenizer, tmp_path, sentence, name):
    with new_book(begun, tokenizer, tmp_path / f"{name}.db") as maker:
        return make_fact_pack(
            maker,
            [entry.fact for entry in maker.write_many([parse_fact(sentence)])],
            name,
            model_hash=hash_model(maker.model),
        )


@pytest.mark.parametrize("has_book", ["empty", "written", "none"])
def test_temporary_packs_leave_no_trace(has_book, begun, tokenizer, tmp_path):
    first = one_fact_pack(begun, tokenizer, tmp_path, "Ada lives in Ravenhill", "first")
    second = one_fact_pack(begun, tokenizer, tmp_path, "Ben eats March", "second")
    model = speaker(make_teacher, tokenizer)
    print_of = hash_model(model)
    plain = logits_of(model, tokenizer)
    if has_book == "none":
        host = FactStore(model, tokenizer, None)
    else:
        shutil.copy(begun["gpt2"], tmp_path / "host.db")
        host = opened(tmp_path / "host.db", model, tokenizer)
        if has_book == "written":
            host.write_many([FACTS[3], parse_fact("It was Ada who ran")])
    with host:
        own, known = logits_of(model, tokenizer), dict(host.records)
        assert torch.equal(own, plain) == (has_book != "written")
        load_packs(host, [first], print_of)
        assert repeats(model, tokenizer, FACTS[0])
        assert not repeats(model, tokenizer, parse_fact("Ben eats March"))
        assert host.find_fact_by_row(-1).answer == " Ravenhill"
        assert host.get_rows(-1)[0].row_id == -1
        load_packs(host, [second], print_of)
        assert repeats(model, tokenizer, parse_fact("Ben eats March"))
        assert not repeats(model, tokenizer, FACTS[0])
        with_second = logits_of(model, tokenizer)
        load_packs(host, [first, second], print_of)
        assert repeats(model, tokenizer, FACTS[0])
        assert repeats(model, tokenizer, parse_fact("Ben eats March"))
        ids = get_fact_hooks(model).memory.rows.ids.tolist()
        assert len(ids) == len(set(ids))
        assert {host.find_fact_by_row(row).answer for row in ids if row < 0} == {
            " Ravenhill",
            " March",
        }
        load_packs(host, [second], print_of)
        assert torch.equal(logits_of(model, tokenizer), with_second)
        load_packs(host, [], print_of)
        assert torch.equal(logits_of(model, tokenizer), own)
        assert host.records == known
        if has_book != "none":
            assert len(host.fact_table.read(include_deleted=True)) == len(known)
    if has_book != "none":
        with opened(
            tmp_path / "host.db", speaker(make_teacher, tokenizer), tokenizer, read_only=True
        ) as again:
            assert torch.equal(logits_of(again.model, tokenizer), own)


def test_temporary_packs_stay_while_facts_are_written(begun, tokenizer, tmp_path):
    first = one_fact_pack(begun, tokenizer, tmp_path, "Ada lives in Ravenhill", "first")
    with new_book(begun, tokenizer, tmp_path / "host.db") as host:
        load_packs(host, [first], hash_model(host.model))
        host.write_many(FACTS[1:2])
        assert repeats(host.model, tokenizer, FACTS[0])
        assert repeats(host.model, tokenizer, FACTS[1])
        host.delete(list(host.records))
        assert repeats(host.model, tokenizer, FACTS[0])
        assert [fact.answer for fact in host.fact_table.read(include_deleted=True)] == [" rows"]


def test_a_temporary_pack_that_does_not_fit_changes_nothing(begun, tokenizer, tmp_path):
    first = one_fact_pack(begun, tokenizer, tmp_path, "Ada lives in Ravenhill", "first")
    with new_book(begun, tokenizer, tmp_path / "host.db") as host:
        load_packs(host, [first], hash_model(host.model))
        with pytest.raises(UserError, match="another model"):
            load_packs(
                host,
                [first, replace(first, manifest=first.manifest | {"model_fingerprint": "x"})],
                hash_model(host.model),
            )
        assert repeats(host.model, tokenizer, FACTS[0])


def test_rows_of_a_pack_are_numbered_downwards(pack):
    found = unpack_facts(pack, 10)
    assert [told.id for told, _ in found] == [-11, -12, -13, -14]
    rows = [part.row_id for _, parts in found for part in parts]
    assert rows == list(range(-11, -11 - len(pack.keys), -1))
    for (told, parts), fact in zip(found, pack.facts, strict=True):
        assert told.rows == tuple(part.row_id for part in parts)
        assert [part.threshold for part in parts] == list(fact.thresholds)
        assert [part.prefix_ids for part in parts] == [
            fact.answer_ids[:said] for said in range(len(parts))
        ]
        assert all(part.subject_ids == fact.subject_ids for part in parts)


# What differs, and one of several.


def variant(pack, changes, name="other", licence=""):
    """The pack with some facts changed, `{number: changes}`, and others (None) left out."""
    facts = [
        replace(fact, **(changes.get(n) or {}))
        for n, fact in enumerate(pack.facts)
        if changes.get(n, {}) is not None
    ]
    rows = [row for fact in facts for row in fact.rows]
    given, numbered = 0, []
    for number, fact in enumerate(facts):
        numbered.append(replace(fact, id=number, rows=tuple(range(given, given + len(fact.rows)))))
        given += len(fact.rows)
    return replace(
        pack,
        facts=numbered,
        keys=pack.keys[rows] + 1,
        values=pack.values[rows] + 1,
        manifest=pack.manifest | {"name": name, "license": licence},
    )


def test_how_two_lists_of_facts_differ(pack):
    other = variant(
        pack,
        {
            0: {"answer": " Rows"},
            1: None,
            2: {"answer": "  a  lazy dog "},
            3: {"subject": "Somebody"},
        },
    )
    found = diff_facts(pack.facts, other.facts)
    assert found.only_first == [pack.facts[1], pack.facts[3]]
    assert found.only_second == [other.facts[2]]
    assert found.different == [(pack.facts[0], other.facts[0])]
    assert found.num_same == 1
    assert diff_facts(pack.facts, pack.facts).num_same == 4
    assert diff_facts([], []).different == []
    loud = [replace(fact, prompt=fact.prompt.upper() + " ") for fact in pack.facts]
    assert diff_facts(pack.facts, loud).num_same == 4, "in the same words, however they are written"


@pytest.mark.parametrize(
    ("prefer", "newer", "kept"),
    [("newest", 1, 1), ("newest", -1, 0), ("first", 1, 0), ("first", -1, 0)],
)
def test_merge_keeps_one_of_two_contradicting_facts(pack, prefer, newer, kept):
    created = pack.facts[0].created + newer
    other = variant(
        pack,
        {0: {"answer": " Rows", "created": created}, 1: None, 3: {"subject": "X"}},
        licence="MIT",
    )
    sides = (pack, pack.facts[0]), (other, other.facts[0])
    merged, conflicts = merge_packs([pack, other], "both", prefer)
    assert conflicts == [(sides[kept][1], sides[1 - kept][1])]
    assert [fact.prompt for fact in merged.facts] == [
        fact.prompt for fact in [*pack.facts, other.facts[2]]
    ]
    assert merged.facts[0].answer == sides[kept][1].answer
    assert [fact.id for fact in merged.facts] == list(range(5))
    assert [row for fact in merged.facts for row in fact.rows] == list(range(len(merged.keys)))
    from_pack, from_fact = sides[kept]
    for name in ("keys", "values"):
        states = getattr(merged, name)
        np.testing.assert_array_equal(
            states[list(merged.facts[0].rows)], getattr(from_pack, name)[list(from_fact.rows)]
        )
        np.testing.assert_array_equal(
            states[list(merged.facts[1].rows)], getattr(pack, name)[list(pack.facts[1].rows)]
        )
        np.testing.assert_array_equal(
            states[list(merged.facts[4].rows)], getattr(other, name)[list(other.facts[2].rows)]
        )
    assert merged.manifest["counts"] == {"facts": 5, "rows": len(merged.keys)}
    assert (merged.manifest["name"], merged.manifest["license"]) == ("both", "CC0-1.0 and MIT")
    assert pack.manifest["name"] == "a pack"


def test_the_same_fact_twice_is_no_conflict(pack):
    later = variant(pack, {n: {"created": fact.created + 1} for n, fact in enumerate(pack.facts)})
    merged, conflicts = merge_packs([pack, later, pack], "one")
    assert conflicts == []
    assert [fact.created for fact in merged.facts] == [fact.created + 1 for fact in pack.facts]
    np.testing.assert_array_equal(merged.keys, later.keys)
    merged, _ = merge_packs([pack, later], "one", "first")
    np.testing.assert_array_equal(merged.keys, pack.keys)


def test_packs_of_different_models_cannot_be_one(pack):
    for name, value in (
        ("model_fingerprint", "x"),
        ("key_layer", 0),
        ("value_layer", 1),
        ("width", 3),
    ):
        with pytest.raises(UserError, match=f"cannot be merged: {name} "):
            merge_packs([pack, replace(pack, manifest=pack.manifest | {name: value})], "both")


def test_a_merged_pack_can_be_saved_and_applied(pack, begun, tokenizer, tmp_path):
    second = one_fact_pack(begun, tokenizer, tmp_path, "Clara eats March", "second")
    merged, conflicts = merge_packs([pack, second], "both")
    assert conflicts == []
    merged.save(tmp_path / "both")
    with new_book(begun, tokenizer, tmp_path / "host.db") as host:
        load_packs(host, [load_fact_pack(tmp_path / "both")], hash_model(host.model))
        assert all(
            repeats(host.model, tokenizer, fact)
            for fact in [*FACTS, parse_fact("Clara eats March")]
        )
    empty, _ = merge_packs(
        [replace(pack, facts=[], keys=pack.keys[:0], values=pack.values[:0])] * 2, "nothing"
    )
    assert empty.keys.shape == (0, 64)


def test_a_store_is_not_needed_to_look_at_a_pack(pack, place, monkeypatch):
    monkeypatch.setattr(RowStore, "__init__", lambda *_, **__: pytest.fail("a store was opened"))
    pack.save(place)
    assert load_fact_pack(place).facts == pack.facts
