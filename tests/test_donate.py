"""A donated state: the bits of the pure function in its own memory, and then it is spent."""

import copy
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor, nn

import rosa_func
from cases import cases
from models import gpt2_and_rosa_module, randn, seeded, tiny_gpt2, token_ids, two_layers
from references import dense_weights, perturbed, state_bytes, storage_pointers
from rosa_func import checkpoint, distributed, export, optim, samplers, sparse
from rosa_func.module import RosaModule
from rosa_func.weight import read
from rosa_func.weight.layout import leaves

pytestmark = [
    pytest.mark.usefixtures("toys", "few_objects"),
    pytest.mark.filterwarnings("ignore:.*forms a batch"),  # of toys, which have no other rule
]


TARGETS = ["c_attn", "c_fc", "mlp.c_proj"]
ADAPTED = 6


def trained(exact: bool | None = None, dtype: torch.dtype = torch.float32) -> TensorDict:
    """Return the state of a tiny GPT-2 that is gone, as if trained; a layer norm trains in full."""
    model = seeded(tiny_gpt2).to(dtype)
    return perturbed(rosa_func.init(model, 2, targets=TARGETS, train="ln_f", exact=exact))


def frozen_of(state: TensorDict) -> dict[str, Tensor]:
    """Return the residuals, which are what is donated."""
    return {name: w.base.R for name, w in read(state).adapted().items()}  # type: ignore[attr-defined]


def parts_of(state: TensorDict) -> dict[str, dict[Any, Any]]:
    """Return the bytes of each adapted weight's entries."""
    names = read(state).adapted()
    found: dict[str, dict[Any, Any]] = {name: {} for name in names}
    for path, (_, content) in state_bytes(state).items():
        if path[1] in names:
            found[path[1]][path] = content
    return found


class TestBits:
    @settings(max_examples=40)
    @given(cases(), st.sampled_from([None, False, True]), st.integers(1, 3))
    def test_they_are_those_of_the_pure_function(self, case, exact, r):
        r = min(r, case.m, case.n)
        old, given_ = case.trained(exact), case.trained(exact)
        pure = rosa_func.resample(old, case.seed, r=r, sampler=case.sampler)
        new = rosa_func.resample(given_, case.seed, r=r, sampler=case.sampler, donate=True)
        assert state_bytes(new) == state_bytes(pure)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_residuals_stay_where_they_are(self, dtype):
        """A resample of GPT-2 medium took as much memory again as its residuals: 1.2 GB."""
        state = trained(dtype=dtype)
        places = {name: R.data_ptr() for name, R in frozen_of(state).items()}
        pure = rosa_func.resample(state, 1)
        assert not storage_pointers(frozen_of(pure).values()) & set(places.values())
        new = rosa_func.resample(state, 1, donate=True)
        assert {name: R.data_ptr() for name, R in frozen_of(new).items()} == places
        again = rosa_func.resample(new, 2, donate=True)  # with the spent state still there
        assert {name: R.data_ptr() for name, R in frozen_of(again).items()} == places
        assert state_bytes(again) == state_bytes(rosa_func.resample(pure, 2))

    def test_what_is_not_adapted_is_shared_as_before(self):
        state = trained()
        embedding = state["frozen", "transformer.wte.weight"]
        new = rosa_func.resample(state, 1, donate=True)
        assert new["frozen", "transformer.wte.weight"] is embedding
        assert embedding.isfinite().all()

    def test_what_lies_in_a_file_is_not_written_to(self, tmp_path):
        state = trained().memmap(tmp_path)
        before = state_bytes(state)
        new = rosa_func.resample(state, 1, donate=True)
        assert state_bytes(new) == state_bytes(rosa_func.resample(trained(), 1))
        kept = state_bytes(TensorDict.load_memmap(tmp_path))
        assert {path: content for path, (_, content) in kept.items()} == {
            path: content for path, (_, content) in before.items()
        }

    def test_a_method_binds_it_for_both(self):
        method, model = rosa_func.method(2, targets=TARGETS, donate=True), seeded(tiny_gpt2)
        state = method.init(model)
        new = method.resample(state, 1)
        pure = rosa_func.method(2, targets=TARGETS)
        expected = pure.resample(pure.init(seeded(tiny_gpt2)), 1)
        assert state_bytes(new) == state_bytes(expected)
        with pytest.raises(ValueError, match="donated to resample"):
            rosa_func.merge(state)


class Failing:
    """A sampler that does something when it comes to the k-th weight."""

    def __init__(self, k: int, act: Callable[[], None]) -> None:
        self.k, self.act, self.lock, self.names = k, act, threading.Lock(), []

    def __call__(self, W: Tensor, r: int, site: samplers.Site) -> tuple[Tensor, Tensor]:
        with self.lock:
            self.names.append(site.name)
            is_due = len(self.names) == self.k + 1
        if is_due:
            self.act()
        return samplers.random(W, r, site)


def fail() -> None:
    raise RuntimeError("injected")


def interrupt() -> None:
    """Do what Ctrl-C does: an exception in the main thread. Let it come before going on."""
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # type: ignore[arg-type]
    time.sleep(0.03)


def interrupt_twice() -> None:
    interrupt()
    interrupt()


FAILURES = {
    "error": (fail, RuntimeError),
    "ctrl-c": (interrupt, KeyboardInterrupt),
    "twice": (interrupt_twice, KeyboardInterrupt),
}


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_each_is_old_or_new(state: TensorDict, old: TensorDict, new: TensorDict) -> int:
    """Check that each weight is either, with the same function; return how many are new."""
    parts, before, after = parts_of(state), parts_of(old), parts_of(new)
    for name, entries in parts.items():
        assert entries in (before[name], after[name]), name
    weights, expected = dense_weights(state), dense_weights(old)
    for name, W in expected.items():
        assert torch.allclose(weights[name], W, atol=1e-5), name
    return sum(parts[name] == after[name] for name in parts)


class TestHalfWay:
    @pytest.mark.parametrize("workers", [1, 3])
    @pytest.mark.parametrize("failure", FAILURES)
    @pytest.mark.parametrize("k", [0, 2, ADAPTED - 1])
    def test_each_weight_is_the_old_or_the_new_one(self, k, failure, workers):
        act, error = FAILURES[failure]
        state, old = trained(), trained()
        held = leaves(state)
        optimizer = torch.optim.SGD(rosa_func.parameters(state), 0.0)
        new = rosa_func.resample(old, 1)
        with threads(workers), pytest.raises(error):
            rosa_func.resample(state, 1, sampler=Failing(k, act), donate=True)
        done = assert_each_is_old_or_new(state.detach(), old, new)
        assert done >= k - (workers - 1)  # those before it
        assert failure == "error" or workers > 1 or done <= k + 1  # and the one under way
        # It can be used: by its optimizer, which has its leaves, and by a resample.
        assert all(leaves(state)[name] is leaf for name, leaf in held.items())
        optimizer.step()
        again = rosa_func.resample(state, 2, donate=True)
        optim.rebind(optimizer, state, again)
        for name, W in dense_weights(again).items():
            assert torch.allclose(W, dense_weights(old)[name], atol=1e-5)

    @pytest.mark.parametrize("k", [0, 3, 5])
    def test_with_other_ranks_and_a_compensation(self, k):
        state, old = trained(exact=True), trained(exact=True)
        expected = rosa_func.merge(old)
        with threads(1), pytest.raises(RuntimeError, match="injected"):
            rosa_func.resample(state, 1, r=3, sampler=Failing(k, fail), donate=True)
        merged = rosa_func.merge(state)
        assert all(torch.equal(merged[name], W) for name, W in expected.items())
        ranks = [leaf.shape[1] for name, leaf in leaves(state).items() if name.endswith(".A")]
        assert ranks.count(2) + ranks.count(3) == ADAPTED
        assert k <= ranks.count(3) < ADAPTED  # the one worker may be quicker than the error

    def test_a_weight_that_is_not_finite(self):
        state, old = trained(), trained()
        name = "transformer.h.0.mlp.c_fc.weight"
        state["trainable", name, "A"].data.fill_(torch.nan)
        with pytest.raises(ValueError, match=rf"^{name}: non-finite"):
            rosa_func.resample(state, 1, donate=True)
        new = rosa_func.resample(old, 1)
        parts, after = parts_of(state), parts_of(new)
        assert {n for n in parts if parts[n] != after[n]} == {name}

    def test_gradients_of_new_factors_are_dropped(self):
        state = trained()
        for leaf in rosa_func.parameters(state):
            leaf.grad = torch.ones_like(leaf)
        with threads(1), pytest.raises(RuntimeError):
            rosa_func.resample(state, 1, sampler=Failing(2, fail), donate=True)
        gone = {name for name, leaf in leaves(state).items() if leaf.grad is None}
        after = parts_of(rosa_func.resample(trained(), 1))
        new = {name for name, entries in parts_of(state.detach()).items() if entries == after[name]}
        assert gone == {f"{name}.{factor}" for name in new for factor in "AB"}
        assert len(new) >= 2

    def test_it_can_be_donated_again_while_the_error_is_looked_at(self):
        state = trained()
        with pytest.raises(RuntimeError) as caught:
            rosa_func.resample(state, 1, sampler=Failing(3, fail), donate=True)
        new = rosa_func.resample(state, 1, donate=True)
        assert caught.traceback and state_bytes(new)

    def test_no_thread_stays_behind(self):
        before = threading.active_count(), torch.get_num_threads()
        with pytest.raises(KeyboardInterrupt):
            rosa_func.resample(trained(), 1, sampler=Failing(1, interrupt), donate=True)
        assert (threading.active_count(), torch.get_num_threads()) == before


def model_and_spent() -> tuple[nn.Module, TensorDict, TensorDict]:
    model = two_layers()
    state = rosa_func.init(model, 2, train="*.bias", targets="*.weight")
    return model, state, rosa_func.resample(state, 1, donate=True)


X = randn(3, 6)
USES: dict[str, Callable[[nn.Module, TensorDict], Any]] = {
    "call": lambda model, state: rosa_func.call(model, state, X),
    "adapted": rosa_func.adapted,
    "bind": lambda model, state: rosa_func.bind(model, state).__enter__(),
    "compose": lambda model, state: rosa_func.compose(state),
    "merge": lambda model, state: rosa_func.merge(state),
    "resample": lambda model, state: rosa_func.resample(state, 2),
    "donate again": lambda model, state: rosa_func.resample(state, 2, donate=True),
    "distributed": lambda model, state: distributed.resample(state, 2),
    "check_equal": lambda model, state: distributed.check_equal(state),
    "parameters": lambda model, state: rosa_func.parameters(state),
    "named": lambda model, state: rosa_func.named_parameters(state),
    "count": lambda model, state: rosa_func.count(state),
    "groups": lambda model, state: optim.groups(state),
    "save": lambda model, state: checkpoint.save("never", state),
    "digest": lambda model, state: checkpoint.digest(state),
    "delta": lambda model, state: checkpoint.delta(state, model),
    "to_module": export.to_module,
    "to_peft": lambda model, state: export.to_peft("never", model, state),
    "module": RosaModule,
    "add": lambda model, state: sparse.add(state, {"0.weight": torch.tensor([1])}),
    "remove": lambda model, state: sparse.remove(state),
    "support": lambda model, state: sparse.support_random(state, 0.5, 0),
    "scores": lambda model, state: sparse.scores(model, state, [X], lambda m, x: m(x).sum()),
    "clone": lambda model, state: state.clone(),
    "to": lambda model, state: state.to(torch.float64),
    "stack": lambda model, state: torch.stack([state, state]),
    "deepcopy": lambda model, state: copy.deepcopy(state),
    "pickle": lambda model, state: pickle.dumps(state),
    "arithmetic": lambda model, state: state["frozen", "0.weight"] @ X.T,
    "write": lambda model, state: state["frozen", "0.weight"].zero_(),
    "leaf": lambda model, state: state["trainable", "0.bias"] + 1,
}


class TestSpent:
    @pytest.mark.parametrize("use", USES)
    def test_every_use_is_refused_by_name(self, use, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        model, state, new = model_and_spent()
        before = state_bytes(new)
        with pytest.raises(ValueError, match=r"(0.weight|0.bias|2.weight) was donated to resample"):
            USES[use](model, state)
        assert state_bytes(new) == before
        assert not list(tmp_path.iterdir())

    def test_what_needs_no_values_is_answered(self):
        _, state, new = model_and_spent()
        R = state["frozen", "0.weight"]
        assert (R.shape, R.dtype, R.requires_grad) == (torch.Size([4, 6]), torch.float32, False)
        assert "donated to resample" in repr(R)
        assert "0.weight" in repr(state)
        assert state["trainable", "0.weight", "A"].isfinite().all()
        assert "donated" not in repr(new["frozen", "0.weight"])

    def test_a_composed_weight_of_it_has_no_values(self):
        """It computes below the classes of its parts, where NaN is all that can be told."""
        state = rosa_func.init(two_layers(), 2)
        weights = rosa_func.compose(state)
        rosa_func.resample(state, 1, donate=True)
        assert (X @ weights["0.weight"].T).isnan().all()


def shared_by_a_model() -> tuple[TensorDict, Any]:
    model = two_layers()
    return rosa_func.init(model, 2, sampler=samplers.lora), model


def of_another_state(share: Callable[[TensorDict], Any]) -> Callable[[], tuple[TensorDict, Any]]:
    def made() -> tuple[TensorDict, Any]:
        state = rosa_func.init(two_layers(), 2, train="*.bias", targets="*.weight")
        return state, share(state)

    return made


def with_a_graph() -> tuple[TensorDict, Any]:
    model = two_layers()
    state = rosa_func.init(model, 2)
    rosa_func.parameters(state)
    model.requires_grad_(False)
    return state, rosa_func.call(model, state, X.clone().requires_grad_()).sum()


def with_a_tensor_twice() -> tuple[TensorDict, Any]:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    state = rosa_func.init(model, 2)
    state["frozen", "1.weight"] = state["frozen", "0.weight"]
    return state, None


SHARED: dict[str, tuple[Callable[[], tuple[TensorDict, Any]], str]] = {
    "model": (shared_by_a_model, r"0.weight is in use, as weight of a module Linear"),
    "shallow copy": (
        of_another_state(lambda state: state.copy()),
        r"0.weight is in another state \(or TensorDict\), as 0.weight",
    ),
    "sparse.add": (
        of_another_state(lambda state: sparse.add(state, {"2.weight": torch.tensor([0])})),
        "2.weight is in another state|0.weight is in another state",
    ),
    "replace": (
        of_another_state(lambda s: s.replace(trainable=s["trainable"].clone())),
        "0.weight is in another state",
    ),
    "detach": (of_another_state(lambda state: state.detach()), "is in another state"),
    "full": (
        of_another_state(lambda state: state["trainable", "2.bias"][:2]),
        "2.bias shares its memory with another tensor",
    ),
    "view": (
        of_another_state(lambda state: state["frozen", "2.weight"][:2]),
        "2.weight shares its memory with another tensor",
    ),
    "module": (
        of_another_state(lambda state: RosaModule(two_layers(), state)),
        r"\d.\w+ is in use, as \w+ of a module Module",
    ),
    "graph": (with_a_graph, "held by a graph that waits for its backward pass"),
    "twice": (with_a_tensor_twice, "shares its memory with another tensor beside it"),
}


class TestSharing:
    @pytest.mark.parametrize("what", SHARED)
    def test_it_is_refused_by_name_and_nothing_is_changed(self, what):
        build, message = SHARED[what]
        state, other = build()
        before = state_bytes(state)
        with pytest.raises(ValueError, match=message):
            rosa_func.resample(state, 1, donate=True)
        assert state_bytes(state) == before
        del other

    @pytest.mark.parametrize("what", [what for what in SHARED if what != "twice"])
    def test_it_is_taken_when_the_other_is_gone(self, what):
        state, other = SHARED[what][0]()
        del other
        pure = rosa_func.resample(state, 1)
        assert state_bytes(rosa_func.resample(state, 1, donate=True)) == state_bytes(pure)

    def test_a_graph_that_went_back_holds_nothing(self):
        state, loss = with_a_graph()
        loss.backward()
        rosa_func.resample(state, 1, donate=True)

    def test_one_in_a_cycle_of_garbage_is_nobody(self):
        state, model = shared_by_a_model()
        model.itself = [model]
        del model
        rosa_func.resample(state, 1, donate=True)

    def test_states_of_checkpoints_and_stacks_are_taken(self, tmp_path):
        checkpoint.save(tmp_path / "a", trained())
        loaded, _ = checkpoint.load(tmp_path / "a")
        rosa_func.resample(loaded, 1, donate=True)
        one, two = torch.stack([trained(), trained()]).unbind(0)
        with pytest.raises(ValueError, match=r"shares its memory|is in another state"):
            rosa_func.resample(one, 1, donate=True)
        del two


def adamw_after_a_step(state: TensorDict) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(rosa_func.parameters(state), 1e-2, weight_decay=0.0)
    step(optimizer, state)
    return optimizer


def step(optimizer: torch.optim.Optimizer, state: TensorDict) -> None:
    ids = token_ids(2, 6)
    rosa_func.call(SKELETON, state, ids, use_cache=False).logits.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


SKELETON = rosa_func.skeleton(seeded(tiny_gpt2))


class TestTraining:
    @pytest.mark.parametrize("moments", ["reset", "project", "keep"])
    def test_rebind_goes_on_from_a_spent_state(self, moments):
        results = []
        for donate in (False, True):
            state = trained()
            optimizer = adamw_after_a_step(state)
            for key in range(2):
                new = rosa_func.resample(state, key, donate=donate)
                optim.rebind(optimizer, state, new, moments=moments)
                state = new
                step(optimizer, state)
            results.append((state_bytes(state), optimizer.state_dict()["state"]))
        assert results[0][0] == results[1][0]
        torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=0)

    def test_in_processes_of_one(self):
        pure = distributed.resample(trained(), 1)
        assert state_bytes(distributed.resample(trained(), 1, donate=True)) == state_bytes(pure)

    def test_states_of_several_threads_are_each_its_own(self):
        expected = state_bytes(rosa_func.resample(trained(), 1))
        states, found = [trained() for _ in range(4)], {}

        def work(place: int) -> None:
            found[place] = rosa_func.resample(states[place], 1, donate=True)

        workers = [threading.Thread(target=work, args=(place,)) for place in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert all(state_bytes(found[place]) == expected for place in range(4))


class TestModule:
    def test_its_residuals_stay_where_they_are(self):
        """A resample of a module took the memory of its residuals again."""
        _, module = gpt2_and_rosa_module()
        places = {name: R.data_ptr() for name, R in frozen_of(module.state).items()}
        parameters = dict(module.named_parameters())
        optimizer = adamw_of(module)
        expected = rosa_func.resample(module.state, 1)
        module.resample(1, optimizer=optimizer)
        assert {name: R.data_ptr() for name, R in frozen_of(module.state).items()} == places
        assert all(dict(module.named_parameters())[name] is p for name, p in parameters.items())
        got, wanted = state_bytes(module.state.detach()), state_bytes(expected)
        assert got == wanted
        module(token_ids(2, 6)).logits.mean().backward()
        optimizer.step()
        pickle.loads(pickle.dumps(module))

    @pytest.mark.parametrize("shares", ["state", "model"])
    def test_it_is_pure_where_something_shares_them(self, shares):
        model = seeded(tiny_gpt2)
        sampler = samplers.lora if shares == "model" else samplers.random
        state = rosa_func.init(model, 2, targets=TARGETS, sampler=sampler)
        other = state_bytes(state) if shares == "state" else None
        weights = {name: p.clone() for name, p in model.named_parameters()}
        module = RosaModule(model, state)
        if shares == "model":
            del state
        expected = state_bytes(rosa_func.resample(module.state, 1))
        module.resample(1)
        assert state_bytes(module.state.detach()) == expected
        assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())
        assert other is None or state_bytes(state) == other

    def test_an_optimizer_that_is_refused_leaves_it_whole(self):
        _, module = gpt2_and_rosa_module()
        ids = token_ids(2, 6)
        before = module(ids).logits.detach()
        optimizer = torch.optim.LBFGS(module.parameters())
        optimizer.state["all"] = {}
        with pytest.raises(ValueError, match="LBFGS"):
            module.resample(1, optimizer=optimizer)
        assert torch.allclose(module(ids).logits, before, atol=1e-5)
        module.resample(2)

    @pytest.mark.parametrize("k", range(5))
    def test_half_way_it_is_whole(self, k):
        _, module = gpt2_and_rosa_module()
        ids = token_ids(2, 6)
        before = module(ids).logits.detach()
        with pytest.raises(KeyboardInterrupt):
            module.resample(1, sampler=Failing(k, interrupt))
        assert torch.allclose(module(ids).logits, before, atol=1e-5)
        module(ids).logits.mean().backward()
        module.resample(2)
        assert torch.allclose(module(ids).logits, before, atol=1e-5)


def adamw_of(module: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(module.parameters(), 1e-3, weight_decay=0.0)
    module(token_ids(2, 6)).logits.mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer
