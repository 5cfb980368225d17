"""What training adds to passes and steps, as transformers and bitsandbytes compute it: the distribution of the loss under
dropout and NEFTune, smoothed labels, optimizers, groups of parameters."""

import os

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from common import SEED, write_json
from make_models import MODELS, batches, build, file_tensors, gradients, norm, rows_alone, summary, summed_loss, targets

# Each dropout by itself, so that one in the wrong place shows.
DROPOUTS = {
    "llama": ["attention_dropout"],
    "gpt2": ["attn_pdrop", "resid_pdrop", "embd_pdrop"],
    "gpt_neox": ["attention_dropout", "hidden_dropout"],
    "gpt_neox_serial": ["hidden_dropout"],
    "phi3": ["attention_dropout", "resid_pdrop", "embd_pdrop"],
}
RATE, ROWS, DRAWS = 0.3, 500, 16


def with_settings(name, **settings):
    """The model, built again with settings that do not touch its weights."""
    model = build(*MODELS[name])
    config = AutoConfig.for_model(**{**model.config.to_dict(), **settings})
    again = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    again.load_state_dict(model.state_dict())
    return again


def row_losses(model, row):
    """The mean loss of each row of the batch."""
    logits = model(**{k: v for k, v in row.items() if k != "labels"}).logits[:, :-1]
    labels = row["labels"][:, 1:]
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
    return nll.view(labels.shape).sum(1) / (labels != -100).sum(1)


def dropout(name, key):
    """Mean and deviation of the loss of the first row over many masks."""
    model = with_settings(name, **{key: RATE}).train()
    row = next(rows_alone(batches()["a"]))
    rows = {k: v.expand(ROWS, -1) for k, v in row.items()}
    torch.manual_seed(SEED)
    with torch.no_grad():
        losses = torch.cat([row_losses(model, rows) for _ in range(DRAWS)]).double()
    return spread(losses, rate=RATE)


def spread(losses, **settings):
    return {**settings, "draws": len(losses), "mean": float(losses.mean()), "std": float(losses.std())}


def neftune(name, alpha=8.0):
    """As `dropout`, with noise on the embeddings."""
    from transformers.integrations.neftune import neftune_post_forward_hook

    model = build(*MODELS[name]).train()
    embeddings = model.get_input_embeddings()
    embeddings.neftune_noise_alpha = alpha
    embeddings.register_forward_hook(neftune_post_forward_hook)
    row = next(rows_alone(batches()["a"]))
    rows = {k: v.expand(ROWS, -1) for k, v in row.items()}
    torch.manual_seed(SEED)
    with torch.no_grad():
        losses = torch.cat([row_losses(model, rows) for _ in range(DRAWS)]).double()
    return spread(losses, alpha=alpha)


def label_smoothing(name, epsilon=0.15):
    """The Trainer's smoothed loss of batch `padded`, and its gradients."""
    from transformers.trainer_pt_utils import LabelSmoother

    model = build(*MODELS[name])
    batch = batches()["padded"]
    labels = batch["labels"]
    outputs = model(**{k: v for k, v in batch.items() if k != "labels"})
    loss = LabelSmoother(epsilon)(outputs, labels, shift_labels=True, num_items_in_batch=targets(batch))
    loss.backward()
    grads = {name: float(grad.double().norm()) for name, grad in gradients(model).items()}
    return {"epsilon": epsilon, "loss": loss.item(), "grad_norms": grads}


def trajectory(name, optimizer_of, steps=6):
    """Losses of steps on batch `a`, and the norms of the parameters after them."""
    model = build(*MODELS[name])
    optimizer = optimizer_of(model)
    batch, losses = batches()["a"], []
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss = summed_loss(model, batch)[0] / targets(batch)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    final = file_tensors(dict(model.named_parameters()))
    return {"losses": losses, "final": {name: float(t.detach().double().norm()) for name, t in final.items()}}


def trainer_groups(model, decay):
    """The Trainer's groups: no decay on biases and norms."""
    decayed = [p for n, p in model.named_parameters() if p.dim() > 1]
    others = [p for n, p in model.named_parameters() if p.dim() == 1]
    return [{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]


def adafactor(model):
    from transformers.optimization import Adafactor

    return Adafactor(trainer_groups(model, 0.1), lr=2e-3, scale_parameter=False, relative_step=False)


def sgd(model):
    return torch.optim.SGD(trainer_groups(model, 0.1), lr=2e-2, momentum=0.9)


# Patterns as the key `param_groups` has them, and what they stand for.
GROUPS = [
    {"match": "embed_tokens", "learning_rate": 1e-4},
    {"match": ["mlp.*_proj", "norm"], "learning_rate": 4e-3, "weight_decay": 0.3},
    {"match": "layers.1.self_attn", "weight_decay": 0.0},
]


def grouped(model):
    """AdamW with groups of its own for some parameters."""

    def group(name):
        if "embed_tokens" in name:
            return 1e-4, None
        if "mlp." in name or name == "model.norm.weight":
            return 4e-3, 0.3
        if "layers.1.self_attn" in name:
            return None, 0.0
        return None, None

    groups = []
    for name, p in model.named_parameters():
        lr, decay = group(name)
        default = 0.1 if p.dim() > 1 else 0.0
        groups.append({"params": [p], "lr": 1e-3 if lr is None else lr, "weight_decay": default if decay is None else decay})
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)


def adamw_8bit(n=1400, steps=4):
    """bitsandbytes' own reference of its block-wise 8-bit AdamW on one tensor: 6 blocks, the last of them short."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    from bitsandbytes.backends.triton.kernels_optim import optimizer_update_8bit_blockwise_pytorch as update
    from bitsandbytes.functional import create_dynamic_map

    generator = torch.Generator().manual_seed(SEED)
    p = torch.randn(n, generator=generator)
    signed, unsigned = create_dynamic_map(True), create_dynamic_map(False)
    state1, state2 = torch.zeros(n, dtype=torch.uint8), torch.zeros(n, dtype=torch.uint8)
    absmax1, absmax2 = torch.zeros((n + 255) // 256), torch.zeros((n + 255) // 256)
    settings = dict(beta1=0.9, beta2=0.95, eps=1e-8, lr=0.01, weight_decay=0.1)
    gradients, after = [], []
    for step in range(1, steps + 1):
        g = torch.randn(n, generator=generator) * torch.logspace(-3, 0, n)
        gradients.append(g)
        update(p, g.clone(), state1, state2, settings["beta1"], settings["beta2"], 0.0, 0.0, settings["eps"], step,
               settings["lr"], signed, unsigned, absmax1, absmax2, settings["weight_decay"], 1.0, False, optimizer_name="adam")
        after.append(p.clone())
    return settings, signed, unsigned, gradients, after, (state1, state2, absmax1, absmax2)


def balanced(name, batch, coefficient=0.5, steps=5):
    """The loss with the load-balancing loss of experts, its gradients, and steps of AdamW on one batch."""
    model = build(*MODELS[name])
    batch = batches()[batch]
    model.config.output_router_logits = True

    def loss():
        outputs = model(**{k: v for k, v in batch.items() if k != "labels"}, output_router_logits=True, use_cache=False)
        logits = outputs.logits[:, :-1].flatten(0, 1)
        nll = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), reduction="sum")
        return nll / targets(batch) + coefficient * outputs.aux_loss, outputs.aux_loss

    value, aux = loss()
    value.backward()
    generator = torch.Generator().manual_seed(SEED)
    grads = gradients(model)
    golden = {
        "coefficient": coefficient,
        "loss": value.item(),
        "aux_loss": aux.item(),
        "grad_norm_total": norm(grads),
        "grads": {name: summary(grad, generator) for name, grad in grads.items()},
        "losses": [],
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        value, _ = loss()
        golden["losses"].append(value.item())
        value.backward()
        optimizer.step()
    return golden


def resized(name, rows=5, many=4000):
    """What `resize_token_embeddings` gives new rows: the mean of the others and the deviation around it, the loss of batch
    `a` with a few more rows, and the norms of the gradients."""
    model = build(*MODELS[name])
    old = {"embedding": model.get_input_embeddings().weight.detach().clone()}
    if not model.config.tie_word_embeddings:
        old["head"] = model.get_output_embeddings().weight.detach().clone()
    torch.manual_seed(SEED)
    model.resize_token_embeddings(len(old["embedding"]) + many)
    new = {"embedding": model.get_input_embeddings().weight, "head": model.get_output_embeddings().weight}
    spread = {
        key: {"mean": weight.mean(0).tolist(), "std": new[key][len(weight) :].detach().double().std(0).tolist()}
        for key, weight in old.items()
    }
    model = build(*MODELS[name])
    model.resize_token_embeddings(len(old["embedding"]) + rows)
    batch = batches()["a"]
    loss = summed_loss(model, batch)[0] / targets(batch)
    loss.backward()
    grads = {name: float(grad.double().norm()) for name, grad in gradients(model).items()}
    return {"rows": rows, "loss": loss.item(), "grad_norms": grads, **spread}


def generate(root):
    torch.set_num_threads(1)
    golden = {
        "balance": {"qwen3_moe": {batch: balanced("qwen3_moe", batch) for batch in ("a", "padded")}},
        "resized": {name: resized(name) for name in ("llama", "llama_tied", "gpt2")},
        "dropout": {name: {key: dropout(name, key) for key in keys} for name, keys in DROPOUTS.items()},
        "neftune": {name: neftune(name) for name in ("llama", "gpt2", "gemma2", "granite")},
        "label_smoothing": {name: label_smoothing(name) for name in ("llama", "gemma2")},
        "adafactor": {name: trajectory(name, adafactor) for name in ("llama", "gpt2", "gpt_neox")},
        "sgd": {name: trajectory(name, sgd) for name in ("llama", "qwen2")},
        "param_groups": {"groups": GROUPS, "llama": trajectory("llama", grouped)},
    }
    write_json(root / "models" / "training.json", golden, short=True)
    settings, signed, unsigned, grads, after, (state1, state2, absmax1, absmax2) = adamw_8bit()
    tensors = {"signed": signed, "unsigned": unsigned, "absmax1": absmax1, "absmax2": absmax2}
    tensors |= {"codes1": state1.float(), "codes2": state2.float()}
    tensors |= {f"gradient_{i}": g for i, g in enumerate(grads)} | {f"after_{i}": p for i, p in enumerate(after)}
    start = torch.randn(1400, generator=torch.Generator().manual_seed(SEED))
    metadata = {key: repr(value) for key, value in settings.items()}
    save_file({"start": start} | tensors, root / "models" / "adamw_8bit.safetensors", metadata=metadata)
