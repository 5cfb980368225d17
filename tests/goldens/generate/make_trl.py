"""The rows that TRL's SFTTrainer makes of the data sets here: ids and what of them is supervised."""

import json
import random
import tempfile

import datasets
import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer, pack_dataset

from common import SEED, run_lengths, write_json, write_lines
from make_rows import read
from make_templates import freeze_the_clock, source

# The special tokens and the template that each tokenizer is given.
SPEC = {
    "gpt2": dict(bos=None, eos="<|endoftext|>", pad="<|endoftext|>", template=None),
    "llama2": dict(bos="<s>", eos="</s>", pad="<unk>", template=None),
    "qwen2_5": dict(bos=None, eos="<|im_end|>", pad="<|endoftext|>", template="tools.jinja"),
    "llama3_2": dict(bos="<|begin_of_text|>", eos="<|eot_id|>", pad="<|end_of_text|>", template="headers.jinja"),
    "gemma2": dict(bos="<bos>", eos="<eos>", pad="<pad>", template="turns.jinja"),
    "phi3": dict(bos="<s>", eos="<|endoftext|>", pad="<|endoftext|>", template="phi.jinja"),
}
CHATS = [name for name, spec in SPEC.items() if spec["template"]]


def prepare(root, name, rows, training=False, **config):
    """The trainer's own rows of a list of rows."""
    spec = SPEC[name]
    file = root / "tokenizers" / name / "tokenizer.json"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(file), bos_token=spec["bos"], eos_token=spec["eos"], pad_token=spec["pad"]
    )
    if spec["template"]:
        tokenizer.chat_template = source(spec["template"].replace(".jinja", "_training.jinja" if training else ".jinja"))
    tiny = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with tempfile.TemporaryDirectory() as out:
        settings = SFTConfig(output_dir=out, report_to=[], use_cpu=True, bf16=False, **config)
        trainer = SFTTrainer(
            model=LlamaForCausalLM(tiny), args=settings, train_dataset=Dataset.from_list(rows, on_mixed_types="use_json"), processing_class=tokenizer
        )
        return [dict(row) for row in trainer.train_dataset], trainer


def golden(case, src, row):
    """Labels are -100 or the id; they are the masks of the prompt and of what is not the assistant's."""
    ids = row["input_ids"]
    labels = row["labels"]
    assert all(label in (-100, i) for label, i in zip(labels, ids))
    made = {"case": case, "src": src, "input_ids": ids, "sup_rle": run_lengths(label != -100 for label in labels)}
    if "seq_lengths" in row:
        made["seq_lengths"] = row["seq_lengths"]
    return made


def crosses(root, name, row):
    """Whether a token of the whole text has bytes of the prompt and of the completion."""
    read = Tokenizer.from_file(str(root / "tokenizers" / name / "tokenizer.json"))
    cut = len(row["prompt"])
    return any(start < cut < end for start, end in read.encode(row["prompt"] + row["completion"]).offsets)


def one_by_one(root, name, kind, sources, **config):
    """A golden of each row that the trainer keeps. Rows are prepared apart, so that none gets the columns of another."""
    made = []
    for src, row in sources:
        kept, _ = prepare(root, name, [row], **config)
        made += [golden(f"{name}/{kind}", src, one) for one in kept]
        if kept and kind.startswith("pc_text"):
            made[-1]["crosses"] = crosses(root, name, row)
    return made


def text_rows(rows):
    """Strings as they are, and every second one with a prompt that ends in a space and its rejected answer."""
    for i, row in enumerate(rows):
        if i % 2:
            prompt, answer = row["prompt"].rstrip("\n") + " ", row["rejected"].strip()
            yield f"prompt_completion.jsonl:{i}#rejected,prompt_ends_with_space", {"prompt": prompt, "completion": answer}
        else:
            yield f"prompt_completion.jsonl:{i}", {"prompt": row["prompt"], "completion": row["completion"]}


def chat_rows(rows, name):
    for i, row in enumerate(rows):
        if name != "gemma2" or row["messages"][0]["role"] != "system":
            yield f"messages.jsonl:{i}", row["messages"]


def packs(root, room=512):
    """TRL's own packer on lengths that fill its tree."""
    numbers = random.Random(SEED)
    lengths = [min(room, 2 + numbers.randrange(60) * numbers.randrange(16)) for _ in range(2000)]
    rows = Dataset.from_dict({"input_ids": [[0] * length for length in lengths]})
    packed = pack_dataset(rows, room, "bfd", {"batch_size": len(lengths)})
    golden = {"room": room, "lengths": lengths, "seq_lengths": [list(pack) for pack in packed["seq_lengths"]]}
    write_json(root / "goldens/packs.json", golden)


def generate(root):
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    freeze_the_clock()
    texts = list(text_rows(read(root, "prompt_completion.jsonl")))
    chats = read(root, "messages.jsonl")
    made = []
    for name in SPEC:
        rows, _ = prepare(root, name, [row for _, row in texts], max_length=1024)
        assert len(rows) == len(texts)
        for (src, row), kept in zip(texts, rows):
            made.append(golden(f"{name}/pc_text", src, kept) | {"crosses": crosses(root, name, row)})
    for mode in ("keep_start", "keep_end"):
        made += one_by_one(root, "qwen2_5", f"pc_text_trunc128_{mode}", texts, max_length=128, truncation_mode=mode)
    packed, _ = prepare(
        root, "qwen2_5", [row for _, row in texts], max_length=512, packing=True, packing_strategy="bfd"
    )
    made += [golden("qwen2_5/pc_text_pack_bfd", None, row) for row in packed]
    for name in CHATS:
        rows = [(src, {"prompt": m[:-1], "completion": m[-1:]}) for src, m in chat_rows(chats, name)]
        made += one_by_one(root, name, "pc_chat", rows, max_length=1024)
        rows = [(src, {"messages": m}) for src, m in chat_rows(chats, name)]
        made += one_by_one(
            root, name, "msgs_assistant_only", rows, training=True, assistant_only_loss=True, max_length=1024
        )
    rows = [
        (f"messages_tools.jsonl:{i}", {"messages": row["messages"], "tools": json.dumps(row["tools"])})
        for i, row in enumerate(read(root, "messages_tools.jsonl"))
    ]
    made += one_by_one(
        root, "qwen2_5", "tools_assistant_only", rows, training=True, assistant_only_loss=True, max_length=1024
    )
    packs(root)
    write_lines(root / "goldens/trl.jsonl", made)
    write_json(root / "goldens/trl_spec.json", SPEC)
