"""Learning rates of every schedule of transformers, and where EarlyStoppingCallback ends a run."""

import random
from types import SimpleNamespace

import torch
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments
from transformers.optimization import get_scheduler
from transformers.trainer_utils import SaveStrategy

from common import write_json

WSD = "warmup_stable_decay"
# (type, arguments, warm-up, steps)
CASES = [
    ("linear", {}, 3, 10),
    ("linear", {}, 0, 4),
    ("cosine", {}, 3, 10),
    ("cosine", {"num_cycles": 1.25}, 0, 9),
    ("cosine_with_restarts", {}, 2, 11),
    ("cosine_with_restarts", {"num_cycles": 3}, 2, 17),
    ("polynomial", {}, 2, 9),
    ("polynomial", {"lr_end": 1e-5, "power": 2.5}, 0, 12),
    ("constant", {}, 0, 4),
    ("constant_with_warmup", {}, 3, 6),
    ("inverse_sqrt", {}, 4, 20),
    ("inverse_sqrt", {}, 0, 5),
    ("inverse_sqrt", {"timescale": 7}, 3, 12),
    ("cosine_with_min_lr", {"min_lr": 2e-5}, 2, 10),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 0.75}, 0, 10),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.2}, 4, 12),
    ("cosine_warmup_with_min_lr", {"min_lr": 1e-5, "warmup_lr_rate": 0.25, "num_cycles": 0.5}, 4, 12),
    (WSD, {"num_decay_steps": 4}, 3, 14),
    (WSD, {"num_decay_steps": 4, "decay_type": "linear", "min_lr_ratio": 0.1, "warmup_type": "cosine"}, 4, 14),
    (WSD, {"num_decay_steps": 5, "num_stable_steps": 3, "decay_type": "1-sqrt", "warmup_type": "1-sqrt"}, 4, 16),
]
PLATEAUS = [{}, {"patience": 0}, {"patience": 1, "cooldown": 2, "factor": 0.5, "min_lr": 4e-5}]
PLATEAUS += [{"mode": "max", "patience": 0, "threshold": 0.05, "threshold_mode": "abs"}, {"patience": 1, "eps": 2e-4}]
# A lowest rate of 1e-3, transformers' own, is above this rate: the rate can then only rise.
GREEDY = [{"min_lr": 1e-5}, {"min_lr": 1e-5, "patience": 1, "factor": 0.5}, {"patience": 0, "min_lr": 1e-6, "max_lr": 5e-4}]
GREEDY += [{"patience": 1, "cooldown": 2, "warmup": 3, "min_lr": 0.0, "smooth": True, "window_size": 4}]
GREEDY += [{"mode": "max", "patience": 0, "threshold": 0.01, "threshold_mode": "rel", "min_lr": 1e-5}]
GREEDY += [{"patience": 0, "factor": 0.1, "min_lr": 2e-4, "reset_start": 3}, {}]
LEARNING_RATE = 3e-4


def optimizer():
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=LEARNING_RATE)


def rates(kind, kwargs, warmup, total):
    adamw = optimizer()
    scheduler = get_scheduler(kind, adamw, warmup, total, kwargs)
    out = []
    for _ in range(total):
        out.append(scheduler.get_last_lr()[0])
        adamw.step()
        scheduler.step()
    return out


def by_metrics(kind, kwargs, metrics):
    adamw = optimizer()
    scheduler = get_scheduler(kind, adamw, scheduler_specific_kwargs=kwargs)
    out = []
    for metric in metrics:
        scheduler.step(metric)
        out.append(adamw.param_groups[0]["lr"])
    return out


def ends(patience, threshold, metric, greater, values):
    """The evaluation (from 0) after which the callback ends a run; None where it does not."""
    args = TrainingArguments(metric_for_best_model=metric, greater_is_better=greater, report_to=[], use_cpu=True)
    callback = EarlyStoppingCallback(patience, threshold)
    state = SimpleNamespace(best_metric=None, best_global_step=None, global_step=0)
    control = SimpleNamespace(should_training_stop=False)
    args.save_strategy = SaveStrategy.STEPS
    trainer = SimpleNamespace(args=args, state=state)
    for i, value in enumerate(values):
        metrics = {f"eval_{metric}": value}
        callback.on_evaluate(args, state, control, metrics)
        Trainer._determine_best_metric(trainer, metrics, None)
        if control.should_training_stop:
            return i
    return None


def generate(root):
    draw = random.Random(5)
    losses = [round(2.0 - 0.1 * i + draw.uniform(-0.25, 0.25), 4) for i in range(8)]
    losses += [round(1.3 + draw.uniform(-0.05, 0.15), 4) for _ in range(22)]
    cases = [
        (patience, threshold, metric, greater, losses)
        for patience in (1, 2, 3, 5)
        for threshold in (0.0, 0.05)
        for metric, greater in (("loss", None), ("mean_token_accuracy", None), ("entropy", False))
    ]
    keys = ("patience", "threshold", "metric", "greater_is_better", "values")
    golden = {
        "learning_rate": LEARNING_RATE,
        "schedules": [
            {"type": kind, "kwargs": kwargs, "warmup": warmup, "lrs": rates(kind, kwargs, warmup, total)}
            for kind, kwargs, warmup, total in CASES
        ],
        "plateaus": [
            {"type": kind, "kwargs": kwargs, "metrics": losses, "lrs": by_metrics(kind, kwargs, losses)}
            for kind, cases in (("reduce_lr_on_plateau", PLATEAUS), ("greedy", GREEDY))
            for kwargs in cases
        ],
        "early_stopping": [{**dict(zip(keys, case)), "ends": ends(*case)} for case in cases],
    }
    write_json(root / "goldens/schedules.json", golden)
