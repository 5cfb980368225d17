"""Tiny models of random weights: losses, logits, gradients and training runs that PyTorch computed.

Everything is f32 on one thread with eager attention, and again in f64 where the file says so.
"""

import json
import math

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from common import SEED, write_json, write_text

VOCAB = 128
LLAMA = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)
NEOX = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    hidden_dropout=0.0,
    attention_dropout=0.0,
)
PLAIN_ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
FULL_THEN_SLIDING = ["sliding_attention", "full_attention"]

# What each folder is there for stands in README.md.
MODELS = {
    "llama": ("llama", dict(LLAMA, rms_norm_eps=1e-5, rope_parameters=PLAIN_ROPE)),
    # Frequencies of head_dim 16 under 64 original positions: long ones divided, short ones kept, one blended.
    "llama_tied": (
        "llama",
        dict(
            LLAMA,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            rope_parameters={
                "rope_theta": 500000.0,
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        ),
    ),
    "llama_bias": (
        "llama",
        dict(
            LLAMA,
            num_key_value_heads=4,
            head_dim=12,
            attention_bias=True,
            mlp_bias=True,
            rope_parameters={"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0},
        ),
    ),
    "llama_yarn": (
        "llama",
        dict(
            LLAMA,
            head_dim=16,
            rope_parameters={
                "rope_theta": 10000.0,
                "rope_type": "yarn",
                "factor": 4.0,
                "beta_fast": 8.0,
                "original_max_position_embeddings": 16,
            },
        ),
    ),
    # The long batch has 40 tokens: a larger base than the others.
    "llama_dynamic": (
        "llama",
        dict(
            LLAMA,
            max_position_embeddings=32,
            rope_parameters={"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 4.0},
        ),
    ),
    "qwen2_window": (
        "qwen2",
        dict(LLAMA, use_sliding_window=True, sliding_window=6, max_window_layers=1, rope_parameters=PLAIN_ROPE),
    ),
    "qwen2": ("qwen2", dict(LLAMA, tie_word_embeddings=True, rope_parameters=dict(PLAIN_ROPE, rope_theta=1e6))),
    "gpt2": (
        "gpt2",
        dict(
            vocab_size=VOCAB,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=2,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
        ),
    ),
    "qwen3": (
        "qwen3",
        dict(LLAMA, head_dim=12, tie_word_embeddings=True, rope_parameters=dict(PLAIN_ROPE, rope_theta=1e6)),
    ),
    "mistral": ("mistral", dict(LLAMA, sliding_window=8, rope_parameters=PLAIN_ROPE)),
    "smollm3": (
        "smollm3",
        dict(LLAMA, no_rope_layers=[1, 0], tie_word_embeddings=True, rope_parameters=PLAIN_ROPE),
    ),
    "granite": (
        "granite",
        dict(
            LLAMA,
            embedding_multiplier=3.0,
            attention_multiplier=0.2,
            residual_multiplier=0.5,
            logits_scaling=2.0,
            rope_parameters=PLAIN_ROPE,
        ),
    ),
    "olmo2": ("olmo2", dict(LLAMA, rope_parameters=dict(PLAIN_ROPE, rope_theta=500000.0))),
    "phi3": ("phi3", dict(LLAMA, sliding_window=16, rope_parameters=dict(PLAIN_ROPE, partial_rotary_factor=0.5))),
    # The long batch has 40 tokens: the long factors.
    "phi3_longrope": (
        "phi3",
        dict(
            LLAMA,
            sliding_window=None,
            original_max_position_embeddings=32,
            rope_parameters={
                "rope_theta": 10000.0,
                "rope_type": "longrope",
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.1, 1.3],
                "long_factor": [1.0, 2.0, 5.0],
                "original_max_position_embeddings": 32,
            },
        ),
    ),
    "gemma2": (
        "gemma2",
        dict(
            LLAMA,
            head_dim=12,
            query_pre_attn_scalar=24,
            sliding_window=8,
            # Scores and logits reach 3 and 6: both caps bend them.
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
            tie_word_embeddings=True,
            layer_types=FULL_THEN_SLIDING,
            rope_parameters=PLAIN_ROPE,
        ),
    ),
    "gemma3": (
        "gemma3_text",
        dict(
            LLAMA,
            head_dim=12,
            query_pre_attn_scalar=24,
            sliding_window=8,
            tie_word_embeddings=True,
            layer_types=FULL_THEN_SLIDING,
            rope_parameters={
                "sliding_attention": PLAIN_ROPE,
                "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
            },
        ),
    ),
    "gpt_neox": (
        "gpt_neox",
        dict(
            NEOX,
            use_parallel_residual=True,
            attention_bias=True,
            rope_parameters=dict(PLAIN_ROPE, partial_rotary_factor=0.5),
        ),
    ),
    "gpt_neox_serial": (
        "gpt_neox",
        dict(
            NEOX,
            use_parallel_residual=False,
            attention_bias=False,
            hidden_act="gelu_new",
            rope_parameters=dict(PLAIN_ROPE, partial_rotary_factor=0.25),
        ),
    ),
    "qwen3_moe": (
        "qwen3_moe",
        dict(
            LLAMA,
            head_dim=12,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            decoder_sparse_step=1,
            norm_topk_prob=True,
            mlp_only_layers=[0],
            rope_parameters=PLAIN_ROPE,
        ),
    ),
}

# Parts of a model that are trained while the rest stays: a parameter is trained when its name has the text in it.
FROZEN = {
    "llama": ["norm", "layers.1."],
    "qwen2": ["norm", "bias"],
    "qwen3": ["norm", "layers.1."],
    "gpt2": ["ln_", "h.1."],
}

QV = ["q_proj", "v_proj"]
# Adapters over a model: what PEFT's LoraConfig says beside r = 4, alpha = 8. Each rule of PEFT is in one of them.
LORA = {
    "llama": {
        "lora": dict(target_modules=QV),
        "lora_all_linear": dict(target_modules="all-linear"),
        "lora_patterns": dict(
            target_modules=r"^(?!.*mlp\.down).*layers\.\d+\.(self_attn|mlp)\.(q|v|down|up)_proj",
            use_rslora=True,
            rank_pattern={r"layers\.1\.self_attn\.q_proj": 2, "up_proj": 3},
            alpha_pattern={"v_proj": 5},
        ),
        "lora_head": dict(target_modules=["lm_head", "o_proj"], modules_to_save=["norm"]),
        "dora": dict(target_modules=["q_proj", "k_proj", "down_proj", "gate_proj", "lm_head"], use_dora=True),
    },
    "llama_bias": {"dora": dict(target_modules="all-linear", use_dora=True, use_rslora=True)},
    "llama_tied": {
        "lora_saved": dict(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
        "lora_saved_head": dict(target_modules=["v_proj"], modules_to_save=["lm_head"]),
        "lora_saved_embedding": dict(target_modules=["v_proj"], modules_to_save=["embed_tokens"]),
    },
    "qwen2": {"lora": dict(target_modules=QV)},
    "qwen3": {
        "lora": dict(target_modules=QV),
        "lora_layers": dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[1], layers_pattern="layers"),
    },
    "gpt2": {
        "lora": dict(target_modules=["c_attn"]),
        "dora": dict(target_modules=["c_attn", "mlp.c_proj"], use_dora=True, exclude_modules=["h.0.mlp.c_proj"]),
    },
    "phi3": {
        "lora_all_linear": dict(target_modules="all-linear"),
        "dora": dict(target_modules=["qkv_proj", "gate_up_proj"], use_dora=True),
    },
    "gpt_neox": {
        "lora": dict(target_modules=["query_key_value"]),
        "dora": dict(target_modules="all-linear", use_dora=True),
        "lora_saved": dict(target_modules=["dense"], modules_to_save=["lm_head", "final_layer_norm"]),
    },
    # Of experts PEFT adapts the parameters, which the engine refuses.
    "qwen3_moe": {"lora": dict(target_modules=["v_proj", "o_proj"])},
}


def build(model_type, settings):
    """A model whose every parameter matters: norms away from 1, biases away from 0."""
    config = AutoConfig.for_model(model_type, **settings)
    config._experts_implementation = "eager"
    config.dtype = "float32"
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().train()
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                # Gemma's norms multiply by 1 + weight.
                one = 0.0 if name.endswith("bias") or model_type.startswith("gemma") else 1.0
                parameter.copy_(one + 0.2 * noise)
            elif "embed" in name or "wte" in name or "wpe" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
    return model


def config_v5(model):
    config = model.config.to_dict()
    config["architectures"] = [type(model).__name__]
    config.pop("_name_or_path", None)
    return json.loads(json.dumps(config))


def config_v4(config):
    """The same configuration as transformers 4 wrote it: `rope_theta`, `rope_scaling`, `torch_dtype`."""
    old = dict(config)
    old["transformers_version"] = "4.51.0"
    old["torch_dtype"] = old.pop("dtype")
    rope = old.pop("rope_parameters", None)
    if rope is None:
        return old
    if "full_attention" in rope:  # gemma3: two kinds of layers, two bases
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    rope = dict(rope)
    old["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        if old["model_type"] == "gpt_neox":
            old["rotary_pct"], old["rotary_emb_base"] = old.pop("partial_rotary_factor"), old.pop("rope_theta")
    old["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
    if old["model_type"] in ("llama", "qwen2", "qwen3", "mistral"):
        old.pop("layer_types", None)
    return old


def file_tensors(state):
    """Names and tensors as published files have them: transformers fuses experts in memory."""
    tensors = {}
    for name, tensor in state.items():
        stem = name.rsplit(".", 1)[0]
        if name.endswith("mlp.experts.gate_up_proj"):
            for expert, both in enumerate(tensor):
                gate, up = both.chunk(2, dim=0)
                tensors[f"{stem}.{expert}.gate_proj.weight"] = gate
                tensors[f"{stem}.{expert}.up_proj.weight"] = up
        elif name.endswith("mlp.experts.down_proj"):
            for expert, down in enumerate(tensor):
                tensors[f"{stem}.{expert}.down_proj.weight"] = down
        elif name == "lm_head.weight" and any(key.startswith("gpt_neox.") for key in state):
            tensors["embed_out.weight"] = tensor
        else:
            tensors[name] = tensor
    return {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}


def parameters(model):
    """Parameters under their names in files; a tied head once, under the embedding's name."""
    return file_tensors({name: p for name, p in model.named_parameters()})


def gradients(model):
    """Gradients under their names in files, of the parameters that are trained."""
    return file_tensors(
        {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters() if p.requires_grad}
    )


def batches():
    """Input ids, labels and masks. Labels are not shifted; -100 is masked; padding is on the right."""
    generator = torch.Generator().manual_seed(SEED)

    def batch(length, rows):
        ids = torch.randint(3, VOCAB, (len(rows), length), generator=generator)
        labels = torch.full_like(ids, -100)
        mask = torch.ones_like(ids)
        for row, (end, learned) in enumerate(rows):
            for start, stop in learned:
                labels[row, start:stop] = ids[row, start:stop]
            ids[row, end:] = 0
            mask[row, end:] = 0
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    return {
        "a": batch(16, [(16, [(6, 16)]), (16, [(11, 14)])]),
        "padded": batch(20, [(20, [(5, 20)]), (13, [(9, 13)]), (8, [(2, 4), (6, 8)])]),
        "long_multiturn": batch(40, [(40, [(8, 14), (20, 27), (33, 40)])]),
        # A label on the first token has no position that could predict it; one on the last has.
        "edge_first_last": batch(12, [(12, [(0, 1)]), (12, [(11, 12)])]),
    }


def targets(batch):
    return int((batch["labels"][:, 1:] != -100).sum())


def summed_loss(model, batch):
    """The summed loss over the targets, and the logits."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    flat = logits[:, :-1].reshape(-1, logits.shape[-1])
    loss = torch.nn.functional.cross_entropy(flat, batch["labels"][:, 1:].reshape(-1), ignore_index=-100, reduction="sum")
    return loss, logits


def norm(tensors):
    return math.sqrt(sum(float(t.double().pow(2).sum()) for t in tensors.values()))


def summary(tensor, generator, values=8):
    """Shape, norm and sum of a tensor, and some of its values: at the largest and at random places (row-major)."""
    flat = tensor.reshape(-1)
    largest = flat.abs().topk(min(values // 2, len(flat))).indices
    places = torch.cat([largest, torch.randint(0, len(flat), (values - len(largest),), generator=generator)])
    return {
        "shape": list(tensor.shape),
        "norm": float(flat.double().norm()),
        "sum": float(flat.double().sum()),
        "idx": places.tolist(),
        "val": flat[places].tolist(),
    }


def rows_alone(batch):
    """The rows of a batch, each by itself and without its padding."""
    for row, mask in enumerate(batch["attention_mask"]):
        yield {key: tensor[row : row + 1, : int(mask.sum())] for key, tensor in batch.items()}


def one_pass(model, batch, row_by_row=False):
    """Loss and gradients of a batch, and its logits."""
    model.zero_grad(set_to_none=True)
    if row_by_row:
        loss, logits = sum(summed_loss(model, row)[0] for row in rows_alone(batch)), torch.zeros(0)
    else:
        loss, logits = summed_loss(model, batch)
    (loss / targets(batch)).backward()
    grads = gradients(model)
    generator = torch.Generator().manual_seed(SEED)
    result = {
        "loss": float(loss.detach()) / targets(batch),
        "n_supervised": targets(batch),
        "sum_nll": float(loss.detach()),
        "grad_norm_total": norm(grads),
        "grads": {name: summary(grad, generator) for name, grad in grads.items()},
    }
    model.zero_grad(set_to_none=True)
    return result, logits.detach()


def five_steps(model, batch, lr):
    """Losses and norms of gradients of five AdamW steps on one batch, decay on everything that is trained, no clipping;
    the sixth loss is afterwards."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    losses, norms = [], []
    for step in range(6):
        optimizer.zero_grad(set_to_none=True)
        loss = summed_loss(model, batch)[0] / targets(batch)
        losses.append(loss.item())
        if step < 5:
            loss.backward()
            norms.append(norm(gradients(model)))
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return losses, norms


def adamw_5(model, batch, lr):
    """[`five_steps`], and what is trained after them."""
    losses, norms = five_steps(model, batch, lr)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    final = file_tensors({n: p for n, p in model.named_parameters() if n in names})
    return {
        "optimizer": f"AdamW lr={lr} betas=(0.9,0.999) eps=1e-8 weight_decay=0.01 on all that is trained, no clipping, "
        "constant lr, batch a at each step",
        "lr": lr,
        "losses": losses,
        "grad_norms": norms,
        "final_param_l2": norm(final),
        "final": {
            name: {"norm": float(t.double().norm()), "sum": float(t.double().sum())} for name, t in final.items()
        },
    }


def hf_like_5(model, two, lr=2e-3, weight_decay=0.1, warmup=2, steps=5):
    """Five steps as the Trainer does them, written out: two micro-batches over their total of targets, clipping."""
    decayed = [p for n, p in model.named_parameters() if p.dim() > 1]
    others = [p for n, p in model.named_parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, warmup, steps)
    total = sum(targets(b) for b in two)
    losses, norms, rates = [], [], []
    for step in range(steps + 1):
        optimizer.zero_grad(set_to_none=True)
        sums = []
        for batch in two:
            loss = summed_loss(model, batch)[0] / total
            sums.append(loss.item())
            if step < steps:
                loss.backward()
        losses.append(sum(sums))
        if step < steps:
            rates.append(schedule.get_last_lr()[0])
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
            optimizer.step()
            schedule.step()
    return {
        "lr": lr,
        "weight_decay": weight_decay,
        "losses": losses,
        "grad_norms_before_clip": norms,
        "lrs": rates,
        "total_supervised": total,
    }


def greedy(model, batch, new=12):
    """What `generate` writes after the first row's prompt without sampling; nothing stops it early."""
    prompt = batch["input_ids"][:1, :6]
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        ids = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=new, pad_token_id=0
        )
    assert ids.shape[1] == 6 + new
    return {"prompt": prompt[0].tolist(), "ids": ids[0, 6:].tolist()}


def reload(model, state):
    model.load_state_dict(state)
    model.zero_grad(set_to_none=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def lora(folder, name, model_type, settings, data, lora_settings):
    """A LoRA adapter over the model: PEFT's loss, gradients, and five steps from it and from B = 0."""
    from peft import LoraConfig, get_peft_model

    def adapted(b_scale):
        torch.manual_seed(SEED)
        config = LoraConfig(
            r=4,
            lora_alpha=8,
            lora_dropout=0.0,
            fan_in_fan_out=model_type == "gpt2",
            task_type="CAUSAL_LM",
            **lora_settings,
        )
        model = get_peft_model(build(model_type, settings), config)
        generator = torch.Generator().manual_seed(SEED + 1)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_A" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[1]))
                if "lora_B" in key:
                    parameter.copy_(b_scale * torch.randn(parameter.shape, generator=generator))
                if "lora_magnitude" in key or "modules_to_save" in key:
                    parameter.mul_(1 + b_scale * torch.randn(parameter.shape, generator=generator))
        return model

    model = adapted(0.2)
    out = folder / name
    model.save_pretrained(out)
    (out / "README.md").unlink()
    # PEFT writes a set of names: sorted, the file is the same each time.
    config = json.loads((out / "adapter_config.json").read_text())
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config[key], list):
            config[key] = sorted(config[key])
    config["base_model_name_or_path"] = ".."
    write_text(out / "adapter_config.json", json.dumps(config, indent=1, sort_keys=True) + "\n")
    fp32, _ = one_pass(model, data["a"])
    steps = adamw_5(model, data["a"], 5e-3)
    merged = adapted(0.2).merge_and_unload()
    with torch.no_grad():
        merged_loss = float(summed_loss(merged, data["a"])[0]) / targets(data["a"])
    golden = {
        "fp32": {"a": fp32},
        "adamw_5": steps,
        "adamw_5_from_B_zero": adamw_5(adapted(0.0), data["a"], 5e-3),
        "merged_loss_a": merged_loss,
    }
    write_json(out / "golden_lora.json", golden, short=True)


def one(root, name, model_type, settings):
    folder = root / "models" / name
    folder.mkdir(parents=True, exist_ok=True)
    model = build(model_type, settings)
    config = config_v5(model)
    old = config_v4(config)
    write_text(folder / "config.json", json.dumps(config, indent=1, sort_keys=True) + "\n")
    write_text(folder / "config_v4_style.json", json.dumps(old, indent=1, sort_keys=True) + "\n")
    save_file(dict(sorted(parameters(model).items())), folder / "model.safetensors", metadata={"format": "pt"})
    state = {key: value.clone() for key, value in model.state_dict().items()}
    data = batches()

    # Both styles of configuration are one model, and the file is the one that transformers loads.
    for text in ("config.json", "config_v4_style.json"):
        with torch.no_grad():
            read = AutoConfig.for_model(**json.loads((folder / text).read_text()))
            again = AutoModelForCausalLM.from_pretrained(folder, config=read, attn_implementation="eager", dtype="float32")
            a, b = summed_loss(again, data["long_multiturn"])[1], summed_loss(model, data["long_multiturn"])[1]
        assert torch.equal(a, b), f"{name}: {text} is another model ({(a - b).abs().max()})"

    fp32, logits = {}, {}
    for key, batch in data.items():
        fp32[key], all_logits = one_pass(model, batch)
        if key in ("a", "long_multiturn"):
            logits[f"logits_{key}"] = all_logits.float().contiguous()
    save_file(logits, folder / "golden_logits.safetensors")

    double = reload(build(model_type, settings), state).double()
    fp64 = {}
    for key, batch in data.items():
        exact, _ = one_pass(double, batch, row_by_row=True)
        grads = exact.pop("grads")
        fp64[key] = {
            "loss": exact["loss"],
            "grad_norm_total": exact["grad_norm_total"],
            "grad_norms": {k: v["norm"] for k, v in grads.items()},
        }

    golden = {
        "model_type": model_type,
        "seed": SEED,
        "vocab": VOCAB,
        "batches": {k: {f: t.tolist() for f, t in b.items()} for k, b in data.items()},
        "fp32": fp32,
        "fp64_reference": fp64,
        "adamw_5": adamw_5(reload(model, state), data["a"], 1e-3),
        "greedy": greedy(reload(model, state), data["a"]),
        "hf_like_5": hf_like_5(reload(model, state), [data["a"], data["padded"]]),
    }
    frozen = {}
    for text in FROZEN.get(name, []):
        reload(model, state)
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(text in key)
        first, _ = one_pass(model, data["a"])
        frozen[text] = {
            "trainable": [key for key, p in model.named_parameters() if p.requires_grad],
            "grad_norm_total": first["grad_norm_total"],
            "grads": first["grads"],
            "adamw_5": adamw_5(model, data["a"], 1e-2),
        }
    if frozen:
        golden["frozen"] = frozen
    write_json(folder / "golden.json", golden, short=True)
    for adapter, of_adapter in LORA.get(name, {}).items():
        lora(folder, adapter, model_type, settings, data, of_adapter)


def generate(root):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for name, (model_type, settings) in MODELS.items():
        one(root, name, model_type, settings)
