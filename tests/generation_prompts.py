"""What transformers gives a model before each answer of nine conversations, under every chat template in some folders.

    python tests/generation_prompts.py FOLDER.. > prompts.jsonl

A line for each template (*.jinja) and conversation: `source` of the template, `bos`, `eos`, `conversation`, the whole
rendering as `whole` and, by the index of the answer, the renderings of the messages before it with the generation prompt
(`with`) and without (`without`); null where the template refuses. TRL's own templates are added where it is installed.
crates/data/tests/generation_prompts.rs compares these with the answers' starts.

tests/goldens/templates, the test material and TRL have 134 distinct templates. The source archives of llama-cpp-python
(vendor/llama.cpp/models/templates) and vllm (examples) on PyPI have some 90 more: `pip download --no-deps --no-binary :all:`,
unpack the *.jinja files into a folder, and name it in SUASION_TEMPLATES for the test. They stay out of this repository.
"""

import importlib.util
import json
import sys
from pathlib import Path

from transformers.utils.chat_template_utils import render_jinja_template


def user(text):
    return {"role": "user", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


def call(name, **arguments):
    return {"id": "call12345", "type": "function", "function": {"name": name, "arguments": arguments}}


def result(text):
    return {"role": "tool", "content": text, "name": "look", "tool_call_id": "call12345"}


SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]},
    },
}
THOUGHT = "<think>\nhm, let me see\n</think>\n\nYes."

SHAPES = {
    "one": [user("Are buses slow?"), answer("At rush hour.")],
    "system": [SYSTEM, user("Are buses slow?"), answer("Yes.")],
    "turns": [user("One?"), answer("1"), user("Two?"), answer("2"), user("Three?"), answer("3")],
    "call": [user("Look there."), answer("", tool_calls=[call("look", at="there")]), result("rain"), answer("It rains.")],
    "calls": [
        user("Look twice."),
        answer("", tool_calls=[call("look", at="here"), call("look", at="there")]),
        result("sun"),
        result("rain"),
        answer("Mixed."),
    ],
    "reasoning": [user("Why?"), answer("So.", reasoning_content="first"), user("Sure?"), answer("Yes.", reasoning_content="second")],
    "reasoning_after_result": [
        user("Look there."),
        answer("", reasoning_content="I look", tool_calls=[call("look", at="there")]),
        result("rain"),
        answer("It rains.", reasoning_content="I saw it"),
    ],
    "inline_thoughts": [user("Why?"), answer(THOUGHT), user("Sure?"), answer(THOUGHT)],
    "white_space": [user(" Why?\n"), answer("\n So. \n"), user("Sure?"), answer("Yes.\n\n")],
}


def render(source, messages, tools, prompt, special):
    try:
        rendered, _ = render_jinja_template(
            conversations=[messages], tools=tools, chat_template=source, add_generation_prompt=prompt, **special
        )
        return rendered[0]
    except Exception:  # whatever a template raises
        return None


def main():
    folders = [Path(folder) for folder in sys.argv[1:]]
    trl = importlib.util.find_spec("trl")
    if trl is not None:
        folders.append(Path(trl.origin).parent / "chat_templates")
    seen = set()
    for folder in folders:
        for path in sorted(folder.rglob("*.jinja")):
            source = path.read_text(encoding="utf-8")
            if source in seen:
                continue
            seen.add(source)
            special = {"bos_token": "<s>", "eos_token": "<|im_end|>" if "<|im_end|>" in source else "</s>"}
            for shape, messages in SHAPES.items():
                tools = [TOOL] if any("tool_calls" in message for message in messages) else None
                answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
                before = {
                    kind: {i: render(source, messages[:i], tools, kind == "with", special) for i in answers}
                    for kind in ("with", "without")
                }
                row = {
                    "template": f"{folder.name}/{path.relative_to(folder)}",
                    "source": source,
                    "bos": special["bos_token"],
                    "eos": special["eos_token"],
                    "shape": shape,
                    "conversation": {"messages": messages, "tools": tools},
                    "whole": render(source, messages, tools, False, special),
                    **before,
                }
                print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    main()
