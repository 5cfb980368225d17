#!/usr/bin/env python3
"""The commands of docs/tutorial.md, run one after the other: a base model from nothing, a LoRA over it, and the evidence.

    benches/tutorial.py --material ../shared/material/datasets --work /tmp/tutorial [--binary target/release/suasion]

Needs `pip install tokenizers`, and the corpora under the names in the material: cmv_threads.jsonl, p4g_messages.jsonl,
ukp_convarg_pairs.jsonl. Prints each command with what it prints and how long it took.
The figures are appended to benches/results/tutorial.jsonl. No text of the corpora is kept outside the work folder.
"""

import argparse
import json
import os
import pathlib
import resource
import shlex
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 4096, "hidden_size": 192,
    "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "hidden_act": "silu",
    "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0, "dtype": "bfloat16",
}  # fmt: skip
# Topics of arguments that no model sees in training.
HELD_OUT = ["atheism", "school uniform", "spanking", "bottles"]


def rows(path):
    with open(path) as lines:
        return [json.loads(line) for line in lines]


def write(path, lines):
    with open(path, "w") as out:
        out.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    print(f"wrote {path}: {len(lines)} rows")


def base_texts(material):
    """Plain texts for the base model: nothing of the threads and topics that are held out."""
    held_out = {row["thread"] for name in ("rows.test.jsonl", "pairs.test.jsonl") for row in rows(name)}
    texts = []
    for thread in rows(material / "cmv_threads.jsonl"):
        if thread["id"] not in held_out:
            texts += [thread["op"].split("\n_____")[0], *(reply["text"] for reply in thread["replies"])]
    for dialogue in rows(material / "p4g_messages.jsonl"):
        texts.append("\n".join(message["content"] for message in dialogue["messages"]))
    pairs = rows(material / "ukp_convarg_pairs.jsonl")
    test = [pair for pair in pairs if any(topic in pair["prompt"].lower() for topic in HELD_OUT)]
    train = [pair for pair in pairs if pair not in test]
    texts += [pair[side] for pair in train for side in ("chosen", "rejected")]
    write("text.jsonl", [{"text": text} for text in dict.fromkeys(texts)])
    write("arguments.jsonl", test[:: max(1, len(test) // 300)])


def tokenizer():
    """A byte-level BPE of the texts, and the configuration of a small model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"], special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator((row["text"] for row in rows("text.jsonl")), trainer)
    folder = pathlib.Path("new")
    folder.mkdir(exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    print(f"wrote new: a vocabulary of {bpe.get_vocab_size()}")


def commands(material):
    """What is run, in this order: command lines, and steps of this file."""
    cmv = shlex.quote(str(material / "cmv_threads.jsonl"))
    return [
        f"suasion convert --from cmv {cmv} -o rows.jsonl --split 0.3",
        f"suasion convert --from cmv {cmv} -o pairs.jsonl --split 0.3 --pairs",
        lambda: base_texts(material),
        tokenizer,
        "suasion train -D text.jsonl -M new -o base --init random --completion_only_loss false --packing --max_length 512"
        " --num_train_epochs 4 --per_device_train_batch_size 4 --learning_rate 2e-3 --lr_scheduler_type cosine --warmup_ratio 0.05"
        " --weight_decay 0.1 --eval_fraction 0.02 --eval_strategy epoch --save_steps 400 --save_total_limit 1",
        "suasion verify -D rows.jsonl -M base --rows 0",
        "suasion eval -D rows.test.jsonl -M base",
        "suasion eval -D pairs.test.jsonl -M base --pairs",
        "suasion eval -D arguments.jsonl -M base --pairs",
        "suasion train -D rows.jsonl -M base -o lora --use_peft --lora_target_modules all-linear --lora_r 8"
        " --eval_dataset_name rows.test.jsonl --eval_strategy epoch --save_strategy epoch --load_best_model_at_end"
        " --num_train_epochs 4 --per_device_train_batch_size 4 --learning_rate 1e-3",
        "suasion eval -D rows.test.jsonl -M base --adapter lora",
        "suasion eval -D pairs.test.jsonl -M base --adapter lora --pairs",
        "suasion eval -D arguments.jsonl -M base --adapter lora --pairs",
        "suasion merge -M base --adapter lora -o merged",
        "suasion eval -D rows.test.jsonl -M merged",
        "suasion diagnose --base base --tuned merged -D rows.jsonl",
        "suasion generate -M merged --json --prompt"
        " $'[SYSTEM] Be honest.\\n[CONTEXT] CMV: Rain is best\\n\\nI like rain.\\n[TASK] Reply to the view.\\n[RESPONSE]'",
    ]


def cpu():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--material", required=True, type=pathlib.Path)
    parser.add_argument("--work", required=True, type=pathlib.Path)
    parser.add_argument("--binary", default=ROOT / "target/release/suasion", type=pathlib.Path)
    parser.add_argument("--from-step", type=int, default=0, help="go on in the work folder from this step (from 0)")
    args = parser.parse_args()
    material, binary = args.material.resolve(), args.binary.resolve()
    if args.from_step == 0:
        shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True, exist_ok=True)
    os.chdir(args.work)
    results = ROOT / "benches/results/tutorial.jsonl"
    began = time.monotonic()
    for step, command in enumerate(commands(material)):
        if step < args.from_step:
            continue
        started, used = time.monotonic(), cpu()
        if callable(command):
            command()
            continue
        print(f"\n$ {command}", flush=True)
        shown = command.replace("suasion", shlex.quote(str(binary)), 1)
        ran = subprocess.run(["bash", "-c", shown], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        # Progress lines but the last few say nothing new.
        notes = ran.stderr.splitlines()
        print("\n".join(notes if len(notes) < 24 else [*notes[:12], "…", *notes[-10:]]))
        if "generate" not in command:
            print(ran.stdout, end="")
        else:
            reply = json.loads(ran.stdout.splitlines()[0])
            print({key: value for key, value in reply.items() if key not in ("text", "prompt", "ids")})
        seconds = time.monotonic() - started
        print(f"# exit {ran.returncode} after {seconds:.1f} s, {cpu() - used:.1f} s of CPU time", flush=True)
        if ran.returncode != 0:
            sys.exit(1)
        with open(results, "a") as out:
            line = {"step": step, "command": command.replace(str(material), "MATERIAL"), "seconds": round(seconds, 1), "cpu": round(cpu() - used, 1)}
            out.write(json.dumps(line) + "\n")
    print(f"\n{time.monotonic() - began:.0f} s in all, {cpu():.0f} s of CPU time")


main()
