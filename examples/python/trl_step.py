"""Prepares rows, trains one TRL step on them, and verifies what TRL makes of the same rows itself.

    python trl_step.py ROWS.jsonl MODEL
"""

import sys

import datasets
import suasion
from trl import SFTConfig, SFTTrainer

path, model = sys.argv[1:]
config = dict(output_dir="/tmp/trl_step", max_steps=1, per_device_train_batch_size=1, max_length=8192, report_to=[], use_cpu=True, bf16=False)

ours = suasion.prepare(path, model, max_length=8192)
trainer = SFTTrainer(model, args=SFTConfig(**config), train_dataset=ours.to_datasets(), callbacks=[suasion.VerifyCallback()])
print(ours, "loss", trainer.train().training_loss)

theirs = SFTTrainer(model, args=SFTConfig(**config), train_dataset=datasets.load_dataset("json", data_files=path, split="train"))
report = suasion.verify(theirs)
print(report, report.shares, sep="\n")
for name, row in ("suasion", suasion.verify(ours, model).row(0)), ("TRL", report.row(0)):
    print(f"\n{name}: row 0\n{row}")
