"""Data parallelism as PyTorch does it: DistributedDataParallel over two processes (gloo), each with its own rows, the loss
divided by the targets of both as the Trainer does (`average_tokens_across_devices`)."""

import os
import random
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import AutoModelForCausalLM

from common import SEED, write_json

RANKS, STEPS, ROWS = 2, 6, 2
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, eps=1e-8, weight_decay=0.01),
}


def rows():
    """Rows of different lengths and numbers of targets: a mean of the ranks' means is another number."""
    draw = random.Random(SEED)
    made = []
    for row in range(STEPS * RANKS * ROWS):
        prompt, reply = draw.randint(3, 9), 1 + row % 7
        ids = [draw.randrange(3, 128) for _ in range(prompt + reply)]
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return made


def summed(model, batch):
    """The sum of the losses of rows, each alone: without padding."""
    total = 0.0
    for row in batch:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        logits = model(input_ids=ids).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
    return total


def work(rank, port, folder, kind, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = OPTIMIZERS[kind](ddp.parameters())
    all_rows, losses, norms = rows(), [], []
    for step in range(STEPS):
        # As accelerate deals batches out: one to each rank in turn.
        batch = all_rows[(step * RANKS + rank) * ROWS :][:ROWS]
        count = torch.tensor(float(sum(label != -100 for row in batch for label in row["labels"])))
        dist.all_reduce(count)
        loss = summed(ddp, batch) / count
        total = loss.detach().double()
        dist.all_reduce(total)
        optimizer.zero_grad()
        # DDP divides the sum of the gradients by the number of ranks.
        (loss * RANKS).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(ddp.parameters(), 1.0)))
        optimizer.step()
        losses.append(float(total))
    with torch.no_grad():
        final = summed(model, all_rows).double() / sum(label != -100 for row in all_rows for label in row["labels"])
    if rank == 0:
        results.put({"losses": losses, "grad_norms": norms, "final": float(final)})
    dist.barrier()
    dist.destroy_process_group()


def generate(root):
    folder = root / "models" / "llama"
    golden = {"ranks": RANKS, "rows_per_rank": ROWS, "rows": rows(), "runs": {}}
    for kind in OPTIMIZERS:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        results = mp.get_context("spawn").SimpleQueue()
        mp.start_processes(work, (port, str(folder), kind, results), nprocs=RANKS, start_method="spawn")
        golden["runs"][kind] = results.get()
    write_json(root / "models" / "ranks.json", golden, short=True)
