#!/usr/bin/env python3
"""usage: gigatoken_encode.py MODEL ROWS   times gigatoken's encoding of prompt/completion rows; prints a line of JSON.

Each row's prompt and completion are one text, as `prepare` tokenises them. The clock starts with the texts in memory and
ends with the ids there: no mask, no offsets, no checks, no output.
"""

import json
import resource
import sys
import time

import gigatoken

model, rows = sys.argv[1:]
tokenizer = gigatoken.Tokenizer(f"{model}/tokenizer.json")
with open(rows, encoding="utf-8") as file:
    texts = [row["prompt"] + row["completion"] for row in map(json.loads, file)]
start = time.perf_counter()
ids = tokenizer.encode_batch(texts)
seconds = time.perf_counter() - start
tokens = sum(len(row) for row in ids)
print(json.dumps({
    "rows": len(texts), "tokens": tokens, "seconds": round(seconds, 3), "tokens_per_second": round(tokens / seconds),
    "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
}))  # fmt: skip
