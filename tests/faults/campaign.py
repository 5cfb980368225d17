#!/usr/bin/env python3
"""The fault campaign: kills, full disks and damaged inputs, against the binary.

usage: tests/faults/campaign.py [--binary target/debug/suasion] [--seed 1] [kills=300] [disks=60] [inputs=3000] [clocks=40]

Only the standard library is needed; the full disks need root on Linux (a tmpfs of a few hundred kB is mounted). A kind
is run as often as its number says, and not at all with 0. The last line is the counts as JSON; the exit code is 1
where something was found, and the folder of each finding is kept.

kills: a run is killed by SIGKILL, a third of them while a checkpoint is saved or pruned, and resumed, with another number
of threads, until it ends. Its weights, moments and metrics must be those of a run that nobody killed. The runs take turns:
all weights, LoRA, 8-bit AdamW, Adafactor, a moving average, the best checkpoint restored.

disks: a run writes to a disk that becomes full at a random place. It must end with exit 0, or with exit 3 and E-IO; it
must not damage a checkpoint that was there; and resumed with space it must end with the same bytes.

inputs: a copy of a good input, of every kind that is read, is damaged: bits, bytes, cuts, insertions, other files' bytes,
lengths. The command must end in time, without a panic and not by a signal, with an exit code of the contract; and where it
says that all is well, it must have done what it does with the undamaged input, or have said what it left out.

clocks: as the kills, with a clock that jumps: before each resume the files of the run get times between 1970 and 2100, and
where libfaketime is installed (Debian's `faketime`) each process has a clock of its own that jumps while it runs.
"""

import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO = REPOSITORY / "examples/persuasion"
TIMEOUT = 300
SETTINGS = [
    "init=random", "per_device_train_batch_size=3", "learning_rate=1e-2", "lr_scheduler_type=cosine", "warmup_steps=2",
    "eval_fraction=0.2", "eval_strategy=steps", "eval_steps=3", "max_steps=24", "save_steps=2", "save_total_limit=2",
    "load_best_model_at_end=true", "lr_scheduler_kwargs={num_cycles: 0.75}",
]  # fmt: skip

# What a run trains and keeps beside the plain weights and AdamW's moments.
VARIANTS = {
    "all weights": [],
    "LoRA": ["init=weights", "use_peft=true", "lora_target_modules=all-linear", "lora_r=4", "lora_dropout=0.1"],
    "8-bit AdamW": ["optim=adamw_8bit"],
    "Adafactor": ["optim=adafactor"],
    "moving average": ["ema_decay=0.9"],
    # The worst loss is the best here: that of the first evaluation, which falls between two saves.
    "best kept": ["greater_is_better=true", "save_steps=5"],
    "LoRA, average, 8-bit": [
        "init=weights", "use_peft=true", "lora_target_modules=all-linear", "use_dora=true", "ema_decay=0.9", "optim=adamw_8bit",
    ],
}  # fmt: skip
FAKETIME = ["/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1", "/usr/lib/aarch64-linux-gnu/faketime/libfaketimeMT.so.1"]


def row(i):
    views = ["Buses are slow.", "Maps are boring.", "Tea is better cold.", "Nobody needs a garden."]
    replies = ["They are, at rush hour.", "Perhaps the ones in school.", "On a hot day, yes.", "Nobody needs music either."]
    start = f"[SYSTEM] Be honest.\n[CONTEXT] {views[i % 4]}\n[TASK] Reply to view number {i}.\n[RESPONSE]"
    return {"input_text": start, "full_text": f"{start} {replies[i % 4]}"}


class Campaign:
    def __init__(self, binary, seed, folder):
        self.binary, self.random, self.folder = binary, random.Random(seed), Path(folder)
        self.findings, self.counts = [], Counter()
        model = self.folder / "model"
        model.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(DEMO / name, model / name)
        config = json.loads((DEMO / "config.json").read_text())
        config |= dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
        config |= dict(num_key_value_heads=1, head_dim=8)
        (model / "config.json").write_text(json.dumps(config))
        self.rows = self.folder / "rows.jsonl"
        self.rows.write_text("".join(json.dumps(row(i)) + "\n" for i in range(10)))
        self.clock = None
        # The base of the adapters: the model with weights.
        args = ["train", "-M", "model", "-D", "rows.jsonl", "-o", "made", "--set", "init=random", "--set", "max_steps=1"]
        made = self.run([*args, "--set", "save_strategy=no"])
        assert made.returncode == 0, made.stderr
        shutil.copytree(model, self.folder / "base")
        shutil.copy(self.folder / "made/model.safetensors", self.folder / "base/model.safetensors")
        shutil.rmtree(self.folder / "made")

    def environment(self):
        known = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "RUST_"))}
        return known | (self.clock or {})

    def run(self, args, cwd=None, timeout=TIMEOUT):
        try:
            return subprocess.run(
                [self.binary, *map(str, args)], cwd=cwd or self.folder, capture_output=True, timeout=timeout,
                stdin=subprocess.DEVNULL, env=self.environment(),
            )  # fmt: skip
        except subprocess.TimeoutExpired as late:
            return subprocess.CompletedProcess(args, -999, late.stdout or b"", late.stderr or b"")

    def start(self, args):
        return subprocess.Popen(
            [self.binary, *map(str, args)], cwd=self.folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, env=self.environment(),
        )  # fmt: skip

    def train(self, out, *more):
        sets = [part for setting in (*SETTINGS, f"output_dir={out}", *more) for part in ("--set", setting)]
        return ["train", "-M", "base" if "init=weights" in more else "model", "-D", "rows.jsonl", *sets]

    def found(self, kind, what, ran=None):
        text = f"{kind}: {what}"
        if ran is not None:
            text += f" (exit {ran.returncode}: {(ran.stderr or b'')[-600:].decode(errors='replace').strip()})"
        self.findings.append(text)
        print(f"FOUND {text}", flush=True)

    # -- kills ---------------------------------------------------------------------------------------------------

    def kept(self, out):
        """What must be the same: weights, moments, and metrics without what the clock decides."""
        newest = max(out.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
        files = sorted([*out.glob("*.safetensors"), *newest.glob("*.safetensors")])
        lines = []
        for line in (out / "metrics.jsonl").read_text().splitlines():
            line = json.loads(line)
            for key in ("tokens_per_second", "peak_memory_bytes"):
                line.pop(key, None)
            lines.append(line)
        names = sorted(p.name for p in out.glob("checkpoint-*"))
        return {str(path.relative_to(out)): path.read_bytes() for path in files}, lines, names

    def kills(self, number, named="kills", between=lambda out: None):
        whole = {}
        done = Counter()
        killed = run = 0
        while killed < number:
            name = list(VARIANTS)[run % len(VARIANTS)]
            if name not in whole:
                out = self.folder / f"whole-{name}"
                began = time.monotonic()
                ran = self.run(self.train(out, *VARIANTS[name]))
                if ran.returncode != 0:
                    return self.found(named, f"{name}: the run without a kill failed", ran)
                whole[name] = self.kept(out), time.monotonic() - began
                shutil.rmtree(out)
            expected, took = whole[name]
            out = self.folder / f"{named}-{run}"
            run += 1
            fresh = True
            for attempt in range(40):
                threads = ["--threads", 1 + (attempt + run) % 2]
                args = [*self.train(out, *VARIANTS[name]), *threads] if fresh else ["train", "--resume", out, *threads]
                if killed >= number or attempt == 39:
                    break
                between(out)
                process = self.start(args)
                self.kill(process, out, took)
                if process.returncode != -signal.SIGKILL:
                    break
                killed += 1
                done[name] += 1
                self.counts[named] += 1
                fresh = not (out / "suasion.yaml").exists()
            args = [*self.train(out, *VARIANTS[name]), *threads] if fresh else ["train", "--resume", out, *threads]
            finished = any((out / f).exists() for f in expected[0]) and (out / "report.html").exists()
            if not finished:
                between(out)
                ran = self.run(args)
                if ran.returncode != 0:
                    self.found(named, f"{out}: {name}: the resume failed", ran)
                    continue
            self.counts[f"{named}: runs"] += 1
            try:
                same = self.kept(out) == expected
            except OSError as error:
                same = False
                self.found(named, f"{out}: {error}")
            if same:
                shutil.rmtree(out)
            else:
                self.found(named, f"{out}: {name}: not the bytes of the run without a kill")
        self.counts |= {f"{named}: {name}": n for name, n in done.items()}

    # -- clocks --------------------------------------------------------------------------------------------------

    def clocks(self, number):
        library = next((path for path in FAKETIME if os.path.exists(path)), None)
        jumps = self.folder / "clock"
        moments = ["@1970-01-02 00:00:00", "@2100-01-01 00:00:00", "-20y", "+30d", "-90s", "+0"]

        def between(out):
            for path in [out, *out.rglob("*")]:
                if path.exists():
                    os.utime(path, (self.random.uniform(0, 4.1e9),) * 2)
                    self.counts["clocks: files with another time"] += 1
            jumps.write_text(self.random.choice(moments) + "\n")

        stop = threading.Event()

        def jump():
            draw = random.Random(0)
            while not stop.wait(0.05):
                beside = jumps.with_suffix(".new")
                beside.write_text(draw.choice(moments) + "\n")
                os.replace(beside, jumps)
                self.counts["clocks: jumps"] += 1

        if library:
            self.clock = {
                "LD_PRELOAD": library, "FAKETIME_TIMESTAMP_FILE": str(jumps), "FAKETIME_NO_CACHE": "1",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            }  # fmt: skip
        between(self.folder / "none")
        thread = threading.Thread(target=jump)
        thread.start()
        try:
            self.kills(number, "clocks", between)
        finally:
            stop.set()
            thread.join()
            self.clock = None
        if not library:
            self.counts["clocks: without libfaketime"] = number

    def kill(self, process, out, took):
        """Kills at a random time; every third while something is being written or removed."""
        if self.random.random() < 1 / 3:
            until = time.monotonic() + 3 * took
            wait = self.random.randrange(1, 6)
            while time.monotonic() < until and process.poll() is None:
                try:
                    busy = any(name.startswith(".suasion-tmp-") for name in os.listdir(out))
                except OSError:
                    busy = False
                if busy:
                    wait -= 1
                    if wait <= 0:
                        time.sleep(self.random.uniform(0, 0.002))
                        self.counts["kills while a temporary name existed"] += 1
                        break
        else:
            try:
                process.wait(self.random.uniform(0.0, took))
            except subprocess.TimeoutExpired:
                pass
        if process.poll() is None:
            process.kill()
        process.wait()

    # -- full disks ----------------------------------------------------------------------------------------------

    def disks(self, number):
        whole = {}
        for name, more in VARIANTS.items():
            out = self.folder / "whole-disk"
            ran = self.run(self.train(out, *more))
            if ran.returncode != 0:
                return self.found("disks", f"{name}: the run with space failed", ran)
            whole[name] = weights(out), sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
            shutil.rmtree(out)
        for i in range(number):
            name = list(VARIANTS)[i % len(VARIANTS)]
            expected, need = whole[name]
            mount = self.folder / f"disk-{i}"
            mount.mkdir()
            size = max(40, int(self.random.uniform(0.02, 1.1) * need / 1024))
            policy = self.random.choice(["continue", "continue", "stop"])
            mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", mount], capture_output=True)
            if mounted.returncode != 0:
                self.counts["full disks skipped (no mount)"] += number - i
                return
            try:
                out = mount / "run"
                ran = self.run(self.train(out, *VARIANTS[name], f"on_save_error={policy}"))
                self.counts["full disks"] += 1
                code = ran.returncode
                self.counts[f"full disks, exit {code}"] += 1
                # A note that the disk ran full; with `continue` a run may get through.
                said = b"No space left" in ran.stderr
                self.counts["full disks that a run met"] += said
                if code not in (0, 2, 3) or b"panicked" in ran.stderr or (code != 0 and not said):
                    self.found("disks", f"{name}, {size} kB, {policy}", ran)
                # Where the best evaluation could not be saved, the run says that it ends with the last weights.
                told = b"has no checkpoint of it" in ran.stderr
                if code == 0 and not told and weights(out) != expected:
                    self.found("disks", f"{name}, {size} kB, {policy}: exit 0 with other weights", ran)
                # With space again the run ends with the bytes of the others.
                if code == 3 and (out / "suasion.yaml").exists() and not (out / final(out)).exists():
                    subprocess.run(["mount", "-o", f"remount,size={4 * need // 1024 + 4000}k", mount], check=True)
                    ran = self.run(["train", "--resume", out])
                    self.counts["full disks, resumed with space"] += 1
                    if ran.returncode != 0 or weights(out) != expected:
                        self.found("disks", f"{name}, {size} kB, {policy}: the resume with space", ran)
            finally:
                subprocess.run(["umount", mount], check=True)

    # -- damaged inputs ------------------------------------------------------------------------------------------

    def damage(self, data):
        """Bytes with one or a few faults."""
        data, draw = bytearray(data), self.random
        for _ in range(draw.choice([1, 1, 1, 2, 5])):
            kind, at = draw.randrange(9), draw.randrange(len(data) + 1)
            if kind == 0 and data:
                data[at % len(data)] ^= 1 << draw.randrange(8)
            elif kind == 1 and data:
                data[at % len(data)] = draw.randrange(256)
            elif kind == 2:
                del data[at:]
            elif kind == 3:
                del data[at : at + draw.randrange(1, 40)]
            elif kind == 4:
                data[at:at] = draw.randbytes(draw.randrange(1, 20))
            elif kind == 5:
                start = draw.randrange(len(data) + 1)
                data[at:at] = data[start : start + draw.randrange(1, 200)]
            elif kind == 6 and len(data) >= 8:
                at = min(at, len(data) - 8)
                values = [0, 1, -1, 2**31 - 1, 2**31, 2**63 - 1, 2**62, 255, 65536]
                data[at : at + 8] = struct.pack("<q", draw.choice(values))
            elif kind == 7:
                words = [b'"', b"{", b"}", b"[", b"]", b"null", b"-1", b"1e999", b"\\u0000", b"\\ud800", b"\n", b"\0", b"NaN"]
                words += [b"{{", b"{%", b"%}", b"{% for x in y %}", b"99999999999999999999", b"true", b"\xff\xfe", b"[" * 600]
                data[at:at] = draw.choice(words)
            elif kind == 8:
                data[:] = data[at:]
        return bytes(data)

    def inputs(self, number):
        kinds = self.kinds()
        names = sorted(kinds)
        good = {}
        for name in names:
            files, args, result = kinds[name]
            place = self.folder / "input"
            self.place(place, files)
            ran = self.run(args, cwd=place)
            if ran.returncode != 0:
                return self.found("inputs", f"{name}: the undamaged input failed", ran)
            good[name] = result(place, ran)
        turn = 0
        while self.counts["damaged inputs"] < number:
            name = names[turn % len(names)]
            turn += 1
            files, args, result = kinds[name]
            place = self.folder / "input"
            victim = self.random.choice([key for key in files if key.startswith("!")])
            damaged = self.damage(files[victim])
            if damaged == files[victim]:
                continue
            self.place(place, files | {victim: damaged})
            ran = self.run(args, cwd=place)
            self.counts["damaged inputs"] += 1
            self.counts[f"damaged inputs: {name}"] += 1
            self.counts[f"damaged inputs, exit {ran.returncode}"] += 1
            err = ran.stderr or b""
            fault = None
            if ran.returncode == -999:
                fault = "no end"
            elif ran.returncode not in (0, 1, 2, 3):
                fault = "exit code"
            elif b"panicked" in err or b"E-INTERNAL" in err:
                fault = "panic"
            elif ran.returncode in (2, 3) and b"error[" not in err:
                fault = "an error that says nothing"
            elif ran.returncode == 0 and name.startswith("checked ") and result(place, ran) != good[name]:
                fault = "another result, and exit 0"
            if fault:
                keep = self.folder / f"finding-{len(self.findings)}"
                shutil.copytree(place, keep, symlinks=True)
                self.found("inputs", f"{name}: {fault}: {keep}: {' '.join(map(str, args))}", ran)

    def place(self, place, files):
        shutil.rmtree(place, ignore_errors=True)
        for name, data in files.items():
            path = place / name.lstrip("!")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def kinds(self):
        """By name: files (those with `!` are damaged), arguments, and what the result is."""
        read = lambda path: path.read_bytes()  # noqa: E731
        model = {f"model/{p.name}": read(p) for p in (self.folder / "model").iterdir()}
        messages = [
            {"messages": [{"role": "user", "content": f"View {i}?"}, {"role": "assistant", "content": f"Reply {i}."}]}
            for i in range(6)
        ]
        template = (
            "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}"
            "{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
        )
        chat = {"rows.jsonl": "".join(json.dumps(m) + "\n" for m in messages).encode()}
        rows = {"rows.jsonl": read(self.rows)}
        verify = ["verify", "-M", "model", "-D", "rows.jsonl", "--json"]
        prepare = lambda data, out: ["prepare", "-M", "model", "-D", data, "-o", out]  # noqa: E731
        nothing = lambda place, ran: None  # noqa: E731
        # Prepared data, in each form, to be read again.
        made = self.folder / "made"
        made.mkdir(exist_ok=True)
        self.place(made, model | rows)
        for out in ("x.parquet", "folder", "x.jsonl"):
            ran = self.run(prepare("rows.jsonl", out), cwd=made)
            assert ran.returncode == 0, ran.stderr
        ran = self.run(
            ["train", "-M", "model", "-D", "rows.jsonl", "-o", "run", "--set", "init=random", "--set", "max_steps=4", "--set",
             "save_steps=2"], cwd=made,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        weights = model | {"model/model.safetensors": read(made / "run/model.safetensors")}
        run = {f"run/{p.relative_to(made / 'run')}": read(p) for p in (made / "run").rglob("*") if p.is_file()}
        unfinished = {
            name: data for name, data in run.items()
            if "checkpoint-4" not in name and not name.endswith(("run/model.safetensors", "report.html", "README.md"))
        }  # fmt: skip
        shard = next(p for p in (made / "folder").rglob("*.arrow"))
        folder = {f"folder/{p.relative_to(made / 'folder')}": read(p) for p in (made / "folder").rglob("*") if p.is_file()}
        arrow = f"folder/{shard.relative_to(made / 'folder')}"
        configuration = (
            b"model_name_or_path: model\ndataset_name: rows.jsonl\ninit: random\nmax_steps: 2\nlearning_rate: 1e-4\n"
            b"lr_scheduler_type: cosine\nsection_markers:\n  TASK: '[TASK]'\nloss_weights: {system: 0.1}\nsave_strategy: 'no'\n"
        )
        toml = (
            b'model_name_or_path = "model"\ndataset_name = ["rows.jsonl"]\ninit = "random"\nmax_steps = 2\n'
            b'[section_markers]\nTASK = "[TASK]"\n[loss_weights]\nsystem = 0.1\n'
        )
        csv = 'prompt,completion\n"Are ""buses"" slow?","They are,\nat rush hour."\nMaps?,Yes.\n' * 4
        mark = lambda files, *names: {("!" + n if n in names else n): d for n, d in files.items()}  # noqa: E731
        weigh = lambda place, ran: (place / "run/model.safetensors").read_bytes()  # noqa: E731
        index = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names_of(weights["model/model.safetensors"]), "a.safetensors")})
        sharded = {k: v for k, v in weights.items() if not k.endswith("model.safetensors")}
        sharded |= {"model/a.safetensors": weights["model/model.safetensors"], "model/model.safetensors.index.json": index.encode()}
        losses = ["eval", "-M", "model", "-D", "rows.jsonl", "--json"]
        prepared = lambda data: ["verify", "-D", data, "--json"]  # noqa: E731
        state = "run/checkpoint-2/suasion_state.json"
        inner = [name for name in unfinished if name.startswith("run/checkpoint-2/")]
        # An adapter, and a run with one, a moving average and 8-bit moments.
        ran = self.run(
            ["train", "-M", "base", "-D", "rows.jsonl", "-o", "tuned", "--set", "max_steps=4", "--set", "save_steps=2", "--set",
             "use_peft=true", "--set", "optim=adamw_8bit", "--set", "ema_decay=0.5"],
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        folder_of = lambda name: {  # noqa: E731
            f"{name}/{p.relative_to(self.folder / name)}": read(p) for p in (self.folder / name).rglob("*") if p.is_file()
        }
        base, tuned = folder_of("base"), folder_of("tuned")
        begun = base | rows | {
            name: data for name, data in tuned.items()
            if "checkpoint-4" not in name and not name.endswith(("tuned/adapter_model.safetensors", "report.html", "README.md"))
        }  # fmt: skip
        adapted = base | rows | {n: tuned[n] for n in ("tuned/adapter_config.json", "tuned/adapter_model.safetensors")}
        states = [name for name in begun if name.startswith("tuned/checkpoint-2/")]
        weigh_adapter = lambda place, ran: read(place / "tuned/adapter_model.safetensors")  # noqa: E731
        with_adapter = ["eval", "-M", "base", "--adapter", "tuned", "-D", "rows.jsonl", "--json"]
        utterance = lambda i, to, speaker, text, won: {  # noqa: E731
            "id": f"c{i}", "conversation_id": "c0", "reply_to": to, "speaker": speaker, "text": text, "meta": {"success": won}}
        utterances = [
            utterance(0, None, "ann", "Rain is best.", None), utterance(1, "c0", "bob", "Sun dries clothes, and people.", 1),
            utterance(2, "c1", "ann", "!delta True.", None), utterance(3, "c0", "cem", "No it is not, and never was.", 0),
        ]  # fmt: skip
        threads = [
            {"id": f"t{i}", "outcome": won, "title": "CMV: Rain is best", "op": "I like rain.\n\nEdit: thanks",
             "replies": [{"author": "u1", "text": f"Sun dries clothes {i} times."}, {"author": "op", "text": "&gt; Sun\n\nTrue."}]}
            for i, won in enumerate(["positive", "negative"] * 3)
        ]  # fmt: skip
        dialogues = "Unit,Turn,B4,B2\nHello!,0,0,d1\nHi.,0,1,d1\nWill you give?,1,0,d1\nYes,1,1,d1\n"
        information = "B2,B4,B6\nd1,0,0.0\nd1,1,0.5\n"
        lines = lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode()  # noqa: E731
        convert = lambda kind, path, *more: ["convert", "--from", kind, path, "-o", "out.jsonl", *more]  # noqa: E731
        return {
            "adapter_config.json": (mark(adapted, "tuned/adapter_config.json"), with_adapter, nothing),
            "adapter's weights": (mark(adapted, "tuned/adapter_model.safetensors"), with_adapter, nothing),
            "checked checkpoint of an adapter": (mark(begun, *states), ["train", "--resume", "tuned/checkpoint-2"], weigh_adapter),
            "checked base of an adapter": (
                mark(begun, "base/model.safetensors", "base/config.json"), ["train", "--resume", "tuned"], weigh_adapter),
            "ConvoKit": (
                {"!corpus/utterances.jsonl": lines(utterances),
                 "!corpus/conversations.json": b'{"c0": {"meta": {"op-title": "CMV: Rain is best"}}}'}, convert("convokit", "corpus"), nothing),
            "CMV": ({"!cmv.jsonl": lines(threads)}, convert("cmv", "cmv.jsonl", "--split", "0.3"), nothing),
            "PersuasionForGood": (
                {"!dialog.csv": dialogues.encode(), "!info.csv": information.encode()},
                convert("p4g", "dialog.csv", "--information", "info.csv"), nothing),
            "rows (JSON Lines)": (mark(model | rows, "rows.jsonl"), verify, nothing),
            "rows (conversations)": (
                mark(model | chat | {"model/chat_template.jinja": template.encode()}, "rows.jsonl"), verify, nothing),
            "rows (CSV)": (mark(model | {"rows.csv": csv.encode()}, "rows.csv"), ["verify", "-M", "model", "-D", "rows.csv"], nothing),
            "rows (Parquet)": ({"!x.parquet": read(made / "x.parquet")}, prepared("x.parquet"), nothing),
            "rows (Arrow)": (mark(folder, arrow), prepared("folder"), nothing),
            "save_to_disk (JSON files)": (mark(folder, *[n for n in folder if n.endswith(".json")]), prepared("folder"), nothing),
            "prepared rows": ({"!x.jsonl": read(made / "x.jsonl")}, prepared("x.jsonl"), nothing),
            "manifest": (
                mark(model | {n: read(made / n) for n in ("x.jsonl", "x.jsonl.manifest.json")}, "x.jsonl.manifest.json"),
                ["train", "-M", "model", "-D", "x.jsonl", "-o", "run", "--set", "init=random", "--set", "max_steps=1"], nothing),
            "tokenizer.json": (mark(model | rows, "model/tokenizer.json"), verify, nothing),
            "tokenizer_config.json": (mark(model | rows, "model/tokenizer_config.json"), verify, nothing),
            "template": (
                mark(model | chat | {"model/chat_template.jinja": template.encode()}, "model/chat_template.jinja"), verify, nothing),
            "config.json": (mark(weights | rows, "model/config.json"), losses, nothing),
            "generation_config.json": (
                mark(weights | {"model/generation_config.json": b'{"do_sample": true, "temperature": 0.7, "top_k": 5, "eos_token_id": [1]}'},
                     "model/generation_config.json"), ["generate", "-M", "model", "-p", "Hi", "--max-new-tokens", "3"], nothing),
            "safetensors": (mark(weights | rows, "model/model.safetensors"), losses, nothing),
            "safetensors index": (mark(sharded | rows, "model/model.safetensors.index.json"), losses, nothing),
            "configuration (YAML)": (mark(model | rows | {"run.yaml": configuration}, "run.yaml"), ["check", "run.yaml"], nothing),
            "configuration (TOML)": (mark(model | rows | {"run.toml": toml}, "run.toml"), ["check", "run.toml"], nothing),
            "configuration of a run": (mark(unfinished | rows, "run/suasion.yaml"), ["train", "--resume", "run"], nothing),
            "checked checkpoint": (mark(unfinished | rows, *inner), ["train", "--resume", "run/checkpoint-2"], weigh),
            "checked checkpoint state": (mark(unfinished | rows, state), ["train", "--resume", "run"], weigh),
            "checked rows of a resume": (mark(unfinished | rows, "rows.jsonl"), ["train", "--resume", "run/checkpoint-2"], weigh),
        }  # fmt: skip


def final(out):
    adapter = "use_peft: true" in (out / "suasion.yaml").read_text()
    return "adapter_model.safetensors" if adapter else "model.safetensors"


def weights(out):
    return (out / final(out)).read_bytes()


def names_of(safetensors):
    (length,) = struct.unpack("<Q", safetensors[:8])
    return [name for name in json.loads(safetensors[8 : 8 + length]) if name != "__metadata__"]


def main():
    words = sys.argv[1:]
    options = dict(kills=300, disks=60, inputs=3000, clocks=40)
    binary, seed = REPOSITORY / "target/debug/suasion", 1
    while words:
        word = words.pop(0)
        if word == "--binary":
            binary = Path(words.pop(0)).resolve()
        elif word == "--seed":
            seed = int(words.pop(0))
        elif word.split("=")[0] in options:
            options[word.split("=")[0]] = int(word.split("=")[1])
        else:
            sys.exit(__doc__)
    folder = tempfile.mkdtemp(prefix="suasion-faults-")
    campaign = Campaign(str(binary), seed, folder)
    for kind, number in options.items():
        began = time.monotonic()
        if number:
            getattr(campaign, kind)(number)
            print(f"{kind}: {time.monotonic() - began:.0f} s", flush=True)
    if not campaign.findings:
        shutil.rmtree(folder)
    print(json.dumps({"findings": len(campaign.findings), **dict(sorted(campaign.counts.items()))}))
    sys.exit(1 if campaign.findings else 0)


if __name__ == "__main__":
    main()
