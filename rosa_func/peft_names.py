"""Arguments that peft has and this library does not, for those who come from there."""

from collections.abc import Mapping

_SCALE = "the scale alpha / r is 1 here; in its place choose the learning rate, see optim.groups"
_QUANTIZE = 'weights in full precision are quantised here, as in quantize="nf4"'
_HERE = {
    "rank": "the rank is r, as in r=8",
    "rank_pattern": 'r takes patterns, as in r={"q_proj": 16, "*": 8}',
    "alpha": _SCALE,
    "lora_alpha": _SCALE,
    "alpha_pattern": _SCALE,
    "use_rslora": _SCALE,
    "target_modules": 'they are targets, as in targets=["q_proj", "v_proj"]',
    "target_parameters": 'they are targets, as in targets="experts.down_proj"',
    "exclude_modules": 'they are in exclude, as in exclude="lm_head"',
    "modules_to_save": 'they are in train, as in train="head"',
    "bias": 'to train biases, train="*.bias"',
    "init_lora_weights": "that is a sampler, as in sampler=samplers.lora or samplers.top (PiSSA)",
    "seed": "a draw has a key, as in key=0",
    "load_in_4bit": _QUANTIZE,
    "load_in_8bit": 'weights in full precision are quantised here, as in quantize="int8"',
    "quantization_config": _QUANTIZE,
    "bnb_4bit_quant_type": _QUANTIZE,
    "bnb_4bit_use_double_quant": 'scales are quantised again by quantize="nf4_double"',
    "bnb_4bit_compute_dtype": "it is the dtype of the model, as in init_from(path, dtype=...)",
    "loftq_config": "there is no LoftQ here; a start that helped is sampler=samplers.top",
}


def refuse(arguments: Mapping[str, object]) -> None:
    """Refuse arguments that a function does not have, and say how to say the same here.

    Raises:
        TypeError: if there are any.
    """
    for name in arguments:
        here = f": {_HERE[name]}" if name in _HERE else ""
        raise TypeError(f"unexpected keyword argument {name!r}{here}")
