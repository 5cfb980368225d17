"""Small tokenizers of each kind, trained on the demo's rows, and what the library makes of texts.

A tokenizer is named after the published one whose stages it has. The vocabularies are of our own making.
"""

import collections
import io
import json
import math

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from common import demo_rows, write_json, write_lines, write_text
from pairs import PAIRS, UNUSUAL

GPT2_SIZE = 256 + 260

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTION}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = O200K.replace(CONTRACTION, "").replace(r"\p{N}{1,3}", r"\p{N}")


def texts():
    """Each prompt and each response once, and lines of everything that the demo's English lacks."""
    seen = dict.fromkeys(text for row in demo_rows() for text in row)
    return list(seen) + UNUSUAL * 3


def special(content, **flags):
    return AddedToken(content, special=True, normalized=False, **flags)


def plain(content, **flags):
    return AddedToken(content, special=False, **flags)


def template(before=(), after=(), ids=None):
    """A post-processor that puts tokens before and after a text."""
    one = " ".join([*before, "$A", *after])
    pair = " ".join([*before, "$A", *after, *before, "$B:1", *after])
    return processors.TemplateProcessing(single=one, pair=pair, special_tokens=[(t, ids(t)) for t in (*before, *after)])


def byte_level(pre_tokenizer, normalizer=None, added=(), before=(), trim=False, ignore_merges=False):
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=GPT2_SIZE, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(texts(), trainer)
    for token in added:
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    bytes_only = processors.ByteLevel(trim_offsets=trim)
    tokenizer.post_processor = bytes_only
    if before:
        tokenizer.post_processor = processors.Sequence([bytes_only, template(before, (), tokenizer.token_to_id)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def split(pattern, behavior="isolated"):
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), behavior), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def pieces():
    """BPE over the demo's letters, learned on words as SentencePiece learns them. What else there is in the world is
    not in the vocabulary."""
    teacher = Tokenizer(models.BPE())
    teacher.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    english = [text for text in texts() if text not in UNUSUAL[4:]]
    teacher.train_from_iterator(english, trainers.BpeTrainer(vocab_size=330, show_progress=False))
    return teacher, english


def sentence_piece_bpe(specials, normalizer=None, pre_tokenizer=None, added=(), before=("<s>",), strip=True):
    """BPE over characters with byte fallback."""
    learned = json.loads(pieces()[0].to_str())["model"]
    first = [*specials, *(f"<0x{byte:02X}>" for byte in range(256))]
    # A line end is a byte here, as in Llama's vocabulary.
    ours = [piece for piece in sorted(learned["vocab"], key=learned["vocab"].get) if "\n" not in piece]
    merges = [tuple(merge) for merge in learned["merges"] if not any("\n" in side for side in merge)]
    vocab = {piece: index for index, piece in enumerate(first + ours)}
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    if normalizer:
        tokenizer.normalizer = normalizer
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.add_special_tokens([special(token) for token in specials])
    for token in added:
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    if before:
        tokenizer.post_processor = template(before, (), tokenizer.token_to_id)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(parts + [decoders.Strip(" ", 1, 0)] * strip)
    return tokenizer


def legacy():
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def charsmap():
    """SentencePiece's own rules of normalisation (nmt_nfkc), as T5's file has them."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["any text will do"] * 10),
        model_writer=written,
        vocab_size=20,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
    )
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(written.getvalue())
    return model.normalizer_spec.precompiled_charsmap


def unigram(specials, normalizer, pre_tokenizer, after=(), before=()):
    """The pieces of our BPE, scored by how often it uses them. (The library's own trainer for this model is not the
    same from run to run.)"""
    teacher, corpus = pieces()
    counts = collections.Counter(piece for text in corpus for piece in teacher.encode(text).tokens)
    counts.update(piece for piece in teacher.get_vocab())
    total = sum(counts.values())
    learned = [(piece, round(math.log(count / total), 4)) for piece, count in counts.items() if "\n" not in piece]
    learned.sort(key=lambda piece: (-piece[1], piece[0]))
    vocab = [(token, 0.0) for token in specials] + learned
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=specials.index("<unk>"), byte_fallback=False))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.add_special_tokens([special(token) for token in specials])
    tokenizer.post_processor = template(before, after, tokenizer.token_to_id)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return tokenizer


CHATML = [special("<|endoftext|>"), special("<|im_start|>"), special("<|im_end|>")]
HEADERS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"]
HARMONY = ["<|endoftext|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"]


def tokenizers():
    """Each tokenizer with its BOS, EOS and padding token."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tools = [plain(token) for token in ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")]
    thoughts = [plain(token) for token in ("<think>", "</think>")]
    yield "gpt2", byte_level(gpt2, added=CHATML[:1]), (None, "<|endoftext|>", "<|endoftext|>")
    yield (
        "llama3_2",
        byte_level(split(LLAMA3), added=map(special, HEADERS), before=["<|begin_of_text|>"], ignore_merges=True),
        ("<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>"),
    )
    yield (
        "qwen2_5",
        byte_level(split(QWEN2), normalizers.NFC(), CHATML + tools + thoughts),
        (None, "<|im_end|>", "<|endoftext|>"),
    )
    yield "o200k", byte_level(split(O200K), added=map(special, HARMONY)), (None, "<|return|>", "<|endoftext|>")
    yield "tekken", byte_level(split(TEKKEN), added=map(special, ["<s>", "</s>", "[INST]", "[/INST]"]), before=["<s>"]), ("<s>", "</s>", None)
    spaces = [plain(" " * n, normalized=True) for n in (2, 3, 4, 8)]
    yield "gpt_neox", byte_level(gpt2, normalizers.NFC(), CHATML[:1] + spaces), (None, "<|endoftext|>", None)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    yield "smollm", byte_level(digits, added=CHATML), (None, "<|im_end|>", "<|endoftext|>")
    # DeepSeek's way: several expressions one after the other. None of ours is made for it, so the library cuts.
    several = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
            pre_tokenizers.Split(Regex("[一-龥぀-ゟ゠-ヿ]+"), "isolated"),
            pre_tokenizers.Split(Regex(r"[!-/:-~]?[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    deepseek = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]
    yield (
        "deepseek",
        byte_level(several, added=[special(t) for t in deepseek[:2]] + [plain(t, normalized=False) for t in deepseek[2:]], before=deepseek[:1]),
        (deepseek[0], deepseek[1], deepseek[1]),
    )
    llama = ["<unk>", "<s>", "</s>"]
    yield "llama2", sentence_piece_bpe(llama, legacy()), ("<s>", "</s>", "<unk>")
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inst = [special(token) for token in ("[INST]", "[/INST]")] + [plain("[REFERENCE_DOC_0]", normalized=False)]
    yield "mistral_v3", sentence_piece_bpe(llama, None, metaspace, inst), ("<s>", "</s>", None)
    swallow = [special(t, rstrip=True) for t in ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")]
    left = [special("<|stop|>", lstrip=True), plain("<|note|>", lstrip=True, rstrip=True, normalized=False)]
    yield "phi3", sentence_piece_bpe(llama, legacy(), None, swallow + left, before=()), ("<s>", "<|endoftext|>", "<|endoftext|>")
    gemma = ["<pad>", "<eos>", "<bos>", "<unk>"]
    turns = [special("<start_of_turn>"), special("<end_of_turn>"), plain("<unused0>", normalized=False)]
    spaced = pre_tokenizers.Split(" ", "merged_with_previous")
    yield (
        "gemma2",
        sentence_piece_bpe(gemma, normalizers.Replace(" ", "▁"), spaced, turns, ["<bos>"], strip=False),
        ("<bos>", "<eos>", "<pad>"),
    )
    words = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")])
    yield (
        "t5_small",
        unigram(["<pad>", "</s>", "<unk>"], normalizers.Precompiled(charsmap()), words, after=["</s>"]),
        (None, "</s>", "<pad>"),
    )
    nfkc = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    yield (
        "unigram",
        unigram(["<s>", "<pad>", "</s>", "<unk>"], nfkc, pre_tokenizers.Metaspace(prepend_scheme="always"), before=["<s>"]),
        ("<s>", "</s>", "<pad>"),
    )


def save(folder, tokenizer, bos, eos, pad):
    file = json.loads(tokenizer.to_str())
    # Files of published models are of all ages: merges as pairs or as texts, a model with or without its type.
    if folder.name in ("gpt2", "qwen2_5", "llama2"):
        file["model"]["merges"] = [" ".join(pair) for pair in file["model"]["merges"]]
    if folder.name == "t5_small":
        del file["model"]["type"], file["model"]["byte_fallback"]
    write_text(folder / "tokenizer.json", json.dumps(file, ensure_ascii=False, separators=(",", ":")))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config.update({"bos_token": bos, "eos_token": eos, "pad_token": pad})
    write_json(folder / "tokenizer_config.json", config)


def fast(root, name):
    """The tokenizer of a folder as transformers opens it."""
    return PreTrainedTokenizerFast.from_pretrained(root / "tokenizers" / name)


def tokenise(name, tokenizer, transformers_own, eos, pair):
    prompt, response = PAIRS[pair]["prompt"], PAIRS[pair]["response"]
    whole, cut = tokenizer.encode(prompt + response), len(prompt)
    assert transformers_own(prompt + response).input_ids == whole.ids, (name, pair)
    before, after = tokenizer.encode(prompt), tokenizer.encode(response, add_special_tokens=False)
    bare = tokenizer.encode(prompt + response, add_special_tokens=False).ids
    without = [i for i, s in zip(whole.ids, whole.special_tokens_mask) if not s]
    first = [
        i
        for i, ((_, end), special_token) in enumerate(zip(whole.offsets, whole.special_tokens_mask))
        if not special_token and end > cut
    ]
    return {
        "tok": name,
        "pair": pair,
        "ids": whole.ids,
        "off": whole.offsets,
        "sp": "".join(map(str, whole.special_tokens_mask)),
        "ids_ns": "=ids_minus_sp" if bare == without else bare,
        "p_ids": before.ids,
        "c_ids_ns": after.ids,
        "concat_eq_full": tokenizer.encode(prompt, add_special_tokens=False).ids + after.ids == bare,
        "straddle": [i for i, (start, end) in enumerate(whole.offsets) if start < cut < end],
        "first_resp_tok": first[0] if first else None,
        "ids_eos": tokenizer.encode(prompt + response + eos).ids[-6:],
    }


def generate(root):
    rows = []
    for name, tokenizer, (bos, eos, pad) in tokenizers():
        folder = root / "tokenizers" / name
        save(folder, tokenizer, bos, eos, pad)
        read = Tokenizer.from_file(str(folder / "tokenizer.json"))
        own = fast(root, name)
        rows += [tokenise(name, read, own, eos, pair) for pair in PAIRS]
    write_lines(root / "goldens/tokenize.jsonl", rows)
    write_json(root / "goldens/tokenize_pairs.json", PAIRS)
