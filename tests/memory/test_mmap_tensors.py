"""Slots in a file: the same outputs as from RAM, mapped reads, one-line errors."""

import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import POSITIONS, WIDTH, make_llama, make_teacher, newest
from conftest import SLOTS as NEURONS
from safetensors import safe_open
from test_featural import KINDS
from transformers import AutoModel, AutoModelForCausalLM

import dmt
from dmt.cli.main import distill_main
from dmt.config import MEMORY_CONFIGS, DenseConfig
from dmt.config_io import load_config
from dmt.editing.edit import solve_value
from dmt.errors import UserError
from dmt.evaluation.metrics import measure_sizes
from dmt.evaluation.trace import trace
from dmt.memory import FeaturalMemory, featural, mmap_tensors
from dmt.memory.mmap_tensors import (
    MmapTensorFile,
    TensorSpec,
    dequantize_rows,
    make_spec,
    quantize_rows,
    write_tensor_file,
)
from dmt.models import external_tensors
from dmt.models.conversion import convert_blocks
from dmt.models.fingerprint import hash_model
from dmt.models.memories import get_associative_memories, get_featural_memories

assert dmt
GENERATION = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
OFFLOADS = ["values", "slots"]


def make(family=make_teacher, threshold=0.3, **changes):
    """Create a student whose parameters all differ from their initial values."""
    settings = {
        "mean_k": None if "k" in changes else 8,
        "search": "int8" if changes.get("offload") == "slots" else "exact",
    } | changes
    config_class = MEMORY_CONFIGS[settings.pop("kind", "featural")]
    memory = config_class(**settings)
    student, _ = convert_blocks(family(), [memory, DenseConfig(), memory])
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
        for memory in get_featural_memories(student).values():
            if memory.metric is not None:
                memory.metric.add_(0.1 * torch.randn_like(memory.metric))
            if memory.threshold is not None:
                memory.threshold.fill_(threshold)
        student.eval()
        for memory in get_associative_memories(student).values():
            with memory.writes_enabled():
                memory(torch.randn(6, WIDTH))
                memory.set_targets(torch.randn(6, WIDTH))
            memory.commit_step()
    return student


@torch.no_grad()
def round_values(student):
    """Round each value of a student as saving does."""
    for memory in get_featural_memories(student).values():
        rows, scales = quantize_rows(memory.values, memory.value_dtype)
        memory.values.copy_(dequantize_rows(rows, scales, torch.float32))
    return student


def save_and_load(student, folder, dtype=torch.float32):
    student.save_pretrained(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True
        )
    assert not [
        str(warning.message)
        for warning in caught
        if "slots" in str(warning.message) or "buffer" in str(warning.message)
    ]
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    # Sums over one token depend in the last bit on where weights begin in memory.
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


@torch.no_grad()
def assert_same(first, second, tokens):
    """Compare logits of windows, of one and of two tokens, and cached generation, to the bit."""
    for batch in (tokens, tokens[:1], tokens[:1, :1], tokens[:2, :1]):
        assert torch.equal(first(batch).logits, second(batch).logits)
    for prompts in (tokens[:1, :6], tokens[:, :6]):
        mask = torch.ones_like(prompts)
        generated = [
            model.generate(prompts, attention_mask=mask, **GENERATION) for model in (first, second)
        ]
        assert torch.equal(*generated)
    assert first(tokens).logits.isfinite().all()


@pytest.mark.parametrize("value_dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("family", [make_teacher, make_llama])
@pytest.mark.parametrize(
    "changes",
    [
        {"offload": "none"},
        {"offload": "values"},
        {"offload": "slots"},
        {"offload": "values", "k": 8},
        {"offload": "slots", "k": 8},
        {"offload": "values", "selection": "centered", "projections": True, "heads": 2},
        {"offload": "slots", "selection": "centered"},
        {"offload": "values", "search": "int8"},
        {"offload": "values", "search": "ivf"},
        {"offload": "values", "search": "ivf", "k": 8},
        {"offload": "values", "kind": "associative"},
        {"offload": "slots", "kind": "associative"},
    ],
    ids=str,
)
def test_a_student_in_a_file_equals_the_one_in_ram(family, changes, value_dtype, tokens, tmp_path):
    if family is make_llama and changes.get("search") == "ivf":
        pytest.skip("ivf searches one key per slot")
    student = make(family, value_dtype=value_dtype, **changes)
    loaded = save_and_load(student, tmp_path)
    assert_same(loaded, round_values(student), tokens)


@pytest.mark.parametrize("value_dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize(("activation", "selection"), KINDS)
@pytest.mark.parametrize("offload", OFFLOADS)
@torch.no_grad()
def test_every_kind_of_memory_reads_a_file(
    activation, selection, offload, value_dtype, tmp_path, monkeypatch
):
    if offload == "slots" and activation == "distance":
        pytest.skip("rejected")
    # So that sums are made in several chunks.
    monkeypatch.setattr(mmap_tensors, "MAX_CONVERTED_VALUES", 5 * 16)
    options = {
        "activation": activation,
        "activation_function": "gelu_new",
        "selection": selection,
        "value_dtype": value_dtype,
        "offload": offload,
        "metric": "fisher",
        "search": "int8" if offload == "slots" else "exact",
    }
    memory = FeaturalMemory(16, 64, 8, **options).eval()
    memory.values.normal_()
    memory.metric.normal_()
    if memory.means is not None:
        memory.means.normal_()
    specs = {f"m.{name}": spec for name, spec in memory.export_specs().items()}
    write_tensor_file(tmp_path / "slots", specs)
    memory.values.copy_(dequantize_rows(*quantize_rows(memory.values, value_dtype), torch.float32))
    loaded = FeaturalMemory(16, 64, 8, **options).eval()
    resident = {
        name: tensor
        for name, tensor in memory.state_dict().items()
        if name not in memory.external_names
    }
    loaded.load_state_dict({**loaded.state_dict(), **resident})
    loaded.release_tensors()
    assert not set(memory.external_names) & set(loaded.state_dict())
    loaded.attach_file(MmapTensorFile(tmp_path / "slots"), "m")
    for tokens in (1, 2, 40, *([] if activation == "distance" else [0])):
        hidden = torch.randn(tokens, 16)
        assert torch.equal(memory(hidden), loaded(hidden))
        if tokens:
            for expected, actual in zip(
                memory.select_with_weights(hidden), loaded.select_with_weights(hidden), strict=True
            ):
                assert torch.equal(expected, actual)
            with torch.enable_grad():
                hidden.requires_grad_(True)
                direction = torch.randn(tokens, 16)
                grads = [
                    torch.autograd.grad((layer(hidden) * direction).sum(), hidden)[0]
                    for layer in (memory, loaded)
                ]
            torch.testing.assert_close(*grads)
            torch.testing.assert_close(loaded(hidden.detach()), loaded.forward(hidden).detach())
    assert torch.equal(loaded.value_norms(), memory.value_norms())
    assert torch.equal(loaded.constant_output(), memory.constant_output())
    assert 0 <= loaded.measure_recall(torch.randn(9, 16)) <= 1


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_offloaded_slots_are_searched_by_codes_and_weighed_exactly(tokens, grad):
    memory = FeaturalMemory(16, 256, 8, search="int8", offload="slots").eval()
    hidden = torch.randn(tokens, 16)
    with torch.set_grad_enabled(grad):
        assert memory._uses_candidates(tokens)
        assert not memory.train()._uses_candidates(tokens)
        memory.eval()
        mask = memory.select_slots(hidden)
        expected = (
            memory.compute_weights(hidden, memory.compute_scores(hidden)) * mask
        ) @ memory.values + memory.constant_output()
        torch.testing.assert_close(memory(hidden), expected)


def test_rows_are_converted_in_chunks(monkeypatch):
    monkeypatch.setattr(mmap_tensors, "MAX_CONVERTED_VALUES", 5 * 16)
    table, chunk_sizes = torch.randn(64, 16), []
    ids, weights = torch.randint(0, 64, (9, 3)), torch.randn(9, 3)
    output = mmap_tensors.sum_embedding_bags(
        lambda row_ids: chunk_sizes.append(len(row_ids)) or table[row_ids], 16, ids, weights
    )
    torch.testing.assert_close(output, (table[ids] * weights.unsqueeze(-1)).sum(1))
    assert len(chunk_sizes) == 9
    assert max(chunk_sizes) <= 5
    # One bag is larger than a chunk.
    large_bags = mmap_tensors.sum_embedding_bags(
        table.__getitem__, 16, torch.randint(0, 64, (2, 40)), torch.ones(2, 40)
    )
    assert large_bags.shape == (2, 16)


def test_rounding_errors_are_bounded(tokens):
    values = torch.randn(50, 16) * torch.logspace(-3, 3, 50).unsqueeze(-1)
    values[7] = 0
    for kind, bound in (("float32", 0.0), ("float16", 2.0**-11), ("int8", 0.5 / 127)):
        rows, scales = quantize_rows(values, kind)
        error = (dequantize_rows(rows, scales, torch.float32) - values).abs()
        assert (
            error
            <= bound * values.abs().amax(-1, keepdim=True) * 1.001 + 2**-24 * (kind == "float16")
        ).all()
        assert rows.element_size() == {"float32": 4, "float16": 2, "int8": 1}[kind]
        assert error.any() == (kind != "float32")
    assert quantize_rows(values, "int8")[0].abs().amax(-1)[0] == 127


def test_a_rounded_student_has_nearly_the_same_logits(tokens, tmp_path):
    distances = []
    for kind in ("float16", "int8"):
        torch.manual_seed(0)
        loaded = save_and_load(make(k=NEURONS, value_dtype=kind), tmp_path / kind)
        torch.manual_seed(0)
        plain = make(k=NEURONS)
        with torch.no_grad():
            distances.append(
                float(
                    (loaded(tokens).logits - plain(tokens).logits).norm()
                    / plain(tokens).logits.norm()
                )
            )
    assert 0 < distances[0] < 1e-3
    assert distances[0] < distances[1] < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_a_model_in_half_precision_reads_the_file(dtype, offload, tokens, tmp_path):
    student = make(k=NEURONS, offload=offload)
    half = save_and_load(student, tmp_path, dtype)
    with torch.no_grad():
        actual, expected = half(tokens).logits.float(), student(tokens).logits
        one_token = half(tokens[:1, :1]).logits
    assert (actual - expected).norm() < 0.1 * expected.norm()
    assert one_token.dtype == dtype


@pytest.mark.parametrize("offload", OFFLOADS)
def test_a_student_saved_twice_is_the_same(offload, tokens, tmp_path):
    student = make(offload=offload, value_dtype="int8")
    first = save_and_load(student, tmp_path / "one")
    slots_file = tmp_path / "one" / external_tensors.SLOTS_FILE
    before = slots_file.read_bytes()
    second = save_and_load(first, tmp_path / "two")
    assert_same(first, second, tokens)
    assert (tmp_path / "two" / external_tensors.SLOTS_FILE).read_bytes() == before
    inode = slots_file.stat().st_ino
    onto_itself = save_and_load(first, tmp_path / "one")  # onto the file that is mapped
    assert slots_file.stat().st_ino == inode
    assert_same(first, onto_itself, tokens)
    # Another student saved to the folder gets a new file; the mapped file stays valid.
    save_and_load(make(offload=offload, value_dtype="int8", threshold=0.1), tmp_path / "one")
    assert_same(first, second, tokens)
    assert hash_model(first) == hash_model(second)
    assert not list(tmp_path.rglob("*.partial"))


def test_the_backbone_of_a_student_is_saved_with_its_file(tokens, tmp_path):
    loaded = save_and_load(make(offload="values"), tmp_path / "one")
    loaded.base_model.save_pretrained(tmp_path / "backbone")
    backbone = AutoModel.from_pretrained(tmp_path / "backbone", dtype=torch.float32)
    with torch.no_grad():
        hidden, expected = backbone(tokens), loaded.base_model(tokens)
    torch.testing.assert_close(hidden.last_hidden_state, expected.last_hidden_state)


def test_a_student_in_ram_can_be_trained_after_saving(tokens, tmp_path):
    student = make(offload="values")
    loaded = save_and_load(student, tmp_path)
    assert student.config.external_tensors is None
    assert (
        loaded.config.external_tensors
        == json.loads((tmp_path / "config.json").read_text())["external_tensors"]
    )
    student.train()
    student(tokens, labels=tokens).loss.backward()
    assert get_featural_memories(student)[0].values.grad is not None
    student.eval()
    assert_same(save_and_load(student, tmp_path), loaded, tokens)


def test_the_model_hash_covers_values_in_the_file(tmp_path):
    student = make(offload="values")
    before = hash_model(save_and_load(student, tmp_path / "a"))
    with torch.no_grad():
        get_featural_memories(student)[2].values[5, 3] += 1
    assert hash_model(save_and_load(student, tmp_path / "b")) != before


def test_tensors_in_the_file_are_not_among_the_weights(tmp_path):
    for offload, names in (
        ("none", {"values"}),
        ("values", {"values", "metric"}),
        ("slots", {"values", "metric", "keys"}),
    ):
        student, folder = make(offload=offload, value_dtype="float16"), tmp_path / offload
        state_names = set(student.state_dict())
        loaded = save_and_load(student, folder)
        blocks = {f"transformer.h.{layer}.mlp" for layer in (0, 2)}
        positions = {"transformer.wpe.weight"} if offload == "slots" else set()
        external = {f"{block}.{name}" for block in blocks for name in names} | positions
        assert state_names - set(loaded.state_dict()) == external
        with safe_open(folder / "model.safetensors", "pt") as weights:
            assert not external & set(weights.keys())
        # Any reader of safetensors can read the file.
        with safe_open(folder / external_tensors.SLOTS_FILE, "pt") as file:
            for block in blocks:
                values = loaded.get_submodule(block).values
                assert torch.equal(file.get_tensor(f"{block}.values"), values)
    make().save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / external_tensors.SLOTS_FILE).exists()
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert not config.get("external_tensors")
    assert not make().config.external_tensors


def test_sizes_in_ram_and_on_disk_are_counted(tmp_path):
    teacher, sizes = make_teacher(), {}
    for offload in ("none", "values", "slots"):
        student = make(offload=offload, value_dtype="int8", skip_connection=False)
        loaded = save_and_load(student, tmp_path / offload)
        sizes[offload] = (
            external_tensors.measure_bytes(loaded),
            measure_sizes(teacher, loaded, tmp_path / offload),
        )
    table, metrics, positions = 2 * NEURONS * WIDTH, 2 * 4 * WIDTH**2, 4 * POSITIONS * WIDTH
    assert sizes["none"][0]["disk"] == 0
    assert "student_offloaded" not in sizes["none"][1]
    assert sizes["values"][0]["disk"] == table + metrics
    assert sizes["slots"][0]["disk"] == table + metrics + 4 * table + positions
    # In RAM are scales and value norms, and with offloaded keys their codes, with scales.
    assert sizes["none"][0]["ram"] - sizes["values"][0]["ram"] == table + metrics
    assert (
        sizes["values"][0]["ram"] - sizes["slots"][0]["ram"]
        == positions + 4 * table - table - 2 * 4 * NEURONS
    )
    for offload, (measured, reported) in sizes.items():
        assert reported.get("student_offloaded", 0) == measured["disk"]
        files = [
            tmp_path / offload / name for name in ("model.safetensors", external_tensors.SLOTS_FILE)
        ]
        assert reported["student_on_disk"] == sum(file.stat().st_size for file in files)
    parameters = sum(p.numel() * 4 for p in loaded.parameters())
    resident = sum(m.mmap_tensors.num_bytes for m in get_featural_memories(loaded).values())
    assert sizes["slots"][1]["student"] == parameters + resident
    assert resident == table + 2 * 3 * 4 * NEURONS  # codes; scales of codes and values, norms


ANONYMOUS = """
import re, sys, torch
from pathlib import Path
from dmt.memory import FeaturalMemory
from dmt.memory.mmap_tensors import MmapTensorFile
torch.set_num_threads(1)
def anonymous_mb():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\\s+(\\d+)", status).group(1)) / 1024
with torch.device("meta"):
    memory = FeaturalMemory(512, 32768, 32, value_dtype=sys.argv[2], offload="values").eval()
memory.release_tensors()
memory.to_empty(device="cpu")
with torch.no_grad():
    for parameter in memory.parameters():
        parameter.zero_()
file = MmapTensorFile(Path(sys.argv[1]))
before = anonymous_mb()
memory.attach_file(file, "m")
attached = anonymous_mb() - before
with torch.no_grad():
    for tokens in (1, 1, 20, 300):
        memory(torch.randn(tokens, 512))
    for ids in torch.arange(32768).split(1000):
        memory.gather_values(ids)
print(attached, anonymous_mb() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("value_dtype", ["float32", "float16", "int8"])
def test_a_large_table_takes_no_anonymous_memory(value_dtype, tmp_path):
    dtype = mmap_tensors.VALUE_TYPES[value_dtype]
    rows = torch.randint(-100, 100, (1024, 512)).to(dtype)
    specs = {
        "m.values": TensorSpec(dtype, (32_768, 512), (rows for _ in range(32))),
        "m.value_norms": make_spec(torch.rand(32_768)),
    }
    if value_dtype == "int8":
        specs["m.scales"] = make_spec(torch.rand(32_768))
    write_tensor_file(tmp_path / "file", specs)
    process = subprocess.run(
        [sys.executable, "-c", ANONYMOUS, tmp_path / "file", value_dtype],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    attached, after = map(float, process.stdout.split())
    assert attached < 4  # MB; the table has 16, 32 or 64
    # Scores of 300 tokens, their masks and converted rows are freed again, some of it only to
    # the allocator.
    assert after < attached + 200


def test_tensors_are_mapped_and_the_file_is_never_written(tmp_path):
    loaded = save_and_load(make(offload="slots"), tmp_path)
    before = (tmp_path / external_tensors.SLOTS_FILE).read_bytes()
    if sys.platform.startswith("linux"):
        with open("/proc/self/maps") as maps:
            spans = [
                [int(bound, 16) for bound in line.split()[0].split("-")]
                for line in maps
                if line.rstrip().endswith(str(tmp_path / external_tensors.SLOTS_FILE))
            ]

        def is_mapped(tensor):
            return any(begin <= tensor.data_ptr() < end for begin, end in spans)

        for memory in get_featural_memories(loaded).values():
            assert all(is_mapped(getattr(memory, name)) for name in ("values", "keys", "metric"))
            assert is_mapped(memory.mmap_tensors.key_codes.rows)
            assert not is_mapped(memory.mmap_tensors.value_norms)
    with torch.no_grad():
        loaded(torch.zeros(1, 4, dtype=torch.long))
        assert not any(
            memory._tensor_cache._entries for memory in get_featural_memories(loaded).values()
        ), "nothing is derived from complete tables"
        get_featural_memories(loaded)[0].values.zero_()
    assert (tmp_path / external_tensors.SLOTS_FILE).read_bytes() == before


def test_a_student_in_a_file_cannot_be_trained(tokens, tmp_path):
    for changes in ({"offload": "values"}, {"offload": "slots"}, {"value_dtype": "int8"}):
        loaded = save_and_load(make(**changes), tmp_path)
        with pytest.raises(UserError, match="offload=none and value_dtype=float32") as error:
            loaded.train()
        assert "\n" not in str(error.value)
        loaded.eval()
        loaded(tokens).logits.sum().backward()  # in eval mode other weights have gradients
        assert loaded.get_input_embeddings().weight.grad.abs().sum() > 0


@pytest.mark.parametrize("offload", OFFLOADS)
def test_an_edit_can_be_solved_for_a_student_in_a_file(offload, tokens, tmp_path):
    student = make(offload=offload).requires_grad_(False)
    loaded = save_and_load(student, tmp_path).requires_grad_(False)
    columns = torch.arange(5)
    values = [
        solve_value(
            model, tokens[:1], torch.zeros_like(columns), columns, tokens[0, 1:6], 1, 2
        ).values
        for model in (student, loaded)
    ]
    # With gradients, RAM multiplies by all values, the file sums those read.
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-4)


def test_traces_from_a_file_equal_those_from_ram(tokenizer, tokens, tmp_path):
    for changes in (
        {"offload": "values"},
        {"offload": "slots"},
        {"offload": "values", "k": 8, "projections": True},
    ):
        student = make(**changes)
        expected = trace(student, tokenizer, tokens[0])
        assert trace(save_and_load(student, tmp_path), tokenizer, tokens[0]) == expected
        assert any(token.activations for token in expected)
    nothing_read = make(offload="values", threshold=1e9)
    assert not any(token.activations for token in trace(nothing_read, tokenizer, tokens[0]))


def load_error(folder):
    """Return the one-line error of loading a student."""
    with pytest.raises(UserError) as error:
        AutoModelForCausalLM.from_pretrained(folder)
    assert "\n" not in str(error.value)
    assert str(folder / external_tensors.SLOTS_FILE) in str(error.value)
    return str(error.value)


def test_a_missing_damaged_or_foreign_file_is_rejected_in_one_line(tmp_path):
    folder = tmp_path / "a"
    make(offload="values").save_pretrained(folder)
    file = folder / external_tensors.SLOTS_FILE
    content = file.read_bytes()
    for length in (0, 5, 8, 100, 4096, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        assert "not a complete file" in load_error(folder)
    for damaged in (content + b"x", b"\xff" * 8 + content[8:], b"{}" * 3000):
        file.write_bytes(damaged)
        assert "not a complete file" in load_error(folder)
    for version, advice in (("2", "newer dmt"), ("0", "save the student again")):
        file.write_bytes(content.replace(b'"format": "1"', f'"format": "{version}"'.encode()))
        message = load_error(folder)
        assert f"its format is {version}" in message
        assert advice in message
    file.write_bytes(content.replace(b'"F32"', b'"F99"', 1))
    assert "not a complete file" in load_error(folder)
    file.write_bytes(content.replace(b'"digest"', b'"digits"', 1))
    assert "no digest in its metadata" in load_error(folder)
    file.unlink()
    assert "does not exist" in load_error(folder)
    torch.manual_seed(5)
    make(offload="values").save_pretrained(tmp_path / "b")
    shutil.copy(tmp_path / "b" / external_tensors.SLOTS_FILE, file)
    assert "another student" in load_error(folder)
    file.write_bytes(content)
    config = json.loads((folder / "config.json").read_text())
    config["memory"]["0"]["value_dtype"] = "float16"
    (folder / "config.json").write_text(json.dumps(config))
    assert "does not match config.json" in load_error(folder)
    config["memory"]["0"] |= {"value_dtype": "float32", "offload": "slots", "search": "int8"}
    (folder / "config.json").write_text(json.dumps(config))
    assert "has no tensor" in load_error(folder)


def test_a_deleted_or_replaced_file_cannot_be_copied(tmp_path):
    loaded = save_and_load(make(offload="values"), tmp_path / "a")
    (tmp_path / "a" / external_tensors.SLOTS_FILE).unlink()
    with pytest.raises(UserError, match="cannot copy"):
        loaded.save_pretrained(tmp_path / "b")
    make(offload="values", threshold=0.1).save_pretrained(tmp_path / "a")
    torch.manual_seed(5)
    make(offload="values").save_pretrained(tmp_path / "a")
    with pytest.raises(UserError, match="no longer the file"):
        loaded.save_pretrained(tmp_path / "b")
    assert not list((tmp_path / "b").glob("slots*"))


def test_a_memory_without_its_file_is_an_error(tokens, tmp_path):
    make(offload="values").save_pretrained(tmp_path)
    config = AutoModelForCausalLM.from_pretrained(tmp_path).config
    with pytest.raises(UserError, match="from_pretrained"):
        AutoModelForCausalLM.from_config(config).eval()(tokens)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_tensor_file(tmp_path / "file", {"a": make_spec(torch.ones(3, 4))})
    before = (tmp_path / "file").read_bytes()
    with pytest.raises(AssertionError, match="chunks"):
        write_tensor_file(
            tmp_path / "file", {"a": TensorSpec(torch.float32, (3, 4), [torch.ones(2, 4)])}
        )
    assert (tmp_path / "file").read_bytes() == before
    with pytest.raises(UserError, match="cannot write"):
        write_tensor_file(tmp_path / "nowhere" / "file", {"a": make_spec(torch.ones(3, 4))})


def test_tensors_are_read_as_they_were_written(tmp_path):
    tensors = {
        "bytes": torch.randint(-128, 127, (7, 3), dtype=torch.int8),
        "halves": torch.randn(5, 3).half(),
        "scalar": torch.randn(()),
        "floats": torch.randn(9, 2),
        "empty": torch.zeros(0, 4),
        "transposed": torch.randn(4, 6).t(),
    }

    def write(name):
        specs = {name: make_spec(tensor) for name, tensor in tensors.items()}
        return write_tensor_file(tmp_path / name, specs)

    digest = write("file")
    mapped = MmapTensorFile(tmp_path / "file")
    assert mapped.digest == digest
    for name, tensor in tensors.items():
        for loaded in (mapped[name], mapped.read_sequentially(name)):
            assert torch.equal(loaded, tensor)
            assert loaded.dtype == tensor.dtype
    assert sorted(map(tuple, mapped.shapes)) == sorted(tuple(t.shape) for t in tensors.values())
    tensors["bytes"][0, 0] += 1
    assert write("other") != digest
    # Tensors begin where pages do.
    header_bytes = int.from_bytes((tmp_path / "file").read_bytes()[:8], "little")
    assert header_bytes % 4096 == 4088


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("memory.offload=slots",),
            "set memory.search=int8 or memory.offload=values, got memory.search=exact",
        ),
        (("memory.offload=slots", "memory.search=ivf"), "got memory.search=ivf"),
        (("memory.offload=tape",), "memory.offload"),
        (("memory.value_dtype=int4",), "memory.value_dtype"),
        (
            (
                "memory.offload=slots",
                "memory.search=int8",
                "memory.k=32",
                "memory.activation=distance",
                "memory.selection=score",
            ),
            "set memory.offload=values",
        ),
        (
            ("student.layer_overrides=[{layers: 0, memory: {offload: slots}}]",),
            "student.layer_overrides[0].memory.search=int8",
        ),
    ],
)
def test_contradicting_settings_are_rejected(overrides, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_config(None, overrides)


@pytest.mark.parametrize(
    "arguments",
    [
        {"offload": "slots"},
        {"offload": "slots", "search": "ivf"},
        {"offload": "all"},
        {"value_dtype": "int4"},
        {"offload": "slots", "search": "int8", "activation": "distance", "selection": "score"},
    ],
    ids=str,
)
def test_contradicting_arguments_are_rejected(arguments):
    with pytest.raises(ValueError, match=r"offload|value_dtype"):
        FeaturalMemory(8, 16, 4, **arguments)


@pytest.mark.parametrize("kind", ["featural", "associative"])
def test_a_run_measures_the_student_that_it_saved(kind, distill_args, tmp_path, monkeypatch):
    measured = []
    from dmt.distillation import run

    real = run.evaluate_student
    monkeypatch.setattr(
        run,
        "evaluate_student",
        lambda config, student, *rest: measured.append(student) or real(config, student, *rest),
    )
    changes = [
        "memory.offload=slots",
        "memory.search=int8",
        "memory.value_dtype=int8",
        f"memory.kind={kind}",
    ]
    assert distill_main([*distill_args, *changes]) == 0
    folder = newest(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "student")
    tokens = torch.randint(0, 300, (2, 12))
    with torch.no_grad():
        assert torch.equal(measured[0](tokens).logits, loaded(tokens).logits)
    assert all(
        memory.mmap_tensors is not None for memory in get_featural_memories(measured[0]).values()
    )
    record = json.loads((folder / "run.json").read_text())
    assert record["bytes"]["student_offloaded"] == external_tensors.measure_bytes(loaded)["disk"]
    assert "stay there" in (folder / "report.md").read_text()
    assert all(0.9 < used["search_recall"] <= 1 for used in record["slots"].values())
    assert "recall of the slot search" in (folder / "report.md").read_text()


def test_slots_scored_in_chunks_give_the_same_output(tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(featural, "MAX_EXACT_SLOTS", 0)
    student = round_values(make(offload="values", search="int8", value_dtype="int8"))
    assert_same(save_and_load(student, tmp_path), student, tokens)


def test_the_benchmark_prints_its_table(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from benchmarks import disk

    lines = disk.measure(quick=True, turns=1)
    assert [line["variant"] for line in lines] == [
        "in RAM",
        "on the disk",
        "dense",
        "offload=slots value_dtype=int8",
        "in the page cache",
        "on the disk",
        "on the disk, not read ahead",
    ]
    assert all(line.get("same tokens", True) for line in lines)
    assert "| in RAM |" in disk.table(lines)
