"""Rows of the demo in the shapes that the other parts train on, and conversations with tools."""

import json

from common import demo_rows, write_lines, write_text


def sections(text):
    """The texts behind [SYSTEM], [CONTEXT] and [TASK]."""
    names = ["[SYSTEM] ", "\n[CONTEXT] ", "\n[TASK] ", "\n[RESPONSE]"]
    places = [text.index(name) for name in names]
    return [text[a + len(n) : b] for a, b, n in zip(places, places[1:], names)]


def start(text, sentences=2):
    """Its first sentences."""
    parts = text.split(". ")
    return ". ".join(parts[:sentences]) + "." * (len(parts) > sentences)


def prompt_completion(rows):
    """Every eighth row; the next row's answer to the same view is the rejected one. The prompt is the demo's own, one
    without sections, or the task alone."""
    made = []
    for n, i in enumerate(range(0, len(rows) - 1, 8)):
        prompt, completion = rows[i]
        _, context, task = sections(prompt)
        if n % 3 == 1:
            prompt, completion = f"{task}\n\n{context}\n\n### Reply:\n", completion.strip()
        if n % 3 == 2:
            prompt = f"{task}\n"
        made.append({"prompt": prompt, "completion": start(completion), "rejected": start(rows[i + 1][1])})
    return made


def messages(rows):
    """Conversations of one to three turns over the replies to one view."""
    made = []
    for i in range(0, len(rows) - 4, 9):
        turns = []
        system, context, task = sections(rows[i][0])
        if i % 2:
            turns.append({"role": "system", "content": system})
        for turn in range(1 + i // 9 % 3):
            _, _, task = sections(rows[i + turn][0])
            ask = f"{context}\n\n{task}" if turn == 0 else f"And now: {task.lower()}"
            turns.append({"role": "user", "content": ask})
            turns.append({"role": "assistant", "content": start(rows[i + turn][1].strip(), 1 + (i + turn) % 3)})
        made.append({"messages": turns})
    return made


def tool(name, description, **properties):
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {key: {"type": kind} for key, kind in properties.items()},
                "required": list(properties),
            },
        },
    }


LIBRARY = tool("find_book", "Find a book on the shelf.", title="string")
SUM = tool("add", "Add two \"whole\" numbers <a> & <b>.", a="integer", b="integer")
TRAIN = tool("next_train", "When does the next train leave?", station="string", after="string")


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tools():
    """Calls and results, several at once, with and without words beside them, a system message and a second turn."""
    user = lambda text: {"role": "user", "content": text}
    says = lambda text, *calls: {"role": "assistant", "content": text, **({"tool_calls": list(calls)} if calls else {})}
    result = lambda text: {"role": "tool", "content": text}
    system = {"role": "system", "content": "Use a tool where one fits."}
    made = []
    for n, (town, time) in enumerate([("Bern", "08:15"), ("Zürich", "17:40"), ("Genève", "23:59")]):
        made.append(
            {
                "messages": [
                    user(f"When is the next train from {town} after {time}?"),
                    says("", call("next_train", station=town, after=time)),
                    result(f'{{"leaves": "{time[:-1]}9", "track": {n + 3}}}'),
                    says(f"It leaves from track {n + 3} at {time[:-1]}9."),
                ],
                "tools": [TRAIN],
            }
        )
        made.append(
            {
                "messages": [
                    system,
                    user(f"What is {n} + {7 * n}, and do you have “{town} by night”?"),
                    says("Two things at once.", call("add", a=n, b=7 * n), call("find_book", title=f"{town} by night")),
                    result(str(8 * n)),
                    result('{"shelf": null, "note": "lent <until Monday>"}'),
                    says(f"{8 * n}. The book is lent."),
                    user("Thanks!"),
                    says("You are welcome."),
                ],
                "tools": [SUM, LIBRARY],
            }
        )
        made.append({"messages": [system, user(f"Hello from {town} 🙂"), says("Hello!")], "tools": [SUM]})
        made.append(
            {
                "messages": [
                    user(f"Add {n} and 1, then add 1 again."),
                    says("", call("add", a=n, b=1)),
                    result(str(n + 1)),
                    says("", call("add", a=n + 1, b=1)),
                    result(str(n + 2)),
                    says(f"The end result is {n + 2}."),
                ],
                "tools": [SUM, TRAIN],
            }
        )
    return made


def sharegpt(row):
    """A row of `tools` in ShareGPT's spelling, which has one call a message."""
    turns = []
    for message in row["messages"]:
        speaker = {"user": "human", "assistant": "gpt", "tool": "observation"}.get(message["role"], message["role"])
        if "tool_calls" in message:
            (one,) = message["tool_calls"]
            turns.append({"from": "function_call", "value": json.dumps(one["function"], ensure_ascii=False)})
        else:
            turns.append({"from": speaker, "value": message["content"]})
    return {"conversations": turns, "tools": json.dumps(row["tools"], ensure_ascii=False)}


def single_calls(row):
    return all(len(message.get("tool_calls", [0])) == 1 for message in row["messages"])


def other_formats(rows):
    """Files of the other formats that are known, and of three that are none."""
    some = [(*sections(prompt), answer.strip()) for prompt, answer in rows[:40:5]]
    talk = lambda context, task, answer: [
        {"role": "user", "content": f"{context} {task}"},
        {"role": "assistant", "content": start(answer)},
    ]
    parts = lambda text: [{"type": "text", "value": text}]
    yield "alpaca.json", [{"instruction": t, "input": c, "output": start(a)} for _, c, t, a in some]
    yield "preferences.jsonl", [{"prompt": c, "chosen": start(a), "rejected": "No."} for _, c, _, a in some]
    yield "feedback.json", [
        {"messages": talk(c, t, a), "label": i % 3 != 0} for i, (_, c, t, a) in enumerate(some)
    ]
    yield "parts_loss_weight.jsonl", [
        {
            "messages": [
                {"role": m["role"], "content": parts(m["content"]), "loss_weight": float(m["role"] == "assistant")}
                for m in talk(c, t, a)
            ]
        }
        for _, c, t, a in some
    ]
    yield "sharegpt_tools.json", [sharegpt(row) for row in tools() if single_calls(row)]
    yield "trees.jsonl", [
        {"tree_id": f"t{i}", "prompt": {"text": c, "replies": [{"text": start(a), "replies": []}]}}
        for i, (_, c, _, a) in enumerate(some)
    ]
    yield "threads.jsonl", [
        {"id": f"v{i}", "outcome": "open", "title": t, "replies": [{"by": "u1", "text": start(a)}]}
        for i, (_, _, t, a) in enumerate(some)
    ]
    yield "seed_tasks.jsonl", [
        {"id": f"seed_{i}", "name": "reply", "instruction": t, "instances": [{"input": c, "output": start(a)}]}
        for i, (_, c, t, a) in enumerate(some)
    ]


def dialogue(rows):
    """A table of turns, a row each: no format either."""
    lines = ["Unit,Turn,B4,B2"]
    for i, (prompt, answer) in enumerate(rows[:40:10]):
        for turn, text in enumerate([sections(prompt)[1], start(answer.strip())]):
            quoted = '"' + text.replace('"', '""') + '"'
            lines.append(f"{quoted},{turn},{turn % 2},d{i}")
    return "\n".join(lines) + "\n"


def generate(root):
    rows = demo_rows()
    folder = root / "datasets"
    write_lines(folder / "prompt_completion.jsonl", prompt_completion(rows))
    write_lines(folder / "messages.jsonl", messages(rows))
    write_lines(folder / "messages_tools.jsonl", tools())
    for name, made in other_formats(rows):
        if name.endswith(".json"):
            write_text(folder / name, json.dumps(made, ensure_ascii=False, indent=0) + "\n")
        else:
            write_lines(folder / name, made)
    write_text(folder / "dialogue.csv", dialogue(rows))


def read(root, name):
    return [json.loads(line) for line in (root / "datasets" / name).read_text(encoding="utf-8").splitlines()]
