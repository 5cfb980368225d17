#!/usr/bin/env python3
"""Memory and speed of a LoRA step over a bf16 model of Qwen2.5-1.5B's shape.

Writes the model with random weights (3.1 GB) and rows of random tokens, trains under a limit on anonymous memory, and prints
the peaks and seconds per step:

    python3 benches/adapter_memory.py --binary target/release/suasion --work /tmp/adapter

No package beside Python's own and numpy is needed. Peak RSS counts the mapped pages of the base that were touched, which the system
can take back; anonymous memory is what the process cannot do without.
"""

import argparse
import json
import os
import pathlib
import resource
import shutil
import struct
import subprocess
import threading
import time

import numpy as np

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
}


def tensors():
    h, m, kv = CONFIG["hidden_size"], CONFIG["intermediate_size"], 256
    yield "model.embed_tokens.weight", [CONFIG["vocab_size"], h]
    for n in range(CONFIG["num_hidden_layers"]):
        layer = f"model.layers.{n}."
        for name, out, inputs in [
            ("self_attn.q_proj", h, h),
            ("self_attn.k_proj", kv, h),
            ("self_attn.v_proj", kv, h),
            ("self_attn.o_proj", h, h),
            ("mlp.gate_proj", m, h),
            ("mlp.up_proj", m, h),
            ("mlp.down_proj", h, m),
        ]:
            yield f"{layer}{name}.weight", [out, inputs]
            if name[-6] in "qkv" and name != "self_attn.o_proj":
                yield f"{layer}{name}.bias", [out]
        yield f"{layer}input_layernorm.weight", [h]
        yield f"{layer}post_attention_layernorm.weight", [h]
    yield "model.norm.weight", [h]


def write_model(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensors():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.default_rng(0)
    with open(folder / "model.safetensors", "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tensors():
            if "norm" in name:
                values = np.ones(shape, dtype=np.float32)
            else:
                values = random.standard_normal(shape, dtype=np.float32) * 0.02
            out.write((values.reshape(-1).view(np.uint32) >> 16).astype("<u2").tobytes())


def write_rows(path, rows, length):
    random = np.random.default_rng(1)
    with open(path, "w") as out:
        for _ in range(rows):
            ids = random.integers(0, 150000, length).tolist()
            labels = [-100] * (length * 4 // 5) + ids[length * 4 // 5 :]
            out.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")


def watch(pid, peaks, stop):
    while not stop.is_set():
        try:
            for line in open(f"/proc/{pid}/status"):
                if line.startswith(("RssAnon", "RssFile", "VmRSS")):
                    name, value = line.split(":")
                    peaks[name] = max(peaks.get(name, 0), int(value.split()[0]))
        except OSError:
            return
        time.sleep(0.05)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--binary", required=True)
    parser.add_argument("--work", required=True, type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rows", type=int, default=2, help="rows of a step")
    parser.add_argument("--limit-gib", type=float, default=8, help="limit on data memory (RLIMIT_DATA: all but mapped files)")
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    model, rows = args.work / "model", args.work / "rows.jsonl"
    if not (model / "model.safetensors").exists():
        write_model(model)
    write_rows(rows, args.rows * args.steps, args.tokens)
    shutil.rmtree(args.work / "out", ignore_errors=True)
    command = [args.binary, "train", "--model", str(model), "--data", str(rows), "-o", str(args.work / "out")]
    settings = ["use_peft=true", "lora_target_modules=all-linear", "max_length=null", f"max_steps={args.steps}"]
    settings += [f"per_device_train_batch_size={args.rows}", "learning_rate=1e-4", "save_steps=2"] + args.set
    command += [part for setting in settings for part in ("--set", setting)]
    print(" ".join(command))
    print(subprocess.run(command + ["--dry-run"], capture_output=True, text=True).stdout)
    limit = int(args.limit_gib * 2**30)
    started = time.time()
    run = subprocess.Popen(command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)))
    peaks, stop = {}, threading.Event()
    threading.Thread(target=watch, args=(run.pid, peaks, stop), daemon=True).start()
    code = run.wait()
    stop.set()
    lines = [json.loads(line) for line in open(args.work / "out" / "metrics.jsonl")]
    tokens = args.rows * args.tokens
    seconds = [tokens / line["tokens_per_second"] for line in lines if "loss" in line]
    print(f"exit {code} after {time.time() - started:.0f} s; limit on data memory {args.limit_gib} GiB")
    print("peaks in MiB:", {name: round(kib / 1024) for name, kib in sorted(peaks.items())})
    print("peak RSS by the system (ru_maxrss), MiB:", round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024))
    print(f"{tokens} tokens a step; seconds per step:", [round(s, 2) for s in seconds])


main()
