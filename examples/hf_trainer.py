"""The Trainer of Hugging Face logs the mean of the losses of steps, and evaluates to the mean of the losses of batches.
A step or a batch of few tokens then counts as much as one of many, and `exp(eval_loss)` is not the perplexity.

python examples/hf_trainer.py
torchrun --nproc-per-node 2 examples/hf_trainer.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from xent_metrics import CrossEntropyReport
from xent_metrics.functional import per_target_losses

EVALUATION = CrossEntropyReport(input="losses", sync_on_compute=False)  # The Trainer gathers from all processes.


def compute_metrics(batch, compute_result: bool) -> dict[str, float]:
    EVALUATION.to(batch.predictions.device).update(batch.predictions, batch.label_ids[:, 1:])
    if not compute_result:  # There are more batches.
        return {}
    values = EVALUATION.compute()
    EVALUATION.reset()
    return {name: values[name].item() for name in ("cross_entropy", "perplexity", "num_tokens")}


class PooledLoss(TrainerCallback):
    """Logs the cross-entropy of all tokens of all processes, after each `loss` of the Trainer."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.report = trainer, CrossEntropyReport(shift=True).to(trainer.args.device)
        trainer.model.register_forward_hook(self.add, with_kwargs=True)

    def add(self, model, args, batch, outputs) -> None:
        if model.training:
            self.report.update(outputs.logits.detach(), batch["labels"])

    def on_log(self, args, state, control, logs, **kwargs) -> None:
        if "loss" in logs:  # On every process, since `compute` adds up over all of them.
            self.trainer.log({"cross_entropy": self.report.compute()["cross_entropy"].item()})
            self.report.reset()


def main() -> Trainer:
    torch.manual_seed(0)
    hard = torch.arange(107)[:, None] % 27 / 27  # Rows of tokens that count up now and then; hard ones are short.
    labels = (torch.rand(107, 33) < hard / 2).long().cumsum(-1).masked_fill(torch.arange(33) > 33 - 32 * hard, -100)
    data = [{"input_ids": row.clamp(min=0), "labels": row} for row in labels]
    model = LlamaForCausalLM(LlamaConfig(vocab_size=33, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    options = {"use_cpu": True, "logging_steps": 5, "learning_rate": 1e-2, "save_strategy": "no", "disable_tqdm": True}
    args = TrainingArguments("runs/hf_trainer", max_steps=15, eval_strategy="epoch", batch_eval_metrics=True, **options)
    trainer = Trainer(model, args, train_dataset=data[:80], eval_dataset=data[80:], compute_metrics=compute_metrics)
    # Of each token its loss is gathered, and not a number for each token of the vocabulary.
    trainer.preprocess_logits_for_metrics = lambda logits, labels: per_target_losses(logits[:, :-1], labels[:, 1:])
    trainer.add_callback(PooledLoss(trainer))
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
