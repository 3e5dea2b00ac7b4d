"""Nothing is read on the host, nor copied from there: a step would wait for the GPU.

On the meta device tensors have shapes and no values, and to read one is an error. What goes unseen
there, such as a copy from the host, a mode refuses.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread, get_ident
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import rosa_func
from cases import WEIGHT_USES, Parts, WeightUse, with_sparse
from models import checkpoint_segments, seeded, stock_moe, tiny_gpt2, token_ids
from references import main_output, perturbed
from rosa_func import samplers, stacking
from rosa_func._torch import TorchDispatchMode, tree_leaves
from rosa_func.module import RosaModule
from rosa_func.weight import parallel
from rosa_func.weight.layout import leaves

META = torch.device("meta")
IDS = token_ids(2, 6)
# Bilinear layers and toys have no rule for batches of matrices.
of_batches = pytest.mark.filterwarnings("ignore:.*forms a batch")

_MASKED = {getattr(torch.ops.aten, name) for name in ("index", "index_put", "index_put_")}
_COPIES = {getattr(torch.ops.aten, name) for name in ("_to_copy", "copy", "copy_")}


class NoWaiting(TorchDispatchMode):
    """Refuse what waits for a GPU: values or shapes read on the host, and copies from or to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (why := _waits(func, args, kwargs or {}, out)) is not None:
            raise AssertionError(f"{func} {why}")
        return out


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _waits(func: Any, args: Any, kwargs: Any, out: Any) -> str | None:
    kind, given, made = func.overloadpacket, _tensors((args, kwargs)), _tensors(out)
    if torch.Tag.data_dependent_output in func.tags:
        return "reads a value"
    is_masked = any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1:2]))
    if kind in _MASKED and is_masked:
        return "counts the places of a mask"
    # How many rows are repeated may be said.
    is_known = kind in _MASKED or kwargs.get("output_size") is not None
    if torch.Tag.dynamic_output_shape in func.tags and not is_known:
        return "makes a tensor whose shape depends on values"
    # A number on the host goes to the device with the operation.
    moved = [t for t in given if t.ndim or kind in _COPIES]
    if len({t.device.type for t in [*moved, *made]}) > 1:
        return "copies from one device to another"
    return None


class NoNumbers(TorchFunctionMode):
    """Refuse tensors of numbers on the host, whose copy no operator shows."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            raise AssertionError(f"{func.__name__} copies numbers from the host")
        return func(*args, **kwargs)


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    with NoWaiting(), NoNumbers():
        yield


@pytest.mark.parametrize(
    "work",
    [
        lambda t: t.sum().item(),
        lambda t: bool(t.any()),
        lambda t: t.nonzero(),
        lambda t: t[t > 0],
        lambda t: t.masked_select(t > 0),
        lambda t: torch.equal(t, t + 1),
        lambda t: t.unique(),
        lambda t: torch.arange(4).repeat_interleave(torch.ones(4).long()),
        lambda t: t.to("meta"),
        lambda t: torch.tensor(1.0).to("meta"),
        lambda t: torch.ones(4, device="meta").copy_(t),
        lambda t: torch.tensor([1.0], device="meta"),
    ],
)
def test_the_mode_refuses_what_waits(work: Callable[[Tensor], Any]):
    with waiting_is_an_error(), pytest.raises(AssertionError, match=r"reads|counts|makes|copies"):
        work(torch.arange(4.0))


def test_the_mode_lets_the_rest_through():
    with waiting_is_an_error():
        t = torch.ones(4, device="meta") * torch.tensor(2.0)  # a number goes as an argument
        t[torch.zeros(3, dtype=torch.long, device="meta")]
        torch.full((), 3, device="meta").add_(1)


def train_twice(compute: Callable[[], Any], state: TensorDict) -> None:
    """Compute and differentiate, as in a second step: in the first one tables are copied."""
    rosa_func.parameters(state)
    main_output(compute()).sum().backward()
    for leaf in leaves(state).values():
        leaf.grad = None
    with waiting_is_an_error():
        main_output(compute()).sum().backward()
    for name, leaf in leaves(state).items():
        assert leaf.grad is not None, name
        assert leaf.grad.shape == leaf.shape


def train_use(module: nn.Module, use: WeightUse, state: TensorDict) -> None:
    state, x = state.to("meta"), use.input.to("meta")
    skeleton = rosa_func.skeleton(module).to("meta")
    train_twice(lambda: rosa_func.call(skeleton, state, x), state)


def quantised(kind: str) -> Callable[[nn.Module, Any], TensorDict]:
    return lambda module, targets: rosa_func.init(module, 1, targets=targets, quantize=kind)


def with_past(module: nn.Module, targets: Any) -> TensorDict:
    state = perturbed(rosa_func.init(module, 1, targets=targets, quantize="nf4"))
    return rosa_func.resample(state, 1, sampler=samplers.additive)


KINDS: dict[str, Callable[[nn.Module, Any], TensorDict]] = {
    "dense": lambda module, targets: rosa_func.init(module, 1, targets=targets),
    "nf4": quantised("nf4"),
    "nf4_double": quantised("nf4_double"),
    "int8": quantised("int8"),
    "past": with_past,
    "sparse": lambda module, targets: with_sparse(rosa_func.init(module, 1, targets=targets), 0.5),
    "a large sparse part alone": lambda module, targets: with_sparse(
        rosa_func.init(module, 0, targets=targets), 0.9
    ),
    "4 bits and sparse": lambda module, targets: with_sparse(
        quantised("nf4")(module, targets), 0.5
    ),
}


class TestAStep:
    """4-bit codes copied their table from the host at each product, and sparse rows were counted.

    So 4 bits waited 4 times a layer and step, and neither could be captured in a graph.
    """

    @of_batches
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("use", WEIGHT_USES, ids=repr)
    def test_a_call_and_its_backward_pass_wait_for_nothing(self, use: WeightUse, kind: str):
        module = seeded(use.build)
        train_use(module, use, KINDS[kind](module, use.targets))

    @of_batches
    @pytest.mark.usefixtures("toys")
    @pytest.mark.parametrize("parts", [Parts("int8", "scaled and sparse")], ids=str)
    @pytest.mark.parametrize("use", WEIGHT_USES, ids=repr)
    def test_nor_do_parts_that_the_library_does_not_know(self, use: WeightUse, parts: Parts):
        module = seeded(use.build)
        state = parts.put_into(rosa_func.init(module, 1, targets=use.targets))
        train_use(module, use, perturbed(state))


def gpt2_state(**options: Any) -> tuple[nn.Module, TensorDict]:
    """Return a GPT-2 in training and a state with all kinds of leaves, both without values."""
    model = seeded(tiny_gpt2).train()
    options = {"targets": ["wte", "c_attn", "c_proj", "c_fc"], "train": "*ln_*", **options}
    state = with_sparse(rosa_func.init(model, 2, **options), 0.3)
    return rosa_func.skeleton(model).to("meta"), state.to("meta")


OPTIONS: dict[str, dict[str, Any]] = {"dense": {}, "nf4": {"quantize": "nf4_double"}}
over_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.fixture
def positions_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let stock models not look, on the host, whether several sequences are packed into one."""
    name = "transformers.masking_utils.find_packed_sequence_indices"
    monkeypatch.setattr(name, lambda positions: None)


@pytest.mark.usefixtures("positions_in_order")
class TestEveryWayToCompute:
    @over_options
    @pytest.mark.parametrize("way", ["adapted", "bind", "recompute", "recompute in a bind"])
    def test_a_stock_model(self, way: str, options: Any):
        model, state = gpt2_state(**options)
        ids = IDS.to("meta")
        if way.startswith("recompute"):
            checkpoint_segments(model, {"use_reentrant": False, "context_fn": rosa_func.recompute})

        def compute() -> Any:
            if "bind" in way:
                with rosa_func.bind(model, state) as bound:
                    return bound(ids, use_cache=False)
            return rosa_func.adapted(model, state)(ids, use_cache=False)

        train_twice(compute, state)

    @over_options
    def test_a_module(self, options: Any):
        module, ids = RosaModule(*gpt2_state(**options)).to("meta"), IDS.to("meta")
        train_twice(lambda: module(ids, use_cache=False), module.state)

    def test_labels(self):
        model, state = gpt2_state()
        ids = IDS.to("meta")
        train_twice(
            lambda: [rosa_func.call(model, state, ids, labels=ids, use_cache=False).loss], state
        )

    @pytest.mark.parametrize("implementation", ["batched_mm"])
    def test_stock_experts(self, implementation: str):
        """Other implementations of transformers count the tokens of an expert on the host."""
        model = stock_moe("mixtral", implementation).model
        state = rosa_func.init(model, 2).to("meta")
        model = rosa_func.skeleton(model).to("meta")
        ids = IDS.to("meta")
        train_twice(lambda: rosa_func.call(model, state, ids, use_cache=False), state)

    def test_several_states_at_once(self):
        model = seeded(tiny_gpt2).eval()
        states = [rosa_func.init(model, 2, key=k, sampler=samplers.lora) for k in (0, 1)]
        stacked = stacking.stack(states).to("meta")
        model, ids = rosa_func.skeleton(model).to("meta"), IDS.to("meta")

        def logits(state: TensorDict) -> Tensor:
            return rosa_func.call(model, state, ids, use_cache=False).logits

        train_twice(lambda: [stacking.vmap(logits)(stacked)], stacked)

    @over_options
    def test_autocast_reads_nothing(self, options: Any):
        """The meta device knows no autocast; on the host the mode sees what is read."""
        model = seeded(tiny_gpt2).train()
        state = rosa_func.init(model, 2, train="*ln_*", **options)

        def compute() -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return rosa_func.call(model, state, IDS, use_cache=False)

        train_twice(compute, state)


class TestWorkers:
    def test_weights_on_a_device_have_one_worker(self):
        """Threads that share a stream gain nothing, and each has handles and memory of its own."""
        seen = parallel.map_weights(lambda _: get_ident(), dict.fromkeys(range(9), META))
        assert len(set(seen)) == 1 and seen[0] != get_ident()

    def test_it_works_on_the_streams_of_its_caller(self, monkeypatch: pytest.MonkeyPatch):
        """A thread begins on the default stream, and would not wait for the caller's work."""
        current: dict[int, list[Any]] = {}

        def current_stream(device: Any = None) -> Any:
            return current.get(get_ident(), ["default"])[-1] if device is None else str(device)

        def set_stream(stream: Any) -> None:
            current.setdefault(get_ident(), []).append(stream)

        monkeypatch.setattr(torch.accelerator, "current_stream", current_stream)
        monkeypatch.setattr(torch.accelerator, "set_stream", set_stream)
        torch.accelerator.set_stream("side")
        devices = {name: torch.device(name) for name in ("cuda:0", "cuda:1", "cpu")}
        seen = parallel.map_weights(lambda _: [*current[get_ident()]][-3:], devices)
        for streams in seen:
            assert set(streams[:-1]) == {"cuda:0", "cuda:1"}
            assert streams[-1] == "side"  # that of the current device, which the last one sets
        follow = parallel.on_the_same_streams([devices["cuda:1"]])
        thread = Thread(target=lambda: (follow(), seen.append(current[get_ident()])))
        thread.start()
        thread.join()
        assert seen[-1][-2:] == ["cuda:1", "side"]
