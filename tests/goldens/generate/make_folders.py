"""Model folders with something odd in them: what transformers loads from them, as the loss of batch `a`.

Each case changes one of the small models. `config` sets keys, `remove` takes keys away, `head` says what
`lm_head.weight` is in the file: `reversed` the embedding's rows in reverse order, `copy` the embedding, `only` the
embedding, which itself is taken away. `split` moves the tensors into shards: `named` as the index says, `moved` the
first tensor of the first shard lies in the second. A `warning` is a part of what transformers logs.
"""

import json
import logging
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from common import write_json

PLAIN = {"rope_theta": 10000.0, "rope_type": "default"}
LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ROPE_KEYS = ["rope_parameters", "rope_scaling", "rope_theta"]
DEFAULTS = ["hidden_act", "initializer_range", "attention_bias", "mlp_bias", "attention_dropout", "head_dim"]

CASES = {
    # The head.
    "a tied head that differs": ("llama_tied", dict(head="reversed")),
    "a tied head that differs, Qwen2": ("qwen2", dict(head="reversed")),
    "a tied head that differs, GPT-2 by default": ("gpt2", dict(head="reversed", remove=["tie_word_embeddings"])),
    "a tied head that is a copy": ("llama_tied", dict(head="copy")),
    "a tied head without an embedding": ("llama_tied", dict(head="only")),
    "a tied head without an embedding, GPT-2": ("gpt2", dict(head="only")),
    # Rotary positions.
    "rope_scaling beside rope_parameters": ("llama", dict(config=dict(rope_scaling=LINEAR))),
    "rope_scaling of the old style beside rope_parameters": (
        "llama",
        dict(config=dict(rope_scaling={"type": "linear", "factor": 4.0})),
    ),
    "rope_scaling beside rope_parameters with another theta": (
        "llama",
        dict(config=dict(rope_scaling=LINEAR, rope_parameters=dict(PLAIN, rope_theta=1e6))),
    ),
    "rope_scaling beside rope_parameters and rope_theta": (
        "llama",
        dict(config=dict(rope_scaling=LINEAR, rope_theta=500000.0, rope_parameters=PLAIN)),
    ),
    "llama3 in rope_scaling beside linear in rope_parameters": (
        "llama",
        dict(config=dict(rope_scaling=dict(LLAMA3, rope_theta=500000.0), rope_parameters=dict(LINEAR))),
    ),
    "an empty rope_scaling": ("llama_tied", dict(config=dict(rope_scaling={}))),
    "a null rope_scaling": ("llama_tied", dict(config=dict(rope_scaling=None))),
    "rope_scaling alone": (
        "llama",
        dict(config=dict(rope_scaling=LINEAR, rope_theta=500000.0), remove=["rope_parameters"]),
    ),
    "no rotary settings": ("llama", dict(remove=ROPE_KEYS)),
    "original positions that are not named": (
        "llama",
        dict(config=dict(rope_scaling={k: v for k, v in LLAMA3.items() if not k.startswith("original")})),
    ),
    # Activations and scores.
    "GPT-2 with the exact GELU": ("gpt2", dict(config=dict(activation_function="gelu"))),
    "GPT-2 with scores divided by the layer's number": ("gpt2", dict(config=dict(scale_attn_by_inverse_layer_idx=True))),
    "GPT-2 with scores as they are": ("gpt2", dict(config=dict(scale_attn_weights=False))),
    "Gemma 3 with a cap on scores, which it does not apply": ("gemma3", dict(config=dict(attn_logit_softcapping=0.5))),
    "Gemma 3 with a cap on logits": ("gemma3", dict(config=dict(final_logit_softcapping=2.0))),
    # Keys that are missing.
    "Llama without keys that have defaults": ("llama", dict(remove=DEFAULTS + ["tie_word_embeddings"])),
    "Llama without an epsilon": ("llama", dict(remove=["rms_norm_eps"])),
    "Llama without key/value heads": ("llama_bias", dict(remove=["num_key_value_heads"])),
    "Llama without positions": ("llama", dict(remove=["max_position_embeddings"])),
    "Llama 3 without positions": (
        "llama",
        dict(
            config=dict(rope_scaling={k: v for k, v in LLAMA3.items() if not k.startswith("original")}),
            remove=["max_position_embeddings"],
        ),
    ),
    "Qwen2 without keys that have defaults": ("qwen2", dict(remove=DEFAULTS)),
    "GPT-2 without keys that have defaults": (
        "gpt2",
        dict(remove=["activation_function", "layer_norm_epsilon", "initializer_range", "n_inner", "scale_attn_weights"]),
    ),
    # Shards.
    "shards as the index names them": ("llama", dict(split="named")),
    "a tensor in another shard than the index names": ("llama", dict(split="moved")),
}


def head_and_embedding(tensors):
    embedding = next(name for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight")))
    return "lm_head.weight", embedding


def change(tensors, head):
    name, embedding = head_and_embedding(tensors)
    if head == "reversed":
        tensors[name] = tensors[embedding].flip(0).contiguous()
    if head in ("copy", "only"):
        tensors[name] = tensors[embedding].clone()
    if head == "only":
        del tensors[embedding]
    return tensors


def save(folder, tensors, split):
    metadata = {"format": "pt"}
    if split is None:
        save_file(tensors, folder / "model.safetensors", metadata)
        return
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[: len(names) // 2], "model-2.safetensors": names[len(names) // 2 :]}
    index = {name: file for file, held in shards.items() for name in held}
    if split == "moved":
        shards["model-2.safetensors"].append(shards["model-1.safetensors"].pop(0))
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / file, metadata)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


class Collect(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def loss_of(source, case):
    config = json.loads((source / "config.json").read_text())
    for key in case.get("remove", []):
        config.pop(key, None)
    config.update(case.get("config", {}))
    tensors = change(load_file(source / "model.safetensors"), case.get("head"))
    batch = json.loads((source / "golden.json").read_text())["batches"]["a"]
    batch = {key: torch.tensor(batch[key]) for key in ("input_ids", "labels", "attention_mask")}
    collect = Collect()
    logger = logging.getLogger("transformers")
    logger.addHandler(collect)
    transformers_logging.set_verbosity_warning()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "config.json").write_text(json.dumps(config))
        save(folder, tensors, case.get("split"))
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    logger.removeHandler(collect)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with torch.no_grad():
        loss = model.eval()(**batch).loss.item()
    warned = any("will NOT" in line for line in collect.lines)
    return dict(loss=loss, tied=tied, warned=warned)


def pad_row(source):
    """Norm of the gradient of the pad token's embedding, where the pad token is one of the row's."""
    golden = json.loads((source / "golden.json").read_text())["batches"]["a"]
    batch = {key: torch.tensor(golden[key]) for key in ("input_ids", "labels", "attention_mask")}
    pad = golden["input_ids"][0][5]
    model = AutoModelForCausalLM.from_pretrained(
        source, pad_token_id=pad, dtype=torch.float32, attn_implementation="eager"
    )
    embedding, norms = model.get_input_embeddings(), {}
    assert embedding.padding_idx == pad
    for name in ("with_padding_idx", "without"):
        model.zero_grad()
        model(**batch).loss.backward()
        norms[name] = embedding.weight.grad[pad].norm().item()
        embedding.padding_idx = None
    return dict(pad_token_id=pad, **norms)


def generate(root):
    torch.set_num_threads(1)
    models = root / "models"
    out = {name: dict(model=model, **case, **loss_of(models / model, case)) for name, (model, case) in CASES.items()}
    out["the row of the pad token"] = dict(model="llama", **pad_row(models / "llama"))
    write_json(models / "folders.json", out, short=True)
