"""`call` computes on copies of a model's modules, which share all but tensors and children."""

import gc
import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rosa_func
from models import (
    STOCK_NAMES,
    Streaming,
    randn,
    seeded,
    stock_model,
    tiny_gpt2,
    token_ids,
    two_layers,
)
from references import (
    main_output,
    model_snapshot,
    perturbed,
    relative_distance,
    state_bytes,
)
from rosa_func.module import RosaModule
from rosa_func.places import places


def in_threads(*works: Callable[[], None]) -> None:
    """Run these at the same time, and raise what one of them raised."""
    raised: list[BaseException] = []
    start = threading.Barrier(len(works))

    def run(work: Callable[[], None]) -> None:
        start.wait()
        try:
            work()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]


class TestThreads:
    """Two threads left composed tensors in the model, and 94 of 400 results were wrong."""

    def test_threads_call_one_model_with_states_of_their_own_beside_the_model_itself(self):
        model, ids = seeded(lambda: tiny_gpt2(layers=4)).eval(), token_ids(2, 8)
        own = {name: p for name, p in model.named_parameters()}
        states = [perturbed(rosa_func.init(model, 2), 0.3, seed=seed) for seed in range(3)]

        def outputs() -> list[Callable[[], Tensor]]:
            calls = [partial(rosa_func.call, model, state, ids) for state in states]
            return [lambda call=call: call().logits for call in (*calls, partial(model, ids))]

        with torch.no_grad():
            expected = [output() for output in outputs()]
        wrong = []

        def work(output: Callable[[], Tensor], right: Tensor) -> None:
            with torch.no_grad():
                wrong.extend(i for i in range(40) if not torch.equal(output(), right))

        pairs = zip(outputs(), expected, strict=True)
        in_threads(*(partial(work, *pair) for pair in pairs))
        assert wrong == []
        assert all(p is own[name] for name, p in model.named_parameters())

    def test_threads_train_states_of_their_own_on_one_model(self):
        model, x = two_layers(), randn(5, 6)
        states = [rosa_func.init(model, 2, key=key) for key in range(3)]

        def train(state: Any) -> None:
            optimizer = torch.optim.SGD(rosa_func.parameters(state), 0.01)
            for _ in range(20):
                optimizer.zero_grad()
                rosa_func.call(model, state, x).square().mean().backward()
                optimizer.step()

        alone = [state.clone() for state in states]
        for state in alone:
            train(state)
        in_threads(*(partial(train, state) for state in states))
        for state, expected in zip(states, alone, strict=True):
            for name, weight in rosa_func.merge(state).items():
                assert torch.equal(weight, rosa_func.merge(expected)[name])

    def test_a_model_that_cannot_be_copied_is_swapped_by_one_thread_at_a_time(self):
        model, x = two_layers(), randn(5, 6)
        model.closure = lambda: model[0]
        states = [perturbed(rosa_func.init(model, 2), 0.3, seed=seed) for seed in range(2)]
        expected = [rosa_func.call(model, state, x) for state in states]

        def work(state: Any, right: Tensor) -> None:
            for _ in range(100):
                assert torch.equal(rosa_func.call(model, state, x), right)

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)  # or threads seldom meet inside a call
        try:
            in_threads(*(partial(work, *pair) for pair in zip(states, expected, strict=True)))
        finally:
            sys.setswitchinterval(interval)


class Linked(nn.Module):
    """A model whose modules know each other by more than the tables of children."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.in_a_list = [self.layers[0], {"last": self.layers[1]}]
        self.bound = self.second
        self.partial = partial(self.second, scale=2.0)
        self.layers[0].__dict__["parent"] = self
        self.calls = 0

    def second(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return scale * self.in_a_list[1]["last"](x)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.in_a_list[0](x)
        return self.bound(x) + self.partial(x) + self.layers[0].parent.layers[1](x)


class Holder:
    """An object that a module has, and that has a module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module


class TestLinks:
    """A copy that led back to the model would silently compute with the model's weights."""

    def test_containers_methods_partials_and_parents_lead_to_the_copies(self):
        model, x = seeded(Linked), randn(3, 6)
        state = perturbed(rosa_func.init(model, 2), 0.3)
        merged = rosa_func.export.to_module(model, state)
        merged.load_state_dict(rosa_func.merge(state))
        assert places(model).links is not None
        W, V = (merged.layers[i].weight for i in (0, 1))
        y = x @ W.T + merged.layers[0].bias
        expected = 4 * (y @ V.T + merged.layers[1].bias)
        assert relative_distance(rosa_func.call(model, state, x), expected) <= 1e-5
        assert model.calls == 0  # what the forward pass sets is dropped

    @pytest.mark.parametrize("kind", ["closure", "object", "compiled"])
    def test_what_a_copy_cannot_follow_is_swapped(self, kind: str):
        model, x = two_layers(), randn(3, 6)
        state = perturbed(rosa_func.init(model, 2), 0.3)
        right = rosa_func.call(model, state, x)  # and what it remembers is true no longer
        if kind == "closure":
            model[2].forward = lambda x, own=model[2].forward: own(x)
        elif kind == "object":
            model[0].holder = Holder(model[2])
        else:
            model = torch.compile(model, backend="eager")
        with pytest.raises(TypeError, match="use bind"):
            rosa_func.adapted(model, state)
        assert torch.equal(rosa_func.call(model, state, x), right)

    @pytest.mark.filterwarnings("ignore:.*torch.jit.script. is")
    def test_a_scripted_module_is_refused_by_name(self):
        """Torch's own TypeError said "contains(): incompatible function arguments"."""
        model, x = two_layers(), randn(3, 6)
        model[0] = torch.jit.script(model[0])
        state = rosa_func.init(model, 2, targets="2")
        for use in (
            lambda: rosa_func.call(model, state, x),
            lambda: rosa_func.adapted(model, state),
            lambda: rosa_func.bind(model, state).__enter__(),
            lambda: RosaModule(model, state),
        ):
            with pytest.raises(
                TypeError, match=r"^0 was compiled by torch\.jit\.script.*to_module"
            ):
                use()
        merged = rosa_func.export.to_module(model, state)
        assert relative_distance(merged(x), model(x)) <= 1e-6

    def test_a_hook_that_closes_over_a_module_computes_with_the_state(self):
        model, x = two_layers(), randn(3, 6)
        state = perturbed(rosa_func.init(model, 2), 0.3)
        rosa_func.call(model, state, x)
        model[1].register_forward_hook(lambda module, args, out: out + model[0](x))
        merged = two_layers()
        merged.load_state_dict(rosa_func.merge(state))
        inner = merged[0](x)
        expected = merged[2](inner.relu() + inner)
        assert relative_distance(rosa_func.call(model, state, x), expected) <= 1e-5

    @pytest.mark.parametrize("change", ["attribute", "list", "hook", "closure"])
    def test_links_that_are_made_after_a_call_are_seen(self, change: str):
        """What was remembered of the model led from the copy to the model's own weights."""

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
                self.extra: Any = None
                self.more: list[nn.Module] = []

            def forward(self, x: Tensor) -> Tensor:
                x = self.last(x)
                for function in (self.extra, *self.more):
                    x = x if function is None else function(x)
                return x

        model, x = seeded(Model), randn(3, 6)
        handle = model.last.register_forward_hook(lambda module, args, out: out)
        state = perturbed(rosa_func.init(model, 2), 0.3)
        rosa_func.call(model, state, x)
        if change == "attribute":
            model.extra = model.first.forward
        elif change == "list":
            model.more.append(model.first)
        elif change == "hook":
            handle.remove()
            model.last.register_forward_hook(lambda module, args, out: model.first(out))
        else:
            model.extra = lambda x: model.first(x)
        W = rosa_func.merge(state)
        y = x @ W["last.weight"].T + W["last.bias"]
        expected = y @ W["first.weight"].T + W["first.bias"]
        assert relative_distance(rosa_func.call(model, state, x), expected) <= 1e-5

    def test_a_weak_reference_to_the_parent_leads_to_its_copy(self):
        class Child(nn.Module):
            def __init__(self, parent: nn.Module) -> None:
                super().__init__()
                self.parent, self.linear = weakref.ref(parent), nn.Linear(6, 6)

            def forward(self, x: Tensor) -> Tensor:
                return self.parent().linear(self.linear(x))

        class Parent(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear, self.child = nn.Linear(6, 6), Child(self)

            def forward(self, x: Tensor) -> Tensor:
                return self.child(x)

        whole, x = seeded(Parent), randn(3, 6)
        state = perturbed(rosa_func.init(whole, 2), 0.3)
        W = rosa_func.merge(state)
        y = x @ W["child.linear.weight"].T + W["child.linear.bias"]
        expected = y @ W["linear.weight"].T + W["linear.bias"]
        assert relative_distance(rosa_func.call(whole, state, x), expected) <= 1e-5

    @pytest.mark.parametrize("weightless", [False, True])
    def test_a_copy_is_gone_when_its_results_are(self, weightless: bool):
        """A cycle kept the residuals of the old state until the garbage collector came."""
        model, x = two_layers(), randn(3, 6)
        state = rosa_func.init(model, 2)
        used = rosa_func.skeleton(model) if weightless else model
        gc.disable()
        try:
            residual = weakref.ref(state["frozen", "0.weight"])
            rosa_func.call(used, state, x)
            copy = weakref.ref(rosa_func.adapted(used, state))
            del state
            assert copy() is None
            assert residual() is None
        finally:
            gc.enable()

    def test_hooks_that_a_forward_pass_adds_are_dropped(self):
        """transformers installs hooks at the first call that asks for hidden states."""
        model, ids = seeded(tiny_gpt2).eval(), token_ids(2, 5)
        state = rosa_func.init(model, 2)
        options = {"output_hidden_states": True, "output_attentions": True}
        lengths = [
            (len(result.hidden_states), len(result.attentions))
            for result in (
                *(rosa_func.call(model, state, ids, **options) for _ in range(3)),
                model(ids, **options),
            )
        ]
        assert len(set(lengths)) == 1


class TestAdapted:
    @pytest.mark.parametrize("name", ["gpt2-small", "llama", "bert", "t5"])
    def test_an_adapted_model_computes_with_the_state(self, name: str):
        case = stock_model(name)
        state = perturbed(rosa_func.init(case.model, 2), 0.1)
        before = dict(case.model.named_parameters())
        result = main_output(rosa_func.adapted(case.model, state)(*case.args, **case.kwargs))
        expected = main_output(rosa_func.call(case.model, state, *case.args, **case.kwargs))
        assert torch.equal(result, expected)
        assert all(p is before[n] for n, p in case.model.named_parameters())

    def test_a_generator_and_a_submodule_compute_with_the_state(self):
        """Through `bind`, a generator ran on with the model's own weights."""
        model, x = seeded(lambda: Streaming(nn.Linear(6, 4), nn.Linear(4, 3))), randn(2, 6)
        state = perturbed(rosa_func.init(model, 2), 0.3)
        adapted = rosa_func.adapted(model, state)
        first, last = adapted.stream(x)
        assert torch.equal(last, rosa_func.call(model, state, x))
        assert torch.equal(adapted[0](x), first)

    def test_what_an_adapted_model_sets_and_writes_to_buffers_stays_with_it(self):
        """In eval mode a buffer that the forward pass writes to was the state's and the model's."""

        class Counting(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(6, 6)
                self.register_buffer("seen", torch.zeros(6))
                self.register_buffer("cache", torch.zeros(6), persistent=False)

            def forward(self, x: Tensor) -> Tensor:
                self.seen += x.sum(0)
                self.cache.copy_(x[0])
                return self.linear(x) + self.seen + self.cache

        model, x = seeded(Counting).eval(), randn(2, 6)
        state = rosa_func.init(model, 2)
        results = [rosa_func.call(model, state, x) for _ in range(2)]
        assert torch.equal(*results)
        for tensor in (model.seen, model.cache, state["frozen", "seen"]):
            assert not tensor.any()

    def test_other_data_for_a_frozen_weight_stays_with_the_call(self):
        """`self.weight.data = ...` in a forward pass changed the state."""
        model, state, x = self.writing(
            lambda weight: setattr(weight, "data", weight.data.clamp(0, 0.5))
        )
        result = rosa_func.call(model, state, x)
        assert relative_distance(result, 0.5 * model.linear(x)) <= 1e-6
        assert (model.scale == 1).all()
        assert (state["frozen", "scale"] == 1).all()

    def test_a_write_to_a_frozen_weight_is_an_error(self):
        """`weight.clamp_()` in a forward pass changed the state and the model, without a word."""
        model, state, x = self.writing(lambda weight: weight.clamp_(0, 0.5))
        with pytest.raises(RuntimeError, match="wrote to scale"):
            rosa_func.call(model, state, x)

    @pytest.mark.parametrize("train", [(), "*scale"], ids=["frozen", "trained"])
    @pytest.mark.parametrize("bound", [False, True])
    def test_a_write_through_data_stays_with_the_call(self, train, bound):
        """`self.part.weight.data.clamp_()`, as in Gemma 3n, changed the state and the model."""

        class Scales(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.ones(6))

        class Clamped(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scales = Scales()

            def predict(self, x: Tensor) -> Tensor:
                def clamp(scales: Scales) -> Tensor:
                    return scales.scale.data.clamp_(0, 0.5)

                clamp(self.scales)
                return x * self.scales.scale

        class Model(nn.Sequential):
            def forward(self, x: Tensor) -> Tensor:
                return self[1].predict(self[0](x))

        model, x = seeded(lambda: Model(nn.Linear(6, 6), Clamped())), randn(3, 6)
        state = rosa_func.init(model, 2, train=train)
        before, own = state_bytes(state), model_snapshot(model)
        expected = 0.5 * rosa_func.merge(state)["0.weight"]
        if bound:
            with rosa_func.bind(model, state):
                result = model(x)
        else:
            result = rosa_func.call(model, state, x)
        assert relative_distance(result, F.linear(x, expected, 0.5 * model[0].bias)) <= 1e-6
        assert state_bytes(state) == before and model_snapshot(model) == own

    def test_methods_that_no_forward_pass_comes_to_cost_no_copies(self):
        """Many a model names `.data` where it sets up or resizes its weights."""

        class Model(nn.Linear):
            def setup(self) -> None:
                self.weight.data.zero_()

        models = [Model(6, 6), *(stock_model(name).model for name in STOCK_NAMES)]
        assert not any(places(model).uncounted for model in models)

    def writing(self, write: Callable[[Tensor], Any]) -> tuple[nn.Module, Any, Tensor]:
        """Return a model that writes to its weight `scale`, its state, and an input."""

        class Writing(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear, self.scale = nn.Linear(6, 6), nn.Parameter(torch.ones(6))

            def forward(self, x: Tensor) -> Tensor:
                with torch.no_grad():
                    write(self.scale)
                return self.linear(x) * self.scale

        model = seeded(Writing)
        return model, rosa_func.init(model, 2), randn(3, 6)
