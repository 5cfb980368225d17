"""usage: columnar_interop.py FOLDER   loads what suasion wrote with datasets and trains on it with TRL.

FOLDER has for each kind (rows, packs): X.jsonl, X.parquet and the dataset folder X, of the same records. The packs
share no prompts. Every check is an assertion; the last line printed is "ok".
"""
import json, os, sys, tempfile
os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
import numpy as np, torch, transformers
from datasets import Dataset, List, Value, concatenate_datasets, load_dataset, load_from_disk
from tokenizers import Tokenizer, models
from transformers import DataCollatorForSeq2Seq, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, default_data_collator
from trl import SFTConfig, SFTTrainer
transformers.logging.set_verbosity_error()

folder, temporary = sys.argv[1], tempfile.mkdtemp()
VOCABULARY = 300
TYPES = {"row": Value("int64"), "rows": List(Value("int64")), "seq_lengths": List(Value("int32")), "position_ids": List(Value("int32")),
         "input_ids": List(Value("int32")), "labels": List(Value("int64")), "origins": Value("string"),
         "weights": List(Value("float32")), "text": Value("string")}


def load(kind):
    """The records of one kind, as datasets has them from each of the files; checked against the JSON lines."""
    lines = [json.loads(line) for line in open(f"{folder}/{kind}.jsonl", encoding="utf-8")]
    load_files = lambda format, name: load_dataset(format, data_files=f"{folder}/{name}", split="train", cache_dir=temporary)
    found = {"parquet": load_files("parquet", f"{kind}.parquet"), "disk": load_from_disk(f"{folder}/{kind}"),
             "json": load_files("json", f"{kind}.jsonl")}
    for name, data in found.items():
        assert len(data) == len(lines) > 0
        if name != "json":
            assert dict(data.features) == {c: TYPES[c] for c in data.column_names}, (name, data.features)
            assert set().union(*lines) == set(data.column_names), name
        for line, row in zip(lines, data):
            for column in data.column_names:
                a, b = line.get(column), row[column]
                if column == "weights" and a is not None:
                    a, b = np.float32(a).tolist(), np.float32(b).tolist()
                assert a == b, (name, column, a, b)
    return lines, found


def trainer(data, **settings):
    torch.manual_seed(0)
    vocabulary = {f"t{i}": i for i in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0")), eos_token="t1", pad_token="t2")
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                                         num_attention_heads=2, max_position_embeddings=4096))
    config = SFTConfig(output_dir=temporary, report_to=[], use_cpu=True, bf16=False, max_steps=1, save_strategy="no", disable_tqdm=True,
                       per_device_train_batch_size=4, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, **settings)
    return SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer)


def unpadded(batch, i):
    n = int(batch["attention_mask"][i].sum())
    assert (batch["labels"][i, n:] == -100).all() and (batch["attention_mask"][i, :n] == 1).all()
    return batch["input_ids"][i, :n].tolist(), batch["labels"][i, :n].tolist()


lines, found = load("rows")
assert any("weights" in line for line in lines) and any("weights" not in line for line in lines)
expected = sorted((line["input_ids"], line["labels"]) for line in lines[:4])
for name, data in found.items():
    sft = trainer(data.select(range(4)))
    batch = next(iter(sft.get_train_dataloader()))
    assert set(batch) == {"input_ids", "labels", "attention_mask"} and batch["labels"].dtype == torch.int64
    assert sorted(unpadded(batch, i) for i in range(4)) == expected, name
    assert np.isfinite(sft.train().training_loss)

# transformers' own collators, on the columns that they know.
features = [{k: row[k] for k in ("input_ids", "labels")} for row in found["parquet"].select(range(4))]
batch = DataCollatorForSeq2Seq(sft.processing_class)(features)
assert sorted(unpadded(batch, i) for i in range(4)) == expected
batch = default_data_collator(features[:1])
assert (batch["input_ids"][0].tolist(), batch["labels"][0].tolist()) == (lines[0]["input_ids"], lines[0]["labels"])
assert batch["labels"].dtype == torch.int64

# A set that somebody else tokenised can stand beside ours.
theirs = Dataset.from_dict({"x": ["a"]}).map(lambda _: {"input_ids": [1, 2], "labels": [-100, 2]}, remove_columns=["x"])
both = concatenate_datasets([found["disk"].select_columns(["input_ids", "labels"]), theirs])
assert both[-1] == {"input_ids": [1, 2], "labels": [-100, 2]}

lines, found = load("packs")
for name, data in found.items():
    sft = trainer(data.select(range(4)), padding_free=True)
    batch = next(iter(sft.get_train_dataloader()))
    assert "attention_mask" not in batch
    by_ids = {tuple(line["input_ids"]): line for line in lines[:4]}
    ids, at, order = batch["input_ids"][0].tolist(), 0, []
    while at < len(ids):
        line = next(line for key, line in by_ids.items() if tuple(ids[at:at + len(key)]) == key)
        order.append(line)
        at += len(line["input_ids"])
    assert batch["position_ids"][0].tolist() == [p for line in order for p in line["position_ids"]], name
    # The first token of a segment has nothing before it to be predicted from; the collator masks it.
    labels = [-100 if p == 0 else l for line in order for p, l in zip(line["position_ids"], line["labels"])]
    assert batch["labels"][0].tolist() == labels, name
    # Segments do not see each other: each by itself gives the same logits.
    with torch.no_grad():
        sft.model.eval()
        together = sft.model(**{k: v for k, v in batch.items() if k != "labels"}).logits[0]
        at = 0
        for length in (n for line in order for n in line["seq_lengths"]):
            alone = sft.model(input_ids=batch["input_ids"][:, at:at + length]).logits[0]
            assert torch.allclose(together[at:at + length], alone, atol=1e-5), (name, at)
            at += length
    assert np.isfinite(sft.train().training_loss)
    # Without padding_free they do see each other: the collator then passes no positions.
    batch = next(iter(trainer(data.select(range(1))).get_train_dataloader()))
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
print("ok")
