"""What transformers renders of conversations under templates of ours, and the masks of {% generation %} blocks."""

import hashlib
from datetime import datetime

from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from common import REPOSITORY, write_json, write_lines
from conversations import CONVERSATIONS
from expressions import EXPRESSIONS

NOW = datetime(2025, 1, 15, 12)

IM = dict(bos=None, eos="<|im_end|>", tokenizer="qwen2_5")
HEADERS = dict(bos="<|begin_of_text|>", eos="<|eot_id|>", tokenizer="llama3_2")
DEEPSEEK = dict(bos="<｜begin▁of▁sentence｜>", eos="<｜end▁of▁sentence｜>", tokenizer="deepseek")

# The special tokens that a template is given, what ends a turn beside the EOS, and the tokenizer of its masks. `spans` is for
# those whose answers have no place that could be proved: "none" where the text before an answer depends on what follows
# it, "no_calls" where calls are not rendered.
TEMPLATES = {
    "after_tool.jinja": DEEPSEEK,
    "blocks.jinja": dict(bos="<s>", eos="</s>", tokenizer="tekken"),
    "chatml.jinja": IM,
    "chatml_training.jinja": IM,
    "controls.jinja": dict(bos=None, eos="</assistant>", tokenizer="gpt2", spans="none"),
    "dates.jinja": HEADERS,
    "headers.jinja": HEADERS,
    "headers_training.jinja": HEADERS,
    "inst.jinja": dict(bos="<s>", eos="</s>", tokenizer="mistral_v3"),
    "keys.jinja": dict(bos=None, eos="</assistant>", tokenizer="gpt2", spans="none"),
    "macros.jinja": dict(bos=None, eos="<|return|>", tokenizer="o200k", stops=["<|end|>", "<|call|>"]),
    "next_role.jinja": dict(bos=None, eos="<|endoftext|>", tokenizer="gpt2", stops=["<|user|>", "<|observation|>"]),
    "opens_thought.jinja": DEEPSEEK,
    "parts.jinja": IM,
    "phi.jinja": dict(bos="<s>", eos="<|endoftext|>", tokenizer="phi3", stops=["<|end|>"]),
    "phi_training.jinja": dict(bos="<s>", eos="<|endoftext|>", tokenizer="phi3", stops=["<|end|>"]),
    "plain.jinja": dict(bos=None, eos="<|endoftext|>", tokenizer="gpt2", spans="no_calls"),
    "strict.jinja": IM,
    "thinking.jinja": IM,
    "tools.jinja": IM,
    "tools_training.jinja": IM,
    "turns.jinja": dict(bos="<bos>", eos="<eos>", tokenizer="gemma2", stops=["<end_of_turn>"]),
    "turns_training.jinja": dict(bos="<bos>", eos="<eos>", tokenizer="gemma2", stops=["<end_of_turn>"]),
}


def freeze_the_clock():
    class Frozen(datetime):
        @classmethod
        def now(cls, tz=None):
            return NOW

    chat_template_utils.datetime = Frozen


def source(name):
    """The template as it stands in the repository; templates are written, not made."""
    with open(REPOSITORY / "tests/goldens/templates" / name, encoding="utf-8", newline="") as file:
        return file.read()


def tokenizer(root, name, spec):
    """The named tokenizer with the special tokens that the template is given."""
    file = root / "tokenizers" / spec["tokenizer"] / "tokenizer.json"
    made = PreTrainedTokenizerFast(tokenizer_file=str(file), bos_token=spec["bos"], eos_token=spec["eos"])
    made.chat_template = source(name)
    return made


def render(made, name, conversation):
    kwargs = conversation.get("kwargs", {})
    settings = dict(
        tools=conversation.get("tools"), add_generation_prompt=conversation.get("add_generation_prompt", False), **kwargs
    )
    row = {"template": name}
    try:
        row["rendered"] = made.apply_chat_template(conversation["messages"], tokenize=False, **settings)
    except Exception as error:  # whatever a template can raise, as text
        return row | {"error": f"{type(error).__name__}: {error}"}
    if "endgeneration" in made.chat_template:
        masked = made.apply_chat_template(
            conversation["messages"],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **settings,
        )
        row["ids"] = masked["input_ids"]
        row["mask"] = "".join(map(str, masked["assistant_masks"]))
    return row


def expression(source):
    try:
        return {"source": source, "rendered": chat_template_utils._compile_jinja_template(source).render(messages=[])}
    except Exception as error:
        return {"source": source, "error": f"{type(error).__name__}: {error}"}


def generate(root):
    freeze_the_clock()
    write_lines(root / "goldens/expressions.jsonl", map(expression, EXPRESSIONS))
    rows, meta = [], {}
    for name, spec in TEMPLATES.items():
        made = tokenizer(root, name, spec)
        meta[name] = {
            "sha256": hashlib.sha256(source(name).encode()).hexdigest(),
            "generation": "endgeneration" in source(name),
            "bos_token": spec["bos"],
            "eos_token": spec["eos"],
            "stops": spec.get("stops", []),
            "spans": spec.get("spans", "all"),
            "tokenizer": spec["tokenizer"],
        }
        for conv, conversation in CONVERSATIONS.items():
            row = render(made, name, conversation)
            rows.append({"template": row.pop("template"), "conv": conv} | row)
    write_lines(root / "goldens/templates.jsonl", rows)
    write_json(root / "goldens/template_meta.json", {"now": NOW.isoformat(), "templates": meta})
    write_json(root / "goldens/template_conversations.json", CONVERSATIONS)
