"""ROSA with the transformers `Trainer`: resampled by a callback, resumable, exported.

    python examples/trainer.py [--short] [--every STEPS] [--resume] [--cache DIR] [--out DIR]

Adapts the base model of quickstart.py (trained once, and cached) to source code.
"""

import argparse
import importlib.util
import math
from pathlib import Path
from typing import Any

from quickstart import BATCH, RATES, SHORT, TARGETS, Base, Budget, base_and_task, cached_base
from torch import Tensor
from transformers import ProgressCallback, Trainer, TrainingArguments

import rosa_func
from rosa_func.module import RosaModule
from rosa_func.trainer import ResampleCallback


def rows(blocks: Tensor) -> list[dict[str, Tensor]]:
    """Return blocks of tokens as Trainer takes them; the model shifts the labels itself."""
    return [{"input_ids": block, "labels": block} for block in blocks]


class Bar(ProgressCallback):
    """Trainer's progress bar, with the loss, the rate, tokens a second and the cycle."""

    def __init__(self, tokens_a_step: int, every: int) -> None:
        """Remember what a step is made of."""
        super().__init__()
        self.tokens_a_step, self.every = tokens_a_step, every

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show what was logged beside the bar."""
        if self.training_bar is not None and logs and "loss" in logs:
            steps_a_second = self.training_bar.format_dict["rate"] or 0.0
            self.training_bar.set_postfix(
                loss=f"{float(logs['loss']):.3f}",
                rate=f"{float(logs['learning_rate']):.1e}",
                tokens_s=f"{steps_a_second * self.tokens_a_step:.0f}",
                cycle=(state.global_step - 1) // self.every,
            )


def main() -> None:
    """Train, evaluate, export."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a tiny model and a few dozen steps")
    parser.add_argument("--every", type=int, help="steps between two resamples; else each epoch")
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint in --out")
    parser.add_argument("--cache", type=Path, default="runs/quickstart", help="the base model's")
    parser.add_argument("--out", type=Path, default="runs/trainer")
    args = parser.parse_args()
    base, budget = SHORT if args.short else (Base(), Budget())
    model, task = base_and_task(cached_base(base, args.cache), base, budget)

    state = rosa_func.init(model, budget.rank, targets=TARGETS)
    module = RosaModule(model, state)
    has_tensorboard = importlib.util.find_spec("tensorboard") is not None
    arguments = TrainingArguments(
        str(args.out),
        per_device_train_batch_size=BATCH,
        num_train_epochs=budget.epochs,
        learning_rate=RATES["rosa"],
        weight_decay=0.0,  # on A and B it would decay pretrained content
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_steps=10,
        report_to="tensorboard" if has_tensorboard else "none",
    )
    trainer = Trainer(
        module,
        arguments,
        train_dataset=rows(task.train),
        eval_dataset=rows(task.held_out),
        callbacks=[ResampleCallback(args.every)],
    )
    trainer.remove_callback(ProgressCallback)
    every = args.every or math.ceil(len(task.train) / BATCH)
    trainer.add_callback(Bar(BATCH * base.block, every))
    trainer.train(resume_from_checkpoint=args.resume)
    loss = trainer.evaluate()["eval_loss"]
    merged = rosa_func.export.to_module(model, module.state)
    merged.save_pretrained(args.out / "merged")
    print(f"held-out perplexity {math.exp(loss):.2f}; merged model in {args.out / 'merged'}")


if __name__ == "__main__":
    main()
