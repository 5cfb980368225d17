"""Rows of every format, generated from a seed."""

import json
import random

WORDS = (
    "I you we they think that this is not really very good bad fair true false reason because although buses trains tea "
    "music gardens people often never always perhaps argue persuade agree doubt evidence study 2024 3.14 1,000 50% don't "
    "we're naïve café Straße œuvre Привет мир 日本語 テキスト 中文 한국어 עברית العربية हिन्दी e\u0301 \u200b 👩‍👩‍👧‍👦 👍🏽 🇩🇪 "
    "def f(x): return {'a': [1, 2]} https://example.org/a?b=c snake_case CamelCase <b>bold</b> \\n \\\\ \"quoted\" [TASK] "
    "[RESPONSE] <|im_end|> <|im_start|> </s> <s> <|endoftext|> <|eot_id|> {{ x }} {% raw %} <think> </think>"
).split(" ")
SPACES = [" "] * 40 + ["\n", "\n\n", "\t", "  ", "\r\n", "\u00a0", ""]


class Maker:
    """Rows of every format, most of them good, from a seed."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def chance(self, share):
        return self.random.random() < share

    def text(self, most=40):
        n = int(self.random.expovariate(1.5 / most))
        parts = []
        for _ in range(min(n, 20 * most)):
            parts += [self.random.choice(WORDS), self.random.choice(SPACES)]
        edge = self.random.choice
        return edge(["", "", "", " ", "\n"]) + "".join(parts).strip(" ") + edge(["", "", "", " ", "\n"])

    def some(self, most=40):
        return self.text(most).strip() or "So it is."

    def input_full(self):
        parts = [f"[{name}] {self.some()}" for name in ("SYSTEM", "CONTEXT", "TASK") if not self.chance(0.1)]
        prompt = "\n".join(parts) + self.random.choice(["\n[RESPONSE]", "\n[RESPONSE] ", "", "\n"])
        full = prompt + self.random.choice([" ", "", "\n"]) + self.text()
        return {"input_text": prompt, "full_text": full[1:] if self.chance(0.005) else full}

    def prompt_completion(self):
        if self.chance(0.2):
            turns = self.turns()
            return {"prompt": turns[:-1], "completion": turns[-1:]}
        return {"prompt": self.text(), "completion": self.random.choice([" ", "", "\n"]) + self.text()}

    def message(self, role):
        message = {"role": role, "content": self.some(25) if not self.chance(0.02) else self.text()}
        if role == "assistant":
            if self.chance(0.04):
                message["reasoning_content"] = self.some(15)
            if self.chance(0.05):
                message["train"] = self.chance(0.5)
            if self.chance(0.03):
                message["weight"] = self.random.choice([0, 0.5, 1])
            if self.chance(0.03):
                call = {"name": "look_up", "arguments": {"query": self.some(4), "most": 3}}
                message["tool_calls"] = [{"type": "function", "function": call}]
                message["content"] = self.random.choice(["", None, message["content"]])
        elif self.chance(0.03):
            message["content"] = [{"type": "text", "text": self.some(8)}, {"type": "text", "text": self.some(8)}]
        return message

    def turns(self):
        roles = ["system"] * self.chance(0.4) + ["user", "assistant"] * self.random.choice([1, 1, 1, 2, 2, 3, 5])
        if self.chance(0.03):
            roles.remove("user")
        turns = [self.message(role) for role in roles]
        # The last answer is one to learn from.
        turns[-1] = {"role": "assistant", "content": self.some(25)}
        return turns

    def messages(self):
        row = {"messages": self.turns()}
        if self.chance(0.05):
            row["messages"].append(self.message("user"))
        if self.chance(0.05):
            properties = {"query": {"type": "string", "description": self.some(4)}, "most": {"type": "integer"}}
            parameters = {"type": "object", "properties": properties, "required": ["query"]}
            row["tools"] = [{"type": "function", "function": {
                "name": "look_up", "description": self.some(6), "parameters": parameters}}]  # fmt: skip
        if self.chance(0.02):
            row["chat_template_kwargs"] = {"enable_thinking": self.chance(0.5)}
        return row

    def sharegpt(self):
        names = {"user": "human", "assistant": "gpt", "system": "system"}
        turns = [turn for turn in self.turns() if isinstance(turn["content"], str)]
        row = {"conversations": [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]}
        if self.chance(0.2):
            row["system"] = self.some(10)
        return row

    def alpaca(self):
        row = {"instruction": self.some(), "input": self.random.choice(["", self.some()]), "output": self.text()}
        if self.chance(0.1):
            row["history"] = [[self.some(10), self.some(10)] for _ in range(self.random.randrange(3))]
        if self.chance(0.1):
            row["system"] = self.some(8)
        return row

    def segments(self):
        def segment():
            kinds = [{"train": self.chance(0.5)}, {"label": True}, {"weight": self.random.choice([0, 0.5, 1])}]
            return {"text": self.text(15), **(self.random.choice(kinds) if not self.chance(0.01) else {})}

        return {"segments": [segment() for _ in range(self.random.randrange(1, 7))]}

    def ids(self, most):
        return [self.random.randrange(2, 1500) for _ in range(self.random.randrange(1, most + 1))] + [0]

    def packs(self):
        """Rows in a pack, as TRL's packing leaves them."""
        ids, labels, lengths = [], [], []
        for _ in range(self.random.randrange(1, 6)):
            row = self.ids(60)
            cut = self.random.randrange(1, len(row))
            ids, labels, lengths = ids + row, labels + [-100] * cut + row[cut:], lengths + [len(row)]
        pack = {"input_ids": ids, "labels": labels, "seq_lengths": lengths}
        if self.chance(0.3):
            pack["position_ids"] = [i for n in lengths for i in range(n)]
        if self.chance(0.01):
            pack["seq_lengths"][0] += 1
        return pack

    def tokenised(self):
        ids = self.ids(self.random.choice([3, 10, 40, 90, 200, 700]))
        cut = self.random.randrange(len(ids) + 1)
        kind = self.random.randrange(8)
        row = {"input_ids": ids}
        if kind == 0:
            row["completion_mask"] = [0] * cut + [1] * (len(ids) - cut)
        elif kind == 1:
            row["assistant_masks"] = [0] * cut + [1] * (len(ids) - cut)
        else:
            row["labels"] = [-100] * cut + ids[cut:]
        if kind == 2:
            row["attention_mask"] = [1] * len(ids)
        if kind == 3:
            padding = self.random.randrange(6)
            row = {"input_ids": ids + [0] * padding, "labels": row["labels"] + [-100] * padding,
                   "attention_mask": [1] * len(ids) + [0] * padding}  # fmt: skip
        if self.chance(0.01):
            row["labels"] = (row.get("labels") or ids)[:-1]
        return row

    def preference(self):
        if self.chance(0.5):
            return {"prompt": self.text(), "chosen": " " + self.some(), "rejected": " " + self.some()}
        turns = self.turns()
        return {"prompt": turns[:-1], "chosen": turns[-1:], "rejected": [self.message("assistant")]}

    def rows(self, kind, n):
        made = []
        for _ in range(n):
            if made and self.chance(0.02):
                made.append(self.random.choice(made[-200:]))
            elif self.chance(0.003):
                made.append(json.dumps(self.random.choice([{}, {"text": self.text()}, {"prompt": None}, [1]])))
            else:
                made.append(json.dumps(getattr(self, kind)(), ensure_ascii=False))
        return "\n".join(made) + "\n"
