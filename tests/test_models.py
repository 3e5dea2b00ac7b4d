"""Stock models, unchanged: same function, gradients, purity, skeletons and default targets."""

import copy
import gc
import pickle
import weakref
from collections.abc import Iterable
from itertools import cycle, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import BertConfig, BertForSequenceClassification

import rosa_func
from cases import ANY_WIDE_DTYPE, SAMPLERS, SIXTEEN_BIT_DTYPES, ZERO_PRODUCT_SAMPLERS
from models import STOCK_NAMES, ModelCall, seeded, stock_model, tiny_gpt2, token_ids
from references import (
    global_state,
    main_output,
    model_snapshot,
    perturbed,
    relative_distance,
    state_bytes,
    storage_pointers,
    tied_names,
)
from rosa_func import samplers

# nn.TransformerEncoder has matrices that the default targets leave out; that is tested below.
pytestmark = pytest.mark.filterwarnings("ignore:layers.0.self_attn.in_proj_weight")

# A layer rounds by a few eps, and a few tens of layers pass that on. 100 eps is ten times what
# comes out, and far below any real mistake.
EPSILONS = 100
keys = st.integers(-(2**70), 2**70)
ranks = st.sampled_from([1, 3, 0.2, 0.5])


def equal_up_to_rounding(a: torch.Tensor, b: torch.Tensor) -> bool:
    return relative_distance(a, b) <= EPSILONS * torch.finfo(b.dtype).eps


def output_of_call(case: ModelCall, state: TensorDict) -> torch.Tensor:
    return main_output(rosa_func.call(case.model, state, *case.args, **case.kwargs))


# The function stays the same.


MODELS_AND_MODES = list(product(STOCK_NAMES, ["sdpa", "eager"], [False, True]))
PAIRS_OF_SAMPLERS = list(product(SAMPLERS, SAMPLERS))
# Enough for every sampler to come before and after every other.
assert len(MODELS_AND_MODES) >= len(PAIRS_OF_SAMPLERS)


@pytest.mark.parametrize(
    "name, attention, training, before, after",
    [
        (*case, *pair)
        for case, pair in zip(MODELS_AND_MODES, cycle(PAIRS_OF_SAMPLERS), strict=False)
    ],
)
@settings(max_examples=2)
@given(r=ranks, key=keys, dtype=ANY_WIDE_DTYPE)
def test_the_output_is_the_same_after_init_and_after_resample(
    name, attention, training, before, after, r, key, dtype
):
    case = stock_model(name, dtype, attention)
    case.model.train(training)
    expected = case.own_output()
    state = rosa_func.init(case.model, r, key=key, sampler=before)
    assert equal_up_to_rounding(output_of_call(case, state), expected)
    state = rosa_func.resample(state, key, sampler=after)
    assert equal_up_to_rounding(output_of_call(case, state), expected)


@pytest.mark.parametrize("name", STOCK_NAMES)
def test_a_trained_state_is_the_same_function_merged_and_resampled(name):
    case = stock_model(name, torch.float64)
    state = perturbed(rosa_func.init(case.model, 2))
    before = output_of_call(case, state)
    assert not equal_up_to_rounding(before, case.own_output())
    assert equal_up_to_rounding(output_of_call(case, rosa_func.resample(state, 1)), before)
    merged = copy.deepcopy(case.model)
    missing, unexpected = merged.load_state_dict(rosa_func.merge(state), strict=False)
    tied = {alias for alias in merged.state_dict()} - {name for name, _ in named_tensors(merged)}
    assert set(missing) == tied and not unexpected
    assert equal_up_to_rounding(ModelCall(merged, case.args, case.kwargs).own_output(), before)


def named_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


@pytest.mark.parametrize("name", STOCK_NAMES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_lora_leaves_the_output_bit_for_bit(name, attention):
    case = stock_model(name, attention=attention)
    state = rosa_func.init(case.model, 2, sampler=samplers.lora)
    # Both must take the same kernels. In eval mode nn.TransformerEncoder fuses its layers where all
    # weights are plain; sdpa takes another kernel when T5's position bias requires a gradient, and
    # so does matmul, of a transposed input, when the weight does.
    case.model.requires_grad_(False)
    case.model.train(name == "encoder")
    with torch.no_grad():
        assert torch.equal(output_of_call(case, state), case.own_output())


# Gradients.


@pytest.mark.parametrize("name, attention, training", MODELS_AND_MODES)
def test_backward_gives_gradients_on_all_leaves(name, attention, training):
    case = stock_model(name, attention=attention)
    case.model.train(training)
    state = rosa_func.init(case.model, 2)
    leaves = rosa_func.named_parameters(state)
    (output_of_call(case, state) ** 2).mean().backward()
    without = [leaf for leaf, value in leaves.items() if value.grad is None or not value.grad.any()]
    assert not without
    assert all(p.grad is None for p in case.model.parameters())


# Purity.


@pytest.mark.parametrize("name, sampler", list(zip(STOCK_NAMES, cycle(SAMPLERS), strict=False)))
@settings(max_examples=3)
@given(
    key=keys,
    training=st.booleans(),
    frozen=st.booleans(),
    exact=st.sampled_from([None, True]),
)
def test_every_function_leaves_the_model_its_input_and_the_globals(
    name, sampler, key, training, frozen, exact
):
    case = stock_model(name)
    # Older OPTs draw a number for each layer in training.
    model = case.model.train(training and name != "opt").requires_grad_(not frozen)
    model.register_forward_hook(lambda *_: None)
    model_before, globals_before = model_snapshot(model), global_state()
    state = rosa_func.init(model, 2, key=key, sampler=sampler, exact=exact)
    before = state_bytes(state)
    for function in (
        lambda: rosa_func.compose(state),
        lambda: output_of_call(case, state),
        lambda: rosa_func.resample(state, key, sampler=sampler),
        lambda: rosa_func.merge(state),
        lambda: rosa_func.count(state),
        lambda: rosa_func.skeleton(model),
        lambda: rosa_func.method(2, sampler=sampler).init(model),
        lambda: rosa_func.method(2, sampler=sampler).resample(state, key),
    ):
        function()
        assert state_bytes(state) == before
        assert model_snapshot(model) == model_before
    # These have one side effect: the flag on the state's leaves.
    rosa_func.parameters(state), rosa_func.named_parameters(state)
    flags = {path[0]: flag for path, (flag, _) in state_bytes(state).items() if flag}
    assert flags == {"trainable": True}
    assert model_snapshot(model) == model_before
    assert global_state() == globals_before


@pytest.mark.parametrize(
    "name, train", [("gpt2-small", "*bias"), ("t5", "*norm*"), ("encoder", ())]
)
def test_training_leaves_the_model_and_the_globals(name, train):
    case = stock_model(name)
    model = case.model.train()
    model_before, globals_before = model_snapshot(model), global_state()
    state = rosa_func.init(model, 2, train=train)
    losses = []
    for step in range(4):
        optimizer = torch.optim.AdamW(rosa_func.parameters(state), 1e-2, weight_decay=0.0)
        for _ in range(2):
            loss = (output_of_call(case, state) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        state = rosa_func.resample(state, step)
    assert losses[-1] < losses[0]
    assert model_snapshot(model) == model_before
    assert global_state() == globals_before


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_only_tensors_that_no_draw_changes_are_shared(sampler):
    model = seeded(tiny_gpt2)
    weights = dict(model.named_parameters())
    state = rosa_func.init(model, 2, sampler=sampler, train="*bias", exact=True)
    adapted = set(state["input_dim"].keys())
    rest = {name for name in weights if name not in adapted and not name.endswith("bias")}

    def kept(tensors: dict[str, torch.Tensor], others: Iterable[torch.Tensor]) -> set[str]:
        found = storage_pointers(others)
        return {name for name, t in tensors.items() if t.untyped_storage().data_ptr() in found}

    def leaves(state: TensorDict) -> Iterable[torch.Tensor]:
        return state.values(include_nested=True, leaves_only=True)

    unchanged = adapted if sampler in ZERO_PRODUCT_SAMPLERS else set()
    assert kept(weights, leaves(state)) == rest | unchanged
    held = dict(state["frozen"].items()) | {
        name: value for name, value in state["trainable"].items() if isinstance(value, torch.Tensor)
    }
    assert kept(held, leaves(rosa_func.resample(state, 1, sampler=sampler))) == rest
    assert kept(held, rosa_func.merge(state).values()) == set(weights) - adapted


# Skeletons.


@pytest.mark.parametrize("name", STOCK_NAMES)
def test_a_skeleton_computes_the_same_bits_without_weights(name):
    case = stock_model(name)
    state = rosa_func.init(case.model, 2)
    skeleton = rosa_func.skeleton(case.model)
    expected = output_of_call(case, state)
    assert torch.equal(output_of_call(ModelCall(skeleton, case.args, case.kwargs), state), expected)
    assert type(skeleton) is type(case.model)
    assert all(p.is_meta for p in skeleton.parameters())
    assert tied_names(skeleton) == tied_names(case.model)
    persistent = set(case.model.state_dict())
    for buffer, tensor in case.model.named_buffers():
        assert skeleton.get_buffer(buffer).is_meta == (buffer in persistent)
        if buffer not in persistent:
            assert torch.equal(skeleton.get_buffer(buffer), tensor)


def test_some_stock_models_have_ties_or_rotary_frequencies():
    # Without them the test above would not show that they are kept.
    assert ["transformer.wte.weight", "lm_head.weight"] in tied_names(
        stock_model("gpt2-small").model
    )
    assert "model.rotary_emb.inv_freq" in dict(stock_model("llama").model.named_buffers())


@pytest.mark.parametrize("name", ["llama", "t5", "encoder", "sequential"])
def test_a_skeleton_moves_and_is_cast_as_a_model(name):
    """`.to("cpu")` said "use to_empty()", which filled Llama's inv_freq with 6.9e-310, silently."""
    case = stock_model(name)
    state = rosa_func.init(case.model, 2)
    expected = output_of_call(case, state)
    skeleton = rosa_func.skeleton(case.model)
    used = ModelCall(skeleton, case.args, case.kwargs)
    for move in (lambda m: m.to("cpu"), lambda m: m.cpu(), lambda m: m.float()):
        assert move(skeleton) is skeleton
        assert torch.equal(output_of_call(used, state), expected)
    before = model_snapshot(case.model)
    with pytest.raises(ValueError, match=r"to_empty would fill its buffers.*model\.to\(device\)"):
        skeleton.to_empty(device="cpu")
    assert torch.equal(output_of_call(used, state), expected)
    wide = copy.deepcopy(skeleton).double()
    assert {p.dtype for p in wide.parameters()} == {torch.float64}
    assert {p.dtype for p in skeleton.parameters()} == {torch.float32}
    args = tuple(x.double() if x.is_floating_point() else x for x in case.args)
    outputs = [
        output_of_call(ModelCall(model, args, case.kwargs), state.double())
        for model in (wide, copy.deepcopy(case.model).double())
    ]
    assert torch.equal(*outputs)
    assert model_snapshot(case.model) == before


@pytest.mark.skipif(torch.__version__ < "2.8", reason="its compiler knows no such parameters")
def test_a_skeleton_says_on_which_device_it_computes(tmp_path):
    """`inputs.to(model.device)` moved them to the meta device, where they lost their values."""
    model = stock_model("llama").model
    skeleton = rosa_func.skeleton(model)
    pickled = pickle.loads(pickle.dumps(skeleton))
    for same in (skeleton, pickled, copy.deepcopy(skeleton), rosa_func.skeleton(skeleton)):
        assert same.device == torch.device("cpu")
        assert all(p.is_meta for p in same.parameters())
    assert skeleton.to("meta").device == torch.device("meta")
    assert all(buffer.is_meta for buffer in skeleton.buffers())
    assert pickled.device == torch.device("cpu")
    assert not any(buffer.is_meta for buffer in pickled.buffers())
    pickled.model.layers.to("meta")  # a part of it
    assert pickled.device == torch.device("cpu")
    assert {p.device.type for p in pickled.model.layers.parameters()} == {"meta"}
    model.save_pretrained(tmp_path)
    loaded, state = rosa_func.init_from(tmp_path, 2)
    assert loaded.device == torch.device("cpu")
    ids = token_ids(2, 6)
    logits = rosa_func.call(loaded, state, ids).logits
    assert torch.equal(rosa_func.call(loaded.to("cpu"), state.to("cpu"), ids).logits, logits)


def test_a_skeleton_without_a_tensor_fails_loudly():
    case = stock_model("gpt2-small")
    state = rosa_func.init(case.model, 2)
    del state["frozen", "transformer.ln_f.bias"]
    skeleton = rosa_func.skeleton(case.model)
    with pytest.raises(KeyError, match=r"transformer\.ln_f\.bias"):
        rosa_func.call(skeleton, state, *case.args, **case.kwargs)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        main_output(skeleton(*case.args, **case.kwargs)).sum().item()  # which some need to notice


@pytest.mark.parametrize("name", ["gpt2-small", "llama", "t5", "sequential"])
def test_no_second_copy_of_a_weight_once_the_model_is_let_go(name):
    model = stock_model(name).model
    state, skeleton = rosa_func.init(model, 2), rosa_func.skeleton(model)
    let_go = [weakref.ref(x) for x in (model, *model.modules(), *model.parameters())]
    adapted = set(state["input_dim"].keys())
    stored = {n: StorageWeakRef(p.untyped_storage()) for n, p in model.named_parameters()}
    del model
    gc.collect()
    assert not any(ref() is not None for ref in let_go)
    assert {n for n, ref in stored.items() if ref.expired()} == adapted
    real = storage_pointers(t for _, t in named_tensors(skeleton) if not t.is_meta)
    assert not real & storage_pointers(state["frozen"].values())


# Defaults.


def test_default_targets_are_the_linear_weights_of_the_backbone():
    tied, untied = stock_model("gpt2-small").model, stock_model("llama").model
    names = [f"transformer.h.0.{m}.weight" for m in ("attn.c_attn", "attn.c_proj", "mlp.c_fc")]
    assert list(rosa_func.init(tied, 2)["trainable"].keys()) == [
        *names,
        "transformer.h.0.mlp.c_proj.weight",
    ]
    adapted = list(rosa_func.init(untied, 2)["trainable"].keys())
    assert "lm_head.weight" not in adapted and len(adapted) == 2 * 7
    with pytest.raises(ValueError, match="'head' in train"):  # pretrained: no task head
        rosa_func.init(untied, 2, train="head")


def tiny_classifier() -> nn.Module:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
    config = BertConfig(vocab_size=31, num_hidden_layers=1, num_labels=3, **shape)
    return seeded(lambda: BertForSequenceClassification(config)).eval()


def test_a_task_head_is_trained_on_request_and_warned_of_when_it_is_not():
    model = tiny_classifier()
    with pytest.warns(UserWarning, match=r'classifier\.weight.*train="head"') as caught:
        state = rosa_func.init(model, 2)
    assert [warning.filename for warning in caught] == [__file__]
    assert not [name for name in state["trainable"].keys() if name.startswith("classifier")]
    state = rosa_func.init(model, 2, train="head")  # warnings are errors
    full = {n for n, v in state["trainable"].items() if isinstance(v, torch.Tensor)}
    assert full == {"classifier.weight", "classifier.bias"}
    rosa_func.init(model, 2, targets=["query", "classifier"])  # adapted: not frozen either


@pytest.mark.parametrize("dtype", SIXTEEN_BIT_DTYPES, ids=str)
@pytest.mark.parametrize("name", ["gpt2-small", "llama", "sequential"])
def test_a_16_bit_model_has_float32_factors_and_16_bit_weights_and_outputs(name, dtype):
    case = stock_model(name, dtype)
    state = rosa_func.init(case.model, 2)
    leaves = rosa_func.parameters(state)
    assert {leaf.dtype for leaf in leaves} == {torch.float32}
    result = output_of_call(case, state)
    assert (
        result.dtype == dtype
        and relative_distance(result, case.own_output()) <= 10 * torch.finfo(dtype).eps
    )
    result.float().square().mean().backward()
    assert {leaf.grad.dtype for leaf in leaves} == {torch.float32}
    merged = rosa_func.merge(state)
    assert all(merged[n].dtype == p.dtype for n, p in case.model.named_parameters())
    assert {weight.dtype for weight in rosa_func.compose(state).values()} == {dtype}


def test_call_takes_inputs_of_any_number_of_dimensions():
    model = nn.Sequential(nn.Embedding(31, 6), nn.Linear(6, 4))
    state = rosa_func.init(model, 2, targets=["0.weight", "1.weight"])
    for shape in [(), (5,), (2, 3), (2, 3, 2), (0, 3)]:
        ids = token_ids(*shape)
        assert rosa_func.call(model, state, ids).shape == (*shape, 4)
        if ids.numel():
            assert equal_up_to_rounding(rosa_func.call(model, state, ids), model(ids))
