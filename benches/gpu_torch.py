#!/usr/bin/env python3
"""Training steps of PyTorch on a card, on the shapes of crates/engine/examples/card.rs. Prints one JSON line.

usage: gpu_torch.py WAY SHAPE MODE ROWS [STEPS]
  WAY    eager (SDPA), compile, or liger (Liger's kernels, where it is installed)
  MODE   full-all, full-20, lora-all or lora-20

Weights are bf16, AdamW is fused and on bf16 too: what most trainers do. It keeps 8 bytes a parameter; suasion keeps 16,
with f32 masters. Supervised rows only are counted in the loss; all rows go through the head, as in transformers.
"""

import json
import statistics
import sys
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM

LENGTH = 1024
SHAPES = {
    "tiny": ("qwen2", 128, 256, 2, 4, 2, 32, 512, True),
    "qwen2.5-0.5b": ("qwen2", 896, 4864, 24, 14, 2, 64, 151936, True),
    "qwen2.5-1.5b": ("qwen2", 1536, 8960, 28, 12, 2, 128, 151936, True),
    "qwen3-8b": ("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, False),
}


def main():
    way, shape, mode, rows = sys.argv[1:5]
    steps = int(sys.argv[5]) if len(sys.argv) > 5 else 8
    kind, hidden, inside, layers, heads, kv_heads, head_dim, vocab, tied = SHAPES[shape]
    config = AutoConfig.for_model(
        kind, hidden_size=hidden, intermediate_size=inside, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, vocab_size=vocab, tie_word_embeddings=tied, use_cache=False,
        max_position_embeddings=32768, rms_norm_eps=1e-6,
    )
    if way == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2, apply_liger_kernel_to_qwen3

        {"qwen2": apply_liger_kernel_to_qwen2, "qwen3": apply_liger_kernel_to_qwen3}[kind]()
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").train()
    if mode.startswith("lora"):
        from peft import LoraConfig, get_peft_model

        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=names))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01, fused=True)
    step_model = torch.compile(model) if way == "compile" else model
    ids = torch.randint(0, vocab, (int(rows), LENGTH), device="cuda")
    labels = ids.clone()
    if mode.endswith("-20"):
        labels[:, : LENGTH * 8 // 10] = -100
    seconds, losses = [], []
    for step in range(steps + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = step_model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step >= 3:
            seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    print(json.dumps({
        "impl": f"torch {torch.__version__} {way}", "card": torch.cuda.get_device_name(), "shape": shape, "mode": mode,
        "tokens": ids.numel(), "seconds": sorted(seconds), "median": median, "tokens_per_second": ids.numel() / median,
        "losses": losses, "used_bytes": torch.cuda.max_memory_reserved(),
    }))


main()
