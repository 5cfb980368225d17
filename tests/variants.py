"""Random variants of every family, beside transformers: `variants.py SUASION [SEEDS [FIRST]]`.

Draws configurations that the families' published models and their transformers' code allow, gives them random weights, writes
folders as transformers 5 and as transformers 4 wrote them, and compares `suasion eval` and one step of `suasion train` with
PyTorch: the loss to 2e-5, and each parameter's gradient to 1e-4 of its norm. Prints what differs or is refused, and exits with 1
if anything is.
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "goldens/generate"))
import common  # noqa: E402, F401  sets the environment
import torch  # noqa: E402
from make_models import build, config_v4, config_v5, gradients, parameters  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402
from transformers.utils import logging  # noqa: E402

VOCAB = 96


def rope(draw, theta, kinds, half, positions):
    kind = draw.choice(kinds)
    out = {"rope_theta": draw.choice([theta, 1e4, 5e5]), "rope_type": kind}
    if kind in ("linear", "dynamic"):
        out["factor"] = draw.choice([2.0, 4.0, 1.5])
    if kind == "yarn":
        out |= {"factor": draw.choice([2.0, 4.0, 8.0]), "original_max_position_embeddings": draw.choice([8, 16, 32])}
        for key, values in {
            "beta_fast": [None, 32.0, 8.0, 3.0],
            "beta_slow": [None, 1.0, 0.5],
            "attention_factor": [None, None, 1.3, 0.7],
            "mscale": [None, 1.0, 0.7],
            "mscale_all_dim": [None, 1.0, 0.3],
            "truncate": [None, True, False],
        }.items():
            value = draw.choice(values)
            if value is not None:
                out[key] = value
    if kind == "llama3":
        out |= {
            "factor": draw.choice([4.0, 8.0]),
            "low_freq_factor": draw.choice([1.0, 0.5]),
            "high_freq_factor": draw.choice([4.0, 2.0]),
            "original_max_position_embeddings": draw.choice([16, 32, 64]),
        }
    if kind == "longrope":
        out |= {
            "short_factor": [1.0 + 0.1 * draw.random() * i for i in range(half)],
            "long_factor": [1.0 + draw.random() * i for i in range(half)],
            "original_max_position_embeddings": draw.choice([8, 16, 32]),
        }
        if draw.random() < 0.3:
            out["attention_factor"] = 1.2
        if draw.random() < 0.3:
            out["factor"] = 4.0
    return out


ROPES = ["default", "default", "linear", "dynamic", "yarn", "llama3"]


def sizes(draw, heads=(2, 4), free_head=True):
    n = draw.choice(heads)
    kv = draw.choice([k for k in (1, 2, 4) if n % k == 0 and k <= n])
    out = dict(
        vocab_size=VOCAB,
        hidden_size=draw.choice([32, 48]),
        intermediate_size=draw.choice([40, 64]),
        num_hidden_layers=draw.choice([2, 3, 4]),
        num_attention_heads=n,
        num_key_value_heads=kv,
        max_position_embeddings=draw.choice([32, 64]),
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=draw.random() < 0.5,
        rms_norm_eps=draw.choice([1e-5, 1e-6]),
    )
    out["head_dim"] = draw.choice([8, 16, 12]) if free_head else out["hidden_size"] // n
    return out


def layer_types(draw, layers):
    return [draw.choice(["full_attention", "sliding_attention"]) for _ in range(layers)]


def variant(family, draw):
    s = sizes(draw)
    layers, yes = s["num_hidden_layers"], lambda p=0.5: draw.random() < p
    half = s["head_dim"] // 2
    positions = s["max_position_embeddings"]
    if family == "llama":
        s |= dict(attention_bias=yes(), mlp_bias=yes(), rope_parameters=rope(draw, 1e4, ROPES, half, positions))
    elif family == "mistral":
        s |= dict(sliding_window=draw.choice([None, 5, 16]), rope_parameters=rope(draw, 1e4, ROPES, half, positions))
    elif family == "qwen2":
        s["head_dim"] = s["hidden_size"] // s["num_attention_heads"]
        s |= dict(
            use_sliding_window=yes(),
            sliding_window=draw.choice([5, 16]),
            max_window_layers=draw.choice([0, 1, 2, 28]),
            rope_parameters=rope(draw, 1e6, ["default", "yarn", "linear"], s["head_dim"] // 2, positions),
        )
    elif family == "qwen3":
        s |= dict(
            attention_bias=yes(0.3),
            use_sliding_window=yes(0.4),
            sliding_window=draw.choice([5, 16]),
            max_window_layers=draw.choice([0, 1, 2]),
            rope_parameters=rope(draw, 1e6, ["default", "yarn", "dynamic"], half, positions),
        )
        if yes(0.4) and s["use_sliding_window"]:
            s["layer_types"] = layer_types(draw, layers)
    elif family == "qwen3_moe":
        s |= dict(
            attention_bias=yes(0.3),
            num_experts=draw.choice([3, 4, 6]),
            num_experts_per_tok=draw.choice([1, 2, 3]),
            moe_intermediate_size=draw.choice([16, 24]),
            decoder_sparse_step=draw.choice([1, 1, 2]),
            norm_topk_prob=yes(),
            mlp_only_layers=draw.choice([[], [0], [1]]),
            use_sliding_window=yes(0.3),
            sliding_window=6,
            rope_parameters=rope(draw, 1e6, ["default", "yarn"], half, positions),
        )
    elif family == "smollm3":
        s |= dict(
            attention_bias=yes(0.3),
            mlp_bias=yes(0.3),
            rope_parameters=rope(draw, 2e6, ["default", "yarn", "linear"], half, positions),
            use_sliding_window=yes(0.4),
            sliding_window=draw.choice([5, 16]),
        )
        s.pop("head_dim")
        s["rope_parameters"] = rope(draw, 2e6, ["default", "linear"], half, positions)
        if yes(0.5):
            s["no_rope_layers"] = [draw.choice([0, 1]) for _ in range(layers)]
        else:
            s["no_rope_layer_interval"] = draw.choice([2, 3])
    elif family == "granite":
        s.pop("head_dim")
        s |= dict(
            attention_bias=yes(0.3),
            mlp_bias=yes(0.3),
            embedding_multiplier=draw.choice([1.0, 3.0, 12.0]),
            attention_multiplier=draw.choice([0.2, 0.5, 1.0]),
            residual_multiplier=draw.choice([0.22, 1.0]),
            logits_scaling=draw.choice([1.0, 2.0, 8.0]),
            rope_parameters=rope(draw, 1e4, ["default", "linear"], half, positions),
        )
    elif family == "olmo2":
        s.pop("head_dim")
        s |= dict(attention_bias=yes(0.3), rope_parameters=rope(draw, 5e5, ["default", "linear", "yarn"], half, positions))
    elif family == "phi3":
        s.pop("head_dim")
        size = s["hidden_size"] // s["num_attention_heads"]
        partial = draw.choice([1.0, 0.5, 0.75])
        rotated = int(size * partial)
        while rotated % 2:
            partial, rotated = 1.0, size
        r = rope(draw, 1e4, ["default", "longrope"], rotated // 2, positions)
        r["partial_rotary_factor"] = partial
        s |= dict(sliding_window=draw.choice([None, 5, 16]), rope_parameters=r)
        if r["rope_type"] == "longrope":
            s["original_max_position_embeddings"] = r["original_max_position_embeddings"]
    elif family in ("gemma2", "gemma3_text"):
        s |= dict(
            query_pre_attn_scalar=draw.choice([12, 24, 256]),
            sliding_window=draw.choice([5, 16]),
            attention_bias=yes(0.2),
        )
        if family == "gemma2":
            s |= dict(
                attn_logit_softcapping=draw.choice([None, 2.0, 50.0]),
                final_logit_softcapping=draw.choice([None, 3.0, 30.0]),
                rope_parameters=rope(draw, 1e4, ["default", "linear"], half, positions),
            )
        else:
            s |= dict(
                rope_parameters={
                    "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
                    "full_attention": rope(draw, 1e6, ["default", "linear"], half, positions),
                }
            )
            if yes(0.3):
                s |= dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0)
        if yes(0.5):
            s["layer_types"] = layer_types(draw, layers)
        elif family == "gemma3_text":
            s["sliding_window_pattern"] = draw.choice([2, 3])
    elif family == "gpt_neox":
        size = draw.choice([8, 16])
        heads = s["num_attention_heads"]
        s = dict(
            vocab_size=VOCAB,
            hidden_size=size * heads,
            intermediate_size=s["intermediate_size"],
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=positions,
            bos_token_id=1,
            eos_token_id=2,
            use_parallel_residual=yes(),
            attention_bias=yes(0.7),
            tie_word_embeddings=yes(0.3),
            hidden_act=draw.choice(["gelu", "gelu_new", "gelu_fast"]),
            rope_parameters=rope(draw, 1e4, ["default", "linear", "dynamic"], 4, positions)
            | {"partial_rotary_factor": draw.choice([0.25, 0.5, 1.0])},
        )
    elif family == "gpt2":
        heads = s["num_attention_heads"]
        s = dict(
            vocab_size=VOCAB,
            n_embd=12 * heads,
            n_layer=layers,
            n_head=heads,
            n_positions=64,
            n_inner=draw.choice([None, 40]),
            bos_token_id=1,
            eos_token_id=2,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            scale_attn_weights=yes(0.8),
            scale_attn_by_inverse_layer_idx=yes(0.3),
            activation_function=draw.choice(["gelu_new", "gelu", "gelu_pytorch_tanh"]),
            tie_word_embeddings=yes(0.8),
        )
    return s


FAMILIES = (
    "llama mistral qwen2 qwen3 qwen3_moe smollm3 granite olmo2 phi3 gemma2 gemma3_text gpt_neox gpt2"
).split()


def rows(draw):
    out = []
    for length in (9, 45 if draw.random() < 0.6 else 20):
        ids = [draw.randrange(3, VOCAB) for _ in range(length)]
        labels = [-100 if i < 4 or draw.random() < 0.5 else x for i, x in enumerate(ids)]
        labels[-1] = ids[-1]
        out.append({"input_ids": ids, "labels": labels})
    return out


def pytorch(model, data):
    """The loss over all targets, each row by itself, and the gradients."""
    total, count = 0.0, 0
    for row in data:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum")
        count += int((labels[0, 1:] != -100).sum())
    (total / count).backward()
    return float(total.detach()) / count, gradients(model)


def suasion(binary, *args):
    done = subprocess.run([binary, *map(str, args)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[0] if done.stderr else f"exit {done.returncode}")
    return done.stdout


def compare(binary, folder, data, loss, grads, old):
    """What differs in a folder."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    args = ["-M", folder, "-D", folder / "rows.jsonl", "--quiet", "--set", "max_length=null"]
    ours = json.loads(suasion(binary, "eval", *args, "--json"))["loss"]
    if not abs(ours - loss) < 2e-5 * max(1.0, abs(loss) / 5):
        yield f"loss {ours}, PyTorch {loss}"
        return
    keys = ["max_steps=1", "optim=sgd", "learning_rate=1", "lr_scheduler_type=constant", "max_grad_norm=0", "weight_decay=0"]
    keys += ["save_strategy=no", "per_device_train_batch_size=2", f"output_dir={folder / 'out'}", "stop_on_divergence=false"]
    suasion(binary, "train", *args, *[x for key in keys for x in ("--set", key)])
    new = load_file(folder / "out/model.safetensors")
    for name, grad in grads.items():
        if name not in new:
            yield f"{name} is not written"
            continue
        ours, size = old[name] - new[name], float(grad.norm())
        off = float((ours - grad).norm())
        # What the weights' own resolution leaves of it.
        if off > 1e-4 * max(size, 1e-3) + 1e-7 * float(old[name].norm()):
            yield f"{name}: gradient off by {off} of {size}"


def main():
    binary, seeds, first = sys.argv[1], int((sys.argv + [0, 0, 5])[2] or 5), int(sys.argv[3]) if len(sys.argv) > 3 else 0
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    checked, found = 0, []
    for family in FAMILIES:
        for seed in range(first, first + seeds):
            draw = random.Random(f"{family} {seed}")
            settings, data = variant(family, draw), rows(draw)
            try:
                model = build(family, settings)
            except Exception as error:  # transformers itself has no such model
                print(f"{family} {seed}: not built: {error}", flush=True)
                continue
            model.eval()
            loss, grads = pytorch(model, data)
            config = config_v5(model)
            with tempfile.TemporaryDirectory() as folder:
                for style, text in (("transformers 5", config), ("transformers 4", config_v4(config)), ("saved", None)):
                    place = Path(folder) / style.replace(" ", "")
                    place.mkdir()
                    old = {name: p.detach() for name, p in parameters(model).items()}
                    want = (loss, grads)
                    if style == "transformers 4":  # what transformers 5 makes of it
                        again = AutoModelForCausalLM.from_config(AutoConfig.for_model(**text), attn_implementation="eager")
                        again.float().eval().load_state_dict(model.state_dict())
                        want = pytorch(again, data)
                    if text is None:
                        model.save_pretrained(place)
                    else:
                        (place / "config.json").write_text(json.dumps(text))
                        save_file(old, place / "model.safetensors", metadata={"format": "pt"})
                    try:
                        problems = list(compare(binary, place, data, *want, old))
                    except RuntimeError as error:
                        problems = [str(error)]
                    checked += 1
                    for problem in problems[:3]:
                        found.append((family, seed, style))
                        print(f"{family} {seed}, {style}: {problem}\n    {json.dumps(settings)}", flush=True)
    print(f"{checked} folders compared, {len(set(found))} differ")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
