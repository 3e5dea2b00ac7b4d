"""Checkpoints whose tensors are not the model's own: transformers' conversions of old into new.

All that the library uses of transformers beyond what its documentation names is here. What a
version lacks counts as nothing to convert.
"""

import copy
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from rosa_func.modules import unwrapped


class Source(NamedTuple):
    """What a tensor of a model is made of.

    Attributes:
        keys: the names in the files; of those of experts, expert by expert.
        patterns: for each key, the pattern by which the converter knows it.
        converter: of transformers; None where the tensor of the only key is the model's.
        first: the first of the tensors that the converter makes.
    """

    keys: list[str]
    patterns: list[str]
    converter: Any = None
    first: str = ""


def sources(model: nn.Module, keys: Iterable[str]) -> dict[str, Source] | None:
    """Return what each tensor of a transformers model is made of, by its name in the model.

    A tensor of a file is renamed, or is one of those of which a converter makes a parameter: such
    as `block_sparse_moe.experts.3.w1.weight`, of which `mlp.experts.gate_up_proj` is stacked.

    Args:
        model: the model, whose parameters may be on the meta device.
        keys: the names in the files.

    Returns:
        The sources of those tensors for which there are any; None if the installed transformers
        has no such conversions.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError:
        return None
    conversions = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    own = model.state_dict()  # with every name of a tied tensor
    prefix: Any = model.base_model_prefix
    found: dict[str, Source] = {}
    for key in sorted(keys, key=dot_natural_key):  # expert 2 before expert 10
        name, pattern = rename_source_key(key, renamings, converters, prefix, own)
        if name not in own and key in own:
            name, pattern = rename_source_key(key, [], [], prefix, own)
        if name not in own:
            continue
        if pattern is None:
            found.setdefault(name, Source([key], []))
            continue
        converter = by_pattern[pattern]
        source = found.setdefault(name, Source([], [], converter, name))
        source.keys.append(key)
        source.patterns.append(pattern)
        for other in converter.target_patterns[1:]:
            found[name.replace(converter.target_patterns[0], other)] = source
    return found


def made(name: str, source: Source, model: nn.Module, read: Callable[[str], Tensor]) -> Tensor:
    """Return a tensor of the model; `read` gives those of the files by their names.

    What else the converter makes is let go, and made again when it is asked for: nothing but
    tensors of one source is ever in memory.
    """
    if source.converter is None:
        return read(source.keys[0])
    converter = copy.deepcopy(source.converter)
    for key, pattern in zip(source.keys, source.patterns, strict=True):
        converter.add_tensor(source.first, key, pattern, lambda key=key: read(key))
    tensors = converter.convert(source.first, model=model, config=model.config)
    tensor = tensors[name]
    result: Tensor = tensor[0] if isinstance(tensor, list) else tensor
    return result


def names_of_old_experts(model: nn.Module) -> frozenset[str]:
    """Return the names of modules that peft takes for experts that were modules once.

    In an architecture whose experts were an nn.Linear each, peft reads these names, in
    `target_modules`, as those of the parameters that hold all experts now: also where they are a
    dense layer's, or a shared expert's.
    """
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:
        return frozenset()
    kind: Any = getattr(getattr(unwrapped(model), "config", None), "model_type", None)
    conversions: Any = get_checkpoint_conversion_mapping(kind) if kind else None  # type: ignore[no-untyped-call]
    patterns = [pattern for each in conversions or () for pattern in each.source_patterns]
    matches = (re.search(r"experts\.\*\.(\w+)\.weight", p.replace("\\", "")) for p in patterns)
    found = {match[1] for match in matches if match}
    return frozenset(found | {"gate"} if found else found)
