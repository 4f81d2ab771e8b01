"""Checks that a memory of your own keeps the contract of `dmt.MemoryLayer`.

```python
def test_my_memory():
    dmt.testing.check_memory(MyMemory, MyConfig(num_rows=32))
```

The built-in kinds pass the same checks (tests/test_testing.py). Each check is a function that
takes a `MemoryUnderTest` and raises an `AssertionError` that says what is wrong.
"""

from __future__ import annotations

import copy
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from dmt.config import MemoryConfig
from dmt.errors import UserError
from dmt.memory.base import BlockShape, MemoryLayer
from dmt.memory.registry import get_memory_class
from dmt.memory.token_context import list_contexts, use_contexts
from dmt.models.calibration import calibrate_memories
from dmt.models.conversion import convert_blocks
from dmt.models.forward import forward_teacher
from dmt.models.memories import get_memories

WIDTH, NUM_NEURONS, NUM_LAYERS, VOCAB_SIZE, MAX_TOKENS = 16, 32, 2, 64, 32
MAX_CONTEXT = 8  # token ids up to each token, of which a memory reads its `context_length`
TOLERANCE = 1e-4  # difference of float32 outputs whose sums have another order
GRADIENT_TOLERANCE = 1e-3  # relative error of a directional derivative in float64
BFLOAT16_TOLERANCE = 0.1  # relative error of an output in bfloat16

# Brings a memory into a state worth checking, from hidden states `(tokens, width)`.
Prepare = Callable[[Any, Tensor], None]
# Computes the output of a memory in a slow and certain way: `(layer, hidden) -> output`.
Reference = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class MemoryUnderTest:
    """A kind of memory in a tiny model.

    Attributes:
        config: settings of the memory.
        family: `gpt2` or `llama`, whose blocks are gated.
        prepare: brings a fresh memory into a state worth checking.
        reference: slow computation whose gradient is the right one; without it, finite differences.
    """

    config: MemoryConfig
    family: str = "gpt2"
    prepare: Prepare | None = None
    reference: Reference | None = None

    def make_student(self, seed: int = 0) -> PreTrainedModel:
        """Return a tiny model with the memory in its first layer, calibrated, in eval mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            teacher = _make_teacher(self.family)
            tokens = make_tokens(4, MAX_TOKENS, seed + 1)
            outputs = forward_teacher(teacher, tokens, capture_blocks=True)
            # The memory in both layers: errors of one would else be hidden by the other.
            configs = [self.config] * NUM_LAYERS
            student, _ = convert_blocks(teacher, configs, outputs.block_inputs)
            calibrate_memories(student, teacher, tokens)
            if self.prepare is not None:
                for layer, memory in get_memories(student).items():
                    with torch.no_grad():
                        contexts = list_contexts(tokens, MAX_CONTEXT).flatten(0, 1)
                        with use_contexts(contexts):
                            self.prepare(memory, outputs.block_inputs[layer].reshape(-1, WIDTH))
        return student.eval()

    def make_layer(self, seed: int = 0) -> MemoryLayer:
        """Return the memory of the first layer of `make_student`."""
        return get_memories(self.make_student(seed))[0]

    def make_fresh_layer(self, seed: int = 0) -> MemoryLayer:
        """Return a memory as its class makes it, in no model."""
        gated = self.family == "llama"
        activation = "silu" if gated else "gelu_new"
        block = BlockShape(WIDTH, NUM_NEURONS, gated, activation, VOCAB_SIZE)
        memory_class = get_memory_class(self.config.kind)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            arguments = memory_class.make_arguments(self.config, block)
            layer = memory_class.from_arguments(WIDTH, gated, arguments)
            layer.reset()
        return layer.eval()


def check_memory(
    cls: type[MemoryLayer],
    config: MemoryConfig | None = None,
    *,
    prepare: Prepare | None = None,
    reference: Reference | None = None,
    families: tuple[str, ...] = ("gpt2", "llama"),
) -> None:
    """Run every check on a kind of memory.

    Args:
        cls: a class registered with `dmt.register_memory`.
        config: its settings; the defaults where None. The width is 16 and a block has 32 neurons.
        prepare: `(layer, hidden)`, brings a fresh memory into a state worth checking, such as
            storing rows.
        reference: `(layer, hidden) -> output`, a slow computation of the same. Without it
            gradients are compared with finite differences, which a straight-through gradient
            does not pass.
        families: models to put the memory into.

    Raises:
        AssertionError: the memory breaks the contract; the message says how.
        UserError: the class is not registered.
    """
    if not getattr(cls, "kind", ""):
        raise UserError(f"{cls.__name__} is not registered; put @dmt.register_memory above it")
    for family in families:
        case = MemoryUnderTest(config or cls.config_class(), family, prepare, reference)
        for check in MEMORY_CHECKS:
            try:
                check(case)
            except AssertionError as error:
                raise AssertionError(f"{cls.__name__}, {check.__name__}: {error}") from error
            except Exception as error:
                raise AssertionError(
                    f"{cls.__name__}, {check.__name__}: {type(error).__name__}: {error}"
                ) from error


def make_tokens(batch: int, time: int, seed: int = 0) -> Tensor:
    """Return random token ids `(batch, time)` for the tiny models."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB_SIZE, (batch, time), generator=generator)


def make_hidden(*shape: int, seed: int = 0) -> Tensor:
    """Return random hidden states `(*shape, width)`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, WIDTH, generator=generator)


def call_layer(layer: MemoryLayer, hidden: Tensor, seed: int = 0) -> Tensor:
    """Return the output of a memory for `hidden` `(..., width)` at random tokens.

    Args:
        layer: the memory.
        hidden: hidden states; the last dimension before the width is time.
        seed: of the tokens.
    """
    shape = hidden.shape[:-1]
    with use_contexts(make_contexts(shape, seed)):
        output: Tensor = layer(hidden)
    return output


def make_contexts(shape: Sequence[int], seed: int = 0) -> Tensor:
    """Return the token ids up to each of random tokens, `(*shape, MAX_CONTEXT)`."""
    rows = make_tokens(math.prod(shape[:-1]), shape[-1], seed)
    return list_contexts(rows, MAX_CONTEXT).reshape(*shape, MAX_CONTEXT).clone()


@torch.no_grad()
def check_shapes(case: MemoryUnderTest) -> None:
    """Check that the output has the shape and type of the input, and is finite."""
    layer = case.make_fresh_layer()
    for shape in ((2, 5), (1, 1), (7,)):
        hidden = make_hidden(*shape)
        output = call_layer(layer, hidden)
        assert output.shape == hidden.shape, (
            f"output has shape {tuple(output.shape)} for an input of {tuple(hidden.shape)}"
        )
        assert output.dtype == hidden.dtype, f"output is {output.dtype} for float32 inputs"
        assert output.isfinite().all(), "output is not finite"


@torch.no_grad()
def check_causality(case: MemoryUnderTest) -> None:
    """Check that a later token changes no earlier output."""
    layer = case.make_layer()
    hidden = make_hidden(1, 8)
    changed = hidden.clone()
    changed[:, 5:] = make_hidden(1, 3, seed=1)
    contexts = make_contexts((1, 8))
    output = _call_with(layer, hidden, contexts)
    contexts[:, 5:] = make_contexts((1, 8), seed=1)[:, 5:]
    difference = (output - _call_with(layer, changed, contexts))[:, :5].abs().max()
    assert difference <= TOLERANCE, (
        f"outputs of tokens 0-4 change by {difference:.3g} when tokens 5-7 change; the output for "
        "a token must not depend on later ones"
    )


@torch.no_grad()
def check_batch_invariance(case: MemoryUnderTest) -> None:
    """Check that a token's output does not depend on what else is in the batch."""
    layer = case.make_layer()
    hidden = make_hidden(4, 6)
    contexts = make_contexts((4, 6))
    batched = _call_with(layer, hidden, contexts)
    single = torch.cat(
        [
            _call_with(layer, row.unsqueeze(0), context.unsqueeze(0))
            for row, context in zip(hidden, contexts, strict=True)
        ]
    )
    difference = (batched - single).abs().max()
    assert difference <= TOLERANCE, (
        f"outputs differ by {difference:.3g} between a batch of four and each text alone"
    )
    alone = torch.stack(
        [
            _call_with(layer, token.reshape(1, 1, -1), context.reshape(1, 1, -1))[0, 0]
            for token, context in zip(hidden[0], contexts[0], strict=True)
        ]
    )
    difference = (batched[0] - alone).abs().max()
    assert difference <= TOLERANCE, (
        f"outputs differ by {difference:.3g} between a text at once and token by token; the output "
        "for a token must depend on that token alone"
    )


def check_gradient(case: MemoryUnderTest) -> None:
    """Check gradients of inputs and parameters, against a reference or finite differences."""
    layer = case.make_layer().double()
    hidden = make_hidden(1, 6).double().requires_grad_()
    direction = make_hidden(1, 6, seed=2).double()
    parameters = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    tensors = {"hidden": hidden, **parameters}
    gradients = _gradients(call_layer(layer, hidden), direction, tensors)
    if case.reference is not None:
        with use_contexts(make_contexts(hidden.shape[:-1])):
            expected = _gradients(case.reference(layer, hidden), direction, tensors)
        for name, gradient in gradients.items():
            error = float((gradient - expected[name]).norm())
            scale = float(expected[name].norm()) + 1e-9
            assert error <= GRADIENT_TOLERANCE * scale, (
                f"the gradient of {name} differs from the reference's by {error / scale:.3g}"
            )
        return
    for name, gradient in gradients.items():
        expected_slope, step = _finite_difference(layer, hidden, direction, tensors[name])
        slope = float((gradient * step).sum())
        scale = abs(expected_slope) + 1e-3 * float(gradient.norm()) + 1e-6
        assert abs(expected_slope - slope) <= GRADIENT_TOLERANCE * scale, (
            f"the gradient of {name} gives a slope of {slope:.6g}, finite differences "
            f"{expected_slope:.6g}; give check_memory a reference where the gradient is meant to "
            "differ"
        )


def _call_with(layer: MemoryLayer, hidden: Tensor, contexts: Tensor) -> Tensor:
    with use_contexts(contexts):
        output: Tensor = layer(hidden)
    return output


def _gradients(output: Tensor, direction: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    loss = (output * direction).sum()
    assert loss.requires_grad, "the output has no gradient"
    gradients = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    return {
        name: torch.zeros_like(tensor) if gradient is None else gradient
        for (name, tensor), gradient in zip(tensors.items(), gradients, strict=True)
    }


@torch.no_grad()
def _finite_difference(
    layer: MemoryLayer, hidden: Tensor, direction: Tensor, tensor: Tensor
) -> tuple[float, Tensor]:
    """Return the slope of the output along a random step of `tensor`, and the step."""
    generator = torch.Generator().manual_seed(3)
    step = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
    original, size = tensor.clone(), 1e-6
    outputs = []
    for sign in (1, -1):
        tensor.copy_(original + sign * size * step)
        outputs.append(float((call_layer(layer, hidden) * direction).sum()))
    tensor.copy_(original)
    return (outputs[0] - outputs[1]) / (2 * size), step


def check_save_and_load(case: MemoryUnderTest) -> None:
    """Check that a student, trained a little, is saved and loaded with every value."""
    student = case.make_student()
    _train(student, torch.optim.SGD(student.parameters(), lr=0.05), steps=2)
    tokens = make_tokens(2, 12)
    arguments = student.config.memory
    assert json.loads(json.dumps(arguments)) == arguments, (
        "make_arguments must return plain JSON values: str, int, float, bool, None, list, dict"
    )
    with torch.no_grad():
        expected = student.eval()(tokens).logits
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        student.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).eval()
        with torch.no_grad():
            logits = loaded(tokens).logits
    state = student.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name]), f"{name} differs after saving and loading"
    difference = (logits - expected).abs().max()
    assert difference <= 1e-6, (
        f"logits differ by {difference:.3g} after saving and loading; state belongs into "
        "parameters and buffers, and reset() sets buffers that are not saved"
    )


@torch.no_grad()
def check_cached_generation(case: MemoryUnderTest) -> None:
    """Check that token by token, with a cache, a student computes what it does at once."""
    student, tokens = case.make_student(), make_tokens(2, 10)
    expected = student(tokens, use_cache=False).logits
    cache, logits = None, []
    for position in range(tokens.shape[1]):
        step = student(tokens[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        logits.append(step.logits)
    difference = (torch.cat(logits, 1) - expected).abs().max()
    assert difference <= 10 * TOLERANCE, (
        f"logits differ by {difference:.3g} between generation with a cache and without"
    )


@torch.no_grad()
def check_dtypes(case: MemoryUnderTest) -> None:
    """Check the memory in bfloat16, and in float32 under autocast."""
    layer, hidden = case.make_layer(), make_hidden(2, 6)
    expected = call_layer(layer, hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _check_close(call_layer(layer, hidden).float(), expected, "under autocast")
    output = call_layer(layer.bfloat16(), hidden.bfloat16())
    assert output.dtype == torch.bfloat16, f"output is {output.dtype} for bfloat16 inputs"
    _check_close(output.float(), expected, "in bfloat16")


def _check_close(output: Tensor, expected: Tensor, label: str) -> None:
    assert output.isfinite().all(), f"output is not finite {label}"
    error = float((output - expected).norm() / expected.norm().clamp_min(1e-9))
    # Which rows are read may change by rounding, so the bound is that of a gross error.
    assert error <= 3 * BFLOAT16_TOLERANCE, f"output {label} is off by {error:.0%} of its norm"


def check_reset(case: MemoryUnderTest) -> None:
    """Check that `reset` sets every parameter: transformers creates layers without values."""
    layer = case.make_fresh_layer()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(torch.nan)
        for module in reversed(list(layer.modules())):  # inner ones first, as transformers does
            if isinstance(module, MemoryLayer):
                module.reset()
    for name, parameter in layer.named_parameters():
        assert parameter.isfinite().all(), f"reset() does not set {name}"


def check_resume(case: MemoryUnderTest) -> None:
    """Check that training resumes from a `state_dict` as if it had not stopped."""
    student = case.make_student()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    _train(student, optimizer, steps=2)
    state = copy.deepcopy((student.state_dict(), optimizer.state_dict()))
    _train(student, optimizer, steps=2, first=2)
    resumed = case.make_student(seed=1)
    resumed_optimizer = torch.optim.AdamW(resumed.parameters(), lr=1e-2)
    resumed.load_state_dict(state[0])
    resumed_optimizer.load_state_dict(state[1])
    _train(resumed, resumed_optimizer, steps=2, first=2)
    final = student.state_dict()
    for name, tensor in resumed.state_dict().items():
        difference = (tensor.float() - final[name].float()).abs().max() if tensor.numel() else 0
        assert difference <= 1e-6, (
            f"{name} differs by {difference:.3g} after a resume; state belongs into parameters and "
            "buffers"
        )


# Every check, in the order in which `check_memory` runs them.
MEMORY_CHECKS: tuple[Callable[[MemoryUnderTest], None], ...] = (
    check_reset,  # first, because values that are not set can fail any other check
    check_shapes,
    check_causality,
    check_batch_invariance,
    check_dtypes,
    check_gradient,
    check_save_and_load,
    check_cached_generation,
    check_resume,
)


def _train(
    student: PreTrainedModel, optimizer: torch.optim.Optimizer, steps: int, first: int = 0
) -> None:
    student.train()
    for step in range(first, first + steps):
        tokens = make_tokens(2, 12, seed=step)
        logits = student(tokens).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    student.eval()


def _make_teacher(family: str) -> PreTrainedModel:
    shared: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 0}
    if family == "gpt2":
        config: Any = GPT2Config(
            n_embd=WIDTH,
            n_inner=NUM_NEURONS,
            n_layer=NUM_LAYERS,
            n_head=2,
            n_positions=MAX_TOKENS,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **shared,
        )
        teacher: PreTrainedModel = GPT2LMHeadModel(config)
    elif family == "llama":
        config = LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=NUM_NEURONS,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=MAX_TOKENS,
            **shared,
        )
        teacher = LlamaForCausalLM(config)
    else:
        raise UserError(f"family must be gpt2 or llama, got {family}")
    with torch.no_grad():  # a fresh model is nearly uniform, and would hide errors
        for parameter in teacher.parameters():
            parameter.mul_(5 if parameter.dim() == 2 else 1)
    return teacher.eval()
