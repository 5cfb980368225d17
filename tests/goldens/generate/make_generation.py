"""What transformers' logits processors make of logits, and what `generate` appends with each of them."""

import json
import random

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from common import write_json

VOCAB = 40
SETTINGS = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3},
    {"temperature": 0.7},
    {"top_k": 7},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"temperature": 1.5, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "temperature": 0.6, "top_k": 20, "top_p": 0.95},
]
GREEDY = [
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2},
    {"repetition_penalty": 1.5, "no_repeat_ngram_size": 3},
]


def order():
    """The order in which `generate` applies them, read off a model's own list."""
    config = GenerationConfig(
        do_sample=True, repetition_penalty=1.2, no_repeat_ngram_size=2, temperature=0.6, top_k=20, top_p=0.95, min_p=0.1
    )
    made = AutoModelForCausalLM.from_config(TINY)._get_logits_processor(generation_config=config, input_ids_seq_length=1)
    return [type(processor) for processor in made]


def processors(settings):
    kinds = {
        RepetitionPenaltyLogitsProcessor: "repetition_penalty",
        NoRepeatNGramLogitsProcessor: "no_repeat_ngram_size",
        TemperatureLogitsWarper: "temperature",
        TopKLogitsWarper: "top_k",
        TopPLogitsWarper: "top_p",
        MinPLogitsWarper: "min_p",
    }
    assert list(kinds) == order(), order()
    return LogitsProcessorList([kind(settings[name]) for kind, name in kinds.items() if name in settings])


def generate(root):
    global TINY
    from transformers import LlamaConfig

    TINY = LlamaConfig(vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    torch.set_num_threads(1)
    draw = random.Random(11)
    processed = []
    for settings in SETTINGS:
        context = [draw.randrange(12) for _ in range(30)]
        logits = torch.tensor([[draw.gauss(0, 2) for _ in range(VOCAB)]], dtype=torch.float32)
        scores = processors(settings)(torch.tensor([context]), logits.clone())[0]
        scores = [None if value == float("-inf") else value for value in scores.tolist()]
        processed.append({"settings": settings, "context": context, "logits": logits[0].tolist(), "scores": scores})
    texts = {}
    for folder in sorted((root / "models").iterdir()):
        golden = folder / "golden.json"
        if not golden.is_file():
            continue
        prompt = json.loads(golden.read_text())["greedy"]["prompt"]
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        model.generation_config.eos_token_id = None
        ids = torch.tensor([prompt])
        made = []
        for settings in GREEDY:
            with torch.no_grad():
                out = model.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16, pad_token_id=0, **settings
                )
            made.append({"settings": settings, "ids": out[0, len(prompt) :].tolist()})
        texts[folder.name] = {"prompt": prompt, "made": made}
    write_json(root / "goldens/generation.json", {"processed": processed, **texts}, short=True)
