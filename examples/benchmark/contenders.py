"""What the benchmarks compare, at what size, and how it takes times."""

import gc
import warnings
from collections.abc import Callable, Iterable
from time import perf_counter, process_time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

import rosa_func

try:  # every process imports it, so that the memory of each includes the same libraries
    import peft
except ImportError:
    peft = None

Work = Callable[[], dict[str, float]]
Batch = tuple[int, int]  # sequences, tokens of each
Times = dict[str, dict[str, list[float]]]  # who, what, one value a round


class Settings(NamedTuple):
    """The size of a run."""

    model: dict[str, int]  # of GPT2Config
    ranks: tuple[int, ...]
    batches: tuple[Batch, ...]
    rounds: int
    warmup: int  # rounds that do not count
    repeats: int  # processes for each figure of memory
    growth_model: dict[str, int]
    widths: tuple[int, ...]
    growth_ranks: tuple[int, ...]  # at the width of `growth_width`
    growth_width: int
    short: bool = False


FULL = Settings(
    model={},  # GPT-2 small is the default
    ranks=(16, 64, 256),
    batches=((4, 128), (2, 512)),
    rounds=9,
    warmup=2,
    repeats=3,
    growth_model={"n_layer": 2, "vocab_size": 1000},
    widths=(256, 512, 768, 1024, 1280, 1600),
    growth_ranks=(4, 8, 16, 32, 64, 128, 256, 512),
    growth_width=768,
)

TINY = Settings(
    model={"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 512},
    ranks=(4, 8),
    batches=((2, 32), (1, 64)),
    rounds=3,
    warmup=1,
    repeats=1,
    growth_model={"n_layer": 1, "vocab_size": 512},
    widths=(64, 128, 192),
    growth_ranks=(4, 16, 64),
    growth_width=64,
    short=True,
)


class Contender(NamedTuple):
    """A way to train: from ids to logits, and what updates the weights."""

    logits: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer | None


def gpt2_config(sizes: dict[str, int]) -> GPT2Config:
    """Configure GPT-2, without dropout, whose random masks would be timed."""
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    # The ids of special tokens lie outside a small vocabulary, and nothing here uses them.
    return GPT2Config(**sizes, **dropouts, bos_token_id=None, eos_token_id=None)


def gpt2(sizes: dict[str, int]) -> GPT2LMHeadModel:
    """Build a stock GPT-2 with random weights; the global random state is put back."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(gpt2_config(sizes))


def adamw(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Make the optimizer of every contender: torch's default AdamW, at a rate that hardly moves."""
    return torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0)


def full(model: nn.Module, rank: int) -> Contender:
    """Train every parameter."""
    return Contender(lambda ids: model(ids, use_cache=False).logits, adamw(model.parameters()))


def peft_lora(model: nn.Module, rank: int) -> Contender:
    """Train LoRA factors on the same weights, with scale alpha / r = 1."""
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's own use of transformers
        adapted = peft.get_peft_model(model, config)
    trainable = [p for p in adapted.parameters() if p.requires_grad]
    return Contender(lambda ids: adapted(ids, use_cache=False).logits, adamw(trainable))


def rosa(model: nn.Module, rank: int) -> Contender:
    """Train ROSA's factors, and let the model go."""
    return rosa_of(rosa_func.skeleton(model), rosa_func.init(model, rank))


def rosa_of(model: nn.Module, state: TensorDict) -> Contender:
    """Train the factors of a given state."""
    return Contender(
        lambda ids: rosa_func.call(model, state, ids, use_cache=False).logits,
        adamw(rosa_func.parameters(state)),
    )


def frozen(model: nn.Module, rank: int) -> Contender:
    """Train nothing: forward, and backward to the inputs, the least that any adapter must do."""
    model.requires_grad_(False)

    def logits(ids: Tensor) -> Tensor:
        embeddings = model.transformer.wte(ids).requires_grad_()
        return model(inputs_embeds=embeddings, use_cache=False).logits

    return Contender(logits, None)


CONTENDERS = {"full": full, "peft": peft_lora, "rosa": rosa, "frozen": frozen}
if peft is None:
    del CONTENDERS["peft"]


def trainable_values(contender: Contender) -> int:
    """Count the values that train."""
    groups = contender.optimizer.param_groups if contender.optimizer else []
    return sum(p.numel() for group in groups for p in group["params"])


def tokens(config: GPT2Config, size: Batch) -> tuple[Tensor, Tensor]:
    """Draw ids, and labels shifted by one (so that the logits need no shifted copy)."""
    ids = torch.randint(config.vocab_size, size, generator=torch.Generator().manual_seed(0))
    return ids, F.pad(ids[:, 1:], (0, 1), value=-100)


def train_step(contender: Contender, ids: Tensor, labels: Tensor) -> dict[str, float]:
    """Run and time one step: zero_grad, forward, backward, AdamW."""
    start = perf_counter()
    if contender.optimizer:
        contender.optimizer.zero_grad()
    forward = perf_counter()
    logits = contender.logits(ids)
    F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    end = perf_counter()
    if contender.optimizer:
        contender.optimizer.step()
    return {"forward+backward": end - forward, "step": perf_counter() - start}


def timed(work: Callable[[], object]) -> dict[str, float]:
    """Run and time anything else."""
    start = perf_counter()
    work()
    return {"seconds": perf_counter() - start}


def clocked(work: Callable[[], object]) -> dict[str, float]:
    """Run and time it without the garbage collector; the processor time is that of all threads."""
    gc.disable()
    try:
        start, processor = perf_counter(), process_time()
        result = work()
        times = {"seconds": perf_counter() - start, "processor": process_time() - processor}
        del result  # to free it is not timed
    finally:
        gc.enable()
    return times


def interleave(work: dict[str, Work], rounds: int, warmup: int, label: str) -> Times:
    """Run everything once a round, each round starting with another, every other one backwards."""
    names = list(work)
    times: Times = {name: {} for name in names}
    total = (warmup + rounds) * len(names)
    with tqdm(total=total, desc=label, unit="run", leave=False) as bar:
        for turn in range(-warmup, rounds):
            first = turn % len(names)
            order = names[first:] + names[:first]
            for name in reversed(order) if turn % 2 else order:
                for what, value in work[name]().items():
                    if turn >= 0:
                        times[name].setdefault(what, []).append(value)
                bar.update()
    return times
