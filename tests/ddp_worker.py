"""What the processes of tests/test_distributed.py do, forked from one, which starts once."""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import rosa_func
from cases import Parts
from forking import in_a_group
from models import seeded, tiny_gpt2, token_ids
from modules import ExpertsInOneProduct
from rosa_func import checkpoint, distributed, samplers, sparse
from rosa_func.module import RosaModule
from rosa_func.samplers import Site
from toys import registered

STEPS, RESAMPLE_AT, RATE = 20, 10, 0.05
TARGETS = ["wte", "c_attn", "c_fc"]


def loss_of(module: torch.nn.Module, ids: Tensor) -> Tensor:
    logits = module(ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def train(rank: int, size: int) -> dict[str, object]:
    """Train on a share of each batch; return the first gradients and the weights after all."""
    decomposed: list[str] = []

    def counting(W: Tensor, r: int, site: Site) -> tuple[Tensor, Tensor]:
        decomposed.append(site.name)
        return samplers.random(W, r, site)

    model = seeded(tiny_gpt2)
    state = rosa_func.init(model, 2, targets=TARGETS, train="ln_f")
    state = sparse.add(state, sparse.support_random(state, {"wte": 0.01, "c_fc": 0.1}, key=0))
    module = RosaModule(model, state)
    wrapped = DistributedDataParallel(module) if size > 1 else module
    optimizer = torch.optim.SGD(module.parameters(), RATE)
    gradients: dict[str, Tensor] = {}
    hashes = []
    for step in range(STEPS):
        if step == RESAMPLE_AT:
            module.resample(step, sampler=counting, optimizer=optimizer)
            hashes.append(distributed.check_equal(module.state))
        ids = token_ids(4, 8, seed=step).tensor_split(size)[rank]
        optimizer.zero_grad()
        loss_of(wrapped, ids).backward()
        if not gradients:
            gradients = {n: p.grad.clone() for n, p in module.named_parameters()}  # type: ignore[union-attr]
        optimizer.step()
        hashes.append(distributed.check_equal(module.state))
    weights = rosa_func.merge(module.state)
    state = module.state.detach()
    return {
        "gradients": gradients,
        "weights": weights,
        "decomposed": decomposed,
        "hashes": hashes,
        "R": {name: state["frozen", name] for name in state["input_dim"].keys()},
    }


def failing(rank: int, donate: bool = False) -> tuple[str, float]:
    """Resample with a sampler that fails on the last process alone.

    Return what is raised, and how far the weights of the state are moved.
    """
    state = rosa_func.init(
        seeded(lambda: torch.nn.Sequential(*[torch.nn.Linear(6, 6) for _ in range(4)])), 2
    )
    before = rosa_func.merge(state)

    def sampler(W: Tensor, r: int, site: Site) -> tuple[Tensor, Tensor]:
        if rank == 1:
            raise ValueError(f"no draw of {site.name}")
        return samplers.random(W, r, site)

    said = "nothing was raised"
    try:
        distributed.resample(state, 1, sampler=sampler, donate=donate)
    except (RuntimeError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"
    after = rosa_func.merge(state)
    return said, max(float((after[name] - W).abs().max()) for name, W in before.items())


def shared_in_one(rank: int) -> str:
    """Donate a state of which one process has a copy; return what is raised."""
    state = rosa_func.init(seeded(lambda: torch.nn.Sequential(torch.nn.Linear(6, 6))), 2)
    copies = [state.copy()] if rank == 0 else []
    try:
        distributed.resample(state, 1, donate=True)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return f"nothing was raised, with {len(copies)} copies"


def not_finite() -> str:
    """Resample a state that trains a bias to infinity; return what is raised."""
    state = rosa_func.init(
        seeded(lambda: torch.nn.Sequential(torch.nn.Linear(6, 6))), 2, train="0.bias"
    )
    state["trainable", "0.bias"][0] = torch.inf
    try:
        distributed.resample(state, 1)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def sent() -> list[str]:
    """Return the dtypes that a resample sends, of a state whose compensation is in float64."""
    kinds = []
    broadcast = dist.broadcast
    model = seeded(lambda: torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)))
    state = rosa_func.init(model.bfloat16(), 2, exact=True)

    def noting(tensor: Tensor, *args: object) -> object:
        kinds.append(str(tensor.dtype))
        return broadcast(tensor, *args)

    dist.broadcast = noting
    try:
        distributed.resample(state, 1)
    finally:
        dist.broadcast = broadcast
    return sorted(set(kinds))


def begun(rank: int) -> dict[str, object]:
    """Begin a sparse part, each process with batches of its own; return what came of it."""
    model = seeded(tiny_gpt2)
    state = rosa_func.init(model, 2, targets=TARGETS)
    looked_at: list[int] = []
    dtypes: list[str] = []
    broadcast = dist.broadcast

    def batches(seed: int) -> Iterator[Tensor]:
        for count in range(2):
            looked_at.append(seed)
            yield token_ids(4, 8, seed=2 * seed + count)

    def noting(tensor: Tensor, *args: object) -> object:
        dtypes.append(str(tensor.dtype))
        return broadcast(tensor, *args)

    dist.broadcast = noting
    try:
        new = distributed.begin(model, state, batches(rank), loss_of, 0.1, across="model")
    finally:
        dist.broadcast = broadcast
    ours = list(looked_at)
    alone = rosa_func.sparse.begin(model, state, batches(0), loss_of, 0.1, across="model")
    try:
        distributed.begin(model, state, [], loss_of, 0.1)
    except (RuntimeError, ValueError) as error:
        failure = f"{type(error).__name__}: {error}"
    return {
        "together": distributed.check_equal(new),
        "alone": checkpoint.digest(alone),
        "looked_at": ours,
        "dtypes": sorted(set(dtypes)),
        "failure": failure,
    }


def unequal(rank: int) -> str:
    state = rosa_func.init(torch.nn.Sequential(torch.nn.Linear(6, 6)), 2, key=rank)
    try:
        distributed.check_equal(state)
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


def of_other_parts() -> list[str]:
    """Return the hashes of a state of many parts, resampled together and alone.

    It has toy parts, a batch of matrices, and a 16-bit bias that is trained in full.
    """
    model = seeded(lambda: torch.nn.Sequential(torch.nn.Linear(6, 5), ExpertsInOneProduct(5, 4)))
    model[0].bias.data = model[0].bias.data.bfloat16()
    with registered():
        state = rosa_func.init(model, 2, targets="*weight", train="0.bias", exact=True)
        state = Parts("int8", "scaled and sparse").put_into(state, exact=True)
        return of_both_resamples(state)


def of_quantised_parts(master: bool | None) -> list[str]:
    """Return the same of a quantised state, whose past products grow where it has no master."""
    model = seeded(lambda: torch.nn.Sequential(torch.nn.Linear(6, 5), ExpertsInOneProduct(5, 4)))
    state = rosa_func.init(model, 2, targets="*weight", quantize="nf4_double", master=master)
    return of_both_resamples(state, samplers.random if master else samplers.additive)


def of_both_resamples(state: TensorDict, sampler: samplers.Sampler = samplers.random) -> list[str]:
    together = distributed.resample(state, 1, sampler=sampler)
    alone = rosa_func.resample(state, 1, sampler=sampler)
    hashes = [distributed.check_equal(together), checkpoint.digest(alone)]
    del together, alone  # they may share what is donated
    donated = distributed.resample(state, 1, sampler=sampler, donate=True)
    return [*hashes, distributed.check_equal(donated)]


def saved(rank: int, folder: Path) -> None:
    results = train(rank, 2) | {"failing": failing(rank), "unequal": unequal(rank)}
    results |= {"failing, donated": failing(rank, True), "shared in one": shared_in_one(rank)}
    results |= {"not_finite": not_finite(), "sent": sent()}
    results["begun"] = begun(rank)
    results["of_other_parts"] = of_other_parts()
    results["quantised"] = [of_quantised_parts(master) for master in (None, True)]
    torch.save(results, folder / f"{rank}.pt")


if __name__ == "__main__":
    in_a_group(saved, Path(sys.argv[1]), "two")
