"""Prepares rows, trains one TRL step on them, and shows what differs in TRL's own preparation of the same rows.

    python trl_step.py ROWS.jsonl MODEL
"""

import sys

import datasets
import suasion
from trl import SFTConfig, SFTTrainer

path, model = sys.argv[1:]
args = SFTConfig("/tmp/trl_step", max_steps=1, per_device_train_batch_size=1, max_length=None, report_to=[], use_cpu=True, bf16=False)

ours = suasion.prepare(path, model, max_length=None)
trainer = SFTTrainer(model, args=args, train_dataset=ours.to_datasets(), callbacks=[suasion.VerifyCallback()])
print(ours, "loss", trainer.train().training_loss)

theirs = SFTTrainer(model, args=args, train_dataset=datasets.load_dataset("json", data_files=path, split="train"))
pairs = list(zip(ours, theirs.train_dataset))
for name in "input_ids", "labels":
    print(f"{name}: the same in {sum(a[name] == b[name] for a, b in pairs)} of {len(pairs)} rows")
report = suasion.verify(theirs, source=path)
print(report, *report.errors[:2], report.row(0), sep="\n")
