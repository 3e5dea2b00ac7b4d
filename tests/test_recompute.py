"""Gradient checkpointing: the plain gradients, or a refusal."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rosa_func
from models import checkpoint_segments, randn, seeded, stock_model, tiny_gpt2, token_ids
from references import main_output, storage_pointers
from rosa_func.weight.layout import leaves

RECOMPUTE = {"use_reentrant": False, "context_fn": rosa_func.recompute}


def gradients_of_leaves(
    model: nn.Module, state: Any, ids: Tensor, bound: bool = False
) -> dict[str, Tensor]:
    """Return the gradients of all leaves; dropout draws from one seed."""
    for leaf in rosa_func.parameters(state):
        leaf.grad = None

    def loss() -> Tensor:
        if bound:
            with rosa_func.bind(model, state):
                return model(ids, use_cache=False).logits.square().mean()
        return rosa_func.call(model, state, ids, use_cache=False).logits.square().mean()

    seeded(lambda: loss().backward())
    return {name: leaf.grad for name, leaf in leaves(state).items()}


class Checkpointed(nn.Module):
    """A model that checkpoints a part of itself by its own code."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 4)
        self.inner = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6))
        self.checkpoints, self.options = True, {}

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.checkpoints:
            x = checkpoint(lambda x: self.inner(x).tanh(), x, **self.options)
        else:
            x = self.inner(x).tanh()
        return self.last(x)


class TestModelsThatCheckpointByThemselvesInABind:
    """6 of 10 gradients were None and the model's own were written, without an error."""

    @pytest.mark.parametrize("train", [(), "inner.*"])  # composed weights, or plain tensors
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_it_is_refused_by_name(self, reentrant: bool, train: Any):
        model = seeded(Checkpointed)
        state = rosa_func.init(model, 2, train=train)
        rosa_func.parameters(state)
        model.options = {"use_reentrant": reentrant}
        hooks = [len(module._forward_pre_hooks) for module in model.modules()]
        with rosa_func.bind(model, state), pytest.raises(ValueError, match=r"inner\.0 runs inside"):
            model(randn(3, 6))
        assert hooks == [len(module._forward_pre_hooks) for module in model.modules()]

    def test_it_is_right_with_recompute(self):
        model = seeded(Checkpointed)
        state = rosa_func.init(model, 2, train="inner.1.*")
        named, found = rosa_func.named_parameters(state), []
        model.options = RECOMPUTE
        for model.checkpoints in (False, True):
            for leaf in named.values():
                leaf.grad = None
            with rosa_func.bind(model, state):
                loss = model(randn(3, 6)).square().sum()
            loss.backward()
            found.append([leaf.grad for leaf in named.values()])
        assert all(map(torch.equal, *found))
        assert all(p.grad is None for p in model.parameters())

    def test_it_is_let_through_where_nothing_is_recomputed(self):
        model = seeded(Checkpointed)
        state = rosa_func.init(model, 2)
        model.options = {"use_reentrant": False}
        with torch.no_grad(), rosa_func.bind(model, state):
            y = model(randn(3, 6))
        assert torch.equal(y, rosa_func.call(model, state, randn(3, 6)))


class TestCheckpointedGradients:
    @pytest.mark.parametrize("bound", [False, True])
    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    @pytest.mark.parametrize("weightless", [False, True])
    def test_checkpointed_gradients_are_bit_for_bit_the_plain_ones(
        self, dropout: float, weightless: bool, bound: bool
    ):
        model = seeded(lambda: tiny_gpt2(layers=3, dropout=dropout)).train()
        state = rosa_func.init(model, 2, targets=["wte", "c_attn", "c_proj", "c_fc"], train="ln_f")
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        ids = token_ids(2, 8)
        plain = gradients_of_leaves(model, state, ids, bound)
        checkpoint_segments(model, RECOMPUTE)
        used = rosa_func.skeleton(model) if weightless else model
        again = gradients_of_leaves(used, state, ids, bound)
        assert all(g is not None and g.any() for g in plain.values())
        assert all(torch.equal(again[name], plain[name]) for name in plain)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert all(p.is_meta for p in used.parameters()) or not weightless

    def test_gradient_checkpointing_enable_works_too(self):
        model = seeded(tiny_gpt2).train()
        if not hasattr(model, "activation_checkpointing_enable"):
            pytest.skip("this transformers has this name only, so that the other tests use it")
        state, ids = rosa_func.init(model, 2), token_ids(2, 8)
        plain = gradients_of_leaves(model, state, ids)
        with pytest.warns(FutureWarning, match="deprecated"):
            model.gradient_checkpointing_enable(RECOMPUTE)
        again = gradients_of_leaves(model, state, ids)
        assert all(torch.equal(again[name], plain[name]) for name in plain)

    @pytest.mark.parametrize("name", ["llama", "opt", "bert", "t5"])
    def test_checkpointed_gradients_of_other_architectures(self, name: str):
        case = stock_model(name)
        model = case.model.train()
        state = rosa_func.init(model, 2)

        def run() -> dict[str, Tensor]:
            for leaf in rosa_func.parameters(state):
                leaf.grad = None
            result = main_output(rosa_func.call(model, state, *case.args, **case.kwargs))
            result.square().mean().backward()
            return {name: leaf.grad for name, leaf in leaves(state).items()}

        plain = run()
        checkpoint_segments(model, RECOMPUTE)
        again = run()
        for leaf, gradient in plain.items():
            if name == "t5":  # the stock model's gradients change in the last bits too
                torch.testing.assert_close(again[leaf], gradient)
            else:
                assert torch.equal(again[leaf], gradient)

    @pytest.mark.parametrize("options", [{"use_reentrant": False}, {"use_reentrant": True}, None])
    def test_call_needs_no_context(self, options: Any):
        """The recomputation ran with the model's own weights: wrong gradients, or an error."""
        model = seeded(lambda: tiny_gpt2(layers=3)).train()
        targets = ["wte", "c_attn", "c_proj", "c_fc"]  # wte, so that all inputs need a gradient
        state, ids = rosa_func.init(model, 2, targets=targets, train="ln_f"), token_ids(2, 8)
        plain = gradients_of_leaves(model, state, ids)
        checkpoint_segments(model, options)
        again = gradients_of_leaves(model, state, ids)
        assert all(torch.equal(again[name], plain[name]) for name in plain)
        assert all(p.grad is None for p in model.parameters())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_a_model_that_checkpoints_by_itself_needs_no_context(
        self, reentrant: bool, dtype: torch.dtype
    ):
        """6 of 6 gradients were wrong or None, and the model's own were written."""

        model = seeded(Checkpointed).to(dtype)
        model.options = {"use_reentrant": reentrant}
        state = rosa_func.init(model, 2, train="inner.1.*")
        named, x = rosa_func.named_parameters(state), randn(3, 6).to(dtype)
        found = []
        for model.checkpoints in (False, True):
            for leaf in named.values():
                leaf.grad = None
            rosa_func.call(model, state, x).square().sum().backward()
            found.append([leaf.grad for leaf in named.values()])
        assert all(g is not None and torch.equal(f, g) for f, g in zip(*found, strict=True))
        assert all(p.grad is None for p in model.parameters())

    def test_a_model_that_checkpoints_by_itself_takes_two_backward_passes(self):
        class Checkpointed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))

            def forward(self, x: Tensor) -> Tensor:
                return checkpoint(self.inner, x, **RECOMPUTE)

        model = seeded(Checkpointed)
        state = rosa_func.init(model, 2)
        named, x = rosa_func.named_parameters(state), randn(3, 6)
        loss = rosa_func.call(model, state, x).square().sum()
        first = torch.autograd.grad(loss, list(named.values()), retain_graph=True)
        second = torch.autograd.grad(loss, list(named.values()))
        plain = rosa_func.call(model.inner, state_of_the_submodule_inner(state), x).square().sum()
        expected = torch.autograd.grad(plain, list(named.values()))
        for one, two, three in zip(first, second, expected, strict=True):
            assert torch.equal(one, two)
            assert torch.equal(one, three)
        # Without a state it is ordinary checkpointing.
        model(x).sum().backward()
        assert model.inner[0].weight.grad is not None

    def test_checkpointing_in_two_models_bound_at_once(self):
        models = [seeded(tiny_gpt2, seed=seed).train() for seed in (0, 1)]
        states = [rosa_func.init(model, 2, train="ln_1") for model in models]
        ids = token_ids(2, 8)
        plain = [gradients_of_leaves(*pair, ids) for pair in zip(models, states, strict=True)]
        for model, state in zip(models, states, strict=True):
            checkpoint_segments(model, RECOMPUTE)
            for leaf in leaves(state).values():
                leaf.grad = None
        with rosa_func.bind(models[0], states[0]), rosa_func.bind(models[1], states[1]):
            losses = [model(ids, use_cache=False).logits.square().mean() for model in models]
        sum(losses).backward()
        for state, expected in zip(states, plain, strict=True):
            assert all(torch.equal(leaf.grad, expected[n]) for n, leaf in leaves(state).items())

    def test_checkpointing_saves_less_for_the_backward_pass(self):
        model = seeded(lambda: tiny_gpt2(layers=6)).train()
        state, ids = rosa_func.init(model, 2), token_ids(4, 8)
        rosa_func.parameters(state)
        weights = storage_pointers([*state["frozen"].values(), *leaves(state).values()])

        def saved() -> int:
            sizes: dict[int, int] = {}

            def pack(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in weights:
                    sizes[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                rosa_func.call(model, state, ids, use_cache=False).logits.sum()
            return sum(sizes.values())

        plain = saved()
        checkpoint_segments(model, RECOMPUTE)
        assert saved() < plain / 3


def state_of_the_submodule_inner(state: Any) -> Any:
    """Return the state of the submodule `inner`, with the same leaves."""
    parts = {
        part: {name.removeprefix("inner."): value for name, value in entries.items()}
        for part, entries in state.items()
    }
    return type(state)({part: type(state)(entries) for part, entries in parts.items()})


class TestCheckpointingRefusals:
    @pytest.mark.parametrize(
        "options",
        [
            None,
            {"use_reentrant": True},
            {"use_reentrant": False},
            {"use_reentrant": True, "context_fn": rosa_func.recompute},
        ],
    )
    def test_checkpointing_that_would_compute_with_other_weights_is_refused(self, options: Any):
        model = seeded(lambda: tiny_gpt2()).train()
        state, ids = rosa_func.init(model, 2), token_ids(2, 8)
        checkpoint_segments(model, options)
        named = hasattr(model, "activation_checkpointing_enable")
        switch = f"{'activation' if named else 'gradient'}_checkpointing_enable"
        uncopied = seeded(lambda: tiny_gpt2()).train()
        checkpoint_segments(uncopied, options)
        uncopied.closure = lambda: uncopied.lm_head  # so that `call` swaps tensors too
        for attempt in (
            lambda: rosa_func.bind(model, state).__enter__(),
            lambda: rosa_func.call(uncopied, state, ids),
        ):
            with pytest.raises(ValueError, match=rf"model\.{switch}\(.*: rosa_func\.recompute"):
                attempt()
        if not options or options["use_reentrant"]:
            return  # without a gradient torch warns or fails by itself
        with torch.no_grad():
            rosa_func.call(uncopied, state, ids, use_cache=False)
        rosa_func.call(uncopied.eval(), state, ids)
