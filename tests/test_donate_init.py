"""A donated model: its memory is the state's, and nothing but a call knows it."""

import copy
import pickle
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

import rosa_func
from bounds import merge_bound
from cases import adapt_every_weight, cases
from models import randn, seeded, stock_model, tiny_gpt2, token_ids, two_layers
from modules import Coded
from references import main_output, state_bytes, storage_pointers, tensor_bytes
from rosa_func import checkpoint, export, samplers, sparse
from rosa_func.module import RosaModule
from rosa_func.weight import read

pytestmark = [
    pytest.mark.usefixtures("few_objects"),
    pytest.mark.filterwarnings("ignore:.*forms a batch"),
]


def pointers(model: nn.Module) -> set[int]:
    return storage_pointers([*model.parameters(), *model.buffers()])


class TestBits:
    @settings(max_examples=30)
    @given(cases(), st.sampled_from([None, False, True]))
    def test_they_are_those_of_the_pure_function(self, case, exact):
        options = {"exact": exact, "sampler": case.sampler, "key": case.seed}
        pure = adapt_every_weight(case.module(), case.r, **options)
        module, x = case.module(), case.input()
        expected = rosa_func.call(module, pure, x)
        memory = pointers(module)
        state = adapt_every_weight(module, case.r, **options, donate=True)
        assert state_bytes(state) == state_bytes(pure)
        assert storage_pointers(state["frozen"].values()) == memory
        assert torch.equal(rosa_func.call(module, state, x), expected)

    @pytest.mark.parametrize("name", ["gpt2-small", "llama", "bert", "t5", "vit"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_those_of_stock_models_with_ties_and_buffers(self, name, dtype):
        """Model and state stood side by side: GPT-2 medium took 2.9 GB, and 2.0 with peft."""
        model, args, kwargs = stock_model(name, dtype)
        pure = rosa_func.init(model, 2)
        expected = main_output(rosa_func.call(model, pure, *args, **kwargs))
        memory = pointers(model)
        state = rosa_func.init(model, 2, donate=True)
        assert state_bytes(state) == state_bytes(pure)
        assert storage_pointers(state["frozen"].values()) <= memory
        for used in (model, rosa_func.skeleton(model)):
            assert torch.equal(main_output(rosa_func.call(used, state, *args, **kwargs)), expected)

    def test_what_trains_in_full_needs_no_clone(self):
        model = seeded(tiny_gpt2)
        pure = rosa_func.init(model, 2, train=["ln_f", "wpe"])
        place = model.transformer.wpe.weight.data_ptr()
        state = rosa_func.init(model, 2, train=["ln_f", "wpe"], donate=True)
        assert state_bytes(state) == state_bytes(pure)
        assert state["trainable", "transformer.wpe.weight"].data_ptr() == place
        whole = seeded(tiny_gpt2)
        memory = storage_pointers(whole.parameters())
        state = rosa_func.init(whole, train="*", donate=True)
        assert storage_pointers(state["trainable"].values()) == memory

    def test_a_model_of_a_file_is_taken(self, tmp_path):
        seeded(tiny_gpt2).save_pretrained(tmp_path)
        model = GPT2LMHeadModel.from_pretrained(tmp_path)
        memory = pointers(model)
        state = rosa_func.init(model, 2, donate=True)
        assert storage_pointers(state["frozen"].values()) <= memory

    def test_quantised_tensors_stay_in_the_model(self):
        """They have no memory of their own that could be taken."""
        model = two_layers()
        model[2].weight = nn.Parameter(Coded(torch.ones(8, 4), torch.tensor(2.0)))
        state = rosa_func.init(model, 2, targets="0.weight", donate=True)
        assert rosa_func.call(model, state, randn(1, 6)).shape == (1, 8)

    def test_it_can_be_resampled_in_its_memory(self):
        model = seeded(tiny_gpt2)
        pure = rosa_func.resample(rosa_func.init(model, 2, sampler=samplers.lora), 1)
        memory = pointers(model)
        state = rosa_func.init(model, 2, sampler=samplers.lora, donate=True)
        new = rosa_func.resample(state, 1, donate=True)
        assert state_bytes(new) == state_bytes(pure)
        assert storage_pointers(new["frozen"].values()) <= memory


def emptied() -> tuple[nn.Module, Any]:
    model = seeded(tiny_gpt2)
    return model, rosa_func.init(model, 2, targets=["c_attn", "c_fc"], donate=True)


IDS = token_ids(2, 6)
USES: dict[str, Callable[[Any, Any], Any]] = {
    "forward": lambda model, state: model(IDS),
    "generate": lambda model, state: model.generate(IDS[:1], max_new_tokens=1),
    "state_dict": lambda model, state: model.state_dict(),
    "load": lambda model, state: model.load_state_dict(rosa_func.merge(state), strict=False),
    "save": lambda model, state: model.save_pretrained("never"),
    "move": lambda model, state: model.to(torch.float64),
    "deepcopy": lambda model, state: copy.deepcopy(model),
    "pickle": lambda model, state: pickle.dumps(model),
    "init": lambda model, state: rosa_func.init(model, 2),
    "donate": lambda model, state: rosa_func.init(model, 2, donate=True),
    "delta": lambda model, state: checkpoint.delta(state, model),
    "from_peft": lambda model, state: export.to_peft("never", model, state),
    "train": lambda model, state: torch.optim.SGD(model.parameters(), 1.0).step(arithmetic(model)),
    "functional": lambda model, state: torch.func.functional_call(model, {}, (IDS,)),
}


def arithmetic(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: sum(p.sum() for p in model.parameters())  # type: ignore[return-value]


class TestEmptyModel:
    @pytest.mark.parametrize("use", USES)
    def test_every_use_is_refused_with_what_to_do(self, use, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        model, state = emptied()
        before = state_bytes(state)
        message = r"of this model was donated to init: rosa_func.call\(model, state, ...\)"
        with pytest.raises((ValueError, RuntimeError), match=message):
            USES[use](model, state)
        assert state_bytes(state) == before

    def test_it_is_a_description_of_the_computation(self):
        model, state = emptied()
        pure = seeded(tiny_gpt2)
        expected = rosa_func.call(pure, state, IDS).logits
        for used in (
            lambda: rosa_func.call(model, state, IDS),
            lambda: rosa_func.adapted(model, state)(IDS),
            lambda: rosa_func.call(rosa_func.skeleton(model), state, IDS),
            lambda: RosaModule(model, state)(IDS),
        ):
            assert torch.equal(used().logits, expected)
        with rosa_func.bind(model, state) as bound:
            assert torch.equal(bound(IDS).logits, expected)
        weights = rosa_func.compose(state)
        called = torch.func.functional_call(model, weights, (IDS,)).logits
        assert torch.equal(called, expected)
        merged = rosa_func.merge(state)["transformer.h.0.attn.c_attn.weight"]
        module = export.to_module(model, state)
        assert torch.equal(module.transformer.h[0].attn.c_attn.weight, merged)
        assert module.lm_head.weight is module.transformer.wte.weight

    def test_it_trains(self):
        model, state = emptied()
        optimizer = torch.optim.SGD(rosa_func.parameters(state), 0.1)
        loss = rosa_func.call(model, state, IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        assert rosa_func.call(model, state, IDS, labels=IDS).loss < loss
        found = sparse.scores(model, state, [IDS], lambda m, x: m(x, labels=x).loss)
        assert found.keys() == read(state).adapted().keys()

    def test_what_needs_no_values_is_answered(self):
        model, _ = emptied()
        assert model.num_parameters() == seeded(tiny_gpt2).num_parameters()
        assert model.device == torch.device("cpu")
        assert all(isinstance(p, nn.Parameter) for p in model.parameters())
        assert repr(model) == repr(seeded(tiny_gpt2))
        model.zero_grad()
        model.train()

    def test_whoever_has_a_parameter_of_it_is_refused(self):
        """An optimizer of the model would go on with memory that holds residuals."""
        model = two_layers()
        optimizer, weight = torch.optim.SGD(model.parameters(), 0.1), model[0].weight
        model(randn(3, 6)).sum().backward()
        rosa_func.init(model, 2, donate=True)
        assert weight.grad is None
        weight.grad = torch.ones(4, 6)
        with pytest.raises(ValueError, match=r"0.weight of this model was donated to init"):
            optimizer.step()


def with_another_model() -> tuple[nn.Module, Any]:
    model = two_layers()
    other = nn.ModuleDict({"head": nn.Linear(6, 4)})
    other["head"].weight = model[0].weight
    return model, other


def with_a_graph() -> tuple[nn.Module, Any]:
    model = two_layers()
    return model, model(randn(3, 6).requires_grad_()).sum()


def with_one_memory() -> tuple[nn.Module, Any]:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    whole = torch.ones(4, 5)
    model[0].weight = nn.Parameter(whole[:, :4])
    model[1].weight = nn.Parameter(whole[:, 1:])
    return model, None


SHARED: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], str]] = {
    "model": (with_another_model, "0.weight is in use, as weight of a module Linear"),
    "state": (
        lambda: (model := two_layers(), rosa_func.init(model, 2, sampler=samplers.lora)),
        "[02].weight is in another state",
    ),
    "view": (
        lambda: (model := two_layers(), model[2].weight.detach()),
        "2.weight shares its memory with another tensor",
    ),
    "graph": (with_a_graph, "graph that waits for its backward pass"),
    "memory": (with_one_memory, "shares its memory with another tensor beside it"),
}


class TestSharing:
    @pytest.mark.parametrize("what", SHARED)
    def test_it_is_refused_by_name_and_nothing_is_changed(self, what):
        build, message = SHARED[what]
        model, other = build()
        before = {name: tensor_bytes(p) for name, p in model.named_parameters()}
        with pytest.raises(ValueError, match=message):
            rosa_func.init(model, 2, donate=True)
        assert {name: tensor_bytes(p) for name, p in model.named_parameters()} == before
        del other

    @pytest.mark.parametrize("what", ["model", "state", "view", "graph"])
    def test_it_is_taken_when_the_other_is_gone(self, what):
        model, other = SHARED[what][0]()
        del other
        rosa_func.init(model, 2, donate=True)

    def test_a_state_that_shares_what_is_not_adapted_lives_on(self):
        model = seeded(tiny_gpt2)
        old = rosa_func.init(model, 2)
        before = state_bytes(old)
        new = rosa_func.init(model, 2, donate=True)
        assert state_bytes(old) == before == state_bytes(new)


class TestHalfWay:
    @pytest.mark.parametrize("exact", [None, True])
    @pytest.mark.parametrize("failure", ["error", "ctrl-c"])
    @pytest.mark.parametrize("k", [0, 3, 7])
    def test_the_model_has_its_weights_back(self, k, failure, exact):
        model, whole = seeded(tiny_gpt2), seeded(tiny_gpt2)
        sampler = failing(k, failure)
        parameters = dict(model.named_parameters())
        state = rosa_func.init(whole, 2, exact=exact)
        with pytest.raises(RuntimeError if failure == "error" else KeyboardInterrupt) as caught:
            rosa_func.init(model, 2, sampler=sampler, exact=exact, donate=True)
        weights = read(state).adapted()
        for name, p in model.named_parameters():
            W = dict(whole.named_parameters())[name]
            assert p is parameters[name]
            if exact or name not in weights:
                assert torch.equal(p, W)
            else:
                assert ((p - W).abs() <= merge_bound(W, weights[name])).all()
        model(IDS).logits.sum().backward()
        rosa_func.init(model, 2, donate=True)
        assert caught.traceback  # which is still there

    @pytest.mark.parametrize("train", [(), "2.weight"])
    def test_nothing_is_taken_where_a_weight_is_not_finite(self, train):
        model = two_layers()
        model[2].weight.data[0, 0] = torch.nan
        before = {name: (p.data_ptr(), tensor_bytes(p)) for name, p in model.named_parameters()}
        with pytest.raises(ValueError, match=r"^2.weight: non-finite"):
            rosa_func.init(
                model, 2, targets="*weight" if not train else "0", train=train, donate=True
            )
        assert before == {
            name: (p.data_ptr(), tensor_bytes(p)) for name, p in model.named_parameters()
        }


def failing(k: int, failure: str) -> samplers.Sampler:
    """Make a sampler that fails, or presses Ctrl-C, at the k-th weight."""
    lock, names = threading.Lock(), list[str]()

    def sampler(W: Tensor, r: int, site: samplers.Site) -> tuple[Tensor, Tensor]:
        with lock:
            names.append(site.name)
            is_due = len(names) == k + 1
        if is_due and failure == "error":
            raise RuntimeError("injected")
        if is_due:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # type: ignore[arg-type]
            time.sleep(0.03)
        return samplers.random(W, r, site)

    return sampler
