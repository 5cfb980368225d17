"""Plants each fault that an audit must find into correct rows of tokens, and counts what `suasion verify` finds.

    peers/bin/python benches/audit_faults.py SUASION [--rows 10000] [--templates chatml headers phi] [--formats jsonl ..] [--results FILE]
    peers/bin/python benches/audit_faults.py --table --results FILE

The rows are conversations made here, rendered and tokenised by `suasion prepare` with templates and tokenizers of
tests/goldens. Each fault goes into one row, and into all rows, in each storage format: JSON Lines, Parquet, Arrow (IPC)
and a folder of `datasets.save_to_disk`. It must be found in its row and nowhere else. It ends with 1 where one is not. A run that was stopped goes on where FILE ends.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import datasets
import pyarrow
import pyarrow.parquet

GOLDENS = pathlib.Path(__file__).parent.parent / "tests/goldens"
MODELS = {
    "chatml": dict(tokenizer="qwen2_5", eos_token="<|im_end|>", pad_token="<|endoftext|>"),
    "headers": dict(tokenizer="llama3_2", bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", pad_token="<|end_of_text|>"),
    "phi": dict(tokenizer="phi3", bos_token="<s>", eos_token="<|endoftext|>", pad_token="<unk>", stops=["<|end|>"]),
}
WORDS = ["tea", "garden", "bus", "map", "bird", "lane", "music", "evening", "cup", "rush hour", "letter", "bridge"]


def model(folder, name):
    """A model folder without weights."""
    made = dict(MODELS[name])
    file = GOLDENS / "tokenizers" / made.pop("tokenizer") / "tokenizer.json"
    stops = made.pop("stops", [])
    folder.mkdir()
    shutil.copy(file, folder / "tokenizer.json")
    shutil.copy(GOLDENS / "templates" / f"{name}.jinja", folder / "chat_template.jinja")
    (folder / "tokenizer_config.json").write_text(json.dumps(made))
    ids = {token["content"]: token["id"] for token in json.loads(file.read_text())["added_tokens"]}
    ends = [ids[made["eos_token"]]] + [ids[stop] for stop in stops]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return dict(bos=ids.get(made.get("bos_token")), pad=ids[made["pad_token"]])


def chats(n):
    """Conversations of one to three turns after a system message; no two alike."""
    for i in range(n):
        messages = [{"role": "system", "content": "Answer honestly and briefly."}]
        for turn in range(1 + i % 3):
            word, other = WORDS[(i + 3 * turn) % len(WORDS)], WORDS[(i + 5 * turn + 1) % len(WORDS)]
            messages.append({"role": "user", "content": f"What about the {word}, number {i}? It was {i % 17} last time, I think."})
            messages.append({"role": "assistant", "content": f"The {word} is fine, I would say {i + turn} times; the {other} is not."})
        yield {"messages": messages}


def last(row, letter):
    return row["origins"].rindex(letter)


def answer(row):
    end = last(row, "R")
    start = end
    while start and row["origins"][start - 1] == "R":
        start -= 1
    return start, end


def learn(row, places):
    for i in places:
        if i:
            row["labels"][i] = row["input_ids"][i]


def cut(row, n):
    for key in ("input_ids", "labels", "attention_mask"):
        row[key] = row[key][:n]


def everything(row, *_):
    row["labels"] = list(row["input_ids"])


def prompt(row, *_):
    learn(row, [i for i, letter in enumerate(row["origins"]) if letter in "SCKUTO"])


def prompt_word(row, *_):
    learn(row, [answer(row)[0] - 1 - [l for l in reversed(row["origins"][: answer(row)[0]])].index("K") - 2])


def header(row, *_):
    learn(row, [answer(row)[0] - 1])


def all_headers(row, *_):
    learn(row, [i for i in range(1, len(row["origins"])) if row["origins"][i] == "B"])


def stop_masked(row, *_):
    row["labels"][last(row, "E")] = -100


def stops_masked(row, *_):
    for i, letter in enumerate(row["origins"]):
        if letter == "E":
            row["labels"][i] = -100


def no_stop(row, *_):
    cut(row, answer(row)[1] + 1)


def padding(row, _, special):
    for key, value in (("input_ids", special["pad"]), ("labels", special["pad"]), ("attention_mask", 0)):
        row[key] += [value] * 5


def nothing(row, *_):
    row["labels"] = [-100] * len(row["labels"])


def answer_cut(row, *_):
    start, end = answer(row)
    cut(row, (start + end) // 2 + 1)


def packed(row, other, _):
    for key in ("input_ids", "labels", "attention_mask"):
        row[key] = row[key] + other[key]


def two_bos(row, _, special):
    for key, value in (("input_ids", special["bos"]), ("labels", -100), ("attention_mask", 1)):
        row[key].insert(0, value)


def other_label(row, *_):
    row["labels"][answer(row)[0]] += 1


def shifted(row, *_):
    row["labels"] = row["labels"][1:] + [-100]


def late(row, *_):
    row["labels"][answer(row)[0]] = -100


def early_end(row, *_):
    row["labels"][answer(row)[1]] = -100


FAULTS = [
    ("labels equal the inputs", "M008", everything),
    ("prompts learned", "M004", prompt),
    ("one token of the prompt learned", "M004", prompt_word),
    ("the mask starts a token early", "M007", header),
    ("all role headers learned", "M007", all_headers),
    ("the last stop token masked", "M009", stop_masked),
    ("all stop tokens masked", "M009", stops_masked),
    ("no stop token", "M002", no_stop),
    ("padding learned", "M005", padding),
    ("nothing learned", "M001", nothing),
    ("answer cut", "M002", answer_cut),
    ("pack without boundaries", "P001", packed),
    ("two BOS", "M006", two_bos),
    ("a label that is another id", "L001", other_label),
    ("labels shifted by one", "L001", shifted),
    ("the mask starts a token late", "M010", late),
    ("the mask ends a token early", "M010", early_end),
]


def write(folder, form, rows):
    keep = [{key: row[key] for key in ("input_ids", "labels", "attention_mask")} for row in rows]
    path = folder / f"rows.{form}"
    if path.is_dir():
        shutil.rmtree(path)
    if form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in keep))
        return path
    lists = pyarrow.list_(pyarrow.int64())
    table = pyarrow.table({key: pyarrow.array([row[key] for row in keep], lists) for key in keep[0]})
    if form == "parquet":
        pyarrow.parquet.write_table(table, path)
    elif form == "arrow":
        with pyarrow.ipc.new_file(path, table.schema) as out:
            out.write_table(table, max_chunksize=1000)
    else:
        datasets.Dataset(table).save_to_disk(path)
    return path


def copied(row):
    return {key: list(value) if isinstance(value, list) else value for key, value in row.items()}


def table(results):
    """The results as Markdown: how many faults were found in their one row and in all rows, and rows with a false finding."""
    print("| template | rows, tokens | format | faults | found in one row | found in all rows | false findings | in the clean rows |")
    print("|---|---|---|---|---|---|---|---|")
    for clean in (line for line in results if "clean" in line):
        own = [line for line in results if "fault" in line and all(line[k] == clean[k] for k in ("template", "format", "rows"))]
        found = [sum(line[where][0] == line[where][1] for line in own) for where in ("one", "all")]
        false = sum(line[where][2] for line in own for where in ("one", "all"))
        print(f"| {clean['template']} | {clean['rows']:,}, {clean['tokens']:,} | {clean['format']} | {len(own)} | {found[0]} | {found[1]} | "
              f"{false} | {len(clean['clean'])} |")


def verify(suasion, folder, path):
    start = time.time()
    ran = subprocess.run([suasion, "verify", "-M", folder, "-D", path, "--json"], capture_output=True, text=True)
    assert ran.returncode in (0, 1), ran.stderr
    assert "not looked for" not in ran.stderr, ran.stderr
    return json.loads(ran.stdout), time.time() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suasion", nargs="?")
    parser.add_argument("--table", action="store_true", help="print FILE as Markdown and run nothing")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--templates", nargs="+", default=list(MODELS))
    parser.add_argument("--formats", nargs="+", default=["jsonl", "parquet", "arrow", "saved"])
    parser.add_argument("--results", type=pathlib.Path)
    args = parser.parse_args()
    results = [json.loads(line) for line in args.results.open()] if args.results and args.results.exists() else []
    if args.table:
        return table(results)
    datasets.disable_progress_bars()

    def keep(line):
        results.append(line)
        if args.results:
            with args.results.open("a") as out:
                out.write(json.dumps(line) + "\n")

    done = {(line["template"], line["format"], line.get("fault")) for line in results if line["rows"] == args.rows}
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        for name in args.templates:
            folder = scratch / name
            special = model(folder, name)
            raw = folder / "chats.jsonl"
            raw.write_text("".join(json.dumps(row) + "\n" for row in chats(args.rows)))
            made = folder / "made.jsonl"
            subprocess.run([args.suasion, "prepare", "-M", folder, "-D", raw, "-o", made, "--quiet"], check=True)
            clean = [json.loads(line) for line in made.open()]
            for row in clean:
                row["attention_mask"] = [1] * len(row["input_ids"])
            assert len(clean) == args.rows
            for form in args.formats:
                if (name, form, None) not in done:
                    found, seconds = verify(args.suasion, folder, write(scratch, form, clean))
                    counts = {code: n for code, n in found["counts"].items() if code != "D001"}
                    print(f"{name} {form}: clean: {counts or 'nothing'}, {found['tokens']:,} tokens, {seconds:.2f} s", flush=True)
                    wrong += bool(counts)
                    keep({"template": name, "format": form, "rows": len(clean), "tokens": found["tokens"], "clean": counts})
                for what, code, plant in FAULTS:
                    if plant is two_bos and special["bos"] != clean[0]["input_ids"][0]:
                        continue
                    if (name, form, what) in done:
                        continue
                    line = {"template": name, "format": form, "fault": what, "code": code, "rows": len(clean)}
                    for where in ("one", "all"):
                        at = [len(clean) // 2] if where == "one" else range(len(clean))
                        rows = list(clean)
                        for i in at:
                            rows[i] = copied(clean[i])
                            plant(rows[i], clean[(i + 1) % len(clean)], special)
                        found, _ = verify(args.suasion, folder, write(scratch, form, rows))
                        hit = {f["row"] for f in found["findings"] if f["code"] == code}
                        false = {f["row"] for f in found["findings"] if f["code"] != "D001"} - set(at)
                        line[where] = [len(hit & set(at)), len(at), len(false)]
                    ok = all(line[where][0] == line[where][1] and not line[where][2] for where in ("one", "all"))
                    wrong += not ok
                    keep(line)
                    print(f"{name} {form} {code} {what}: one {line['one']}, all {line['all']}{'' if ok else '  WRONG'}", flush=True)
    print(f"{sum('fault' in line for line in results)} faults, {wrong} wrong in this run")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
