"""Runs of transformers' Trainer: schedules, accumulation over an epoch's end, clipping and weight decay."""

import tempfile

import torch
from transformers import Trainer, TrainingArguments

from common import write_json
from make_models import MODELS, batches, build, rows_alone, summed_loss, targets

COMMON = dict(
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    num_train_epochs=3,
    learning_rate=2e-3,
    weight_decay=0.1,
    max_grad_norm=1.0,
    adam_beta2=0.99,
)
# Five rows, so two steps an epoch: of two micro-batches, then of one with one row.
RUNS = {
    "linear": dict(lr_scheduler_type="linear", warmup_steps=2),
    "cosine": dict(lr_scheduler_type="cosine", warmup_steps=0.3),
    "constant": dict(lr_scheduler_type="constant", max_grad_norm=4.0),
    "constant_with_warmup": dict(lr_scheduler_type="constant_with_warmup", warmup_steps=3, weight_decay=0.0),
    "max_steps": dict(lr_scheduler_type="cosine", max_steps=5),
}


def rows():
    data = batches()
    return [{key: tensor[0].tolist() for key, tensor in row.items()} for k in ("a", "padded") for row in rows_alone(data[k])]


def collate(features):
    length = max(len(row["input_ids"]) for row in features)
    pad = lambda key, value: torch.tensor([row[key] + [value] * (length - len(row[key])) for row in features])
    return {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100), "attention_mask": pad("attention_mask", 0)}


def run(name, settings):
    model = build(*MODELS[name])
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            output_dir=out,
            use_cpu=True,
            report_to=[],
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            disable_tqdm=True,
            train_sampling_strategy="sequential",
            optim="adamw_torch",
            **{**COMMON, **settings},
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows(), data_collator=collate)
        trainer.train()
    steps = [line for line in trainer.state.log_history if "loss" in line]
    with torch.no_grad():
        data = [{key: torch.tensor([value]) for key, value in row.items()} for row in rows()]
        after = sum(float(summed_loss(model, row)[0]) for row in data) / sum(targets(row) for row in data)
    return {
        "settings": {**COMMON, **settings},
        "losses": [float(line["loss"]) for line in steps],
        "grad_norms": [float(line["grad_norm"]) for line in steps],
        "lrs": [float(line["learning_rate"]) for line in steps],
        "loss_after": after,
    }


def generate(root):
    torch.set_num_threads(1)
    for name in ("llama", "gpt2"):
        golden = {"rows": {key: [row[key] for row in rows()] for key in rows()[0]}} | {kind: run(name, settings) for kind, settings in RUNS.items()}
        write_json(root / "models" / name / "trainer.json", golden, short=True)
