"""Sequences that count, and a small GPT-2 that has learned to count by ones."""

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import rosa_func

NUMBERS, LENGTH = 64, 32  # the vocabulary; the tokens of a sequence


def sequences(by: Tensor | int, rows: int, seed: int) -> Tensor:
    """Return rows that count by a step, or each by its own, from random starts: rows x LENGTH."""
    starts = torch.randint(NUMBERS, (rows, 1), generator=torch.Generator().manual_seed(seed))
    return (starts + torch.as_tensor(by).view(-1, 1) * torch.arange(LENGTH)) % NUMBERS


def loss(model: GPT2LMHeadModel, state: TensorDict, ids: Tensor) -> Tensor:
    """Return the mean loss of the next number, of rows x tokens or of a single row."""
    ids = ids if ids.ndim == 2 else ids.unsqueeze(0)
    logits = rosa_func.call(model, state, ids, use_cache=False).logits
    return loss_of(logits, ids)


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the mean loss of the next number by the logits of a model."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def counter(width: int = 64, layers: int = 2, steps: int = 150) -> GPT2LMHeadModel:
    """Train all of a small GPT-2, for some seconds, to count by ones."""
    config = GPT2Config(
        vocab_size=NUMBERS,
        n_positions=LENGTH,
        n_embd=width,
        n_layer=layers,
        n_head=4,
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), 0),
    )
    with torch.random.fork_rng(devices=[]):  # the constructor draws from the global generator
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).eval()
    model.set_attn_implementation("eager")  # fused attention is slow under vmap, and torch warns
    state = rosa_func.init(model, targets=(), train="*")
    optimizer = torch.optim.AdamW(rosa_func.parameters(state), 3e-3, weight_decay=0.0)
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, state, sequences(1, 16, step)).backward()
        optimizer.step()
    return rosa_func.export.to_module(model, state)
