"""The small stock GPT-2 that the experiments adapt: trained from scratch once, then cached."""

import hashlib
import json
import os
import tomllib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from examples.experiments import corpora
from examples.shared.caching import made_once
from examples.shared.text import in_blocks, rate_at


def settings(name: str) -> dict[str, Any]:
    """Return what bases.toml says of a base."""
    bases = tomllib.loads(Path(__file__).with_name("bases.toml").read_text())
    if name not in bases:
        raise SystemExit(f"bases.toml has no {name!r}; it has {sorted(bases)}")
    return bases[name]


def cached(name: str, data: Path | None, cache: Path) -> Path:
    """Return the directory of a base model and its tokenizer; make it if it is not there."""
    chosen = settings(name)
    texts = corpora.prose(chosen["corpora"], data)
    digest = hashlib.sha256(corpora.END.join(texts).encode())
    digest.update(json.dumps(chosen, sort_keys=True).encode())
    directory = cache / f"{name}-{digest.hexdigest()[:12]}"

    def make(content: Path) -> None:
        tokenizer = corpora.tokenizer(chosen["vocabulary"], data)
        blocks = blocks_of(texts, tokenizer, chosen["block"])
        pretrain(chosen, tokenizer, blocks, name).save_pretrained(content)
        tokenizer.save_pretrained(content)

    return made_once(directory, make)


def blocks_of(texts: list[str], tokenizer: PreTrainedTokenizerFast, block: int) -> Tensor:
    """Return the tokens of all texts in blocks, an end after each text."""
    return in_blocks(tokenizer([text + corpora.END for text in texts]).input_ids, block)


def cached_blocks(
    texts: list[str], tokenizer: PreTrainedTokenizerFast, block: int, cache: Path
) -> Tensor:
    """Return what `blocks_of` does, from a file if it was done before."""
    digest = hashlib.sha256(corpora.END.join(texts).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    path = cache / f"blocks-{block}-{digest.hexdigest()[:12]}.safetensors"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(f".{os.getpid()}.partial")  # a kill leaves no half of a file
        save_file({"blocks": blocks_of(texts, tokenizer, block)}, whole)
        whole.replace(path)
    return load_file(path)["blocks"]


def pretrain(
    chosen: dict[str, Any], tokenizer: PreTrainedTokenizerFast, blocks: Tensor, name: str
) -> GPT2LMHeadModel:
    """Train all parameters of a new model; the last twentieth of the blocks is held out."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=chosen["positions"],
        n_embd=chosen["width"],
        n_layer=chosen["layers"],
        n_head=chosen["heads"],
        initializer_range=chosen["initializer_range"],
        activation_function="gelu_pytorch_tanh",  # GPT-2's own, in one kernel
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_token_id),
    )
    with torch.random.fork_rng(devices=[]):  # the constructor draws from the global generator
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
    generator = torch.Generator().manual_seed(0)
    cut, steps = len(blocks) * 19 // 20, chosen["steps"]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)

    def loss_of(ids: Tensor) -> Tensor:
        logits = model(ids, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    order = torch.randperm(cut, generator=generator)
    for step in (bar := tqdm(range(steps), f"base {name}", unit="step")):
        if len(order) < chosen["batch"]:
            order = torch.randperm(cut, generator=generator)
        rows, order = order[: chosen["batch"]], order[chosen["batch"] :]
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, chosen["rate"], steps // 30, steps)
        loss = loss_of(blocks[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(nll=f"{loss.item():.3f}", refresh=False)
    with torch.no_grad():
        held_out = [loss_of(ids).item() for ids in blocks[cut:].split(chosen["batch"])[:16]]
    print(f"base {name}: held-out NLL {sum(held_out) / max(1, len(held_out)):.3f}", flush=True)
    return model
