#!/usr/bin/env python3
"""Calibration and accuracy of `suasion diagnose`, over small models that are trained here in every way.

    benches/diagnose.py train   [--work DIR] [--binary SUASION] [--only PART]
    benches/diagnose.py measure [--work DIR] [--binary SUASION]
    benches/diagnose.py fit     [--work DIR]
    benches/diagnose.py table   [--work DIR]

`train` pre-trains the base models, then tunes models from them on rows made here, each with labels of one kind: all
tokens, the response, the response without its stop token, a mask that starts some tokens early or late. Whole settings
(base model and kind of rows) are held out of the calibration, and fresh ones were made after it. `measure` runs `suasion diagnose --json` on each.
`fit` prints the constants of crates/train/src/diagnose/verdict.rs from the calibration models only, and `table` the
accuracy, as Markdown. Everything is drawn from SEED: the same binary gives the same models. Needs Python's standard
library only. One model takes some seconds on one core.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

SEED = 20261126
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TOKENIZER = ROOT / "examples/persuasion"

# ---------------------------------------------------------------- rows

TOPICS = {
    "bikes": ["a bicycle", "the lane", "a helmet", "the traffic", "a short trip", "the hill", "a bus ticket"],
    "books": ["a paper book", "the library", "a novel", "the screen", "a page", "the reader", "a shelf"],
    "food": ["a warm meal", "the kitchen", "a recipe", "the market", "a lunch box", "the bread", "an onion"],
    "work": ["an office", "the meeting", "a long call", "the team", "a quiet room", "the plan", "a break"],
    "garden": ["a garden", "the soil", "a tomato", "the neighbour", "a fence", "the rain", "a tool"],
    "school": ["a teacher", "the class", "an exam", "the homework", "a student", "the grade", "a course"],
    "music": ["a song", "the choir", "a guitar", "the concert", "a lesson", "the crowd", "a record"],
    "travel": ["a train", "the station", "a suitcase", "the hotel", "a map", "the ticket", "a border"],
    "health": ["a long walk", "the doctor", "a pill", "the sleep", "a cold", "the gym", "a habit"],
    "money": ["a salary", "the bank", "a loan", "the rent", "a coin", "the budget", "a tax"],
    "news": ["a headline", "the editor", "a rumour", "the source", "a photo", "the debate", "a poll"],
    "home": ["a window", "the heating", "a couch", "the noise", "a lamp", "the stairs", "a key"],
}
LIKE = ["I think that", "It seems to me that", "In my view", "I have always felt that", "I am sure that"]
VERBS = ["costs more than", "matters less than", "takes time from", "spoils", "helps", "needs", "comes before"]
ENDS = ["in most cases", "for most people", "on a normal day", "when money is short", "in the long run", "today"]
TASKS = ["Concede what is right, then reframe.", "Reply with one argument.", "Answer with an example.",
         "Ask what would change the mind, then reply.", "Be brief and kind.", "Start from what both sides want."]
SYSTEMS = ["You write honest replies.", "You are a patient friend who argues fairly and never mocks.",
           "You answer as a teacher would.", "You write for a local paper, and you weigh both sides.",
           "You are careful with facts.", "You reply in a calm tone and close with a question."]
CONSTANT = "You write honest, respectful replies that may change a reader's mind. Never insult, never invent facts."
OPENERS = ["You are right that", "It is true that", "I see why", "There is something in that:", "Fair point:"]
TURNS = ["But look at", "Still, think of", "And yet consider", "Now compare that with", "Then remember"]


def sentence(rng, nouns):
    a, b = rng.sample(nouns, 2)
    return f"{a} {rng.choice(VERBS)} {b} {rng.choice(ENDS)}"


def view(rng, nouns, n):
    return " ".join(f"{rng.choice(LIKE)} {sentence(rng, nouns)}." for _ in range(n))


def reply(rng, nouns, n):
    out = [f"{rng.choice(OPENERS)} {sentence(rng, nouns)}."]
    out += [f"{rng.choice(TURNS)} {rng.choice(nouns)}: {sentence(rng, nouns)}." for _ in range(n)]
    return " ".join(out)


def row(kind, rng, topics):
    nouns = TOPICS[rng.choice(topics)]
    if kind == "sections_constant":
        prompt = f"[SYSTEM] {CONSTANT}\n[CONTEXT] {view(rng, nouns, rng.randint(2, 4))}\n[TASK] {rng.choice(TASKS)}\n[RESPONSE]"
    elif kind == "sections_varying":
        prompt = (f"[SYSTEM] {rng.choice(SYSTEMS)}\n[CONTEXT] {view(rng, nouns, rng.randint(1, 5))}\n"
                  f"[TASK] {rng.choice(TASKS)} {rng.choice(TASKS)}\n[RESPONSE]")
    elif kind == "plain":
        # Nothing but the text: no marker, no header, every prompt another one.
        return {"prompt": view(rng, nouns, rng.randint(2, 5)), "completion": " " + reply(rng, nouns, rng.randint(1, 3))}
    elif kind == "constant":
        # One prompt for all rows.
        prompt = f"[SYSTEM] {CONSTANT}\n[CONTEXT] The reader has an opinion about daily life.\n[TASK] {TASKS[0]}\n[RESPONSE]"
    elif kind == "chat":
        turns = [{"role": "system", "content": rng.choice([CONSTANT, CONSTANT, SYSTEMS[1]])}]
        for _ in range(rng.randint(1, 2)):
            turns += [{"role": "user", "content": view(rng, nouns, rng.randint(1, 3))},
                      {"role": "assistant", "content": reply(rng, nouns, rng.randint(1, 2))}]
        return {"messages": turns}
    elif kind == "constant_chat":
        # One system message and one question for all rows.
        question = "What would you say to a reader who has an opinion about daily life?"
        return {"messages": [{"role": "system", "content": CONSTANT}, {"role": "user", "content": question},
                             {"role": "assistant", "content": reply(rng, nouns, rng.randint(1, 3))}]}
    elif kind == "instruction":
        # A preamble and headers in words, as Alpaca's; the prompts between them all differ.
        prompt = (f"Below is an opinion. Write a reply.\n\n### Opinion:\n{view(rng, nouns, rng.randint(1, 4))}\n\n"
                  f"### Reply:\n")
        return {"prompt": prompt, "completion": reply(rng, nouns, rng.randint(1, 3))}
    else:
        raise ValueError(kind)
    return {"input_text": prompt, "full_text": prompt + " " + reply(rng, nouns, rng.randint(1, 3))}


CHAT = ("{% for m in messages %}{{ '<' + m['role'] + '>\\n' + m['content'] + ('<|endoftext|>' if m['role'] == 'assistant'"
        " else '') + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>\\n' }}{% endif %}")

# ---------------------------------------------------------------- models

COMMON = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0, "vocab_size": 2048}


def llama(kind, hidden, layers, heads, **more):
    name = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "olmo2": "Olmo2ForCausalLM"}[kind]
    return {**COMMON, "architectures": [name], "model_type": kind, "hidden_size": hidden,
            "intermediate_size": hidden * 5 // 2, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": heads // 2, "head_dim": hidden // heads, "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5, "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": True,
            "initializer_range": 0.02, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, **more}


def gpt2(hidden, layers, heads):
    return {**COMMON, "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": hidden, "n_layer": layers,
            "n_head": heads, "n_positions": 1024, "n_ctx": 1024, "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new", "initializer_range": 0.02, "tie_word_embeddings": True,
            "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}


def gpt_neox(hidden, layers, heads):
    return {**COMMON, "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "hidden_size": hidden,
            "intermediate_size": 4 * hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
            "max_position_embeddings": 1024, "layer_norm_eps": 1e-5, "hidden_act": "gelu", "rotary_pct": 0.5,
            "rotary_emb_base": 10000, "use_parallel_residual": True, "tie_word_embeddings": False,
            "initializer_range": 0.02}


# Each base: configuration, what it is pre-trained on, steps. "format" has seen rows of the same formats, as an
# instruction-tuned model has: it knows headers and stop tokens before it is tuned.
BASES = {
    "llama64": (llama("llama", 64, 2, 4), "prose", 200),
    "gpt2_64": (gpt2(64, 3, 4), "prose", 200),
    "llama96_format": (llama("llama", 96, 2, 4), "format", 200),
    "qwen3_96": (llama("qwen3", 96, 3, 4, tie_word_embeddings=False), "prose", 200),
    "gpt2_96_format": (gpt2(96, 2, 6), "format", 200),
    "neox80": (gpt_neox(80, 3, 4), "prose", 250),
    "olmo2_96_format": (llama("olmo2", 96, 2, 4, tie_word_embeddings=False), "format", 250),
    "llama128": (llama("llama", 128, 2, 8), "prose", 150),
    "qwen3_64_format": (llama("qwen3", 64, 4, 4), "format", 300),
}
# Kinds that a "format" base has seen.
KINDS = ["sections_constant", "plain", "constant", "sections_varying", "chat"]
CALIBRATION = [(b, k) for b in ["llama64", "gpt2_64", "llama96_format"] for k in ["sections_constant", "plain", "constant"]]
HELD_OUT = [(b, k) for b in ["qwen3_96", "gpt2_96_format"] for k in ["sections_varying", "chat"]]
HELD_OUT += [("qwen3_96", "sections_constant"), ("llama64", "chat"), ("qwen3_96", "constant"), ("gpt2_96_format", "plain")]
# Made after the scores and their constants were fixed: other bases, topics and draws, and two more kinds of rows.
FRESH = [("neox80", "sections_varying"), ("neox80", "constant_chat"), ("neox80", "plain"),
         ("olmo2_96_format", "sections_constant"), ("olmo2_96_format", "instruction"),
         ("llama128", "constant"), ("llama128", "chat"),
         ("qwen3_64_format", "constant_chat"), ("qwen3_64_format", "instruction")]
PARTS = [("calibration", CALIBRATION), ("held_out", HELD_OUT), ("fresh", FRESH)]
OBJECTIVES = ["response", "all", "stop", "early", "late", "response", "all", "all_stop"]
TRUTH = {"response": "response", "all": "all_tokens", "all_stop": "all_tokens", "stop": "stop_never_learned",
         "early": "starts_early", "late": "starts_late"}
OLD = ["bikes", "books", "food", "work"]
NEW = dict.fromkeys(["calibration", "held_out"], ["garden", "school", "music", "travel"]) | {"fresh": ["health", "money", "news", "home"]}


def plan():
    """Every model of the zoo with its setting; the draws depend on the setting's name only."""
    zoo = []
    for part, cells in PARTS:
        for base, kind in cells:
            for n, objective in enumerate(OBJECTIVES):
                name = f"{base}-{kind}-{objective}-{n}"
                rng = random.Random(f"{SEED} {name}")
                shift = rng.randint(3, 8) if objective in ("early", "late") else 0
                if part != "fresh":
                    rate, steps = rng.choice([3e-4, 1e-3, 3e-3]), rng.choice([50, 100, 160])
                    rows = rng.choice([80, 200, 400])
                else:
                    rate, steps = float(f"{10 ** rng.uniform(-3.5, -2.5):.2g}"), rng.randint(50, 180)
                    rows = rng.randint(60, 500)
                zoo.append({
                    "name": name, "part": part, "base": base, "kind": kind, "objective": objective, "shift": shift,
                    "learning_rate": rate, "steps": steps, "rows": rows, "seed": rng.randint(1, 10**6),
                    # Half of them are judged on the rows that they were trained on, half on others like them.
                    "judged_on": rng.choice(["own", "like"]),
                })
    return zoo


# ---------------------------------------------------------------- running

class Zoo:
    def __init__(self, args):
        self.work, self.binary = Path(args.work), args.binary
        self.work.mkdir(parents=True, exist_ok=True)

    def run(self, *command):
        env = {**os.environ, "RAYON_NUM_THREADS": "1"}
        command = ["nice", str(self.binary), *map(str, command), "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        return done.stdout

    def rows(self, name, kind, seed, topics, n):
        path = self.work / f"{name}.jsonl"
        rng = random.Random(f"{seed} {name}")
        path.write_text("".join(json.dumps(row(kind, rng, topics)) + "\n" for _ in range(n)))
        return path

    def base(self, name):
        folder = self.work / "bases" / name
        if (folder / "model.safetensors").exists():
            return folder
        config, on, steps = BASES[name]
        start = self.work / "bases" / f"{name}-start"
        start.mkdir(parents=True, exist_ok=True)
        (start / "config.json").write_text(json.dumps(config))
        (start / "chat_template.jinja").write_text(CHAT)
        for file in ["tokenizer.json", "tokenizer_config.json"]:
            (start / file).write_bytes((TOKENIZER / file).read_bytes())
        rng = random.Random(f"{SEED} {name}")
        lines = []
        for _ in range(1500):
            nouns = TOPICS[rng.choice(OLD)]
            if on == "prose" or rng.random() < 0.3:
                lines.append({"text": view(rng, nouns, 3) + " " + reply(rng, nouns, 2)})
            else:
                lines.append(row(rng.choice(KINDS), rng, OLD))
        data = self.work / f"pretraining-{name}.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.run("train", "--data", data, "--model", start, "-o", folder, "--completion_only_loss", "false",
                 "--init", "random", "--learning_rate", "2e-3", "--max_steps", steps, "--save_strategy", "no",
                 "--per_device_train_batch_size", 8, "--seed", 7, "--overwrite_output_dir", "true",
                 "--allow_findings", ALLOWED)
        return folder

    def tune(self, model):
        folder = self.work / "models" / model["name"]
        if (folder / "model.safetensors").exists():
            return
        base = self.base(model["base"])
        topics = NEW[model["part"]]
        own = self.rows(f"{model['name']}-own", model["kind"], model["seed"], topics, model["rows"])
        self.rows(f"{model['name']}-like", model["kind"], model["seed"] + 1, topics, 80)
        prepared = self.work / f"{model['name']}-prepared.jsonl"
        self.run("prepare", "--data", own, "--model", base, "-o", prepared)
        lines = [json.loads(line) for line in prepared.open()]
        for suffix in ["", ".manifest.json", ".findings.jsonl"]:
            (self.work / (prepared.name + suffix)).unlink(missing_ok=True)
        bugged = self.work / f"{model['name']}-bugged.jsonl"
        with bugged.open("w") as out:
            for line in lines:
                out.write(json.dumps({"input_ids": line["input_ids"], "labels": planted(line, model)}) + "\n")
        self.run("train", "--data", bugged, "--model", base, "-o", folder, "--learning_rate", model["learning_rate"],
                 "--max_steps", model["steps"], "--per_device_train_batch_size", 4, "--seed", model["seed"],
                 "--save_strategy", "no", "--warmup_ratio", 0.1, "--overwrite_output_dir", "true", "--allow_findings", ALLOWED)
        bugged.unlink()

    def measure(self, model):
        out = self.work / "diagnoses" / f"{model['name']}.json"
        out.parent.mkdir(exist_ok=True)
        data = self.work / f"{model['name']}-{model['judged_on']}.jsonl"
        text = self.run("diagnose", "--base", self.base(model["base"]), "--tuned", self.work / "models" / model["name"],
                        "--data", data, "--json")
        out.write_text(text)
        return json.loads(text)


ALLOWED = "M001,M002,M003,M004,M005,M006,M007,M008,M009,C001,C002,L001,T001,T002,T003,D001"


def planted(line, model):
    """The labels of a row under an objective, or with a bug."""
    ids, labels, origins = line["input_ids"], list(line["labels"]), line["origins"]
    objective, shift = model["objective"], model["shift"]
    if objective.startswith("all"):
        labels = list(ids)
    starts = [i for i, o in enumerate(origins) if o == "R" and (i == 0 or origins[i - 1] != "R")]
    for start in starts:
        if objective == "early":
            for i in range(max(0, start - shift), start):
                labels[i] = ids[i]
        if objective == "late":
            for i in range(start, min(start + shift, len(ids))):
                if origins[i] == "R":
                    labels[i] = -100
    if objective in ("stop", "all_stop"):
        labels = [-100 if o == "E" else l for l, o in zip(labels, origins)]
    return labels


# ---------------------------------------------------------------- calibration and table

def lift(diagnosis):
    """As `lift` of verdict.rs."""
    def ratio(p):
        inside = p["inside"] if p["inside"] is not None else p["before_end"]
        return math.log(max(p["at_end"], 1e-9) / max(inside, 1e-9))
    stop = diagnosis["stop"]
    return max(-4.0, min(4.0, ratio(stop["tuned"]) - ratio(stop["base"])))


def fitted(rows, l2):
    """Logistic regression: rows of ({term: features}, yes). A term is a list of features that share an offset; a row
    without it has None. Returns the slopes and the offset of each term; slopes are shrunk, offsets are not."""
    names = list(rows[0][0])
    widths = {n: max(len(x[n]) for x, _ in rows if x[n] is not None) for n in names}
    w = {n: [0.0] * (widths[n] + 1) for n in names}
    yes = sum(y for _, y in rows)
    weigh = {True: len(rows) / (2 * max(yes, 1)), False: len(rows) / (2 * max(len(rows) - yes, 1))}
    rate = 0.5
    for _ in range(20000):
        gradient = {n: [2 * l2 * v for v in w[n][:-1]] + [0.0] for n in names}
        for x, y in rows:
            z = sum(sum(a * b for a, b in zip(w[n], x[n] + [1.0])) for n in names if x[n] is not None)
            error = weigh[y] * (1 / (1 + math.exp(-max(-30.0, min(30.0, z)))) - y) / len(rows)
            for n in names:
                if x[n] is not None:
                    for i, v in enumerate(x[n] + [1.0]):
                        gradient[n][i] += error * v
        for n in names:
            w[n] = [a - rate * g for a, g in zip(w[n], gradient[n])]
    return w


def fit(pairs):
    one = lambda v: None if v is None else [v]
    prompts = {k: [] for k in ("prompt_only", "constant", "varying")}
    early, late, stop = [], [], []
    for model, d in pairs:
        f, objective = d["features"], model["objective"]
        for k, rows in prompts.items():
            if f[k] is not None:
                rows.append(({k: [f[k]]}, objective.startswith("all")))
        if f["header"] is not None and not objective.startswith("all"):
            early.append(({"header": [f["header"]]}, objective == "early"))
        if f["first"] is not None:
            late.append(({"first": [f["first"]]}, objective == "late"))
        if f["stop"] is not None:
            stop.append(({"stop": [f["stop"], lift(d)]}, objective in ("stop", "all_stop")))
    # Each kind of prompt token has a score of its own, since rows may lack the others.
    for name, rows in [("PROMPT_ONLY", prompts["prompt_only"]), ("CONSTANT", prompts["constant"]),
                       ("VARYING", prompts["varying"]), ("EARLY", early), ("LATE", late), ("STOP", stop)]:
        (values,) = fitted(rows, L2).values()
        print(f"    pub const {name}: [f64; {len(values)}] = [{', '.join(f'{v:.2f}' for v in values)}];")


# Keeps the slopes, and with them the confidences, from growing without end where the models are told apart perfectly.
L2 = 3e-4


def verdict_of(model, d):
    """right, undecided or wrong. A mask that starts early where no header stands before responses is undecided by
    design: the diagnosis says that it cannot be told."""
    truth = TRUTH[model["objective"]]
    if d["verdict"] == truth:
        return "right"
    untold = truth == "starts_early" and d["answers"]["starts_early"] is None and d["verdict"] == "response"
    return "undecided" if d["verdict"] == "undecided" or untold else "wrong"


def table(pairs):
    for part, _ in PARTS:
        rows = [(m, d, verdict_of(m, d)) for m, d in pairs if m["part"] == part]
        if not rows:
            continue
        decided = [r for r in rows if r[2] != "undecided"]
        right = sum(r[2] == "right" for r in rows)
        print(f"\n**{part.replace('_', ' ')}**: {len(rows)} models, {right} right, {len(rows) - len(decided)} undecided, "
              f"{len(decided) - right} wrong: {100 * right / max(len(decided), 1):.1f} % of the verdicts given are right.\n")
        print("| trained on | models | right | undecided | wrong | mean confidence |\n|---|---:|---:|---:|---:|---:|")
        for objective in dict.fromkeys(OBJECTIVES):
            own = [r for r in rows if r[0]["objective"] == objective]
            n = {k: sum(r[2] == k for r in own) for k in ("right", "undecided", "wrong")}
            sure = [r[1]["confidence"] for r in own if r[2] != "undecided"]
            print(f"| {objective} | {len(own)} | {n['right']} | {n['undecided']} | {n['wrong']} | "
                  f"{sum(sure) / max(len(sure), 1):.3f} |")
        bins = [(0.75, 0.9), (0.9, 0.97), (0.97, 1.01)]
        for low, high in bins:
            own = [r for r in decided if low <= r[1]["confidence"] < high]
            if own:
                mean = sum(r[1]["confidence"] for r in own) / len(own)
                print(f"\nConfidence {low} to {min(high, 1.0)}: {len(own)} verdicts, mean confidence {mean:.3f}, "
                      f"{sum(r[2] == 'right' for r in own) / len(own):.3f} right.", end="")
        print()
    print("\n| model | part | learning rate | steps | rows | seed | shift | judged on | verdict | confidence | |")
    print("|---|---|---:|---:|---:|---:|---:|---|---|---:|---|")
    for m, d in pairs:
        print(f"| {m['name']} | {m['part'].replace('_', ' ')} | {m['learning_rate']} | {m['steps']} | {m['rows']} | {m['seed']} | "
              f"{m['shift'] or ''} | {m['judged_on']} | {d['verdict']} | {d['confidence']:.3f} | {verdict_of(m, d)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["train", "measure", "fit", "table"])
    parser.add_argument("--work", default="/tmp/suasion-diagnose")
    parser.add_argument("--binary", default=ROOT / "target/release/suasion")
    parser.add_argument("--only", help="calibration, held_out or fresh, or a part of a name")
    args = parser.parse_args()
    zoo, models = Zoo(args), plan()
    if args.only:
        models = [m for m in models if args.only == m["part"] or args.only in m["name"]]
    if args.action in ("fit", "table"):
        pairs = [(m, json.loads((zoo.work / "diagnoses" / f"{m['name']}.json").read_text())) for m in models]
        return fit([p for p in pairs if p[0]["part"] == "calibration"]) if args.action == "fit" else table(pairs)
    # In turns through the settings, so that a run that was stopped has some of each.
    models.sort(key=lambda m: (m["part"], int(m["name"].rsplit("-", 1)[1])))
    for n, model in enumerate(models):
        start = time.time()
        if args.action == "train":
            zoo.tune(model)
        else:
            zoo.measure(model)
        print(f"{n + 1}/{len(models)} {model['name']} {time.time() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
