"""The laws of all other tests, on a GPU. They have not been run on one yet.

They are skipped where there is none. ROSA_FUNC_TEST_DEVICE=cpu runs all but those of CUDA alone, to
see that they are right; another device can be named too. What they compare with is computed on the
host, in float64.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap

import rosa_func
from bounds import merge_bound
from cases import (
    LAYOUTS,
    SAMPLERS,
    WEIGHT_USES,
    Layout,
    WeightUse,
    adapt_every_weight,
    scattered_layer,
    with_sparse,
)
from models import (
    checkpoint_segments,
    seeded,
    stock_model,
    stock_moe,
    tiny_gpt2,
    token_ids,
)
from references import (
    dense_weights,
    main_output,
    perturbed,
    relative_distance,
    state_bytes,
    widened,
)
from rosa_func import checkpoint, export, optim, quantised, samplers, sparse, stacking
from rosa_func.module import RosaModule
from rosa_func.weight import read
from rosa_func.weight.layout import leaves

DEVICE = torch.device(os.environ.get("ROSA_FUNC_TEST_DEVICE", "cuda"))
IS_CUDA = DEVICE.type == "cuda"
if IS_CUDA and not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)
# What torch warns of on a GPU is not known yet: it is shown, and no error.
pytestmark = pytest.mark.filterwarnings("default")
of_cuda = pytest.mark.skipif(not IS_CUDA, reason="CUDA alone has this")

# Sums of tens of products over a few layers; a number of 16 bits is off by 2**-9.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.05}
over_dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
IDS = token_ids(3, 6)


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """Let convolutions of float32 be those of float32: by default they have 10 bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def on_device(value: Any) -> Any:
    return value.to(DEVICE)


def on_host(state: TensorDict) -> TensorDict:
    return state.detach().cpu()


KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "nf4": {"quantize": "nf4", "master": True},
    "nf4_double": {"quantize": "nf4_double", "master": True},
    "int8": {"quantize": "int8", "master": True},
}
over_kinds = pytest.mark.parametrize("kind", KINDS)


def trained(module: nn.Module, r: int = 2, density: float = 0.0, **options: Any) -> TensorDict:
    """Return a state on the device, as if trained there."""
    state = rosa_func.init(module.to(DEVICE), r, **options)
    if density:
        state = on_device(with_sparse(on_host(state), density))
    return on_device(perturbed(on_host(state), 0.02))


def _weighted(out: Tensor) -> Tensor:
    """Return a sum whose gradient no norm at the end of a model takes away."""
    weights = torch.arange(out.numel(), device=out.device, dtype=out.dtype).sin()
    return (out.flatten() * weights).sum()


def assert_as_by_dense_weights(
    module: nn.Module, state: TensorDict, args: tuple[Tensor, ...], tolerance: float, **kwargs: Any
) -> None:
    """Compare outputs and gradients with those of dense weights in float64 on the host."""
    rosa_func.parameters(state)
    out = main_output(rosa_func.call(module, state, *map(on_device, args), **kwargs))
    assert out.device.type == DEVICE.type
    _weighted(out.float()).backward()
    wide = on_host(state).apply(widened)
    wide["trainable"] = wide["trainable"].apply(lambda leaf: leaf.requires_grad_())
    plain = tuple(widened(x) for x in args)
    expected = main_output(
        functional_call(module.cpu().double(), dense_weights(wide), plain, kwargs)
    )
    assert relative_distance(out.cpu().double(), expected) <= tolerance
    found = dict(wide["trainable"].items(include_nested=True, leaves_only=True))
    gradients = torch.autograd.grad(_weighted(expected), list(found.values()))
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    for path, gradient in zip(found, gradients, strict=True):
        leaf: Any = state["trainable"].get(path)
        off = (leaf.grad.cpu().double() - gradient).abs().max()
        assert off <= 4 * tolerance * largest, path


class TestProducts:
    @over_dtypes
    @pytest.mark.parametrize("kind", ["dense", "nf4_double", "sparse"])
    @pytest.mark.parametrize("use", WEIGHT_USES, ids=repr)
    def test_outputs_and_gradients_are_those_of_dense_weights(
        self, use: WeightUse, kind: str, dtype: torch.dtype
    ):
        module = seeded(use.build).to(dtype)
        state = trained(
            module,
            1,
            density=0.3 * (kind == "sparse"),
            targets=use.targets,
            **KINDS.get(kind, {}),
        )
        x = use.input.to(dtype) if use.input.is_floating_point() else use.input
        assert_as_by_dense_weights(module, state, (x,), TOLERANCE[dtype])

    @over_dtypes
    @pytest.mark.parametrize("name", ["gpt2-small", "llama", "bert", "vit"])
    @over_kinds
    def test_stock_models(self, name: str, kind: str, dtype: torch.dtype):
        model, args, kwargs = stock_model(name, dtype)
        state = trained(model, 3, density=0.1, **KINDS[kind])
        # Tokens and images go through two layers, each rounded to the dtype several times.
        assert_as_by_dense_weights(model, state, args, 4 * TOLERANCE[dtype], **kwargs)

    @over_dtypes
    @pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
    def test_stock_experts(self, implementation: str, dtype: torch.dtype):
        """Against the merged model on the same device: which experts a token takes may flip."""
        model, args, kwargs = stock_moe("mixtral", implementation, dtype)
        state = trained(model)
        merged = export.to_module(model, state)
        ids = on_device(args[0])
        result = rosa_func.call(model, state, ids, **kwargs).logits
        expected = merged(ids, **kwargs).logits
        off = (result - expected).abs().amax(-1) / expected.abs().max()
        assert off.float().median() <= 4 * TOLERANCE[dtype]

    @over_kinds
    def test_autocast(self, kind: str):
        model = seeded(tiny_gpt2)
        state = trained(model, **KINDS[kind])
        ids = on_device(IDS)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            result = rosa_func.call(model, state, ids, use_cache=False).logits
        assert result.dtype == torch.bfloat16
        expected = rosa_func.call(model, state, ids, use_cache=False).logits
        assert relative_distance(result.float(), expected) <= TOLERANCE[torch.bfloat16]

    def test_a_float32_product_of_ten_bits_changes_no_weight(self):
        """R = W - A B and W = R + A B take the same A B, however it is rounded."""
        module = on_device(seeded(lambda: nn.Linear(96, 64)))
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            state = rosa_func.init(nn.Sequential(module), 8)
            for key in range(3):
                state = rosa_func.resample(state, key)
            merged = rosa_func.merge(state)["0.weight"]
        finally:
            torch.set_float32_matmul_precision(before)
        assert relative_distance(merged, module.weight) <= 1e-5


class TestStates:
    @over_dtypes
    @pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
    def test_merges_are_exact_or_within_their_bound(self, layout: Layout, dtype: torch.dtype):
        module = on_device(scattered_layer(layout, 24, 18, dtype, 0))
        for sampler in SAMPLERS:
            exact = adapt_every_weight(module, 5, exact=True, sampler=sampler)
            assert torch.equal(rosa_func.merge(exact)["weight"], module.weight), sampler
            again = rosa_func.resample(exact, 1, r=3, sampler=sampler)
            assert torch.equal(rosa_func.merge(again)["weight"], module.weight), sampler
            state = adapt_every_weight(module, 5, sampler=sampler)
            W, w = module.weight.detach().cpu(), read(on_host(state)).adapted()["weight"]
            off = (rosa_func.merge(state)["weight"].cpu() - W).abs()
            assert (off <= merge_bound(W, w)).all(), sampler

    @pytest.mark.parametrize("sampler", SAMPLERS)
    @pytest.mark.parametrize("r", [3, 16])
    def test_a_draw_is_that_of_the_host(self, sampler: samplers.Sampler, r: int):
        """What is drawn is the same; singular vectors are, up to rounding and their sign."""
        model = seeded(lambda: nn.Sequential(nn.Linear(300, 200), nn.Linear(40, 90)))
        host = rosa_func.init(model, r, sampler=sampler)
        there = on_host(rosa_func.init(on_device(model), r, sampler=sampler))
        for name, w in read(host).adapted().items():
            (own,), (other,) = w.terms, read(there).adapted()[name].terms
            if sampler in (samplers.lora, samplers.additive):
                pairs = zip(own, other, strict=True)
                assert all(relative_distance(a, b) <= 1e-6 for a, b in pairs)
            # Neighbouring singular values of a random matrix are about 1% apart.
            assert (own.A @ own.B - other.A @ other.B).abs().max() <= 1e-3

    @over_kinds
    @over_dtypes
    def test_a_donated_state_has_the_bits_of_the_pure_function(self, kind: str, dtype: torch.dtype):
        states = [trained(seeded(tiny_gpt2).to(dtype), **KINDS[kind]) for _ in range(2)]
        pure = rosa_func.resample(states[0], 1)
        donated = rosa_func.resample(states[1], 1, donate=True)
        assert state_bytes(donated) == state_bytes(pure)
        for _ in range(3):
            donated = rosa_func.resample(donated, 2, donate=True)

    def test_a_donated_model(self):
        model = on_device(seeded(tiny_gpt2))
        expected = state_bytes(rosa_func.init(model, 2))
        assert state_bytes(rosa_func.init(model, 2, donate=True)) == expected

    @over_kinds
    def test_ten_resamples_do_not_drift(self, kind: str):
        model = seeded(lambda: nn.Sequential(nn.Linear(192, 128))).bfloat16()
        state = rosa_func.init(on_device(model), 4, **KINDS[kind])

        def weight(state: TensorDict) -> Tensor:
            if kind == "dense":
                return rosa_func.merge(state)["0.weight"].float()
            return quantised.merge_into_master(state).weights["0.weight"].float()

        before = weight(state)
        for key in range(10):
            state = rosa_func.resample(state, key)
        assert (weight(state) - before).norm() <= 2e-3 * before.norm()

    @pytest.mark.parametrize("kind", ["nf4", "int8"])
    def test_codes_are_those_of_the_host(self, kind: str):
        model = seeded(tiny_gpt2)
        options: dict[str, Any] = {"quantize": kind, "sampler": samplers.lora}
        host = rosa_func.init(model, 2, **options)
        there = rosa_func.init(on_device(model), 2, **options)
        assert state_bytes(on_host(there)) == state_bytes(host)

    @pytest.mark.parametrize("kind", ["nf4", "nf4_double", "int8"])
    def test_without_a_master_draws_go_on_beside_the_codes(self, kind: str):
        model = seeded(tiny_gpt2)
        state = trained(model, quantize=kind)
        new = rosa_func.resample(state, 1, sampler=samplers.additive)
        ids = on_device(IDS)
        results = [rosa_func.call(model, s, ids, use_cache=False).logits for s in (new, state)]
        assert relative_distance(*results) <= TOLERANCE[torch.float32]


class TestPlaces:
    @over_kinds
    def test_a_state_is_moved_in_the_middle_of_a_run(self, kind: str):
        model = seeded(tiny_gpt2)
        state = perturbed(with_sparse(rosa_func.init(model, 2, **KINDS[kind]), 0.1))
        expected = rosa_func.call(model, state, IDS, use_cache=False).logits
        there, moved = on_device(rosa_func.skeleton(model)), on_device(state)
        result = rosa_func.call(there, moved, on_device(IDS), use_cache=False).logits
        assert relative_distance(result.cpu(), expected) <= 4 * TOLERANCE[torch.float32]
        new = rosa_func.resample(moved, 1)
        assert all(t.device.type == DEVICE.type for t in new.values(True, True))
        back = rosa_func.merge(on_host(new))
        for name, W in rosa_func.merge(on_host(moved)).items():
            if kind == "dense":
                assert relative_distance(back[name], W) <= 1e-5

    def test_a_folder_is_read_to_a_device(self, tmp_path: Path):
        model = seeded(tiny_gpt2)
        model.save_pretrained(tmp_path)
        options: dict[str, Any] = {"train": "*ln_f*", "quantize": "nf4", "master": "cpu"}
        skeleton, state = rosa_func.init_from(tmp_path, 2, device=DEVICE, **options)
        expected = rosa_func.init(on_device(model).eval(), 2, **options)
        assert state_bytes(state) == state_bytes(expected)
        ids = on_device(IDS)
        results = [rosa_func.call(m, state, ids, use_cache=False) for m in (skeleton, model)]
        assert torch.equal(results[0].logits, results[1].logits)

    @pytest.mark.parametrize("exact", [None, True])
    def test_a_compensation_is_kept_on_the_host(self, exact: bool | None):
        model = on_device(seeded(tiny_gpt2).bfloat16())
        near = rosa_func.init(model, 2, exact=exact)
        far = rosa_func.init(model, 2, exact=exact, compensation="cpu")
        for key in range(2):
            assert all(lost.is_cpu for lost in far["compensation"].values())
            if IS_CUDA:
                lost = [lost for lost in far["compensation"].values() if lost.numel()]
                assert lost and all(one.is_pinned() for one in lost)
            pairs = zip(rosa_func.merge(near).values(), rosa_func.merge(far).values(), strict=True)
            assert all(torch.equal(*pair) for pair in pairs)
            near = rosa_func.resample(near, key)
            far = rosa_func.resample(far, key, donate=bool(key))
        assert state_bytes(on_host(near)) == state_bytes(on_host(far))

    def test_files_are_the_same_from_any_device(self, tmp_path: Path):
        model = seeded(tiny_gpt2)
        state = trained(model, density=0.1, quantize="nf4", master=True)
        checkpoint.save(tmp_path / "state.safetensors", state, step=3)
        loaded, extra = checkpoint.load(tmp_path / "state.safetensors")
        assert extra == {"step": 3}
        assert checkpoint.digest(loaded) == checkpoint.digest(state)
        ids = on_device(IDS)
        results = [
            rosa_func.call(model, s, ids, use_cache=False).logits
            for s in (on_device(loaded), state)
        ]
        assert torch.equal(*results)

    def test_changes_and_exports(self, tmp_path: Path):
        model = on_device(seeded(tiny_gpt2))
        state = trained(model)
        ids = on_device(IDS)
        expected = rosa_func.call(model, state, ids, use_cache=False).logits
        change = checkpoint.delta(state, model)
        changed = functional_call(model, checkpoint.apply_delta(model, change), (ids,))
        assert relative_distance(changed.logits, expected) <= TOLERANCE[torch.float32]
        merged = export.to_module(model, state)
        assert relative_distance(merged(ids).logits, expected) <= TOLERANCE[torch.float32]
        export.to_peft(tmp_path, model, state)
        read_back = on_device(export.from_peft(model, tmp_path))
        result = rosa_func.call(model, read_back, ids, use_cache=False).logits
        assert relative_distance(result, expected) <= 2 * TOLERANCE[torch.float32]


def loss_of(model: nn.Module, state: TensorDict, ids: Tensor) -> Tensor:
    logits = main_output(rosa_func.call(model, state, ids, use_cache=False))
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def adamw(state: TensorDict, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(rosa_func.parameters(state), 1e-3, weight_decay=0.0, **options)


def step(
    model: nn.Module, state: TensorDict, optimizer: torch.optim.Optimizer, ids: Tensor
) -> Tensor:
    loss = loss_of(model, state, ids)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


STEPS: dict[str, dict[str, Any]] = {
    **KINDS,
    "sparse": {"density": 0.1},
    "in full": {"train": "*ln_*"},
    "embeddings": {"targets": ["wte", "c_attn"], "density": 0.1},
}
over_steps = pytest.mark.parametrize("kind", STEPS)


class TestTraining:
    @over_steps
    @over_dtypes
    def test_a_run_with_a_resample(self, kind: str, dtype: torch.dtype):
        model = seeded(tiny_gpt2).to(dtype)
        state, ids = trained(model, **STEPS[kind]), on_device(IDS)
        optimizer = adamw(state)
        losses = [step(model, state, optimizer, ids) for _ in range(5)]
        for moments in ("reset", "project", "keep"):
            before = loss_of(model, state, ids)
            new = rosa_func.resample(state, len(losses))
            optimizer = optim.rebind(optimizer, state, new, moments=moments)
            state = new
            # Quantised residuals are rounded anew, by their master.
            near = {"nf4": 0.2, "nf4_double": 0.2, "int8": 0.02}.get(kind, TOLERANCE[dtype])
            assert abs(loss_of(model, state, ids) - before) <= near * before
            losses += [step(model, state, optimizer, ids) for _ in range(5)]
        assert losses[-1] < losses[0]

    def test_a_module_trains_as_the_functions_do(self):
        model, ids = on_device(seeded(tiny_gpt2)), on_device(IDS)
        state = rosa_func.init(model, 2)
        module = RosaModule(rosa_func.skeleton(model), state)
        optimizer = torch.optim.AdamW(module.parameters(), 1e-3, weight_decay=0.0)
        own = adamw(state)
        for key in range(3):
            step(model, state, own, ids)
            logits = module(ids, use_cache=False).logits
            F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
            module.resample(key, optimizer=optimizer)
            new = rosa_func.resample(state, key)
            own, state = optim.rebind(own, state, new), new
        for name, leaf in leaves(module.state).items():
            assert relative_distance(leaf, leaves(state)[name]) <= 1e-3, name

    @over_steps
    def test_recomputed_gradients_are_the_plain_ones(self, kind: str):
        model, ids = seeded(tiny_gpt2).train(), on_device(IDS)
        state = trained(model, **STEPS[kind])
        found = []
        for on in (False, True):
            checkpoint_segments(
                model, {"use_reentrant": False, "context_fn": rosa_func.recompute}, on
            )
            rosa_func.parameters(state)
            for bound in (nullcontext(model), rosa_func.bind(model, state)):
                with bound:
                    if isinstance(bound, nullcontext):
                        loss = loss_of(model, state, ids)
                    else:
                        logits = model(ids, use_cache=False).logits
                        labels = ids[:, 1:].flatten()
                        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels)
                found.append(torch.autograd.grad(loss, rosa_func.parameters(state)))
        for other in found[1:]:
            for one, two in zip(found[0], other, strict=True):
                assert (one - two).abs().max() <= 1e-6 * max(g.abs().max() for g in found[0])

    @over_steps
    def test_transforms(self, kind: str):
        model = seeded(tiny_gpt2).eval()
        model.set_attn_implementation("eager")
        state, ids = trained(model, **STEPS[kind]), on_device(IDS)

        def loss(trainable: TensorDict, ids: Tensor) -> Tensor:
            return loss_of(model, state.replace(trainable=trainable), ids)

        gradients, value = grad_and_value(loss)(state["trainable"], ids)
        assert relative_distance(value, loss_of(model, state, ids)) <= 1e-5
        each = vmap(grad(lambda t, one: loss(t, one[None])), (None, 0))(state["trainable"], ids)
        mean = each.apply(lambda g: g.mean(0), batch_size=[])
        pairs = [
            (mean[path], gradients[path])
            for path in gradients.keys(include_nested=True, leaves_only=True)
        ]
        largest = max(g.abs().max() for _, g in pairs)
        assert all((a - b).abs().max() <= 1e-4 * largest for a, b in pairs)

    def test_several_states_at_once(self):
        model, ids = on_device(seeded(tiny_gpt2).eval()), on_device(IDS)
        states = [
            on_device(
                perturbed(on_host(rosa_func.init(model, r, key=r, sampler=samplers.lora)), 0.02)
            )
            for r in (1, 3)
        ]
        logits = stacking.vmap(lambda s: rosa_func.call(model, s, ids, use_cache=False).logits)
        together = logits(stacking.stack(states))
        for state, result in zip(states, together, strict=True):
            expected = rosa_func.call(model, state, ids, use_cache=False).logits
            assert relative_distance(result, expected) <= TOLERANCE[torch.float32]

    @pytest.mark.parametrize("kind", ["dense", "int8"])
    def test_a_sparse_part_begins_moves_and_goes(self, kind: str):
        model, ids = seeded(tiny_gpt2), on_device(IDS)
        state = trained(model, **KINDS[kind])

        def loss(model: nn.Module, ids: Tensor) -> Tensor:
            return model(ids, labels=ids, use_cache=False).loss

        state = sparse.begin(model, state, [ids, ids[:1]], loss, 0.05)
        optimizer = adamw(state)
        losses = [step(model, state, optimizer, ids) for _ in range(3)]
        state = sparse.begin(model, state.detach(), [ids], loss, across="model")
        gone = sparse.remove(state)
        near = 0.05 if kind == "int8" else 1e-4
        assert abs(loss_of(model, gone, ids) - losses[-1]) <= (near + 0.05) * losses[-1]


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def positions_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let stock models not look, on the host, whether several sequences are packed into one."""
    name = "transformers.masking_utils.find_packed_sequence_indices"
    monkeypatch.setattr(name, lambda positions: None)


@of_cuda
@pytest.mark.usefixtures("positions_in_order")
class TestCudaAlone:
    @over_steps
    @over_dtypes
    def test_a_step_waits_for_nothing(self, kind: str, dtype: torch.dtype):
        model = seeded(tiny_gpt2).to(dtype).train()
        state, ids = trained(model, **STEPS[kind]), on_device(IDS)
        optimizer = adamw(state)
        step(model, state, optimizer, ids)  # the first copies tables, and makes moments
        with waiting_is_an_error():
            step(model, state, optimizer, ids)
            with torch.autocast("cuda", torch.bfloat16):
                step(model, state, optimizer, ids)

    @over_steps
    @over_dtypes
    def test_a_step_is_captured_in_a_graph(self, kind: str, dtype: torch.dtype):
        model, ids = seeded(tiny_gpt2).to(dtype).train(), on_device(IDS)
        eager, state = (trained(model, **STEPS[kind]) for _ in range(2))
        plain, optimizer = adamw(eager, capturable=True), adamw(state, capturable=True)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(model, state, optimizer, ids)
        torch.cuda.current_stream().wait_stream(side)
        optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(model, state, optimizer, ids)
        for _ in range(4):
            graph.replay()
        for _ in range(7):
            step(model, eager, plain, ids)
        for name, leaf in leaves(state).items():
            # A gradient of nearly zero may have another sign: a step of 1e-3 either way.
            off = (leaf - leaves(eager)[name]).abs()
            assert off.median() <= 1e-4 and off.max() <= 2e-2, name

    def test_a_resample_goes_on_where_the_stream_of_its_caller_is(self):
        """A worker began on the default stream, and did not wait for what was asked for before."""
        big = torch.randn(4096, 4096, device="cuda")
        model = on_device(seeded(lambda: nn.Sequential(nn.Linear(64, 48))))
        state = trained(model)
        expected = rosa_func.merge(rosa_func.resample(state, 1))["0.weight"]
        late = state.clone()
        late["frozen", "0.weight"].zero_()
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(50):
                big = big @ big / 64
            late["frozen", "0.weight"].copy_(state["frozen", "0.weight"])  # behind those products
            merged = rosa_func.merge(rosa_func.resample(late, 1))["0.weight"]
            torch.cuda.current_stream().synchronize()
        assert torch.equal(merged, expected)

    def test_a_state_on_the_second_gpu(self):
        if torch.cuda.device_count() < 2:
            pytest.skip("there is one GPU")
        model, ids = seeded(tiny_gpt2).to("cuda:1"), IDS.to("cuda:1")
        state = rosa_func.resample(rosa_func.init(model, 2, quantize="nf4", master="cpu"), 1)
        assert rosa_func.call(model, state, ids, use_cache=False).logits.device.index == 1
        assert torch.cuda.current_device() == 0

    def test_a_donated_resample_holds_one_weight_more(self):
        """At 24 equal weights a pure resample holds 24 more, a donated one about 4."""
        model = seeded(lambda: nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(24))))
        state = rosa_func.init(on_device(model), 8, donate=True)
        size = 512 * 512 * 4
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        rosa_func.resample(state, 1, sampler=samplers.projection, donate=True)
        assert torch.cuda.max_memory_allocated() - before <= 8 * size


class TestCompiled:  # last, since a compiler takes longest
    @pytest.mark.parametrize("kind", [*KINDS, "sparse", "in full"])
    def test_a_step(self, kind: str):
        """Inductor's for a GPU; that of a CPU is tested elsewhere, and takes long."""
        torch.compiler.reset()
        model = seeded(
            lambda: nn.Sequential(
                nn.Embedding(31, 16), nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 31)
            )
        )
        options = {"in full": {"train": "*bias"}, "sparse": {"density": 0.1}}
        given = options.get(kind, KINDS.get(kind, {}))
        state, ids = trained(model, targets="*weight", **given), on_device(IDS)

        def loss(trainable: TensorDict) -> Tensor:
            logits = rosa_func.call(model, state.replace(trainable=trainable), ids)
            return F.cross_entropy(logits.flatten(0, 1), ids.flatten())

        backend = "inductor" if IS_CUDA else "aot_eager"
        compiled = torch.compile(grad_and_value(loss), fullgraph=True, backend=backend)
        gradients, expected = grad_and_value(loss)(state["trainable"])
        found, value = compiled(state["trainable"])
        assert relative_distance(value, expected) <= 1e-5
        for path in gradients.keys(include_nested=True, leaves_only=True):
            assert relative_distance(found[path], gradients[path]) <= 1e-3, path
        torch.compiler.reset()

    def test_a_stock_model(self):
        torch.compiler.reset()
        model = seeded(lambda: tiny_gpt2(layers=1)).eval()
        state, ids = trained(model, density=0.1), on_device(IDS)
        rosa_func.parameters(state)
        backend = "inductor" if IS_CUDA else "aot_eager"
        compiled = torch.compile(lambda: loss_of(model, state, ids), backend=backend)
        assert relative_distance(compiled(), loss_of(model, state, ids)) <= 1e-5
        compiled().backward()
        assert all(leaf.grad is not None for leaf in leaves(state).values())
        torch.compiler.reset()
