#!/usr/bin/env python3
"""LoRA over a mapped bf16 base: the memory of a step over a model of Qwen2.5-1.5B's shape, and the speed beside PEFT.

    benches/adapters.py memory [--limit-gib 8] [--steps 2]   trains under a limit on anonymous memory, and prints the peaks
    benches/adapters.py speed  [--rounds 2] [--steps 3]      six layers of the same model as bf16 and f32 files, against PEFT
                                                             with PyTorch in f32 and bf16; and where the time goes, with perf
    benches/adapters.py all                                  both: some six minutes on two idle cores

Options: --binary (target/release/suasion), --work (a folder with 5 GB of space, kept), --python (one with torch, transformers
and peft; default $SUASION_PEERS_PYTHON). The models have random weights, the rows are random tokens of which the last fifth is
learned, 2 x 512 a step, rank 16 on all linear layers. Both sides compute the same losses, which are printed. Needs numpy. Lines
are appended to benches/results/adapters.jsonl. Peak RSS counts the mapped pages of the base that were touched, which the system
can take back; anonymous memory is what the process cannot do without.
"""

import argparse
import datetime
import json
import os
import pathlib
import re
import resource
import shutil
import statistics
import struct
import subprocess
import sys
import threading
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOKENS, ROWS, RANK = 512, 2, 16
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


SMALL = {**CONFIG, "num_hidden_layers": 6, "vocab_size": 32768}


def tensors(config):
    h, m, kv = config["hidden_size"], config["intermediate_size"], 256
    yield "model.embed_tokens.weight", [config["vocab_size"], h]
    for n in range(config["num_hidden_layers"]):
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


def write_model(folder, config, kind="BF16"):
    """The same values in either type: those of bf16."""
    if (folder / "complete").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    named = {"BF16": "bfloat16", "F32": "float32"}[kind]
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": named}))
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensors(config):
        size = {"BF16": 2, "F32": 4}[kind] * int(np.prod(shape))
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.default_rng(0)
    with open(folder / "model.safetensors", "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tensors(config):
            if "norm" in name:
                values = np.ones(shape, dtype=np.float32)
            else:
                values = random.standard_normal(shape, dtype=np.float32) * 0.02
            bits = values.reshape(-1).view(np.uint32) >> 16
            out.write((bits.astype("<u2") if kind == "BF16" else (bits << 16).astype("<u4")).tobytes())
    (folder / "complete").touch()


def write_rows(path, rows, vocabulary):
    random = np.random.default_rng(1)
    with open(path, "w") as out:
        for _ in range(rows):
            ids = random.integers(0, vocabulary, TOKENS).tolist()
            labels = [-100] * (TOKENS * 4 // 5) + ids[TOKENS * 4 // 5 :]
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


def command(args, model, rows, steps, out):
    shutil.rmtree(out, ignore_errors=True)
    settings = ["use_peft=true", "lora_target_modules=all-linear", f"lora_r={RANK}", f"lora_alpha={2 * RANK}", "lora_dropout=0"]
    settings += ["max_length=null", f"max_steps={steps}", f"per_device_train_batch_size={ROWS}", "learning_rate=1e-4"]
    settings += ["save_strategy=no", "logging_steps=1", "shuffle_dataset=false", *args.set]
    line = [args.binary, "train", "--model", model, "--data", rows, "-o", out, "--quiet"]
    return [str(part) for part in line] + [part for setting in settings for part in ("--set", setting)]


def steps_of(out):
    lines = [json.loads(line) for line in open(out / "metrics.jsonl")]
    lines = [line for line in lines if "loss" in line]
    return [ROWS * TOKENS / line["tokens_per_second"] for line in lines], [line["loss"] for line in lines]


def keep(**line):
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    with open(ROOT / "benches/results/adapters.jsonl", "a") as file:
        file.write(json.dumps({"at": now, **line}) + "\n")
    print(json.dumps(line), flush=True)


def memory(args):
    model, rows, out = args.work / "whole", args.work / "whole.jsonl", args.work / "out"
    write_model(model, CONFIG)
    write_rows(rows, ROWS * args.steps, CONFIG["vocab_size"])
    line = command(args, model, rows, args.steps, out)
    print(subprocess.run([*line, "--dry-run"], capture_output=True, text=True).stdout)
    limit = int(args.limit_gib * 2**30)
    started = time.time()
    # RLIMIT_DATA counts all but mapped files.
    run = subprocess.Popen(line, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)))
    peaks, stop = {}, threading.Event()
    threading.Thread(target=watch, args=(run.pid, peaks, stop), daemon=True).start()
    code = run.wait()
    stop.set()
    seconds, losses = steps_of(out)
    keep(
        bench="adapter memory", exit=code, limit_gib=args.limit_gib, wall=round(time.time() - started),
        mib={name: round(kib / 1024) for name, kib in sorted(peaks.items())},
        seconds_per_step=[round(s, 2) for s in seconds], losses=losses,
    )  # fmt: skip


def peft(folder, rows, kind, steps):
    """PyTorch's side, in its own process: prints seconds and losses of its steps as JSON."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, kind), attn_implementation="sdpa")
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    lines = [json.loads(line) for line in open(rows)]
    model.train()
    seconds, losses = [], []
    for step in range(steps):
        batch = lines[step * ROWS : (step + 1) * ROWS]
        ids, labels = (torch.tensor([row[key] for row in batch]) for key in ("input_ids", "labels"))
        started = time.perf_counter()
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps({"seconds": seconds, "losses": losses, "mib": peak}))


def speed(args):
    rows, out = args.work / "small.jsonl", args.work / "out"
    steps = args.steps + 1
    write_rows(rows, ROWS * steps, SMALL["vocab_size"])
    for kind in ("BF16", "F32"):
        write_model(args.work / kind.lower(), SMALL, kind)

    def ours(kind):
        run = subprocess.Popen(command(args, args.work / kind, rows, steps, out))
        _, status, usage = os.wait4(run.pid, 0)
        if status != 0:
            sys.exit(f"suasion failed with {status}")
        return *steps_of(out), usage.ru_maxrss // 1024

    def theirs(kind):
        line = [args.python, __file__, "peft", "--work", args.work, "--kind", kind, "--steps", str(steps)]
        found = json.loads(subprocess.run(line, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        return found["seconds"], found["losses"], found["mib"]

    sides = {"suasion, bf16 file": lambda: ours("bf16"), "suasion, f32 file": lambda: ours("f32")}
    if args.python:
        sides |= {"PEFT, f32": lambda: theirs("float32"), "PEFT, bf16": lambda: theirs("bfloat16")}
    seconds, peaks = {side: [] for side in sides}, {}
    for turn in range(args.rounds):
        for side, run in sides.items():
            # The first step is a warm-up.
            (_, *timed), losses, mib = run()
            seconds[side] += timed
            peaks[side] = max(mib, peaks.get(side, 0))
            keep(bench="adapter speed", side=side, round=turn, seconds=[round(s, 3) for s in timed], mib=mib, losses=losses)
    medians = {side: statistics.median(found) for side, found in seconds.items()}
    first = medians["suasion, bf16 file"]
    keep(
        bench="adapter speed", side="median", seconds={side: round(s, 3) for side, s in medians.items()},
        tokens_per_second={side: round(ROWS * TOKENS / s) for side, s in medians.items()}, peak_mib=peaks,
        ours_over={side: round(first / s, 3) for side, s in medians.items()},
    )  # fmt: skip
    where(args, rows, out)


def where(args, rows, out):
    """The shares of the functions of a run on the bf16 file, where perf is installed and allowed."""
    record = args.work / "perf.data"
    line = ["perf", "record", "-q", "-F", "199", "-o", str(record), *command(args, args.work / "bf16", rows, args.steps, out)]
    try:
        if subprocess.run(line, capture_output=True).returncode != 0:
            return print("perf does not run here: no shares")
    except FileNotFoundError:
        return print("no perf: no shares")
    report = ["perf", "report", "-i", str(record), "--stdio", "--no-children", "-F", "overhead,symbol"]
    text = subprocess.run(report, capture_output=True, text=True).stdout
    shares = {}
    for percent, place, name in re.findall(r"^\s*([\d.]+)%\s+\[(\S)\]\s+(.*)$", text, re.M):
        # gemm copies panels of its operands side by side before it multiplies them.
        kinds = {
            "widening the base": "files::from_", "products": "microkernel", "packing of products": "vectorize::imp",
        }  # fmt: skip
        kind = next((kind for kind, word in kinds.items() if word in name), "the rest")
        kind = "the kernel: page faults, reading" if place == "k" else kind
        shares[kind] = shares.get(kind, 0) + float(percent)
    keep(bench="adapter speed", side="shares", percent={kind: round(share, 1) for kind, share in shares.items()})
    print("\n".join(line for line in text.splitlines() if line.strip() and not line.startswith("#"))[:1500])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "speed", "all", "peft"])
    parser.add_argument("--binary", default=ROOT / "target/release/suasion")
    parser.add_argument("--work", required=True, type=pathlib.Path)
    parser.add_argument("--python", default=os.environ.get("SUASION_PEERS_PYTHON"))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit-gib", type=float, default=8, help="limit on data memory (RLIMIT_DATA: all but mapped files)")
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.what == "peft":
        folder = args.work / ("bf16" if args.kind == "bfloat16" else "f32")
        return peft(folder, args.work / "small.jsonl", args.kind, args.steps)
    if args.what in ("memory", "all"):
        memory(args)
    if args.what in ("speed", "all"):
        speed(args)


main()
