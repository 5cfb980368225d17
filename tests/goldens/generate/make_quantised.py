"""Bases in 4 and 8 bits: what bitsandbytes makes of matrices, and what PEFT computes over models of them.

Adapters are those of models/NAME/ADAPTER. NF4 is transformers' load_in_4bit. In 8 bits the base has the values that bitsandbytes packs
its weights to (`int8_vectorwise_quant`), and activations as they are; `llm_int8_loss` is the loss with those in 8 bits too.
"""

import json
import shutil

import torch
from safetensors.torch import save_file

from common import SEED, write_json, write_text
from make_models import batches, five_steps, gradients, one_pass, summary, summed_loss, targets

# An adapter for each way in which files have linear layers, and DoRA, which needs the rows' lengths.
CASES = ["llama/lora_all_linear", "llama/dora", "qwen2/lora", "gpt2/lora", "phi3/lora_all_linear", "gpt_neox/dora"]
KINDS = {"nf4": dict(bnb_4bit_use_double_quant=False), "nf4_nested": dict(bnb_4bit_use_double_quant=True), "int8": None}


def matrices():
    """By name: odd sizes, blocks and rows of zeros, more than one block of nested scales, large and small values."""
    generator = torch.Generator().manual_seed(SEED)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    zeros = draw(6, 64)
    zeros[2] = 0
    wide = draw(96, 192) * torch.exp(draw(96, 1))
    return {"odd": draw(5, 13), "zeros": zeros, "wide": wide.bfloat16().float(), "tail": torch.cat([draw(2, 64), torch.zeros(1, 64)])[:, :63].contiguous()}


def packed(matrix):
    import bitsandbytes.functional as F

    out = {"values": matrix.bfloat16() if torch.equal(matrix, matrix.bfloat16().float()) else matrix}
    codes, state = F.quantize_4bit(matrix, blocksize=64, quant_type="nf4")
    out |= {"nf4.codes": codes.flatten(), "nf4.absmax": state.absmax}
    nested, state = F.quantize_4bit(matrix, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert torch.equal(nested, codes)
    out |= {"nested.codes": state.absmax, "nested.absmax": state.state2.absmax, "nested.offset": state.offset.reshape(1)}
    if matrix.numel() < 1000:
        out |= {"nf4.unpacked": F.dequantize_4bit(codes, F.quantize_4bit(matrix, blocksize=64, quant_type="nf4")[1]), "nested.unpacked": F.dequantize_4bit(nested, state)}
    rows, scales, _ = F.int8_vectorwise_quant(matrix.half())
    return out | {"int8.codes": rows, "int8.absmax": scales}


def quantised(folder, kind):
    """The model of a folder with its base packed."""
    import bitsandbytes.functional as F
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.pytorch_utils import Conv1D

    load = lambda **kw: AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32, **kw)
    if kind != "int8":
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32, **KINDS[kind]
        )
        model = load(quantization_config=settings)
        for module in model.modules():
            # Another layout for bf16 products, of whole blocks a row only.
            module.support_avx512bf16_for_cpu = False
        return model
    model = load()
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and name not in ("lm_head", "embed_out"):
            with torch.no_grad():
                turned = isinstance(module, Conv1D)
                weight = module.weight.T if turned else module.weight
                codes, scales, _ = F.int8_vectorwise_quant(weight.half().contiguous())
                values = codes.float() * (scales[:, None] / 127)
                module.weight.copy_(values.T if turned else values)
    return model


def adapted(folder, adapter, kind):
    from peft import PeftModel

    return PeftModel.from_pretrained(quantised(folder, kind), folder / adapter, is_trainable=True)


def steps(model, batch, lr=5e-3):
    losses, norms = five_steps(model, batch, lr)
    return {"optimizer": f"AdamW lr={lr} decay=0.01 on all that is trained", "losses": losses, "grad_norms": norms}


def case(root, name, kind, batch):
    family, adapter = name.split("/")
    folder = root / "models" / family
    model = adapted(folder, adapter, kind)
    fp32, _ = one_pass(model, batch)
    generator = torch.Generator().manual_seed(SEED)
    (summed_loss(model, batch)[0] / targets(batch)).backward()
    grads = {key: summary(grad, generator, 2) for key, grad in gradients(model).items()}
    with torch.no_grad():
        base = quantised(folder, kind)
        loss = float(summed_loss(base, batch)[0]) / targets(batch)
    return {"fp32": {"a": {**fp32, "grads": grads}}, "adamw_5": steps(adapted(folder, adapter, kind), batch), "base_loss": loss}


def saved(root, family, kind, settings):
    """A folder as transformers writes it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = root / "models" / family
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**settings), dtype=torch.float32)
    out = folder / kind
    shutil.rmtree(out, ignore_errors=True)
    model.save_pretrained(out)
    (out / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((out / "config.json").read_text())
    write_text(out / "config.json", json.dumps(config, indent=1, sort_keys=True) + "\n")


def generic_dequantisation():
    """bitsandbytes' versions in PyTorch (`backends/default/ops.py`), which compute what its CUDA kernels do. Its kernels for CPUs
    (0.50.2) unpack with the scales of other blocks where a row is no multiple of 64, as in models of width 32, and pack nested scales
    not always to the nearest value."""
    import bitsandbytes  # registers its kernels, of which one is replaced
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
    from bitsandbytes.backends.utils import _get_4bit_code

    def dequantise(codes, absmax, blocksize, quant_type, shape, dtype):
        code = _get_4bit_code(quant_type, codes.device)
        return _dequantize_4bit_compute(codes.reshape(-1), absmax, code, blocksize, shape, dtype)

    def quantise(values, code, blocksize):
        flat = values.reshape(-1).float()
        whole = len(flat) // blocksize * blocksize
        blocks = flat[:whole].reshape(-1, blocksize)
        absmax = blocks.abs().amax(-1)
        scaled = torch.clamp(blocks * (1.0 / absmax.clamp(min=1e-38).view(-1, 1)), -1, 1).reshape(-1)
        if whole < len(flat):
            last = flat[whole:].abs().max().clamp(min=1e-38)
            absmax, scaled = torch.cat([absmax, last[None]]), torch.cat([scaled, torch.clamp(flat[whole:] / last, -1, 1)])
        return torch.bucketize(scaled, (code[:-1] + code[1:]) / 2, out_int32=True).to(torch.uint8).reshape(values.shape), absmax

    library = torch.library.Library("bitsandbytes", "IMPL")
    library.impl("quantize_blockwise", quantise, "CPU", allow_override=True)
    library.impl("dequantize_4bit", dequantise, "CPU", allow_override=True)
    return library


def generate(root):
    library = generic_dequantisation()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    tensors = {f"{name}.{key}": value.contiguous() for name, matrix in matrices().items() for key, value in packed(matrix).items()}
    save_file(tensors, root / "models/quantised.safetensors")
    batch = batches()["a"]
    golden = {f"{name}/{kind}": case(root, name, kind, batch) for name in CASES for kind in KINDS}
    four = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)
    for family in ("llama", "gpt2"):
        saved(root, family, "nf4_nested", four)
        saved(root, family, "int8", dict(load_in_8bit=True))
        from transformers import AutoModelForCausalLM

        with torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(root / "models" / family / "int8", dtype=torch.float32)
            golden[f"{family}/llm_int8_loss"] = float(summed_loss(model, batch)[0]) / targets(batch)
    write_json(root / "models/quantised.json", golden, short=True)
