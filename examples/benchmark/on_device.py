"""What cuda.py compares on a device: models, ways to train them, and how a step is timed."""

import warnings
from collections.abc import Callable
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import rosa_func
from examples.benchmark.contenders import Contender, adamw, peft


class Size(NamedTuple):
    """A model by its config, and what peft is to adapt of it: all linear layers of the backbone."""

    kind: str
    config: dict[str, Any]
    targets: list[str]


_GPT2 = ["c_attn", "c_proj", "c_fc"]
_LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_DROPOUTS = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS = {
    "gpt2-small": Size("GPT2", _DROPOUTS, _GPT2),
    "gpt2-medium": Size("GPT2", {"n_layer": 24, "n_embd": 1024, "n_head": 16, **_DROPOUTS}, _GPT2),
    "llama-1b": Size(  # as Llama 3.2 1B
        "Llama",
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128_256,
            "tie_word_embeddings": True,
        },
        _LLAMA,
    ),
}
SHORT = {  # in the place of these
    "GPT2": {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 256},
    "Llama": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
    },
}


class Run(NamedTuple):
    """Where and how much to measure."""

    device: torch.device
    rank: int
    batch: tuple[int, int]
    rounds: int
    short: bool

    def wait(self) -> None:
        """Let the device come to the end of what it was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def mark(self) -> Any:
        """Return this moment: that at which the device comes to what it is asked for now."""
        if self.device.type != "cuda":
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        """Return the seconds between two moments that have come."""
        return end - start if isinstance(end, float) else start.elapsed_time(end) / 1e3


def built(name: str, dtype: str, run: Run) -> nn.Module:
    """Build a model with random weights on the device; the global random state is put back."""
    size = MODELS[name]
    changed = SHORT[size.kind] if run.short else {}
    config = getattr(transformers, f"{size.kind}Config")(
        **size.config | changed, bos_token_id=None, eos_token_id=None
    )
    with torch.random.fork_rng(), run.device:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
    return model.to(getattr(torch, dtype)).train()


def full(model: nn.Module, name: str, rank: int) -> Contender:
    """Train every parameter."""
    return Contender(lambda ids: model(ids, use_cache=False).logits, adamw(model.parameters()))


def peft_lora(model: nn.Module, name: str, rank: int) -> Contender:
    """Train LoRA factors on the same weights, with scale alpha / r = 1."""
    size = MODELS[name]
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=size.targets,
        fan_in_fan_out=size.kind == "GPT2",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's own use of transformers
        adapted = peft.get_peft_model(model, config)
    trainable = [p for p in adapted.parameters() if p.requires_grad]
    return Contender(lambda ids: adapted(ids, use_cache=False).logits, adamw(trainable))


def rosa(model: nn.Module, name: str, rank: int) -> Contender:
    """Train ROSA's factors, and let the model go."""
    # By projection, which is drawn sooner: the time of a step does not depend on the draw.
    state = rosa_func.init(model, rank, sampler=rosa_func.samplers.projection, donate=True)
    weightless = rosa_func.skeleton(model)
    return Contender(
        lambda ids: rosa_func.call(weightless, state, ids, use_cache=False).logits,
        adamw(rosa_func.parameters(state)),
    )


def frozen(model: nn.Module, name: str, rank: int) -> Contender:
    """Train nothing: forward, and backward to the inputs, the least that any adapter must do."""
    model.requires_grad_(False)

    def logits(ids: Tensor) -> Tensor:
        embeddings = model.get_input_embeddings()(ids).requires_grad_()
        return model(inputs_embeds=embeddings, use_cache=False).logits

    return Contender(logits, None)


CONTENDERS = {"full": full, "peft": peft_lora, "rosa": rosa, "frozen": frozen}
if peft is None:
    del CONTENDERS["peft"]


def steps(
    contender: Contender,
    loss: Callable[[Tensor, Tensor], Tensor],
    ids: Tensor,
    labels: Tensor,
    run: Run,
    many: int = 3,
) -> dict[str, float]:
    """Take some steps; return the time of one, and of its forward and backward pass."""
    run.wait()
    start, marks = run.mark(), []
    for _ in range(many):
        before = run.mark()
        loss(ids, labels).backward()
        marks.append((before, run.mark()))
        if contender.optimizer:
            contender.optimizer.step()
            contender.optimizer.zero_grad()
    end = run.mark()
    run.wait()
    both = sum(run.between(*pair) for pair in marks)
    return {"step": run.between(start, end) / many, "forward+backward": both / many}


def loss_of(contender: Contender, mode: str, run: Run) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss of the next token as a function of ids and labels, compiled or not."""

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(contender.logits(ids).flatten(0, 1), labels.flatten())

    if mode == "eager":
        return loss
    return torch.compile(loss, backend="aot_eager" if run.short else "inductor")


def tokens(model: nn.Module, run: Run) -> tuple[Tensor, Tensor]:
    """Draw ids, and labels shifted by one."""
    generator = torch.Generator().manual_seed(0)
    size: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
    ids = torch.randint(size, run.batch, generator=generator)
    return ids.to(run.device), F.pad(ids[:, 1:], (0, 1), value=-100).to(run.device)
