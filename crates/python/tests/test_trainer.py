"""TRL's trainer: it takes prepared rows as they are, and the callback sees what it learns. Skipped without TRL."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import suasion

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")


@pytest.fixture(scope="module")
def model(chat_model, tmp_path_factory):
    """A model of two layers with the demo's tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(chat_model)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def trainer(model, rows, tmp_path, callbacks=(), **options):
    config = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=False,
        max_length=256, save_strategy="no", disable_tqdm=True, **options,
    )
    return trl.SFTTrainer(model, args=config, train_dataset=rows, callbacks=list(callbacks))


def test_trl_trains_on_prepared_rows(model, rows, tmp_path):
    prepared = suasion.prepare(rows[:8], model)
    seen = []
    callback = suasion.VerifyCallback()
    run = trainer(model, prepared.to_datasets(), tmp_path, [callback])
    run.model.register_forward_pre_hook(lambda m, a, k: seen.append(k["labels"].tolist()), with_kwargs=True)
    run.train()
    assert len(callback.reports) == 3 and all(report.ok for report in callback.reports)
    # What reaches the model is what was prepared, but for padding.
    known = {tuple(row["labels"]) for row in prepared}
    for labels in [row for batch in seen for row in batch]:
        while labels and tuple(labels) not in known:
            labels = labels[:-1]
        assert labels


def test_a_collator_that_breaks_masks_is_found(model, rows, tmp_path):
    def shift(features):
        ids = [torch.tensor(f["input_ids"]) for f in features]
        labels = [torch.tensor(f["labels"][1:] + [-100]) for f in features]
        pad = torch.nn.utils.rnn.pad_sequence
        return {"input_ids": pad(ids, True, 0), "labels": pad(labels, True, -100),
                "attention_mask": pad([torch.ones_like(i) for i in ids], True, 0)}

    prepared = suasion.prepare(rows[:8], model).to_datasets()
    run = trainer(model, prepared, tmp_path, [suasion.VerifyCallback()])
    run.data_collator = shift
    with pytest.raises(suasion.FindingsError, match="batch 1, as the model gets it: .*L001"):
        run.train()
    warned = suasion.VerifyCallback(on_error="warn", batches=1)
    run = trainer(model, prepared, tmp_path, [warned])
    run.data_collator = shift
    with pytest.warns(UserWarning, match="L001"):
        run.train()
    assert [report.ok for report in warned.reports] == [True, False]


def test_trls_own_preparation_is_verified(model, tmp_path):
    rows = [
        {"prompt": f"[TASK] Say {word}. [RESPONSE]", "completion": f" {word.title()}."} for word in ("yes", "no", "maybe")
    ]
    run = trainer(model, datasets.Dataset.from_list(rows), tmp_path)
    report = suasion.verify(run)
    assert report.summary["rows"] == 3
    # TRL learns the completion and the EOS that it appends.
    assert "".join(token.text for token in report.row(0).tokens if token.supervised) == " Yes.<|endoftext|>"
    everything = trainer(model, datasets.Dataset.from_list(rows), tmp_path, completion_only_loss=False)
    assert all(token.supervised for token in suasion.verify(everything).row(0).tokens)


def test_what_the_callback_cannot_see_is_said(model, rows, tmp_path):
    prepared = suasion.prepare(rows[:8], model).to_datasets()
    # A loss of one's own takes the labels out before the model sees them.
    run = trainer(model, prepared, tmp_path, [suasion.VerifyCallback(dataset=False, source=rows)])
    run.compute_loss = lambda model, inputs, **kwargs: model(input_ids=inputs["input_ids"]).logits.sum() * 0
    with pytest.warns(UserWarning) as warned:
        run.train()
    texts = [str(warning.message) for warning in warned]
    assert any("source is not used" in text for text in texts)
    assert any("no batch with labels reached the model" in text for text in texts)


def test_labels_are_held_against_the_rows_of_the_trainer(chat_model, model, tmp_path):
    turn = lambda role, text: {"role": role, "content": text}  # noqa: E731
    rows = datasets.Dataset.from_list(
        [{"messages": [turn("user", f"Say {word}."), turn("assistant", word.title())]} for word in ("yes", "no", "maybe")]
    )
    # TRL learns every token of conversations, unless it is told otherwise.
    found = suasion.VerifyCallback(on_error="warn", source=rows, batches=0)
    with pytest.warns(UserWarning, match="M008"):
        trainer(model, rows, tmp_path, [found]).train()
    (report,) = found.reports
    assert report.shares["user"]["after"] > 0 and report.counts["M008"] == 3
    own = suasion.prepare(rows, model)
    origins = [[token.origin for token in report.row(i).tokens] for i in range(3)]
    assert [[origin == "response" for origin in row] for row in origins] == [
        [letter == "R" for letter in row["origins"]] for row in own
    ]


def test_tokenizers_are_taken_as_objects(model, rows):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    folder, held = suasion.prepare(rows[:20], model), suasion.prepare(rows[:20], tokenizer)
    assert list(folder) == list(held)
    messages = [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello."}]
    ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert [token.id for token in suasion.explain(messages, tokenizer).tokens] == ids
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    changed = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert [token.id for token in suasion.explain(messages, tokenizer).tokens] == changed != ids


def test_a_batch_of_a_loader(model, rows):
    prepared = suasion.prepare(rows[:4], model).to_datasets().select_columns(["input_ids", "labels"])
    collate = transformers.DataCollatorForSeq2Seq(transformers.AutoTokenizer.from_pretrained(model))
    loader = torch.utils.data.DataLoader(prepared, batch_size=4, collate_fn=collate)
    report = suasion.verify(next(iter(loader)), model)
    assert report.ok and report.summary["rows"] == 4
    with pytest.raises(suasion.InputError, match="batches, not rows"):
        suasion.verify(loader, model)
