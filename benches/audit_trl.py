"""What `suasion verify` finds in the rows that TRL prepares, in each of its modes.

    peers/bin/python benches/audit_trl.py SUASION MATERIAL [WORDS]

MATERIAL is a folder with tokenizers, templates and data sets as the internal test material has them; WORDS choose the lines of the table that
have them. Prints a Markdown table:
figures, codes and tokens of templates only, no text of the rows.
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile

import datasets
import torch
import transformers
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

SUASION, MATERIAL = sys.argv[1], pathlib.Path(sys.argv[2])
MODELS = {
    "qwen2_5": dict(bos=None, eos="<|im_end|>", pad="<|endoftext|>", template="trl/qwen2_5"),
    "llama3_2": dict(bos="<|begin_of_text|>", eos="<|eot_id|>", pad="<|end_of_text|>", template="trl/llama3"),
    "gemma2": dict(bos="<bos>", eos="<eos>", pad="<pad>", template="trl/gemma", stops=["<end_of_turn>"]),
}


def lines(name, n):
    return [json.loads(line) for line in (MATERIAL / "datasets" / name).open()][:n]


def from_user(messages):
    """From the first user's message to the last answer, in turns."""
    out = []
    for message in messages:
        role = {"user": "user", "assistant": "assistant"}.get(message["role"])
        if role and message.get("content") and (role == "user" if not out else role != out[-1]["role"]):
            out.append({"role": role, "content": message["content"]})
    return out[:-1] if out and out[-1]["role"] == "user" else out


def with_tools():
    """Conversations with tools, tool calls and their results, up to the last answer."""
    out = []
    for row in lines("glaive_messages_tools.jsonl", 80):
        messages = [{key: value for key, value in message.items() if value is not None} for message in row["messages"]]
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        if any(message.get("tool_calls") for message in messages):
            out.append({"messages": messages, "tools": row["tools"]})
    return out


def data():
    texts = [{"prompt": r["prompt"], "completion": r["completion"]} for r in lines("cmv_prompt_completion.jsonl", 100) if r.get("completion")]
    chats = [m for m in (from_user(r["messages"]) for r in lines("oasst_en_100_messages.jsonl", 60) + lines("p4g_messages.jsonl", 60)) if len(m) > 1]
    tools = with_tools()
    calls = [next(i for i, m in enumerate(row["messages"]) if m.get("tool_calls")) for row in tools]
    return {
        "tools": tools,
        "tools, prompt+completion": [{"prompt": r["messages"][:-1], "completion": r["messages"][-1:], "tools": r["tools"]} for r in tools],
        "tools, the call is the completion": [
            {"prompt": r["messages"][:i], "completion": r["messages"][i : i + 1], "tools": r["tools"]} for r, i in zip(tools, calls) if i
        ],
        "text": [{"text": r["prompt"] + r["completion"]} for r in texts],
        "prompt+completion": texts,
        "prompt+completion (messages)": [{"prompt": m[:-1], "completion": m[-1:]} for m in chats],
        "messages": [{"messages": m} for m in chats],
    }


MODES = [
    ("text", {}),
    ("prompt+completion", {}),
    ("prompt+completion", dict(completion_only_loss=False)),
    ("prompt+completion", dict(max_length=128)),
    ("prompt+completion", dict(max_length=128, truncation_mode="keep_end")),
    ("prompt+completion (messages)", {}),
    ("prompt+completion (messages)", dict(completion_only_loss=False)),
    ("messages", {}),
    ("messages", dict(assistant_only_loss=True)),
    ("messages", dict(assistant_only_loss=True, max_length=256)),
    ("messages", dict(assistant_only_loss=True, padding_free=True, max_length=None)),
    ("messages", dict(assistant_only_loss=True, packing=True, packing_strategy="bfd")),
    ("messages", dict(assistant_only_loss=True, packing=True, packing_strategy="bfd_split")),
    ("messages", dict(assistant_only_loss=True, packing=True, packing_strategy="wrapped")),
]


# Of templates that render tools.
TOOL_MODES = [
    ("tools", {}),
    ("tools", dict(assistant_only_loss=True)),
    ("tools", dict(assistant_only_loss=True, packing=True, packing_strategy="bfd")),
    ("tools, prompt+completion", {}),
    ("tools, the call is the completion", {}),
]
TOOL_MODELS = {
    "qwen2_5": MODELS["qwen2_5"],
    "qwen2_5 (Qwen3)": {**MODELS["qwen2_5"], "template": "trl/qwen3"},
    "llama3_2": {**MODELS["llama3_2"], "template": "trl/llama3_2"},
}


def prepare(tokenizer, rows, out, config):
    tiny = LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    settings = SFTConfig(output_dir=str(out / "run"), report_to=[], use_cpu=True, bf16=False, **{"max_length": 1024, **config})
    trainer = SFTTrainer(model=LlamaForCausalLM(tiny), args=settings, train_dataset=Dataset.from_list(rows, on_mixed_types="use_json"), processing_class=tokenizer)
    path = out / "rows.parquet"
    trainer.train_dataset.to_parquet(str(path))
    return path, trainer.train_dataset.column_names


def main():
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    sets = data()
    print("| tokenizer, template | rows | settings | columns | lines | found | the first |\n|---|---|---|---|---|---|---|")
    each = [(name, spec, mode) for name, spec in MODELS.items() for mode in MODES]
    each += [(name, spec, mode) for name, spec in TOOL_MODELS.items() for mode in TOOL_MODES]
    for label, spec, (kind, config) in each:
        name = label.split()[0]
        with tempfile.TemporaryDirectory() as out:
            out = pathlib.Path(out)
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_file=str(MATERIAL / "tokenizers" / name / "tokenizer.json"),
                bos_token=spec["bos"], eos_token=spec["eos"], pad_token=spec["pad"],
            )
            tokenizer.chat_template = (MATERIAL / "templates" / f"{spec['template']}.jinja").read_text()
            model = out / "model"
            tokenizer.save_pretrained(model)
            ends = tokenizer.convert_tokens_to_ids([spec["eos"], *spec.get("stops", [])])
            (model / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
            if config.get("assistant_only_loss"):
                training = MATERIAL / "templates" / f"{spec['template']}_training.jinja"
                tokenizer.chat_template = training.read_text() if training.exists() else tokenizer.chat_template
            settings = ", ".join(f"{key}={value}" for key, value in config.items()) or "defaults"
            head = f"| {name}, {spec['template']} | {kind} | {settings} |"
            if len(sys.argv) > 3 and sys.argv[3] not in head:
                continue
            try:
                path, columns = prepare(tokenizer, sets[kind], out, config)
            except Exception as error:
                print(f"{head} | | TRL refuses: {type(error).__name__} | |", flush=True)
                continue
            ran = subprocess.run([SUASION, "verify", "-M", model, "-D", path, "--json"], capture_output=True, text=True)
            assert ran.returncode in (0, 1), ran.stderr
            found = json.loads(ran.stdout)
            levels = {f["code"]: f["level"] for f in reversed(found["findings"])}
            counts = ", ".join(f"{code} ({levels[code]}) {n}" for code, n in found["counts"].items() if code != "D001")
            # Of a message only tokens of the template are shown.
            m007 = next((f["message"] for f in found["findings"] if f["code"] == "M007"), "")
            shown = re.search(r'"(?:\\n|<[^"]*>)"', m007)
            first = f"M007: `{shown[0]}`" if shown else ""
            columns = ", ".join(columns)
            print(f"{head} {columns} | {found['rows']} | {counts or 'nothing'} | {first} |", flush=True)


if __name__ == "__main__":
    main()
