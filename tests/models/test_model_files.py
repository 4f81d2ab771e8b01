"""Folders of models that people have: formats, names and settings, each refused by its cause."""

import json
import logging
from pathlib import Path

import pytest
import torch
from conftest import make_llama, make_teacher
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2ForSequenceClassification

import dmt
from dmt.errors import UserError
from dmt.models.architectures import ACTIVATION_ALIASES
from dmt.models.loading import load_teacher
from dmt.models.model_files import format_other_files


def change_json(path, **differences):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | differences))


def change_weights(folder, change):
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def save_pickle(folder, name="pytorch_model.bin"):
    (folder / "model.safetensors").unlink()
    torch.save(make_teacher().state_dict(), folder / name)


def save_sentencepiece(folder):
    for path in folder.glob("tokenizer*.json"):
        path.unlink()
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")


def save_classifier(folder):
    GPT2ForSequenceClassification(make_teacher().config).save_pretrained(folder)


def add_prefix(prefix):
    return lambda folder: change_weights(
        folder, lambda weights: {prefix + name: tensor for name, tensor in weights.items()}
    )


def drop_biases(folder):
    change_weights(
        folder, lambda weights: {n: t for n, t in weights.items() if not n.endswith(".bias")}
    )


def set_config(**differences):
    return lambda folder: change_json(folder / "config.json", **differences)


def write_generation_config(text):
    return lambda folder: (folder / "generation_config.json").write_text(text)


NOT_VALID = "its generation_config.json is not valid"
FOLDERS = {
    "a pickle": (save_pickle, "only pytorch_model.bin: a pickle, which can run code and is never"),
    "a checkpoint": (lambda folder: save_pickle(folder, "model.ckpt"), "only model.ckpt: a pickle"),
    "another format": (
        lambda folder: (folder / "model.safetensors").rename(folder / "model.gguf"),
        "only model.gguf, a format that is not read",
    ),
    "SentencePiece": (save_sentencepiece, "its tokenizer is tokenizer.model, a SentencePiece"),
    "quantized": (
        set_config(quantization_config={"quant_method": "gptq", "bits": 4}),
        r"is quantized (gptq), which is not supported",
    ),
    "compiled": (add_prefix("_orig_mod."), "the names of its weights begin with _orig_mod., which"),
    "parallel": (add_prefix("module."), "the names of its weights begin with module., which"),
    "a classifier": (save_classifier, "it has the head of another task (score.weight)"),
    "no biases": (drop_biases, "it lacks biases that its class has"),
    "another size": (set_config(n_positions=16), "transformer.wpe.weight has the shape (32, 16)"),
    "a builtin": (
        set_config(activation_function="__import__"),
        "activation_function=__import__, which transformers does not have; it has gelu,",
    ),
    "no number": (set_config(initializer_range=float("nan")), "says initializer_range=nan, which"),
    "negative": (set_config(initializer_range=-1.0), "initializer_range=-1.0, which must be in"),
    "infinite": (set_config(layer_norm_epsilon=float("inf")), "says layer_norm_epsilon=inf, which"),
    "settings cut off": (write_generation_config("{"), NOT_VALID),
    "settings in a list": (write_generation_config("[1]"), f"{NOT_VALID} (not an object)"),
    "an end that is a word": (
        write_generation_config('{"eos_token_id": [0, "x"]}'),
        f"{NOT_VALID} (eos_token_id is [0, x])",
    ),
    "negative length": (
        write_generation_config('{"max_new_tokens": -1}'),
        f"{NOT_VALID} (`max_new_tokens` must be greater than 0",
    ),
    "no temperature": (
        write_generation_config('{"temperature": NaN}'),
        f"{NOT_VALID} (temperature is nan)",
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_refused_by_its_cause(teacher_folder, name):
    change, message = FOLDERS[name]
    change(teacher_folder)
    with pytest.raises(UserError) as error:
        load_teacher(str(teacher_folder))
    assert f"teacher={teacher_folder}" in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", [make_teacher, make_llama])
@pytest.mark.parametrize("alias", ["swish", *ACTIVATION_ALIASES])
def test_names_of_activations_are_those_of_transformers(family, alias, tokenizer, tmp_path):
    key = {make_teacher: "activation_function", make_llama: "hidden_act"}[family]
    family(len(tokenizer), **{key: alias}).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = load_teacher(str(tmp_path))
    assert getattr(model.config, key) == alias


def test_a_student_has_what_its_teacher_carries(
    teacher_folder, text_file, tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    settings = {
        "eos_token_id": [0, 13],
        "pad_token_id": 0,
        "max_new_tokens": 7,
        "do_sample": False,
        "temperature": 0.6,  # without do_sample: transformers warns, and published models have it
        "repetition_penalty": 1.3,
    }
    (teacher_folder / "generation_config.json").write_text(json.dumps(settings))
    (teacher_folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (teacher_folder / "additional_chat_templates").mkdir()
    (teacher_folder / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    change_json(teacher_folder / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})
    change_json(
        teacher_folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Code", None]}
    )
    (teacher_folder / "evil.py").write_text("open('touched', 'w')")
    (teacher_folder / "README.md").write_text("a model")
    with caplog.at_level(logging.INFO, "dmt"):
        result = dmt.distill(
            teacher_folder,
            text_file,
            seq_len=16,
            batch_size=2,
            micro_batch_size=2,
            validation_tokens=32,
            test_tokens=32,
            calibration_tokens=32,
            layerwise_steps=0,
            end_to_end_steps=1,
            mean_k=8,
            accelerator="cpu",
            progress_bar=False,
        )
    assert "not taken along from the teacher's folder: README.md, evil.py" in caplog.messages
    assert not Path("touched").exists()
    written = json.loads((result.student / "generation_config.json").read_text())
    assert written.items() >= settings.items()
    tokenizer = AutoTokenizer.from_pretrained(result.student)
    assert tokenizer.get_chat_template("tool") == "{{ tools }}"
    assert "{{ messages[0].content }}" in tokenizer.get_chat_template("default")
    for name in ("config.json", "tokenizer_config.json"):
        assert "evil" not in (result.student / name).read_text()
    assert AutoModelForCausalLM.from_pretrained(result.student).generation_config.eos_token_id == [
        0,
        13,
    ]


def test_files_that_stay_are_named(teacher_folder):
    assert format_other_files(teacher_folder) == ""
    for name in ("b.txt", "a.bin", ".hidden", *(f"{index}.onnx" for index in range(8))):
        (teacher_folder / name).touch()
    (teacher_folder / "onnx").mkdir()
    names = "0.onnx, 1.onnx, 2.onnx, 3.onnx, 4.onnx, 5.onnx, 6.onnx, 7.onnx and 3 more"
    assert format_other_files(teacher_folder) == names
    assert format_other_files(teacher_folder / "nowhere") == ""
