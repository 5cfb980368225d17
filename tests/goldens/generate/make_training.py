"""What training adds to a model's passes, as transformers computes it: the distribution of the loss under dropout."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from common import SEED, write_json
from make_models import MODELS, batches, build, rows_alone

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
    return {"rate": RATE, "draws": len(losses), "mean": float(losses.mean()), "std": float(losses.std())}


def generate(root):
    torch.set_num_threads(1)
    golden = {"dropout": {name: {key: dropout(name, key) for key in keys} for name, keys in DROPOUTS.items()}}
    write_json(root / "models" / "training.json", golden, short=True)
