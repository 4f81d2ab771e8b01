"""Text generation with one model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dmt.errors import UserError
from dmt.models.forward import check_length, encode_text, override_decoding

MAX_REASON_CHARS = 120  # of a message of transformers


@torch.no_grad()
def generate_tokens(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 30,
    temperature: float = 0.0,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> Tensor:
    """Generate a continuation.

    Args:
        model: in eval mode.
        tokenizer: of the model.
        prompt: the text to continue.
        max_new_tokens: fewer are generated where the model ends the text or is out of positions.
        temperature: 0 takes the most probable token; above 0, tokens are sampled with `seed`.
        seed: of the samples.
        on_text: called with each piece of text as it is generated.

    Returns:
        Token IDs `(time,)` of the prompt, its start token included, and of the continuation.

    Raises:
        UserError: the prompt is empty, leaves no room for a continuation, or the generation
            settings of the model do not work.
    """
    prompt_ids = encode_text(tokenizer, prompt)
    if not prompt.strip():
        raise UserError("the prompt is empty; give one such as 'The capital of France is'")
    check_length(model, tokenizer, [*prompt_ids, 0], "the prompt, with room for an answer,")
    free_positions = model.config.max_position_embeddings - len(prompt_ids)
    sampling_args: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        torch.manual_seed(seed)
        sampling_args = {"do_sample": True, "temperature": temperature}
    input_ids = torch.tensor([prompt_ids], device=next(model.parameters()).device)
    try:
        output_ids = model.generate(  # type: ignore[operator]
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=min(max_new_tokens, free_positions),
            streamer=None if on_text is None else _TextStreamer(tokenizer, on_text),
            pad_token_id=tokenizer.eos_token_id or 0,
            tokenizer=tokenizer,  # for stop_strings
            **sampling_args,
            **override_decoding(model),
        )
    except (ValueError, TypeError) as error:
        if getattr(model.generation_config, "_from_model_config", False):
            raise  # it has no settings of its own
        raise UserError(
            "the model's generation settings do not work "
            f"({' '.join(str(error).split())[:MAX_REASON_CHARS]}); correct its "
            "generation_config.json, or remove it"
        ) from error
    return output_ids[0]


def generate_text(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 30,
    temperature: float = 0.0,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """Generate a continuation and return its text without the prompt; see `generate_tokens`."""
    output_ids = generate_tokens(
        model, tokenizer, prompt, max_new_tokens, temperature, seed, on_text
    )
    prompt_length = len(encode_text(tokenizer, prompt))
    return tokenizer.decode(output_ids[prompt_length:], skip_special_tokens=True)


class _TextStreamer:
    """The `streamer` of `transformers`' generate; it receives the prompt first and skips it."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self.tokenizer, self.on_text = tokenizer, on_text
        self.generated_ids: list[int] | None = None
        self.emitted_text = ""

    def put(self, ids: Tensor) -> None:
        if self.generated_ids is None:
            self.generated_ids = []
            return
        self.generated_ids += ids.flatten().tolist()
        text = self.tokenizer.decode(self.generated_ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # a character may take several tokens
            self.on_text(text[len(self.emitted_text) :])
            self.emitted_text = text

    def end(self) -> None:
        text = self.tokenizer.decode(self.generated_ids or [], skip_special_tokens=True)
        self.on_text(text[len(self.emitted_text) :])
