"""From a checkpoint folder to a skeleton and a state, weight by weight."""

import json
import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from rosa_func import modules, peft_names, samplers, targeting
from rosa_func.drawing import Progress, check_draw
from rosa_func.extras import needs
from rosa_func.files import converted, hub
from rosa_func.modules import skeleton, some
from rosa_func.patterns import Rank
from rosa_func.samplers import Sampler
from rosa_func.starting import split_all
from rosa_func.storage import Master, Storage
from rosa_func.targeting import Targets
from rosa_func.weight.keeping import Place
from rosa_func.weight.sharded import spread_over

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def init_from(
    path: str | os.PathLike[str],
    r: Rank | None = None,
    *,
    key: int = 0,
    sampler: Sampler = samplers.random,
    targets: Targets = None,
    train: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    exact: bool | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    compensation: Place = None,
    progress: Progress = False,
    quantize: str | None = None,
    master: Master = None,
    mesh: "DeviceMesh | None" = None,
    **others: NoReturn,
) -> tuple[nn.Module, TensorDict]:
    """Do what `init` does, reading the weights of a transformers checkpoint one by one.

        skeleton, state = init_from(path, r)    is    model = from_pretrained(path)
                                                      skeleton(model), init(model, r)

    without the model ever standing in memory beside the state. A tensor that is stored otherwise
    than the model holds it, such as the experts of a layer one by one, is converted by transformers
    when its turn comes. Each keeps the dtype of its file unless `dtype` says otherwise, and a
    `generation_config.json` is not read. Needs transformers and safetensors.

    Args:
        path: a folder with `config.json`, which names the architecture, and `model.safetensors` or
            the shards of `model.safetensors.index.json`; or the name of a repository of the Hub
            that has them: what is in the Hub's cache is taken from there, and not updated.
        r: as in `init`, as are `key`, `sampler`, `targets`, `train`, `exclude`, `exact` and
            `compensation`.
        key: see `init`.
        sampler: see `init`.
        targets: see `init`.
        train: see `init`.
        exclude: see `init`.
        exact: see `init`.
        dtype: of the floating-point weights; None for that of the files.
        device: where each weight is taken to, and decomposed; None for the CPU, or the mesh's.
        compensation: see `init`.
        progress: as in `init`.
        quantize: see `init`.
        master: see `init`.
        mesh: of processes that all call this, to have the state as `distributed.shard` returns it.
            Each reads and splits its share of the weights, one at a time, and deals out the rows:
            none ever has more than its rows and a whole weight. The bits are the same.
        others: none, as in `init`.

    Returns:
        The weightless model, in eval mode, to be passed to `call`, and the state, both on the
        device: `model, state = model.to(device), state.to(device)` moves them.

    Raises:
        FileNotFoundError: if the folder lacks one of the files, or neither it nor such a repository
            is found.
        KeyError: if the files lack a tensor of the model (named), such as those of a new head.
        ValueError: if a shape differs from that of the config, if the tensors of experts do not go
            together, if the files hold two values of one tied weight, on the meta device, or
            as `init`. With a mesh, for a device, a progress, or a place apart from the weights for
            what storing takes.
        TypeError: as `init`.
        RuntimeError, AssertionError: of torch, if there is no such device; with a mesh, as
            `distributed.resample`.

    Example:
        >>> import rosa_func, tempfile, torch, transformers
        >>> sizes = {"n_layer": 1, "n_embd": 12, "n_head": 2, "vocab_size": 9}
        >>> config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     transformers.GPT2LMHeadModel(config).save_pretrained(folder)
        ...     model, state = rosa_func.init_from(folder, r=2)
        >>> rosa_func.call(model, state, torch.tensor([[1, 2]])).logits.shape
        torch.Size([1, 2, 9])
    """
    peft_names.refuse(others)
    check_draw(key, sampler, progress)
    storage = Storage(exact, compensation, quantize, master).check()
    if dtype is not None and dtype not in _DTYPES.values():
        known = ", ".join(str(known) for known in _DTYPES.values())
        raise TypeError(f"dtype is None or one of {known}, got {dtype!r}")
    apart = [place for place in (compensation, master) if place and place is not True]
    if mesh is not None and (progress or apart or device is not None):
        raise ValueError(
            "with a mesh all of a weight is on the mesh's device, what storing takes beside its "
            f"rows, and there is no progress: leave out compensation={compensation!r}, "
            f"master={master!r}, device={device!r} or progress={progress!r}"
        )
    like = None if mesh is None else spread_over(mesh)
    place = like.device if like is not None else _device(device)
    folder = hub.folder(path, _PATTERNS, _files_in)
    with ExitStack() as stack:
        files = _Files(folder, stack)
        model = _weightless(folder, dtype or files.dtype()).to(place)
        expected = modules.tensors(model)
        stored = files.locate(model)

        def read(name: str) -> Tensor:
            first, *others = stored[name]
            tensor = files.read(name, first, model)
            for other in others:
                if not torch.equal(tensor, files.read(name, other, model).to(tensor)):
                    raise ValueError(
                        f"{first.alias} and {other.alias} are one tied weight of "
                        f"{type(model).__name__}, and {folder} holds two different ones: untie "
                        'them in its config.json, by "tie_word_embeddings": false'
                    )
            if tensor.shape != expected[name].shape:
                keys, converter = first.source.keys, first.source.converter
                what = keys[0] if converter is None else f"{name}, made of {some(keys)},"
                raise ValueError(
                    f"{what} has shape {tuple(tensor.shape)} in {folder}, and by the config of "
                    f"{type(model).__name__} {tuple(expected[name].shape)}"
                )
            tensor = tensor.to(place)
            return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor

        plan = targeting.plan(model, r, targets, train, exclude)
        modules.refuse_sparse_gradients(model, plan.full)
        return model, split_all(
            plan,
            read,
            lambda _: place,
            key=key,
            sampler=sampler,
            storage=storage,
            progress=progress,
            like=like,
        )


def _device(given: torch.device | str | None) -> torch.device:
    """Return the device, or raise the error of torch if there is none."""
    place = torch.empty(0, device=given or "cpu").device
    if place.type == "meta":
        raise ValueError(
            "init_from reads weights, and the meta device holds none: rosa_func.plan(config, r) "
            "says what they would take"
        )
    return place


class _Files:
    """The tensors of a checkpoint folder, by name, read when asked for."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        with needs("trainer"):
            from safetensors import safe_open

        self._folder, self._file_of = folder, {}
        for path in _files_in(folder):
            # Mapped memory would stay resident, and be counted, as long as the file is open.
            file = stack.enter_context(safe_open(path, "pt", backend="pread"))
            self._file_of.update(dict.fromkeys(file.keys(), file))

    def read(self, name: str, place: "_Place", model: nn.Module) -> Tensor:
        """Return a tensor of the model."""

        def read(key: str) -> Tensor:
            tensor: Tensor = self._file_of[key].get_tensor(key)
            return tensor

        try:
            return converted.made(place.alias, place.source, model, read)
        except (RuntimeError, KeyError) as error:  # of torch.stack and torch.cat, where some lack
            keys = place.source.keys
            raise ValueError(
                f"{name} of {type(model).__name__} cannot be made of {some(keys)} in "
                f"{self._folder}; is a tensor missing? ({error})"
            ) from error

    def dtype(self) -> torch.dtype:
        """Return the dtype of the first floating-point tensor."""
        kinds = (file.get_slice(name).get_dtype() for name, file in self._file_of.items())
        return next((_DTYPES[kind] for kind in kinds if kind in _DTYPES), torch.float32)

    def locate(self, model: nn.Module) -> "dict[str, list[_Place]]":
        """Return what each tensor of the model is stored as.

        A tied one may be stored under any of its names, or several, and all with or without the
        name of the backbone, as transformers reads them too.
        """
        sources = converted.sources(model, self._file_of)
        if sources is None:
            sources = self._under_own_names(model)
        places = {
            name: [_Place(alias, sources[alias]) for alias in aliases if alias in sources]
            for name, aliases in modules.aliases(model).items()
        }
        if missing := [name for name, found in places.items() if not found]:
            backbone = f"{getattr(model, 'base_model_prefix', '')}."
            lack = f"the files in {self._folder} lack {some(missing)} of {type(model).__name__}"
            if any(name.startswith(backbone) for name in missing) or backbone == ".":
                raise KeyError(
                    f"{lack}: load the model with from_pretrained, which knows old and new names, "
                    "and draws what is new at random, and use init"
                )
            raise KeyError(
                f"{lack}, and have its backbone: a new head has no weights yet. Load the model "
                'with from_pretrained, which draws them, and use init with train="head"'
            )
        return places

    def _under_own_names(self, model: nn.Module) -> dict[str, converted.Source]:
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        sources: dict[str, converted.Source] = {}
        for alias in model.state_dict():
            for key in (alias, alias.removeprefix(prefix), prefix + alias):
                if key in self._file_of:
                    sources.setdefault(alias, converted.Source([key], []))
        return sources


class _Place(NamedTuple):
    """Where a tensor of a model is stored: under which of its names, and made of what."""

    alias: str
    source: converted.Source


_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PATTERNS = ["config.json", _SINGLE, _INDEX, "model-*.safetensors"]


def _files_in(folder: Path) -> list[Path]:
    """Return the files with the weights, after making sure that all are there."""
    files = [folder / _SINGLE]
    if (folder / _INDEX).is_file():
        shards = json.loads((folder / _INDEX).read_text())["weight_map"].values()
        files = [folder / name for name in sorted(set(shards))]
    elif not files[0].is_file():
        raise FileNotFoundError(
            f"there is neither {files[0]} nor {_INDEX}; a pytorch_model.bin is not read, since a "
            "pickle can run any code: load it with from_pretrained if you trust it, and "
            "save_pretrained writes safetensors"
        )
    for file in [folder / "config.json", *files]:
        if not file.is_file():
            raise FileNotFoundError(f"there is no {file}")
    return files


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def _weightless(folder: Path, dtype: torch.dtype) -> nn.Module:
    """Build the model of the folder's config with its parameters on the meta device from birth."""
    with needs("trainer"):
        import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    model_class: Any = getattr(transformers, (config.architectures or ["(none)"])[0], None)
    if model_class is None:
        raise ValueError(
            f"{folder / 'config.json'} names the architectures {config.architectures}, which "
            "transformers does not have: load the model by other means, and use init"
        )

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> Any:
        if parameter.is_meta:  # a tie: the very same one
            return None
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(on_meta)
    try:
        with torch.random.fork_rng(devices=[]):
            return skeleton(model_class._from_config(config, dtype=dtype).eval())
    finally:
        hook.remove()
