"""Out to plain modules and to peft adapters, and in from them."""

import os
from pathlib import Path

from tensordict import TensorDict
from torch import Tensor, nn

from rosa_func import modules, samplers
from rosa_func.checkpoint import delta
from rosa_func.cycle import merge
from rosa_func.files.peft_adapter import find_adapter, write_adapter
from rosa_func.files.peft_reading import read_change
from rosa_func.files.peft_writing import adapter
from rosa_func.forward import check_fit
from rosa_func.modules import with_tensors
from rosa_func.starting import init
from rosa_func.weight import read, write
from rosa_func.weight.layout import refuse_sharded
from rosa_func.weight.low_rank import LowRank, low_rank


def to_module(model: nn.Module, state: TensorDict) -> nn.Module:
    """Return a new plain module of the same class with the merged weights.

    It shares no memory with the model or the state, and has the ties of the model. It can be saved
    by `save_pretrained` and used by `generate`.

    Args:
        model: the model, or its `skeleton`; it is not written to.
        state: a state of `init` or `resample`.

    Returns:
        A module with the weights of `merge(state)`, in the model's mode.

    Raises:
        KeyError, ValueError: if model and state do not fit, as in `call`.

    Example:
        >>> import rosa_func, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> state, x = rosa_func.init(model, 2), torch.ones(3, 6)
        >>> merged = rosa_func.export.to_module(model, state)
        >>> torch.allclose(merged(x), rosa_func.call(model, state, x), atol=1e-6)
        True
    """
    refuse_sharded(state, "to_module")
    names, merged = check_fit(model, state), merge(state)
    return with_tensors(model, {name: merged[own].clone() for name, own in names.items()})


def to_peft(
    path: str | os.PathLike[str],
    model: nn.Module,
    state: TensorDict,
    *,
    rank: int | None = None,
    tol: float = 1e-7,
) -> dict[str, float]:
    """Write the change as a LoRA adapter that `PeftModel.from_pretrained` loads.

    The adapter, on the model that `init` was given, computes what `call` does, up to the error:

        W0 + (alpha / rank) lora_B lora_A = W - E,    alpha = rank

    The rank that a weight needs is the smallest within `tol`, see `delta`: at most 2 r K after K
    cycles. All go out with the largest of these ranks, padded with zeros: some readers, such as
    llama.cpp's converter, know one alpha for all, and divide it by the rank of each.

    The weights of an nn.Linear, Conv1D and nn.Embedding go out under `target_modules`; other
    matrices and the experts of a layer under `target_parameters`, and peft forms the whole weight
    to compute with them. Parameters trained in full go out as `modules_to_save`, and a tied weight
    under each of its modules.

    Args:
        path: a folder, made if need be: `adapter_config.json`, `adapter_model.safetensors`, and a
            short `README.md` for the Hub if there is none.
        model: the model as `init` was given it.
        state: a state of `init` or `resample`, trained or not.
        rank: the largest rank of a weight, in place of tol.
        tol: the largest error of a weight, relative to the weight.

    Returns:
        {name: |E| / |W|} for each adapted weight; of a batch of matrices, the largest.

    Raises:
        ValueError: if peft could not load it, or not as what it is (the weight, and why, are
            named): a weight of a module of another kind, such as a convolution; a parameter
            trained in full whose module has other modules or an adapter in it; a sparse part that
            is not zero; or nothing adapted. Nothing is written then.

    Warns:
        UserWarning: if a tied weight is adapted: load the adapter, but do not let peft merge it,
            which would add the change once for each name (`to_module` merges).

    Example:
        >>> import rosa_func, tempfile, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(60, 40))
        >>> state = rosa_func.init(model, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     errors = rosa_func.export.to_peft(folder, model, state)
        >>> max(errors.values()) < 1e-6
        True
    """
    change = delta(state, model, tol=tol, rank=rank)
    for name, part in change.get("sparse", {}).items():
        if part["values"].any():
            raise ValueError(
                f"{name} has a sparse part, which no LoRA adapter of peft holds: write the merged "
                "model (export.to_module), or the change (checkpoint.delta)"
            )
    factors = {str(name): (pair["A"], pair["B"]) for name, pair in change["change"].items()}
    full = {str(name): tensor for name, tensor in change["full"].items()}
    write_adapter(Path(path), *adapter(model, factors, full))
    return {name: float(error.max()) for name, error in change["error"].items()}


def from_peft(model: nn.Module, path: str | os.PathLike[str]) -> TensorDict:
    """Return a peft LoRA adapter as a state, which can go on training, also by `resample`.

        R = W0,  A B = (alpha / rank) lora_B lora_A    (alpha / sqrt(rank) for rsLoRA)

    in the parameter's layout, the scale shared by both factors. Experts that peft adapted under
    `target_parameters` are adapted as experts.

    Args:
        model: the base model of the adapter; the state shares its weights, as with `samplers.lora`.
        path: a folder with `adapter_config.json` and `adapter_model.safetensors`, or, where
            huggingface_hub is installed, the name of a repository of the Hub that has them.

    Returns:
        A state. What else the file holds, as of `modules_to_save`, is trained in full.

    Raises:
        FileNotFoundError: if the folder lacks one of the files, or neither it nor such a repository
            is found.
        ValueError: for an adapter that is not plain LoRA (what else it is, is named), is of other
            shapes than the model, or changes only one of two tied weights, or both differently.
        KeyError: if it changes a weight that the model does not have, or a factor is missing.

    Example:
        >>> import rosa_func, tempfile, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(60, 40))
        >>> state = rosa_func.init(model, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     errors = rosa_func.export.to_peft(folder, model, state, rank=3)
        ...     state = rosa_func.export.from_peft(model, folder)
        >>> state["trainable", "0.weight", "A"].shape
        torch.Size([40, 3])
    """
    factors, whole = read_change(model, find_adapter(path))
    buffers = {name for name, _ in modules.persistent_buffers(model)}
    start = read(
        init(
            model,
            {name: A.shape[-1] for name, (A, _) in factors.items()},
            sampler=samplers.lora,
            targets=(lambda name, _: name in factors) if factors else (),
            train=[name for name in whole if name not in buffers],
        )
    )
    frozen = dict(start.frozen)
    for name, w in start.adapted().items():
        like = low_rank(w)
        pair = (new.to(old).contiguous() for new, old in zip(factors[name], like, strict=True))
        frozen[name] = w._replace(terms=(LowRank(*pair),))
    frozen |= {
        name: whole[name].to(like, copy=True)
        for name, like in start.frozen.items()
        if name in whole and isinstance(like, Tensor)
    }
    full = {name: whole[name].to(value, copy=True) for name, value in start.full.items()}
    return write(start._replace(frozen=frozen, full=full))
