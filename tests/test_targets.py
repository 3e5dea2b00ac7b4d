"""Which weights are adapted at which rank. Bad input is a clear error and changes nothing."""

import re

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import rosa_func
from cases import DTYPES
from models import MOE_BUILDERS, seeded, tiny_gpt2, two_layers
from references import model_snapshot, state_bytes
from rosa_func import samplers
from rosa_func.patterns import rank

ATTENTION = "transformer.h.0.attn.c_attn.weight"
WORDS = "transformer.wte.weight"


def adapted_ranks(model: nn.Module, r=2, **options) -> dict[str, int]:
    """Return the rank of each adapted weight."""
    trainable = rosa_func.init(model, r, sampler=samplers.lora, **options)["trainable"]
    return {n: v["A"].shape[1] for n, v in trainable.items() if not isinstance(v, torch.Tensor)}


def assert_init_refuses(
    error: type[Exception], *parts: str, model: nn.Module | None = None, **options
) -> None:
    """Check init's error, that its message has all parts, and that nothing changed."""
    model = two_layers() if model is None else model
    options = {"r": 2, **options}
    before, generator = model_snapshot(model), torch.get_rng_state()
    with pytest.raises(error) as caught:
        rosa_func.init(model, **options)
    for part in parts:
        assert part in str(caught.value), f"{part!r} is not in {caught.value}"
    assert model_snapshot(model) == before and torch.equal(torch.get_rng_state(), generator)


# Ranks.


@given(m=st.integers(1, 30), n=st.integers(1, 30), fraction=st.floats(0, 1, exclude_max=True))
def test_a_fraction_is_of_the_smaller_side_rounded_down_and_at_least_one(m, n, fraction):
    model = nn.Sequential(nn.Linear(n, m))
    if fraction > 0:
        assert adapted_ranks(model, fraction) == {
            "0.weight": max(1, int(fraction * min(m, n) + 1e-9))
        }


@pytest.mark.parametrize("none", [(), []])
def test_with_no_targets_what_is_in_train_is_all_that_trains(none):
    model = two_layers()
    state = rosa_func.init(model, targets=none, train="*")
    assert set(state["trainable"].keys()) == set(dict(model.named_parameters()))
    assert not state["input_dim"].keys()


def test_the_first_match_of_a_mapping_counts():
    model = seeded(lambda: tiny_gpt2(layers=1))
    ranks = adapted_ranks(model, {"c_attn": 3, "*mlp*": 0.5, "*": 1})
    layer = "transformer.h.0"
    assert ranks == {
        ATTENTION: 3,
        f"{layer}.attn.c_proj.weight": 1,
        f"{layer}.mlp.c_fc.weight": 6,
        f"{layer}.mlp.c_proj.weight": 6,
    }
    assert set(adapted_ranks(model, {"*": 1, "c_attn": 3}).values()) == {1}


@pytest.mark.parametrize(
    "r, error, parts",
    [
        (-3, ValueError, ["at least 0", "-3"]),
        (True, TypeError, ["True", "bool", "int or a fraction"]),
        ("4", TypeError, ["'4'", "str"]),
        (None, TypeError, ["None"]),
        (0.0, ValueError, ["0.0", "(0, 1)"]),
        (1.0, ValueError, ["1.0", "(0, 1)", "pass an int"]),
        (2.5, ValueError, ["2.5", "(0, 1)"]),
        (-0.5, ValueError, ["-0.5", "(0, 1)"]),
        (float("nan"), ValueError, ["nan", "(0, 1)"]),
        (5, ValueError, ["5", "min(4, 6) = 4", "0.weight", "smaller rank"]),
        ({"0.weight": 2}, ValueError, ["2.weight", "'0.weight': 2", "'*'"]),
        ({"0.weight": 2, "*": -1}, ValueError, ["at least 0", "-1"]),
        ({"0.weight": True, "*": 1}, TypeError, ["True", "bool"]),
        ({"0.wieght": 2, "*": 1}, ValueError, ["'0.wieght'", "0.weight"]),
        ({0: 2, "*": 1}, TypeError, ["0", "patterns"]),
        ({}, ValueError, ["0.weight", "'*'"]),
    ],
    ids=repr,
)
def test_ranks_that_are_refused(r, error, parts):
    assert_init_refuses(error, *parts, r=r)
    state = rosa_func.init(two_layers(), 2)
    before = state_bytes(state)
    if r is not None:  # with None, resample keeps the ranks
        with pytest.raises(error) as caught:
            rosa_func.resample(state, 1, r=r)
        assert all(part in str(caught.value) for part in parts)
        assert state_bytes(state) == before


def test_rank_0_adapts_by_no_factors():
    """It is for a sparse part alone; ranks beside it stay."""
    assert adapted_ranks(two_layers(), 0) == {"0.weight": 0, "2.weight": 0}
    assert adapted_ranks(two_layers(), {"0.weight": 2, "*": 0}) == {"0.weight": 2, "2.weight": 0}


def test_a_rank_is_checked_against_each_weight():
    assert_init_refuses(
        ValueError,
        "rank 5",
        "min(5, 4) = 4",
        "1.weight",
        model=nn.Sequential(nn.Linear(8, 8), nn.Linear(4, 5)),
        r=5,
    )


@example(29, 100)
@given(st.integers(1, 99), st.integers(1, 200))
def test_a_decimal_fraction_is_taken_as_written(hundredths, limit):
    """0.29 of 100 is 29, though the float next to 0.29 times 100 is 28.999999999999996."""
    fraction = float(f"0.{hundredths:02}")
    assert rank(fraction, "w", (limit, 500)) == max(1, hundredths * limit // 100)


# Targets.


@pytest.mark.parametrize("targets", ["lm_head", "wte", "lm_head.weight", "*wte*", "lm_*"])
def test_an_alias_means_the_tied_weight(targets):
    assert list(adapted_ranks(seeded(tiny_gpt2), targets=targets)) == [WORDS]


@pytest.mark.parametrize(
    "targets, names",
    [
        ("c_attn", [ATTENTION]),
        (ATTENTION, [ATTENTION]),
        ("*attn.c_proj.weight", ["transformer.h.0.attn.c_proj.weight"]),
        ("attn.c_proj", ["transformer.h.0.attn.c_proj.weight"]),
        ("attn.c_proj.weight", ["transformer.h.0.attn.c_proj.weight"]),
        ("attn.c_*", [ATTENTION, "transformer.h.0.attn.c_proj.weight"]),
        ("attn", [ATTENTION, "transformer.h.0.attn.c_proj.weight"]),
        ("*attn", [ATTENTION, "transformer.h.0.attn.c_proj.weight"]),
        ("h.?.attn", [ATTENTION, "transformer.h.0.attn.c_proj.weight"]),
        ("c_[af]*", [ATTENTION, "transformer.h.0.mlp.c_fc.weight"]),
        ("transformer.h.0.attn.c_proj", ["transformer.h.0.attn.c_proj.weight"]),
        ("*.h.?.attn.c_proj", ["transformer.h.0.attn.c_proj.weight"]),
        (["wpe", "c_attn"], ["transformer.wpe.weight", ATTENTION]),
        ("*c_attn*", [ATTENTION]),  # the bias, a vector, is passed over
        (lambda name, owner: "c_attn" in name, [ATTENTION]),
        (lambda name, owner: owner.__class__ is nn.Embedding, [WORDS, "transformer.wpe.weight"]),
    ],
    ids=[
        "name",
        "full name",
        "glob",
        "path",
        "path of a parameter",
        "glob of a path",
        "module of modules",
        "glob of modules",
        "glob of a layer",
        "glob of letters",
        "full path",
        "glob of paths",
        "list",
        "vectors",
        "predicate of names",
        "and of modules",
    ],
)
def test_which_weights_a_pattern_or_predicate_means(targets, names):
    assert list(adapted_ranks(seeded(lambda: tiny_gpt2(layers=1)), targets=targets)) == names


@pytest.mark.parametrize(
    "options, error, parts",
    [
        ({"targets": "attn.c_atn.weight"}, ValueError, ["names are attn.c_attn.weight,"]),
        ({"targets": "c_attn,c_fc"}, ValueError, ["a list of names, ['c_attn', 'c_fc']"]),
        ({"targets": r".*\.(c_attn|c_fc)"}, ValueError, ["regular expression", "predicate"]),
        ({"targets": r"h\.\d+\.attn"}, ValueError, ["regular expression", "predicate"]),
        ({"targets": ".*c_fc"}, ValueError, ["regular expression", "predicate"]),
        ({"exclude": "c_atn"}, ValueError, ["'c_atn' in exclude", "names are c_attn,"]),
        ({"exclude": "*"}, ValueError, ["exclude leaves nothing", ATTENTION]),
        ({"targets": "wte", "exclude": "lm_head"}, ValueError, ["exclude leaves nothing", WORDS]),
        ({"exclude": 3}, TypeError, ["exclude", "3"]),
        ({"targets": "attention"}, ValueError, ["'attention' in targets", "c_attn"]),
        ({"targets": nn.Linear}, TypeError, ["predicate", "Linear"]),
        ({"sampler": "lora"}, TypeError, ["samplers.random", "'lora'"]),
        ({"targets": "c_atn"}, ValueError, ["'c_atn'", "targets", "c_attn"]),
        ({"targets": "*c_atn.weight"}, ValueError, ["matches no parameter", "c_attn.weight"]),
        ({"targets": ["c_attn", "querry"]}, ValueError, ["'querry'", "closest names"]),
        ({"targets": []}, ValueError, ["targets is empty", "None"]),
        ({"targets": [1]}, TypeError, ["targets", "1", "int"]),
        ({"targets": 3}, TypeError, ["targets", "3"]),
        ({"targets": lambda name, owner: False}, ValueError, ["predicate", "no parameter"]),
        ({"targets": "*bias"}, ValueError, ["'*bias'", "two dimensions", "(36,)", "train="]),
        ({"targets": "ln_f"}, ValueError, ["'ln_f'", "transformer.ln_f.weight", "(12,)"]),
        ({"train": "ln_g"}, ValueError, ["'ln_g'", "train", "ln_f"]),
        ({"train": 3}, TypeError, ["train", "3"]),
        ({"targets": "c_attn", "train": "c_attn"}, ValueError, [ATTENTION, "`targets`", "`train`"]),
        ({"train": "head"}, ValueError, ["'head'", "train"]),
        ({"targets": "wte", "train": "lm_head"}, ValueError, [WORDS, "both"]),
        ({"key": "0"}, TypeError, ["'0'", "str", "key=0"]),
        ({"key": 1.0}, TypeError, ["1.0", "float"]),
        ({"key": True}, TypeError, ["True", "bool"]),
        ({"key": torch.tensor(1)}, TypeError, ["tensor(1)", "Tensor"]),
        ({"exact": 1}, TypeError, ["exact", "1"]),
        ({"exact": "yes"}, TypeError, ["exact", "'yes'"]),
        ({"alpha": 16}, TypeError, ["alpha"]),
    ],
    ids=lambda value: str(value).partition(" at 0x")[0] if isinstance(value, dict) else "",
)
def test_arguments_of_init_that_are_refused(options, error, parts):
    assert_init_refuses(error, *parts, model=seeded(tiny_gpt2), **options)


@pytest.mark.parametrize(
    "pattern", ["atn", "attention", "mpl", "hh", "weights", "attn.c_atn", "h.0.atn.*", "*c_atn"]
)
@pytest.mark.parametrize("argument", ["targets", "r"])
def test_the_names_that_are_suggested_would_match(pattern, argument):
    model = seeded(lambda: tiny_gpt2(layers=1))
    options = {"targets": pattern, "r": 2} if argument == "targets" else {"r": {pattern: 2, "*": 1}}
    with pytest.raises(ValueError, match="closest names are") as caught:
        rosa_func.init(model, **options)
    for name in str(caught.value).partition("names are ")[2].split(", "):
        assert adapted_ranks(model, targets=name)


class Mixed(nn.Module):
    """What a model has matrices in, besides linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict(
            {"out": nn.Linear(4, 4), "self_attn": nn.MultiheadAttention(4, 2)}
        )
        self.lstm = nn.LSTM(4, 4)
        self.out = nn.Linear(4, 4)


@pytest.mark.parametrize(
    "targets, names",
    [
        ("in_proj_weight", ["body.self_attn.in_proj_weight"]),
        ("self_attn", ["body.self_attn.in_proj_weight", "body.self_attn.out_proj.weight"]),
        ("weight_ih_l0", ["lstm.weight_ih_l0"]),
        ("lstm", ["lstm.weight_ih_l0", "lstm.weight_hh_l0"]),
        ("out", ["body.out.weight", "out.weight"]),
        ("out.*", ["body.out.weight", "out.weight"]),
        ("out.weight", ["out.weight"]),
    ],
)
def test_a_name_means_parameters_and_modules_alike(targets, names):
    """ "lstm" and "in_proj_weight" matched nothing; "out" was two modules, and "out.*" one."""
    model = seeded(Mixed)
    assert list(adapted_ranks(model, targets=targets)) == names
    state = rosa_func.init(model, targets=(), train=targets)
    matrices = [name for name, leaf in state["trainable"].items() if leaf.ndim == 2]
    assert sorted(matrices) == sorted(names)
    ranks = adapted_ranks(model, {targets: 1, "*": 2}, targets="*")
    assert sorted(name for name, r in ranks.items() if r == 1) == sorted(names)


@pytest.mark.parametrize("targets", ["gate_up_proj", "experts.gate_up_proj", "*gate_up*"])
def test_a_name_means_the_experts_of_every_layer(targets):
    """The closest names to "gate_up_proj" were said to be v_proj and q_proj."""
    model = seeded(MOE_BUILDERS["mixtral"])
    layers = [f"model.layers.{layer}.mlp.experts" for layer in range(2)]
    state = rosa_func.init(model, 1, sampler=samplers.lora, targets=targets)
    assert list(state["input_dim"].keys()) == [f"{layer}.gate_up_proj" for layer in layers]


def test_all_linear_is_the_default_and_goes_with_others():
    """peft's word for it was taken for a name."""
    model = seeded(tiny_gpt2)
    default = adapted_ranks(model)
    assert adapted_ranks(model, targets="all-linear") == default
    assert adapted_ranks(model, targets=["all-linear", "wpe"]) == {
        **default,
        "transformer.wpe.weight": 2,
    }
    with pytest.warns(UserWarning, match=r"lstm.weight_ih_l0, lstm.weight_hh_l0 of the backbone"):
        adapted_ranks(seeded(Mixed), targets=["all-linear", "in_proj_weight"])


@pytest.mark.parametrize(
    "exclude", ["mlp", "*mlp*", ["c_fc", "mlp.c_proj"], ["mlp", "lm_head", "ln_f"]], ids=str
)
@pytest.mark.parametrize("targets", [None, "h", lambda name, _: ".h." in name and "c_" in name])
def test_what_is_excluded_is_not_adapted(targets, exclude):
    """There was no `exclude_modules`."""
    ranks = adapted_ranks(seeded(tiny_gpt2), targets=targets, exclude=exclude)
    assert ranks == adapted_ranks(seeded(tiny_gpt2), targets="attn")


def test_what_is_excluded_is_not_warned_of_and_may_be_in_train():
    model = seeded(Mixed)
    options = {"exclude": ["lstm", "self_attn"], "train": "lstm"}
    state = rosa_func.init(model, 2, **options)
    assert list(state["input_dim"].keys()) == ["body.out.weight", "out.weight"]
    assert "lstm.weight_ih_l0" in state["trainable"].keys()


def test_a_rank_too_large_for_one_layer_says_how_to_go_on():
    """r=8 failed on a model with a layer of 32 x 7."""
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 7))
    hint = "r={'1.weight': 7, '*': 8}"
    assert_init_refuses(
        ValueError, "min(7, 32) = 7 of 1.weight", hint, "exclude='1.weight'", model=model, r=8
    )
    assert adapted_ranks(model, {"1.weight": 7, "*": 8}) == {"0.weight": 8, "1.weight": 7}
    assert adapted_ranks(model, 8, exclude="1.weight") == {"0.weight": 8}


@pytest.mark.parametrize("first", ["embed", "project"])
def test_a_weight_tied_to_an_embedding_is_not_adapted_by_default(first):
    modules = {"embed": nn.Embedding(9, 6), "project": nn.Linear(6, 9, bias=False)}
    modules["project"].weight = modules["embed"].weight
    model = nn.ModuleDict({first: modules[first], **modules, "own": nn.Linear(6, 6)})
    assert list(adapted_ranks(model)) == ["own.weight"]
    assert list(adapted_ranks(model, targets="project")) == [f"{first}.weight"]


def test_arguments_in_the_wrong_places_are_refused():
    model = two_layers()
    state = rosa_func.init(model, 2)
    with pytest.raises(TypeError, match=r"the model is an nn\.Module, got TensorDict"):
        rosa_func.init(state, 2)
    for use in (
        lambda: rosa_func.call(state, model, torch.ones(2, 6)),
        lambda: rosa_func.merge(model),
        lambda: rosa_func.count(model),
        lambda: rosa_func.parameters(model),
        lambda: rosa_func.resample({}, 1),
    ):
        with pytest.raises(TypeError, match="the state is a TensorDict, got"):
            use()
    with pytest.raises(TypeError, match=r"a sampler is a function .* got 'lora'"):
        rosa_func.resample(state, 1, sampler="lora")


def test_a_model_without_a_weight_to_adapt_is_refused():
    assert_init_refuses(
        ValueError, "Sequential", "no nn.Linear or Conv1D", "targets=", model=nn.Sequential()
    )
    assert_init_refuses(ValueError, "LayerNorm", "targets=", model=nn.LayerNorm(3))


# Weights.


def two_layers_with(name: str, value: torch.Tensor) -> nn.Module:
    model = two_layers()
    layer, parameter = name.split(".")
    setattr(model[int(layer)], parameter, nn.Parameter(value, requires_grad=False))
    return model


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_that_are_not_finite_are_refused(bad, dtype):
    weight = torch.ones(8, 4, dtype=dtype)
    weight[3, 2] = bad
    assert_init_refuses(
        ValueError, "2.weight", "non-finite", model=two_layers_with("2.weight", weight)
    )
    options = {"targets": "0.weight", "train": "2.weight"}
    assert_init_refuses(
        ValueError, "2.weight", "non-finite", model=two_layers_with("2.weight", weight), **options
    )
    model = two_layers()
    state = rosa_func.init(model, 2)
    state["trainable", "2.weight", "A"][0, 0] = bad  # as after too large a step
    with pytest.raises(ValueError, match=r"^2\.weight: non-finite values.*learning rate"):
        rosa_func.resample(state, 1)
    state = rosa_func.init(model, 2, targets="0", train="2")
    state["trainable", "2.weight"][0, 0] = bad
    with pytest.raises(ValueError, match=r"^2\.weight: non-finite values"):
        rosa_func.resample(state, 1)
    # A weight that is neither adapted nor trained may be anything.
    assert adapted_ranks(two_layers_with("2.weight", weight), targets="0.weight")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_finite_weights_whose_sum_overflows_are_taken(dtype):
    weight = torch.full((8, 4), torch.finfo(dtype).max, dtype=dtype)
    assert not weight.sum().isfinite()
    options = {"targets": "2.weight", "sampler": samplers.lora}
    state = rosa_func.init(two_layers_with("2.weight", weight), 2, **options)
    assert torch.equal(rosa_func.merge(state)["2.weight"], weight)


def test_all_weights_that_are_not_finite_are_named():
    model = two_layers()
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
        model[2].weight.fill_(float("nan"))
    assert_init_refuses(ValueError, "0.weight, 2.weight: non-finite", model=model)
    options = {"targets": "2.weight", "train": "0.*"}
    assert_init_refuses(ValueError, "2.weight, 0.weight: non-finite", model=model, **options)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.complex64, torch.float8_e4m3fn])
@pytest.mark.parametrize("argument", ["targets", "train"])
def test_weights_of_a_dtype_that_cannot_be_trained_are_refused(dtype, argument):
    model = two_layers_with("2.weight", torch.ones(8, 4).to(dtype))
    options = {"targets": "2.weight"} if argument == "targets" else {"targets": "0.weight"}
    options |= {"train": "2.weight"} if argument == "train" else {}
    assert_init_refuses(TypeError, "2.weight", str(dtype), "float32", model=model, **options)
    assert adapted_ranks(model, targets="0.weight") == {"0.weight": 2}


def test_meta_weights_and_empty_weights_are_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(ValueError, match=r"0\.weight.*meta device.*load"):
        rosa_func.init(model, 2)
    with pytest.raises(ValueError, match=r"0\.weight.*meta device"):
        rosa_func.init(rosa_func.skeleton(two_layers()), 2)
    assert_init_refuses(
        ValueError, "2.weight", "(0, 4)", model=two_layers_with("2.weight", torch.ones(0, 4))
    )


def test_weights_too_large_for_their_norms_are_refused():
    model = two_layers_with("2.weight", torch.full((8, 4), 1e30))
    assert_init_refuses(
        ValueError, "2.weight", "not finite", "1e+30", model=model, sampler=samplers.projection
    )


def test_a_sampler_whose_factors_are_not_finite_is_refused():
    def broken(W, r, site):
        return W.new_full((W.shape[0], r), float("nan")), W.new_zeros(r, W.shape[1])

    assert_init_refuses(ValueError, "0.weight", "factors", "not finite", sampler=broken)


def test_a_residual_beyond_float16_is_refused():
    W = torch.full((8, 4), 6e4).half()
    W[0, 0] = -W[0, 0]

    def far(W, r, site):
        return torch.full((W.shape[0], 1), 250.0), torch.full((1, W.shape[1]), 250.0)

    assert_init_refuses(
        ValueError, "2.weight", "65504", model=two_layers_with("2.weight", W), r=1, sampler=far
    )


@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_with_max_norm_are_refused(layer):
    model = nn.ModuleDict({"words": layer(9, 6, max_norm=1.5), "out": nn.Linear(6, 4)})
    assert_init_refuses(ValueError, "words", "max_norm=1.5", "max_norm=None", model=model)


def test_a_decomposition_that_does_not_converge_is_named(monkeypatch):
    def eigh(*_args, **_kwargs):
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    state = rosa_func.init(two_layers(), 2)
    before = state_bytes(state)
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    assert_init_refuses(ValueError, "0.weight", "did not converge")
    with pytest.raises(ValueError, match=r"0\.weight did not converge"):
        rosa_func.resample(state, 1)
    assert state_bytes(state) == before


# States.


@pytest.mark.parametrize("key", ["1", 1.0, None, True, torch.tensor(1)], ids=repr)
def test_keys_of_resample_that_are_refused(key):
    state = rosa_func.init(two_layers(), 2)
    before = state_bytes(state)
    with pytest.raises(TypeError, match=re.escape(repr(key))):
        rosa_func.resample(state, key)
    assert state_bytes(state) == before


def test_unknown_arguments_are_refused():
    state = rosa_func.init(two_layers(), 2)
    with pytest.raises(TypeError, match="rank"):
        rosa_func.resample(state, 1, rank=2)
    with pytest.raises(TypeError, match="strict"):
        rosa_func.merge(state, strict=False)
    with pytest.raises(TypeError, match="alpha"):
        rosa_func.method(2, alpha=16)
