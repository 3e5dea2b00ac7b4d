"""Text by a merged model: the prompts as in training, beams or the greedy choice."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def generate(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[str], setting: dict[str, Any]
) -> list[str]:
    """Return the best of the beams for each prompt, which is cut as in training."""
    limit = setting["length"] // 2
    tokenizer.padding_side, texts = "left", []
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for start in range(0, len(prompts), 32):
        lines = [f"{prompt}\n" for prompt in prompts[start : start + 32]]
        ids = [ids[:limit] for ids in tokenizer(lines, add_special_tokens=False).input_ids]
        inputs = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        ids = model.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            max_new_tokens=limit,
            num_beams=setting["beams"],
            do_sample=False,
            early_stopping=setting["beams"] > 1,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        written = ids[:, inputs.input_ids.shape[1] :]
        texts += [text.strip() for text in tokenizer.batch_decode(written, True)]
    return texts
