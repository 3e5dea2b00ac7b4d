"""Models behind torch.compile and DDP: their names, and losses that they compute themselves."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import rosa_func
from models import randn, seeded, tiny_gpt2, token_ids, two_layers
from references import model_snapshot, perturbed, relative_distance
from rosa_func import checkpoint, export
from rosa_func.module import RosaModule
from rosa_func.trainer import ResampleCallback

IDS = token_ids(2, 8)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model: nn.Module) -> nn.Module:
    wrapped: nn.Module = torch.compile(model, backend="aot_eager")
    return wrapped


class Parallel(nn.Module):
    """Names its parts as DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Tensor) -> Tensor:
        result: Tensor = self.module(*args)
        return result


WRAPPERS = {
    "compiled": compiled,
    "parallel": Parallel,
    "both": lambda model: Parallel(compiled(model)),
    "a part compiled": lambda model: nn.Sequential(compiled(model[0]), *model[1:]),
}


class TestNames:
    """`_orig_mod.` and `module.` in front of names count for nothing, in either direction."""

    @pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
    def test_a_state_of_the_model_fits_the_wrapped_one_and_the_other_way_round(self, wrap):
        model, x = two_layers(), randn(3, 6)
        wrapped = wrap(model)
        own, of_wrapped = (perturbed(rosa_func.init(m, 2)) for m in (model, wrapped))
        expected = rosa_func.call(model, own, x)
        for one in (model, wrapped):
            for state in (own, of_wrapped):
                assert relative_distance(rosa_func.call(one, state, x), expected) <= 1e-6
                with rosa_func.bind(one, state) as bound:
                    assert relative_distance(bound(x), expected) <= 1e-6
                assert relative_distance(RosaModule(model, state)(x), expected) <= 1e-6
        change = checkpoint.delta(of_wrapped, model)
        merged = export.to_module(model, of_wrapped)
        assert relative_distance(merged(x), expected) <= 1e-6
        weights = checkpoint.apply_delta(wrapped, change)
        wrapped.load_state_dict(weights)
        assert relative_distance(model(x), expected) <= 1e-5

    @pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
    def test_patterns_match_names_without_their_prefixes(self, wrap):
        states = [
            rosa_func.init(model, {"0.weight": 1, "2.weight": 2}, targets="?.w*")
            for model in (two_layers(), wrap(two_layers()))
        ]
        own, of_wrapped = (rosa_func.count(state).trainable for state in states)
        assert own == of_wrapped

    def test_a_name_of_a_child_that_is_called_module_is_its_own(self):
        model = Parallel(two_layers())
        model.other = nn.Linear(2, 2)
        state = rosa_func.init(model, 1)
        assert "module.0.weight" in state["trainable"].keys()
        assert "other.weight" in state["trainable"].keys()

    @pytest.mark.parametrize("name", ["compiled", "parallel", "both"])
    def test_a_child_called_module_is_told_from_a_wrapper(self, name):
        """Without "module." the names of the two weights would be the same."""
        wrap = WRAPPERS[name]
        model, x = Parallel(nn.Linear(4, 4)), randn(3, 4)
        model.weight = nn.Parameter(randn(4, 4))
        state = perturbed(rosa_func.init(model, 2, targets="*weight"))
        expected = rosa_func.call(model, state, x)
        assert relative_distance(rosa_func.call(wrap(model), state, x), expected) <= 1e-6
        of_wrapped = perturbed(rosa_func.init(wrap(model), 2, targets="*weight"))
        assert relative_distance(rosa_func.call(model, of_wrapped, x), expected) <= 1e-6

    @pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
    def test_a_resample_takes_the_patterns_of_ranks_that_init_took(self, wrap):
        state = rosa_func.init(wrap(two_layers()), ranks := {"0.weight": 1, "2.weight": 2})
        new = rosa_func.resample(state, 1, r=ranks)
        assert rosa_func.count(new).trainable == rosa_func.count(state).trainable


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


# Torch's compiler asks what it takes over after a break of the graph for its gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
class TestModelsThatAreCompiledBefore:
    """A gradient of torch.func of `call` ended in dynamo's own "AssertionError: False != True"."""

    @pytest.mark.parametrize("wrap", [compiled_in_place, partial(torch.compile, backend="eager")])
    def test_gradients_of_torch_func_are_those_of_the_plain_model(self, wrap):
        model, x = two_layers(), randn(3, 6)
        state = perturbed(rosa_func.init(model, 2))

        def loss(trainable):
            state_of = state.replace(trainable=trainable)
            return rosa_func.call(model, state_of, x).square().sum()

        expected = torch.func.grad(loss)(state["trainable"])
        before, model = rosa_func.call(model, state, x), wrap(model)
        own = model_snapshot(model)
        for _ in range(2):
            found = torch.func.grad(loss)(state["trainable"])
            for leaf, other in zip(
                found.values(True, True), expected.values(True, True), strict=True
            ):
                assert relative_distance(leaf, other) <= 1e-5
        assert relative_distance(rosa_func.call(model, state, x), before) <= 1e-6
        assert model_snapshot(model) == own

    def test_training_and_resamples_are_those_of_the_plain_model(self):
        losses = []
        for wrap in (lambda model: model, compiled_in_place):
            model, x = wrap(two_layers()), randn(3, 6)
            state = rosa_func.init(model, 2)
            optimizer = torch.optim.SGD(rosa_func.parameters(state), 0.1)
            losses.append([])
            for step in range(4):
                loss = rosa_func.call(model, state, x).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[-1].append(loss.item())
                if step == 1:
                    new = rosa_func.resample(state, step)
                    rosa_func.optim.rebind(optimizer, state, new)
                    state = new
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)


# Torch's compiler asks what it takes over after a break of the graph for its gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
class TestModelsThatComputeTheirLoss:
    """The graph breaks in the loss of transformers; the rest of the frame must go on with us."""

    def test_a_compiled_rosa_module_has_the_loss_and_gradients_of_the_plain_one(self):
        model = seeded(lambda: tiny_gpt2(layers=1)).train()
        module = RosaModule(model, perturbed(rosa_func.init(model, 2, targets="c_attn")))
        fast = torch.compile(module, backend="eager")
        for key in range(2):
            losses, gradients = [], []
            for run in (module, fast):
                module.zero_grad()
                loss = run(input_ids=IDS, labels=IDS).loss
                loss.backward()
                losses.append(loss.detach())
                gradients.append([p.grad for p in module.parameters()])
            assert relative_distance(*losses) <= 1e-6
            for one, other in zip(*gradients, strict=True):
                assert relative_distance(other, one) <= 1e-5
            module.resample(key)

    def test_a_compiled_call_has_the_loss_and_gradients_of_the_plain_one(self):
        model = seeded(lambda: tiny_gpt2(layers=1)).eval()
        state = perturbed(rosa_func.init(model, 2, targets="c_attn"))
        leaves = rosa_func.parameters(state)
        before = model_snapshot(model)

        def loss_of(state):
            return rosa_func.call(model, state, input_ids=IDS, labels=IDS).loss

        losses, gradients = [], []
        for run in (loss_of, torch.compile(loss_of, backend="aot_eager")):
            losses.append(run(state))
            gradients.append(torch.autograd.grad(losses[-1], leaves))
        assert relative_distance(*losses) <= 1e-6
        for one, other in zip(*gradients, strict=True):
            assert relative_distance(other, one) <= 1e-5
        assert model_snapshot(model) == before

    def test_trainer_compiles(self, tmp_path):
        model = seeded(lambda: tiny_gpt2(layers=1))
        rows = [{"input_ids": row, "labels": row} for row in token_ids(8, 8)]
        losses = []
        for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
            module = RosaModule(model, rosa_func.init(model, 2, targets="c_attn"))
            arguments = TrainingArguments(
                output_dir=str(tmp_path),
                max_steps=4,
                per_device_train_batch_size=4,
                learning_rate=1e-2,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
                **options,
            )
            trainer = Trainer(
                module, arguments, train_dataset=rows, callbacks=[ResampleCallback(every=2)]
            )
            losses.append(trainer.train().training_loss)
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
