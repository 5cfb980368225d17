"""What PEFT, TRL and transformers make of adapters, beside suasion: `adapters.py TASK FOLDER ARGUMENTS..`.

Prints one line `RESULT {json}`.
"""

import json
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)


def rows(path):
    return [json.loads(line) for line in open(path)]


def base(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype="float32")


def losses(model, data):
    """The summed loss of each row."""
    out = []
    for row in data:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        out.append(float(torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum")))
    return out


def mean(model, data):
    count = sum(sum(label != -100 for label in row["labels"][1:]) for row in data)
    return sum(losses(model.eval(), data)) / count


def read(folder, adapter, merged, data):
    """The losses of an adapter of ours over its base, and of a merged model of ours."""
    model = PeftModel.from_pretrained(base(folder), adapter)
    return {"adapter": mean(model, rows(data)), "merged": mean(base(merged), rows(data))}


def loss(folder, data):
    """The loss of a model, or of an adapter that names its base, as transformers and PEFT load it; and the ids of the second row
    by its own tokenizer."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    own = AutoPeftModelForCausalLM if os.path.exists(os.path.join(folder, "adapter_config.json")) else AutoModelForCausalLM
    model = own.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "Three?"}, {"role": "assistant", "content": "<thought>Four."}]
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    return {"loss": mean(model, rows(data)), "ids": ids}


def logits(folder, adapter, data):
    """Logits of the first two rows: of a model, of an adapter over it, and of both merged."""

    def of(model):
        ids = [torch.tensor([row["input_ids"]]) for row in rows(data)[:2]]
        with torch.no_grad():
            return [model.eval()(input_ids=row, use_cache=False).logits[0].tolist() for row in ids]

    if not adapter:
        return {"model": of(base(folder))}
    model = PeftModel.from_pretrained(base(folder), adapter)
    return {"adapter": of(model), "merged": of(model.merge_and_unload())}


def begin(folder, adapter, settings):
    """A new adapter of PEFT."""
    torch.manual_seed(7)
    model = get_peft_model(base(folder), LoraConfig(task_type="CAUSAL_LM", **json.loads(settings)))
    model.save_pretrained(adapter)
    return {}


def collate(features):
    length = max(len(row["input_ids"]) for row in features)
    pad = lambda key, value: torch.tensor([row[key] + [value] * (length - len(row[key])) for row in features])
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in features])
    return {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100), "attention_mask": mask}


def train(folder, adapter, data, trainer, settings, out):
    """A run from an adapter, by transformers' Trainer or TRL's."""
    model = PeftModel.from_pretrained(base(folder), adapter, is_trainable=True)
    common = dict(
        output_dir=out,
        use_cpu=True,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        optim="adamw_torch",
        bf16=False,
        gradient_checkpointing=False,
        **json.loads(settings),
    )
    if trainer == "trl":
        from datasets import Dataset
        from transformers import PreTrainedTokenizerFast
        from trl import SFTConfig, SFTTrainer

        # The rows are tokenised; TRL asks for a tokenizer all the same.
        from tokenizers import Tokenizer, models

        words = {f"<{i}>": i for i in range(128)}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<0>")), pad_token="<0>", eos_token="<2>"
        )
        dataset = Dataset.from_list([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows(data)])
        run = SFTTrainer(
            model=model,
            args=SFTConfig(max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, **common),
            train_dataset=dataset,
            data_collator=collate,
            processing_class=tokenizer,
        )
    else:
        from transformers import Trainer, TrainingArguments

        run = Trainer(model=model, args=TrainingArguments(**common), train_dataset=rows(data), data_collator=collate)
    run.train()
    steps = [line for line in run.state.log_history if "loss" in line]
    return {
        "losses": [float(line["loss"]) for line in steps],
        "grad_norms": [float(line["grad_norm"]) for line in steps],
        "after": mean(model, rows(data)),
    }


TASKS = {"loss": loss, "logits": logits, "read": read, "begin": begin, "train": train}
print("RESULT " + json.dumps(TASKS[sys.argv[1]](*sys.argv[2:])))
