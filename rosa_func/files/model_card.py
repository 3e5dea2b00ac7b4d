"""What peft and the Hub are told of an adapter besides its weights."""

import re
from pathlib import Path
from typing import Any

from torch import nn

from rosa_func.modules import unwrapped

# The ends of class names. peft saves the heads of these tasks whole, by the ends of their names.
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "Model": "FEATURE_EXTRACTION",
}
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_HUB_NAME = r"[\w.-]+(/[\w.-]+)?"


def task_type(model: nn.Module) -> str | None:
    """Return what peft calls the task of a transformers model of text, None if it has no word."""
    model = unwrapped(model)
    config: Any = getattr(model, "config", None)
    if getattr(model, "main_input_name", None) != "input_ids":
        return None
    names = [task for end, task in _TASKS.items() if type(model).__name__.endswith(end)]
    if names[:1] == ["SEQ_2_SEQ_LM"] and not getattr(config, "is_encoder_decoder", False):
        return None
    return names[0] if names else None


def heads(model: nn.Module, task: str | None) -> list[str]:
    """Return the modules that peft takes for the head of that task, and saves whole."""
    ends = HEADS.get(task or "", ())
    return [name for name, _ in model.named_modules() if name.endswith(ends)] if ends else []


def base_model(model: nn.Module) -> str | None:
    """Return the name, on the Hub or of a folder, from which the model was loaded."""
    return getattr(unwrapped(model), "name_or_path", None) or None


def card(model: nn.Module, task: str | None, adapted: int, rank: int, whole: int) -> str:
    """Return the text of a README.md, which names no folder.

    Args:
        model: the model without the adapter.
        task: of `task_type`.
        adapted: how many weights have factors.
        rank: the largest rank of them.
        whole: how many modules are saved whole.
    """
    name, kind = base_model(model), type(unwrapped(model)).__name__
    if name is not None and (Path(name).exists() or not re.fullmatch(_HUB_NAME, name)):
        name = None
    of_transformers = hasattr(unwrapped(model), "main_input_name")
    front = [f"base_model: {name}"] if name else []
    front += ["library_name: peft"]
    front += ["pipeline_tag: text-generation"] if task == "CAUSAL_LM" else []
    tags = [f"base_model:adapter:{name}"] if name else []
    tags += ["lora", "rosa", *(["transformers"] if of_transformers else [])]
    lines = ["---", *front, "tags:", *(f"- {tag}" for tag in tags), "---", ""]
    lines += [f"# LoRA adapter of {name or kind}", ""]
    more = f", and {whole} of its modules whole" if whole else ""
    lines += [
        f"The change of {adapted} weights of {kind} by training, as products of rank {rank} at "
        f"most{more}. Written by rosa_func.",
        "",
        "```python",
        "from peft import PeftModel",
    ]
    if name and of_transformers:
        lines += [f"from transformers import {kind}", ""]
        lines += [f'model = {kind}.from_pretrained("{name}")']
    else:
        lines += ["", f"model = ...  # the {kind}, as it was before training"]
    lines += ['model = PeftModel.from_pretrained(model, "the name or folder of this adapter")']
    return "\n".join([*lines, "```", ""])
