"""A file that an earlier version wrote is read, and means what it meant.

tests/files/state_of_0_1.safetensors was written by rosa_func at commit bcabade, before states had
bases and terms: an exact state of `LayersOfEveryKind` after two cycles of three steps, with the
weights that it merged to and what it computed. With that commit in /tmp/old, and the class below in
layers.py, it was made by PYTHONPATH=/tmp/old and

    import torch, rosa_func
    from layers import IDS, LayersOfEveryKind

    assert rosa_func.__file__.startswith("/tmp/old/")
    torch.manual_seed(0)
    model = LayersOfEveryKind()
    state = rosa_func.init(model, 1, targets=["*experts", "*.weight"], train="norm", exact=True)
    for cycle in range(2):
        optimizer = torch.optim.Adam(rosa_func.parameters(state), 0.01)
        for _ in range(3):
            sum(out.float().square().sum() for out in rosa_func.call(model, state, IDS)).backward()
            optimizer.step()
            optimizer.zero_grad()
        if cycle == 0:
            state = rosa_func.resample(state, 1)
    merged = {name: W.clone() for name, W in rosa_func.merge(state).items()}
    with torch.no_grad():
        outputs = rosa_func.call(model, state, IDS)
    rosa_func.checkpoint.save(
        "state_of_0_1.safetensors", state, merged=merged, outputs=list(outputs), step=6
    )
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

import rosa_func
from models import seeded
from references import relative_distance
from rosa_func.module import RosaModule

FILE = Path(__file__).parent / "files" / "state_of_0_1.safetensors"
IDS = torch.arange(5)
BFLOAT16_EPS = torch.finfo(torch.bfloat16).eps


class LayersOfEveryKind(nn.Module):
    """A layer of each layout, and one in bfloat16. The experts count as one matrix, 2 x 12."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.convolution = nn.Conv2d(1, 2, (1, 2))
        self.linear = nn.Linear(4, 3)
        self.conv1d = Conv1D(4, 3)
        self.experts = nn.Parameter(torch.randn(2, 4, 3))
        self.head = nn.Linear(3, 2).bfloat16()

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(self.embedding(ids)).view(-1, 1, 2, 2)
        x = torch.tanh(self.linear(self.convolution(x).flatten(1)))
        x = (self.conv1d(x) @ self.experts).sum(0)
        return x, self.head(x.bfloat16())


def assert_outputs_are(outputs: tuple[Tensor, Tensor], expected: list[Tensor]) -> None:
    for out, value, eps in zip(outputs, expected, (1e-7, BFLOAT16_EPS), strict=True):
        assert out.dtype == value.dtype
        assert relative_distance(out, value) <= 10 * eps


def test_the_state_is_read_with_all_that_was_saved_beside_it():
    state, extra = rosa_func.checkpoint.load(FILE)
    assert extra.keys() == {"merged", "outputs", "step"} and extra["step"] == 6
    model = LayersOfEveryKind()
    assert extra["merged"].keys() == model.state_dict().keys()
    named = rosa_func.named_parameters(state)
    assert {"norm.weight", "norm.bias", "experts.A", "head.weight.B"} <= named.keys()
    assert named["experts.B"].shape == (1, 12)
    assert rosa_func.count(state).total == sum(p.numel() for p in model.parameters())


def test_the_state_merges_to_the_same_bits():
    state, extra = rosa_func.checkpoint.load(FILE)
    merged = rosa_func.merge(state)
    assert merged.keys() == extra["merged"].keys()
    for name, W in extra["merged"].items():
        assert merged[name].dtype == W.dtype and torch.equal(merged[name], W), name


def test_the_state_computes_what_it_computed():
    state, extra = rosa_func.checkpoint.load(FILE)
    model = seeded(LayersOfEveryKind, 1)  # its own weights are not read
    assert_outputs_are(rosa_func.call(model, state, IDS), extra["outputs"])
    assert_outputs_are(RosaModule(model, state)(IDS), extra["outputs"])
    assert_outputs_are(functional_call(model, extra["merged"], (IDS,)), extra["outputs"])


def test_the_state_trains_and_resamples_and_keeps_its_weights():
    state, extra = rosa_func.checkpoint.load(FILE)
    model = seeded(LayersOfEveryKind, 1)
    new = rosa_func.resample(state, 2)
    assert new["trainable", "experts", "A"].shape == (2, 1)  # one matrix, as before
    for name, W in rosa_func.merge(new).items():
        assert torch.equal(W, extra["merged"][name]), name
    assert_outputs_are(rosa_func.call(model, new, IDS), extra["outputs"])
    optimizer = torch.optim.Adam(rosa_func.parameters(new), 0.01)
    start = [leaf.detach().clone() for leaf in rosa_func.parameters(new)]
    sum(out.float().square().sum() for out in rosa_func.call(model, new, IDS)).backward()
    optimizer.step()
    for leaf, before in zip(rosa_func.parameters(new), start, strict=True):
        assert not torch.equal(leaf, before)


class LayersOf16Bit(nn.Module):
    """A layer in bfloat16, one in float16, and one in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6).bfloat16(), Conv1D(4, 6).half()
        self.third = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x).half()).float())


class TestCompensationIn16Bit:
    """Of 16-bit weights; since then it is kept in eight bits.

    tests/files/state_in_16_bit.safetensors was written by rosa_func at commit 2be407d, as the file
    above, by

        torch.manual_seed(0)
        model, x = LayersOf16Bit(), torch.randn(2, 5).bfloat16()
        state = rosa_func.init(model, 2)
        optimizer = torch.optim.Adam(rosa_func.parameters(state), 0.01)
        for _ in range(3):
            rosa_func.call(model, state, x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        state = rosa_func.resample(state, 1)
        merged = {name: W.clone() for name, W in rosa_func.merge(state).items()}
        rosa_func.checkpoint.save("state_in_16_bit.safetensors", state, merged=merged)
    """

    def test_it_is_read_and_merged_and_resampled_in_its_way(self):
        state, extra = rosa_func.checkpoint.load(FILE.with_name("state_in_16_bit.safetensors"))
        dtypes = {name: lost.dtype for name, lost in state["compensation"].items()}
        assert dtypes == {"first.weight": torch.bfloat16, "second.weight": torch.float16}
        for name, W in rosa_func.merge(state).items():
            assert torch.equal(W, extra["merged"][name]), name
        for key in range(100):
            state = rosa_func.resample(state, key)
        assert {name: lost.dtype for name, lost in state["compensation"].items()} == dtypes
        for name, W in rosa_func.merge(state).items():
            # A hundred roundings move a value by less than the one to its dtype.
            eps = torch.finfo(W.dtype).eps if name in dtypes else 1e-5
            assert relative_distance(W.double(), extra["merged"][name].double()) <= eps

    def test_a_module_of_a_new_state_takes_it(self):
        """Its numbers would else be rounded to codes, and mean another weight."""
        old, _ = rosa_func.checkpoint.load(FILE.with_name("state_in_16_bit.safetensors"))
        model = seeded(LayersOf16Bit)
        new = rosa_func.init(model, 2)
        for given, state in ((old, new), (new, old)):
            module = RosaModule(model, state)
            module.load_state_dict(RosaModule(model, given).state_dict())
            merged = rosa_func.merge(module.state)
            assert all(torch.equal(merged[n], W) for n, W in rosa_func.merge(given).items())
            module.state = state
            merged = rosa_func.merge(module.state)
            assert all(torch.equal(merged[n], W) for n, W in rosa_func.merge(state).items())
