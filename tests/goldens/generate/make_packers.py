"""Packs as LLaMA-Factory and axolotl lay them out, of rows that TRL made here.

Their own code packs; their packages are installed without what they depend on, which would replace the peers:

    peers/bin/pip install --no-deps llamafactory==0.9.5 axolotl==0.19.0
"""

import copy
import importlib
import importlib.util
import json
import sys
import types

from transformers import PreTrainedTokenizerFast

from common import write_lines

CUTOFF = 600


def module(name):
    """A module of a package whose `__init__` would import trainers and their dependencies: the packages above it are empty."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        package = ".".join(parts[:i])
        if package not in sys.modules:
            spec = importlib.util.find_spec(package)
            made = types.ModuleType(package)
            made.__path__ = list(spec.submodule_search_locations)
            sys.modules[package] = made
    return importlib.import_module(name)


def sources(root):
    """Conversations that TRL prepared with assistant_only_loss, as ids and labels."""
    rows = []
    for line in (root / "goldens/trl.jsonl").open():
        row = json.loads(line)
        if row["case"] == "qwen2_5/msgs_assistant_only":
            learned = [bool(i % 2) for i, n in enumerate(row["sup_rle"]) for _ in range(n)]
            labels = [token if bit else -100 for token, bit in zip(row["input_ids"], learned)]
            rows.append({"input_ids": row["input_ids"], "labels": labels})
    return [row for row in rows if len(row["input_ids"]) < 250][:7]


def llamafactory(tokenizer, rows, neat):
    supervised = module("llamafactory.data.processor.supervised")

    class Processor(supervised.PackedSupervisedDatasetProcessor):
        """Theirs, of rows that are tokenised already: a prompt is the number of its row."""

        def _encode_data_example(self, prompt, **_):
            row = rows[int(prompt[0]["content"])]
            return list(row["input_ids"]), list(row["labels"])

    settings = types.SimpleNamespace(cutoff_len=CUTOFF, neat_packing=neat)
    processor = Processor(template=None, tokenizer=tokenizer, processor=None, data_args=settings)
    n = len(rows)
    examples = {key: [None] * n for key in ("_system", "_tools", "_images", "_videos", "_audios")}
    examples["_prompt"] = [[{"role": "user", "content": str(i)}] for i in range(n)]
    examples["_response"] = [[{"role": "assistant", "content": ""}]] * n
    columns = processor.preprocess_dataset(examples)
    return [{key: column[i] for key, column in columns.items()} for i in range(len(columns["input_ids"]))]


def axolotl(tokenizer, rows, kind, masked):
    """The batch of one pack of all rows, padded to a multiple of 64."""
    batching = module("axolotl.utils.collators.batching")
    collator = getattr(batching, kind)(tokenizer=tokenizer, pad_to_multiple_of=64, return_tensors="np")
    group = []
    for row in copy.deepcopy(rows):
        row["position_ids"] = list(range(len(row["input_ids"])))
        row.update({"attention_mask": [1] * len(row["input_ids"])} if masked else {})
        group.append(row)
    batch = collator([group])
    return [{key: values[0].tolist() for key, values in batch.items()}]


def golden(peer, settings, rows):
    return [{"peer": peer, "settings": settings, "row": row} for row in rows]


def generate(root):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(root / "tokenizers/qwen2_5/tokenizer.json"), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    rows = sources(root)
    lines = [{"peer": "sources", "rows": rows}]
    lines += golden("llamafactory", "neat_packing", llamafactory(tokenizer, rows, True))
    lines += golden("llamafactory", "packing", llamafactory(tokenizer, rows, False))
    two = rows[:3]
    lines += golden("axolotl", "numbered", axolotl(tokenizer, two, "V2BatchSamplerDataCollatorForSeq2Seq", True))
    lines += golden("axolotl", "mask", axolotl(tokenizer, two, "BatchSamplerDataCollatorForSeq2Seq", True))
    lines += golden("axolotl", "positions", axolotl(tokenizer, two, "BatchSamplerDataCollatorForSeq2Seq", False))
    write_lines(root / "goldens/packers.jsonl", lines)
