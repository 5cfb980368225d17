#!/usr/bin/env python3
"""Two builds of suasion side by side: the same results, and how fast.

    benches/old_new.py OLD NEW                  both parts
    benches/old_new.py OLD NEW --part same      results only (exit status 1 where one differs)
    benches/old_new.py OLD NEW --part speed     speed only, on an otherwise idle machine

same:  what `prepare` writes (JSON Lines, Parquet, folders; plain, packed, with shared prompts, cut, in shards) for the
       demo's rows, for every file of the test material with its tokenizers, for its chat templates, and for --rows
       generated rows of each format; what `verify` and `prepare` make of prepared data; and metrics, weights, `eval` and
       `generate` of short runs with the demo's model and with Llama, Qwen2 and GPT-2. Files of rows and weights are
       compared byte for byte, findings by row, code and level, manifests without what names a version.
speed: `prepare`, `verify` of prepared Parquet, and the training step, OLD and NEW in turns: each ratio is of two
       neighbouring runs, and the median of the ratios is printed (below 1: NEW is faster).

The material is in --shared (default ../shared). Raw lines are appended to benches/results/<cpu>.jsonl.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from generated_rows import Maker
from side_by_side import ROOT, Results

FORMATS = "input_full prompt_completion messages sharegpt alpaca segments tokenised packs preference".split()

# ------------------------------------------------------------------------------------------------ sameness

PLAIN = ["on_bad_row=skip", "template_date=2025-01-15"]

# name → (settings, output, flags): what each generated file is prepared as.
VARIANTS = {
    "plain": ([], "out.jsonl", []),
    "packed": (["packing=true", "max_length=512"], "out.parquet", []),
    "shared": (["packing=true", "share_prefix=true", "max_length=768"], "out.jsonl", []),
    "cut": (["max_length=96", "truncation_mode=keep_end", "prompt_loss_weight=0.1", "loss_weights.system=0.3"],
            "out.parquet", ["--with-text"]),
    "joint": (["boundary=joint", "completion_only_loss=false", "content_special_tokens=text", "supervise=last"], "out", []),
    "shards": (["truncation_mode=keep_start", "max_length=200"], "out.parquet", ["--max-shard-size", "400KB"]),
}  # fmt: skip

# tokenizer → a chat template of the material that was written for it or can be used with it.
TEMPLATES = {
    "qwen2_5": "trl/qwen2_5", "llama3_2": "trl/llama3_2", "gpt2": "axolotl/chatml", "mistral_v3": "axolotl/mistral_v2v3",
    "gemma2": "trl/gemma", "phi3": "trl/phi3", "llama2": "axolotl/mistral_v1", "gpt_neox": "axolotl/metharme",
    "t5_small": "axolotl/alpaca",
}  # fmt: skip

# Lines of metrics.jsonl differ in these between any two runs.
CLOCK = ("tokens_per_second", "peak_memory_bytes")


class Same:
    """Runs the same command with both builds, each in its own folder, and compares what they leave."""

    def __init__(self, builds, scratch):
        self.builds, self.scratch = builds, pathlib.Path(scratch)
        self.jobs, self.differences = [], []
        self.groups = {}

    def case(self, group, name, run):
        """Plans a case: `run(work)` calls `work(*arguments)` and `work.compare(…)`."""
        self.jobs.append((group, name, run))

    def run(self, workers, only):
        jobs = [job for job in self.jobs if only in f"{job[0]}: {job[1]}"]
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            for (group, name, _), work in zip(jobs, pool.map(self.one, jobs)):
                counts = self.groups.setdefault(group, {"cases": 0, "different": 0, "refused": 0, "kept": 0, "failed": 0})
                counts["cases"] += 1
                counts["different"] += bool(work.faults)
                for key, count in work.counts.items():
                    counts[key] += count
                for fault in work.faults:
                    self.differences.append((group, name, fault))
                    print(f"DIFFERENT {group}: {name}: {fault}", flush=True)

    def one(self, job):
        _, name, run = job
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            work = Work(self.builds, folder)
            try:
                run(work)
            except Exception as error:  # A bug of this script must not pass as sameness.
                work.faults.append(f"{type(error).__name__}: {error}")
            return work


class Work:
    """One case: a folder for each build."""

    def __init__(self, builds, folder):
        self.builds = builds
        self.folders = [pathlib.Path(folder) / side for side in ("old", "new")]
        for side in self.folders:
            side.mkdir()
        self.faults = []
        # How much there was to compare: commands that both builds refuse, rows that they keep, rows that fail.
        self.counts = {"refused": 0, "kept": 0, "failed": 0}

    def __call__(self, *arguments, environment=None):
        """Runs both; their standard outputs. Exit statuses and the tags of errors are compared."""
        ran = []
        for build, folder in zip(self.builds, self.folders):
            command = [build, *map(str, arguments)]
            # One thread each: results do not depend on it, and two cases run at a time.
            env = {**os.environ, "RAYON_NUM_THREADS": "1", **(environment or {})}
            ran.append(subprocess.run(command, cwd=folder, env=env, capture_output=True))
        statuses = [run.returncode for run in ran]
        tags = [b"".join(line[:line.find(b":")] for line in run.stderr.splitlines() if line.startswith(b"error["))
                for run in ran]  # fmt: skip
        if statuses[0] != statuses[1] or tags[0] != tags[1]:
            tail = [run.stderr.decode("utf-8", "replace")[-300:] for run in ran]
            self.faults.append(f"{arguments[0]} ends with {statuses[0]} {tags[0]} and {statuses[1]} {tags[1]}: {tail}")
        self.counts["refused"] += statuses[0] not in (0, 1)
        return [run.stdout for run in ran]

    def equal(self, what, pair):
        old, new = pair
        if old == new:
            return
        if isinstance(old, bytes):
            at = next((i for i, (a, b) in enumerate(zip(old, new)) if a != b), min(len(old), len(new)))
            line = old[:at].count(b"\n")
            self.faults.append(f"{what}: {len(old)} and {len(new)} bytes, first difference at byte {at} (line {line + 1}): "
                               f"{old[max(0, at - 60):at + 60]!r} and {new[max(0, at - 60):at + 60]!r}")  # fmt: skip
        else:
            self.faults.append(f"{what}: {str(old)[:400]} and {str(new)[:400]}")

    def files(self, under=""):
        """Equality of everything below a folder: the files by name, and each by its bytes or by what it says of rows."""
        trees = [sorted(path.relative_to(folder).as_posix() for path in (folder / under).rglob("*") if path.is_file())
                 for folder in self.folders]  # fmt: skip
        self.equal(f"files in {under or 'the folder'}", trees)
        for name in sorted(set(trees[0]) & set(trees[1])):
            self.file(name)

    def file(self, name):
        """Equality of one file. A folder for `datasets` carries a fingerprint of its own, which follows the manifest's."""
        if name.endswith("manifest.json"):
            self.equal(name, [self.manifest(folder / name) for folder in self.folders])
        elif name.endswith("state.json"):
            self.lines(name, lambda state: {**state, "_fingerprint": None}, whole=True)
        elif name.endswith(".findings.jsonl"):
            self.lines(name, lambda line: (line["row"], line["code"], line["level"]))
        else:
            self.equal(name, [(folder / name).read_bytes() for folder in self.folders])

    def lines(self, name, of, whole=False):
        """Equality of what `of` takes from each JSON line, or from the whole file."""
        sides = []
        for folder in self.folders:
            path = folder / name
            texts = ([path.read_text()] if whole else path.open()) if path.exists() else []
            sides.append([of(json.loads(text)) for text in texts])
        self.equal(name, sides)

    def manifest(self, path):
        """A manifest's facts about rows; its version and fingerprint may change with the masking's version."""
        manifest = json.loads(path.read_text())
        for key in ("kept", "failed"):
            self.counts[key] += manifest["counts"][key] if path.is_relative_to(self.folders[0]) else 0
        keys = ("source", "tokenizer", "template", "policy", "counts", "vocab_size", "packs")
        return [manifest.get(key) for key in keys] + [[file["bytes"] for file in manifest["files"]]]


def prepare(work, model, data, settings, output, flags=(), *, again=False):
    """Prepares with both builds and compares every file; with `again`, both also verify and prepare the old build's output."""
    sets = [part for setting in [*PLAIN, *settings] for part in ("--set", setting)]
    work("prepare", "--quiet", "-M", model, "-D", data, "-o", output, *flags, *sets)
    work.files()
    # What the old build prepared, read by both.
    shards = work.folders[0] / f"{output.split('.')[0]}-*"
    prepared = work.folders[0] / output
    if again and any(work.folders[0].iterdir()):
        prepared = prepared if prepared.exists() else shards
        verified = work("verify", "--json", "--quiet", "-D", prepared, "--set", "on_bad_row=skip")
        work.equal("verify of prepared data", [facts(out) for out in verified])
        work("prepare", "--quiet", "-M", model, "-D", prepared, "-o", "again.jsonl", *sets)
        for name in ("again.jsonl", "again.findings.jsonl"):
            if all((folder / name).exists() for folder in work.folders):
                work.file(name)


def facts(verified):
    """What `verify --json` says, without the wording of findings."""
    if not verified:
        return None
    report = json.loads(verified)
    report["findings"] = [(f["row"], f["code"], f["level"]) for f in report["findings"]]
    return report


def train(work, data, model, settings, *, generated):
    """A short run with both builds: metrics, weights, evaluation, and greedy replies."""
    sets = [part for setting in [*settings, "logging_steps=1", "output_dir=out"] for part in ("--set", setting)]
    work("train", "--quiet", "-M", model, "-D", data, *sets)
    work.file("out/model.safetensors")
    work.lines("out/metrics.jsonl", lambda line: {key: value for key, value in line.items() if key not in CLOCK})
    outs = work("eval", "--json", "--quiet", "-M", "out", "-D", data, "--set", "max_length=null")
    work.equal("eval", [json.loads(out or "null") for out in outs])
    if generated:
        work.equal("generate", work("generate", "--json", "--quiet", "-M", "out", "-D", data, "--rows", "4",
                                    "--max-new-tokens", "24"))  # fmt: skip


def demo(work):
    work("train", "--demo", "--quiet", "--json", "--set", "max_steps=12")
    work.files("suasion-demo/data")
    work.files("suasion-demo/model")
    work.file("suasion-demo/run/model.safetensors")
    work.lines("suasion-demo/run/metrics.jsonl", lambda line: {k: v for k, v in line.items() if k not in CLOCK})


def golden_rows(golden):
    """The batches of a model's golden values as tokenised rows."""
    lines = []
    for batch in ("a", "padded"):
        columns = json.loads(golden.read_text())["batches"][batch]
        for row in zip(columns["input_ids"], columns["labels"], columns["attention_mask"]):
            lines.append(json.dumps(dict(zip(("input_ids", "labels", "attention_mask"), row))))
    return "\n".join(lines) + "\n"


def folders(options, scratch):
    """Model folders: the demo's, and each tokenizer of the material with a template."""
    material = options.shared / "material"
    models = {"demo": ROOT / "examples" / "persuasion"}
    for tokenizer, template in TEMPLATES.items():
        source = material / "tokenizers" / tokenizer
        if source.is_dir():
            folder = pathlib.Path(scratch) / "models" / tokenizer
            shutil.copytree(source, folder)
            folder.chmod(0o755)
            shutil.copyfile(material / "templates" / f"{template}.jinja", folder / "chat_template.jinja")
            models[tokenizer] = folder
    return models


def same(options, results, scratch):
    same = Same([options.old, options.new], scratch)
    models = folders(options, scratch)
    material = options.shared / "material"
    demo_rows = ROOT / "examples" / "persuasion" / "rows.jsonl"

    same.case("train --demo", "12 steps", demo)
    small = ["init=random", "max_steps=12", "learning_rate=1e-3", "eval_fraction=0.1", "eval_strategy=steps", "eval_steps=6"]
    for name, more in {
        "rows": [],
        "packs": ["packing=true", "max_length=512", "share_prefix=true"],
        "weighted": ["prompt_loss_weight=0.1", "gradient_accumulation_steps=2", "per_device_train_batch_size=3"],
        "all tokens, recomputed": ["completion_only_loss=false", "gradient_checkpointing=true", "lr_scheduler_type=cosine"],
    }.items():
        run = lambda work, more=more: train(work, demo_rows, models["demo"], small + more, generated=True)
        same.case("training", f"demo's model, {name}", run)
    for family in ("llama", "qwen2", "gpt2"):
        model = material / "models" / family
        if model.is_dir():
            data = pathlib.Path(scratch) / f"{family}.jsonl"
            data.write_text(golden_rows(model / "golden.json"))
            for batch, accumulation in ((5, 1), (1, 5), (2, 3)):
                sets = ["shuffle_dataset=false", "max_steps=8", "warmup_steps=2", "weight_decay=0.1", "max_length=null",
                        "learning_rate=1e-3", f"per_device_train_batch_size={batch}",
                        f"gradient_accumulation_steps={accumulation}"]  # fmt: skip
                run = lambda work, data=data, model=model, sets=sets: train(work, data, model, sets, generated=False)
                same.case("training", f"{family}, {accumulation} times {batch} rows", run)

    files = sorted((material / "datasets").glob("*")) if material.is_dir() else []
    for name, model in models.items():
        for data in [demo_rows, *files]:
            run = lambda work, model=model, data=data: prepare(work, model, data, [], "out.jsonl")
            same.case("prepare: material", f"{data.name} with {name}", run)
    model = models.get("qwen2_5", models["demo"])
    for data in [demo_rows, *files]:
        for name, (settings, output, flags) in VARIANTS.items():
            if name != "plain":
                run = lambda work, data=data, a=settings, b=output, c=flags: prepare(work, model, data, a, b, c, again=True)
                same.case("prepare: material", f"{data.name}, {name}", run)
    columns = ROOT / "crates" / "data" / "tests" / "columnar"
    for data in sorted([*columns.glob("*.parquet"), *columns.glob("*.arrow"), *columns.glob("*_saved")]):
        run = lambda work, data=data: prepare(work, model, data, [], "out.jsonl")
        same.case("prepare: columns", data.name, run)

    chats = [material / "datasets" / name for name in ("oasst_en_100_messages.jsonl", "glaive_messages_tools.jsonl",
                                                       "reason_tool_use_parts.jsonl")]  # fmt: skip
    if material.is_dir():
        generated = pathlib.Path(scratch) / "chats.jsonl"
        generated.write_text(Maker(5).rows("messages", 300))
        sample = pathlib.Path(scratch) / "sample.jsonl"
        sample.write_text("".join("".join(chat.open().readlines()[:40]) for chat in chats) + generated.read_text())
        for template in sorted((material / "templates").glob("*/*.jinja")):
            folder = pathlib.Path(scratch) / "templates" / f"{template.parent.name}-{template.stem}"
            shutil.copytree(material / "tokenizers" / "qwen2_5", folder)
            folder.chmod(0o755)
            shutil.copyfile(template, folder / "chat_template.jinja")
            run = lambda work, folder=folder: prepare(work, folder, sample, [], "out.jsonl")
            same.case("prepare: templates", f"{template.parent.name}/{template.name}", run)

    for seed, kind in enumerate(FORMATS):
        data = pathlib.Path(scratch) / f"{kind}.jsonl"
        data.write_text(Maker(seed).rows(kind, options.rows))
        own = models["demo"] if kind in ("input_full", "tokenised", "packs") else model
        for name, (settings, output, flags) in VARIANTS.items():
            run = lambda work, own=own, data=data, a=settings, b=output, c=flags: prepare(work, own, data, a, b, c, again=True)
            same.case(f"prepare: {options.rows} {kind}", name, run)

    started = time.perf_counter()
    same.run(options.workers, options.only)
    for group, counts in same.groups.items():
        results.add(bench="old_new", part="same", group=group, **counts)
    print(f"\n{'same':<34} {'cases':>6} {'different':>10} {'rows kept':>10} {'failed':>8} {'commands that both refuse':>26}")
    for group, c in same.groups.items():
        print(f"{group:<34} {c['cases']:>6} {c['different']:>10} {c['kept']:>10,} {c['failed']:>8,} {c['refused']:>26}")
    print(f"{time.perf_counter() - started:.0f} s\n")
    return not same.differences


# ------------------------------------------------------------------------------------------------ speed


def timed(command, folder):
    """Wall seconds of a command from start to exit, and its peak resident MB."""
    before = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - before
    if os.waitstatus_to_exitcode(status) not in (0, 1):
        sys.exit(f"{' '.join(map(str, command))}:\n{error.decode()}")
    return seconds, usage.ru_maxrss * 1024 // 1_000_000


def step_seconds(build, folder, model, data, settings):
    """The median seconds of a training step, by the run's own metrics: reading and start are left out."""
    sets = [part for setting in [*settings, "logging_steps=1", "output_dir=out"] for part in ("--set", setting)]
    shutil.rmtree(folder / "out", ignore_errors=True)
    _, mb = timed([build, "train", "--quiet", "-M", model, "-D", data, *sets], folder)
    lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").open()]
    # The first steps touch memory for the first time.
    steps = [line["tokens"] / line["tokens_per_second"] for line in lines if "tokens" in line][3:]
    return statistics.median(steps), mb


def speed(options, results, scratch):
    scratch = pathlib.Path(scratch)
    models = folders(options, scratch / "speed")
    peers = options.shared / "peers"
    subprocess.run([sys.executable, peers / "make_rows.py", scratch], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([sys.executable, peers / "make_distinct.py", scratch, "20"], check=True, stdout=subprocess.DEVNULL)
    qwen, demo = models["qwen2_5"], models["demo"]
    sets = [part for setting in ["max_length=1024", "truncation_mode=keep_start", *PLAIN] for part in ("--set", setting)]
    prepare = lambda data, output, *more: lambda build: timed(
        [build, "prepare", "--quiet", "-D", scratch / data, "-M", qwen, "-o", output, "--rebuild", *sets, *more], scratch)
    for output, more in (("rows.parquet", ()), ("packs.parquet", ("--set", "packing=true"))):
        prepare("pc.jsonl", output, *more)(options.old)
    verify = lambda data, *more: lambda build: timed([build, "verify", "--quiet", "--json", "-D", data, *more], scratch)
    wide = scratch / "wide"
    wide.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo / name, wide / name)
    config = json.loads((demo / "config.json").read_text())
    config |= {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 8,
               "num_key_value_heads": 4, "head_dim": 32}  # fmt: skip
    (wide / "config.json").write_text(json.dumps(config))
    rows = demo / "rows.jsonl"
    step = lambda model, steps: lambda build: step_seconds(
        build, scratch, model, rows, ["init=random", f"max_steps={steps}", "save_strategy=no", "per_device_train_batch_size=4"])
    measures = {
        "prepare: 20,000 prompt/completion rows": prepare("pc.jsonl", "speed.jsonl"),
        "prepare: 10,000 conversations": prepare("msgs.jsonl", "speed.jsonl"),
        "prepare: distinct rows, 20 MB": prepare("distinct.jsonl", "speed.jsonl"),
        "prepare: packs to Parquet": prepare("pc.jsonl", "speed.parquet", "--set", "packing=true"),
        "verify: prepared Parquet": verify("rows.parquet"),
        "verify: prepared Parquet, with the model": verify("rows.parquet", "-M", qwen),
        "verify: packs in Parquet": verify("packs.parquet"),
        "training step: the demo's model (1.0 M)": step(demo, 40),
        "training step: 6 layers of width 256": step(wide, 12),
    }
    table = []
    for name, measure in measures.items():
        seconds, memory, ratios = ([], []), ([], []), []
        for turn in range(-1, options.rounds):
            pair = []
            # The order alternates too: the first of a round runs on a machine that the second has just used.
            for side in (0, 1) if turn % 2 else (1, 0):
                taken, mb = measure((options.old, options.new)[side])
                # The first round warms the disk's cache.
                if turn >= 0:
                    seconds[side].append(taken)
                    memory[side].append(mb)
                    results.add(bench="old_new", part="speed", measure=name, side=("old", "new")[side], round=turn,
                                seconds=round(taken, 4), peak_mb=mb)  # fmt: skip
                pair.append((side, taken))
            if turn >= 0:
                pair = dict(pair)
                ratios.append(pair[1] / pair[0])
        old, new = (statistics.median(side) for side in seconds)
        ratio = statistics.median(ratios)
        table.append((name, old, new, ratio, min(ratios), max(ratios), *(max(side) for side in memory)))
        results.add(bench="old_new", part="speed", measure=name, side="ratio", old_s=round(old, 4), new_s=round(new, 4),
                    ratio=round(ratio, 4), ratios=[round(r, 4) for r in ratios])  # fmt: skip
    print(f"\n{'speed':<42} {'old':>9} {'new':>9} {'new/old':>8} {'from':>6} {'to':>6} {'old MB':>7} {'new MB':>7}")
    for name, old, new, ratio, low, high, *mb in table:
        print(f"{name:<42} {old:>7.3f} s {new:>7.3f} s {ratio:>8.3f} {low:>6.3f} {high:>6.3f} {mb[0]:>7} {mb[1]:>7}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=pathlib.Path)
    parser.add_argument("new", type=pathlib.Path)
    parser.add_argument("--part", choices=["same", "speed", "both"], default="both")
    parser.add_argument("--rows", type=int, default=10_000, help="generated rows of each format")
    parser.add_argument("--only", default="", help="the cases of `same` whose names have this in them")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each measurement")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="cases of `same` at a time")
    parser.add_argument("--scratch", help="a folder on a large disk")
    parser.add_argument("--shared", type=pathlib.Path, default=ROOT.parent / "shared")
    options = parser.parse_args()
    options.old, options.new, options.shared = (path.resolve() for path in (options.old, options.new, options.shared))
    results = Results()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        equal = same(options, results, scratch) if options.part != "speed" else True
        if options.part != "same":
            speed(options, results, scratch)
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
