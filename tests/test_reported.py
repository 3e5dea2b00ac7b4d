"""What public reports have shown, each with a line on what users met."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

import rosa_func
from models import randn, seeded, stock_model, tiny_gpt2, token_ids, two_layers
from modules import Coded, LeavesItsSum
from references import model_snapshot, perturbed, relative_distance, state_bytes
from rosa_func import samplers


@pytest.mark.parametrize("sampler", [samplers.lora, samplers.additive])
@pytest.mark.parametrize("exact", [None, True])
def test_lora_of_a_16_bit_model_keeps_no_compensation_while_nothing_was_lost(sampler, exact):
    """Zeros as large as the weights were kept: 1.49 times peft's memory."""
    model = seeded(tiny_gpt2).to(torch.bfloat16)
    state = rosa_func.init(model, 2, sampler=sampler, exact=exact)
    assert all(not lost.numel() for lost in state["compensation"].values())
    merged = rosa_func.merge(state)
    assert all(torch.equal(merged[name], p) for name, p in model.named_parameters())
    trained = perturbed(state, 1e-3)
    again = rosa_func.resample(trained, 1, sampler=samplers.random)  # and what is lost is kept
    assert all(lost.shape == again["frozen", n].shape for n, lost in again["compensation"].items())
    expected = rosa_func.merge(trained)
    for name, weight in rosa_func.merge(again).items():
        assert torch.equal(weight, expected[name]) or exact is None
        assert relative_distance(weight.float(), expected[name].float()) <= 2**-8


def test_an_embedding_under_autocast_is_as_exact_as_torchs():
    """A and B were multiplied in bfloat16: 2e-3 off."""
    module, ids = seeded(lambda: nn.Embedding(31, 16)), token_ids(4, 5)
    state = perturbed(rosa_func.init(module, 4, targets="weight"))
    expected = torch.nn.functional.embedding(ids, rosa_func.merge(state)["weight"])
    with torch.autocast("cpu", torch.bfloat16):
        result = rosa_func.call(module, state, ids)
    assert result.dtype == torch.float32
    assert relative_distance(result, expected) <= 1e-6


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_an_embedding_bag_that_asks_for_sparse_gradients_trains(mode):
    """The backward pass died on the sparse gradient of a weight that is no leaf."""
    module = seeded(lambda: nn.EmbeddingBag(31, 8, mode=mode, sparse=mode != "max"))
    state, ids = perturbed(rosa_func.init(module, 2, targets="weight")), token_ids(4, 5)
    A, B = rosa_func.parameters(state)
    result = rosa_func.call(module, state, ids)
    result.square().sum().backward()
    W = rosa_func.merge(state)["weight"].requires_grad_()
    expected = torch.nn.functional.embedding_bag(ids, W, mode=mode)
    expected.square().sum().backward()
    assert relative_distance(result, expected) <= 1e-6
    assert relative_distance(A.grad, W.grad @ B.T) <= 1e-5
    assert relative_distance(B.grad, A.T @ W.grad) <= 1e-5


def test_a_rank_may_name_a_tied_weight_by_any_of_its_names():
    """r={"lm_head": ...} was refused: only the first name, wte, was known."""
    model = seeded(tiny_gpt2)
    for name in ("lm_head", "wte", "lm_head.weight", "transformer.wte"):
        state = rosa_func.init(model, {name: 3, "*": 2}, targets=["lm_head", "c_attn"])
        assert state["trainable", "transformer.wte.weight", "A"].shape[1] == 3
        assert state["trainable", "transformer.h.0.attn.c_attn.weight", "A"].shape[1] == 2


def test_a_state_of_several_dtypes_that_was_cast_says_what_to_do():
    """merge said that a compensation was missing, and not that .to(dtype) had made it so."""
    model = two_layers()
    model[0].bfloat16()
    state = rosa_func.init(model, 2)
    with pytest.raises(KeyError, match=r"cannot be cast by \.to\(dtype\): cast the model"):
        rosa_func.merge(state.to(torch.float32))
    whole = rosa_func.init(two_layers().bfloat16(), 2)
    with pytest.raises(ValueError, match=r"was cast to torch\.float32.*cast what it returns"):
        rosa_func.merge(whole.to(torch.float32))  # codes of eight bits, which became numbers
    with pytest.raises(ValueError, match="was cast to"):
        rosa_func.resample(whole.to(torch.bfloat16), 1)
    whole = rosa_func.init(two_layers().bfloat16(), 2, exact=False)
    merged = rosa_func.merge(whole.to(torch.float32))  # none is kept: nothing is wrong
    for name, weight in rosa_func.merge(whole).items():
        assert relative_distance(merged[name], weight.float()) <= 2**-8


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of peft
def test_a_model_with_adapters_of_peft_is_refused():
    """Its lora_A and lora_B were adapted as if they were weights of the model."""
    model = get_peft_model(
        seeded(tiny_gpt2), LoraConfig(target_modules=["c_attn"], r=2, fan_in_fan_out=True)
    )
    before = model_snapshot(model)
    with pytest.raises(TypeError, match=r"c_attn is a layer of peft.*merge_and_unload"):
        rosa_func.init(model, 2)
    assert model_snapshot(model) == before
    rosa_func.init(model.merge_and_unload(), 2)


def test_matrices_that_the_defaults_leave_out_are_named_once():
    """Half of a model stayed frozen without a word."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.normed = weight_norm(nn.Linear(4, 4))
            self.attention = nn.MultiheadAttention(4, 2)
            self.recurrent = nn.LSTM(4, 4)
            self.raw = nn.Parameter(torch.zeros(4, 4))
            self.convolution, self.embedding = nn.Conv1d(4, 4, 1), nn.Embedding(3, 4)

    model = seeded(Mixed)
    with pytest.warns(UserWarning, match="of the backbone: frozen") as caught:
        state = rosa_func.init(model, 2)
    assert [warning.filename for warning in caught] == [__file__]
    text = str(caught[0].message)
    assert "raw" in text and "more" in text
    assert set(state["input_dim"].keys()) == {"linear.weight", "attention.out_proj.weight"}
    rosa_func.init(model, 2, targets=["linear"])  # what is named is all there is to say


def test_what_is_in_train_is_left_out_of_the_default_targets():
    """It was refused as both adapted and trained in full, though no targets were given."""
    state = rosa_func.init(two_layers(), 2, train="2")
    assert list(state["input_dim"].keys()) == ["0.weight"]


def test_full_fine_tuning_is_a_state_too():
    """Its TensorDict had to be put together by hand."""
    model, ids = seeded(tiny_gpt2), token_ids(2, 6)
    state = rosa_func.init(model, targets=(), train="*")
    leaves = rosa_func.parameters(state)
    assert [leaf.shape for leaf in leaves] == [p.shape for p in model.parameters()]
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(group, 0.1) for group in (leaves, list(twin.parameters()))]
    for _ in range(2):
        outputs = rosa_func.call(model, state, ids).logits, twin(ids).logits
        for optimizer, logits in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            logits.square().mean().backward()
            optimizer.step()
    merged = rosa_func.merge(state)
    assert all(torch.equal(merged[name], p) for name, p in twin.named_parameters())
    assert all(
        torch.equal(merged[n], t) for n, t in rosa_func.merge(rosa_func.resample(state, 1)).items()
    )
    with pytest.raises(TypeError, match="r is None: pass the rank of"):
        rosa_func.init(model)
    with pytest.raises(ValueError, match="targets is empty"):
        rosa_func.init(model, targets=())


@pytest.mark.parametrize("name", ["llama", "t5", "vit"])
def test_the_digest_of_a_state_tells_bits_names_and_shapes_apart(name):
    """Users hashed states by hand."""
    digest = rosa_func.checkpoint.digest
    model = stock_model(name).model
    states = [rosa_func.init(model, 2, key=key) for key in (0, 0, 1)]
    one, same, other = map(digest, states)
    assert one == same != other and len(one) == 64
    assert digest(states[0].clone()) == one and state_bytes(states[0])
    moved = states[0].clone()
    leaf = next(iter(moved["frozen"].keys()))
    moved["frozen", leaf] = moved["frozen", leaf].unsqueeze(0)
    assert digest(moved) != one
    assert digest(model.state_dict()) == digest(dict(model.state_dict()))


def test_a_wrong_way_of_giving_a_key_or_a_mask_changes_nothing():
    """Refusals come before anything is drawn or written."""
    model, x = two_layers(), randn(2, 6)
    before = model_snapshot(model)
    for wrong in ({"key": "0"}, {"sampler": "random"}, {"exact": 1}):
        with pytest.raises(TypeError):
            rosa_func.init(model, 2, **wrong)
    assert model_snapshot(model) == before
    assert rosa_func.call(model, rosa_func.init(model, 2), x).shape[0] == 2


def coded_and_dense() -> nn.Sequential:
    """Return two layers of which the first has a weight that is made of two tensors."""
    model = two_layers()
    codes = torch.arange(24).view(4, 6).to(torch.int8)
    model[0].weight = nn.Parameter(Coded(codes, torch.tensor(0.01)), requires_grad=False)
    return model


def test_a_quantised_weight_stays_frozen_and_is_named_where_it_cannot_be_used(tmp_path):
    """Of torchao: "dispatch: attempting to run unimplemented operator", from inside."""
    model, x = coded_and_dense(), randn(3, 6)
    state = rosa_func.init(model, 2, targets="2")
    for same in (state, rosa_func.resample(state, 1)):
        assert relative_distance(rosa_func.call(model, same, x), model(x)) <= 1e-6
    for options in ({}, {"targets": "0"}, {"targets": "2", "train": "0.weight"}):
        with pytest.raises(TypeError, match=r"0\.weight is of type Coded.*it can stay frozen"):
            rosa_func.init(model, 2, **options)
    with pytest.raises(TypeError, match=r"state/frozen/0\.weight is of type Coded.*delta"):
        rosa_func.checkpoint.save(tmp_path / "state.safetensors", state)
    assert not list(tmp_path.iterdir())
    with pytest.raises(TypeError, match=r"0\.weight.* is of type Coded"):
        rosa_func.checkpoint.digest(state)


def test_weights_of_8_bit_layers_of_bitsandbytes_are_refused_at_once():
    """`call` failed with "'Tensor' object has no attribute 'CB'"."""

    class Int8Params(nn.Parameter):
        pass

    model = two_layers()
    model[0].weight = Int8Params(torch.ones(4, 6, dtype=torch.int8), requires_grad=False)
    for targets in (None, "2"):
        with pytest.raises(TypeError, match=r"0\.weight is an Int8Params.*load_in_8bit"):
            rosa_func.init(model, 2, targets=targets)


def test_a_pruned_layer_is_adapted_under_its_mask_and_copied():
    """After a forward pass: "Only Tensors created explicitly by the user support deepcopy"."""
    model, x = two_layers(), randn(3, 6)
    prune.l1_unstructured(model[0], "weight", 0.5)
    mask = model[0].weight_mask
    state = perturbed(rosa_func.init(model, 2, targets=["0.weight_orig", "2"]))
    merged = rosa_func.merge(state)
    first = torch.relu(x @ (merged["0.weight_orig"] * mask).T + merged["0.bias"])
    expected = first @ merged["2.weight"].T + merged["2.bias"]
    assert relative_distance(rosa_func.call(model, state, x), expected) <= 1e-6
    own = model(x)  # computes model[0].weight, with a graph
    skeleton, module = rosa_func.skeleton(model), rosa_func.export.to_module(model, state)
    assert relative_distance(rosa_func.call(skeleton, state, x), expected) <= 1e-6
    assert relative_distance(module(x), expected) <= 1e-6
    assert torch.equal(model(x), own)


def test_a_model_that_keeps_what_it_computed_is_copied():
    """A layer that left a loss in an attribute could have no skeleton."""
    model, x = seeded(lambda: LeavesItsSum(6, 4)), randn(3, 6)
    state = rosa_func.init(model, 2)
    model(x)
    for copied in (rosa_func.skeleton(model), rosa_func.export.to_module(model, state)):
        assert torch.equal(copied.sum, model.sum)
        assert not copied.sum.requires_grad and copied.sum is not model.sum


def test_a_16_bit_embedding_with_sparse_gradients_is_not_trained_in_full():
    """Its float32 master has a dense gradient: torch's error is of layouts, and names nothing."""
    embedding = nn.Embedding(9, 4, sparse=True)
    with pytest.raises(ValueError, match=r"weight is the torch\.bfloat16 .*sparse=False"):
        rosa_func.init(copy.deepcopy(embedding).bfloat16(), targets=(), train="weight")
    state = rosa_func.init(embedding, targets=(), train="weight")  # one of float32 is itself a leaf
    (W,) = rosa_func.parameters(state)
    rosa_func.call(embedding, state, torch.tensor([1, 2])).sum().backward()
    assert W.grad.is_sparse
