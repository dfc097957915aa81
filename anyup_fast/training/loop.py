"""The loop of training: steps, the average of the weights, what it measures, and states to resume from."""

import csv
import json
import logging
import math
import os
import time
from dataclasses import asdict

import numpy as np
import torch

from ..checkpoints import load_checkpoint, save_checkpoint
from ..files import expanded, written_aside
from ..model import AnyUp
from ..plain.precision import fast_in_bfloat16
from .objectives import OWN_TERMS, training_loss
from .optimizers import Optimizer
from .samples import draw_sample
from .targets import TargetCache

logger = logging.getLogger("anyup_fast")

METRICS = ("step", "loss", "main", *OWN_TERMS, "reconstruction", "consistency", "norm", "lr", "seconds")


def train(config, output, *, cache=None, save_every=200, until=None, progress=iter):
    """Train AnyUp, from scratch or from the weights `config.init`.

    Args:
        config: TrainConfig.
        output: folder of the run: `state.pt` (to resume from), `metrics.csv`, `config.json` and in the end
            `anyup.safetensors` (the exponential moving average of the weights).
        cache: folder of the cached targets; None = `targets` inside `output`.
        save_every: steps between two writes of `state.pt`.
        until: stop after this step as if it were the last one; None = at the end of `config.steps`. The same call
            with another one, or none, goes on from there.
        progress: wraps the iterables of the two stages (for instance in a progress bar).

    Returns:
        pathlib.Path of the trained weights.

    Raises:
        FileNotFoundError: no pictures, no weights to start from. ValueError: `output` holds a run with other settings,
            or one that is past `until`; what `TargetCache.fill` refuses. RuntimeError: the gradient is not finite any
            more, or weights are missing.
    """
    if save_every < 1:
        raise ValueError(f"save_every: must be at least 1, got {save_every}")
    if until is not None and not 1 <= until <= config.steps:
        raise ValueError(f"until: must lie between 1 and steps, {config.steps}, got {until}")
    with torch.device("cpu"):  # whatever the default device
        return _train(config, expanded(output), cache, save_every, until or config.steps, progress)


def _train(config, output, cache, save_every, last, progress):
    settings = json.loads(json.dumps(asdict(config), default=os.fspath))
    record = output / "config.json"
    if record.exists() and json.loads(record.read_text()) != settings:
        raise ValueError(f"output: {output} holds a run with other settings; choose another folder or remove it")
    initial = None if config.init is None else load_checkpoint(config.init, AnyUp)[0]
    targets = TargetCache(cache or output / "targets", config)
    targets.fill(progress)
    with written_aside(record) as aside:
        aside.write_text(json.dumps(settings, indent=1))

    torch.manual_seed(config.seed)
    arguments = {"window_ratio": config.window_ratio, **config.model}
    model = AnyUp(**arguments)
    if initial is not None:
        _start_from(model, initial, config.init)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(config.ema)
    )
    optimizer = Optimizer(model, config.optimizer, config.weight_decay)
    first = 0
    state_file = output / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
        logger.info("resuming at step %d of %d", first, config.steps)
        if first > last:
            raise ValueError(f"until: {output} is at step {first} already, got {last}")

    narrow = config.bf16 and fast_in_bfloat16()
    if config.bf16 and not narrow:
        logger.info("products in float32: this processor does not multiply bfloat16 faster")
    _cut_metrics(output / "metrics.csv", first)
    with open(output / "metrics.csv", "a", newline="") as file:
        metrics = csv.writer(file)
        for step in progress(range(first, last)):
            start = time.perf_counter()
            rng = np.random.default_rng((config.seed, config.pictures, step, *([config.draws] if config.draws else ())))
            sample = draw_sample(targets, rng)
            with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
                loss, terms = training_loss(model, sample, rng, config)
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            if not math.isfinite(norm):
                raise RuntimeError(f"step {step}: the gradient is {norm.item()}; lower lr (now {config.lr}) and resume")
            optimizer.step(learning_rate(config, step))
            average.update_parameters(model)
            row = {"loss": loss.item(), "norm": norm.item(), **terms}
            row |= {"lr": learning_rate(config, step), "seconds": time.perf_counter() - start}
            metrics.writerow([step, *(f"{row[name]:.6g}" if name in row else "" for name in METRICS[1:])])
            file.flush()
            if (step + 1) % save_every == 0 or step + 1 == last:
                state = {"model": model.state_dict(), "average": average.state_dict()}
                state |= {"optimizer": optimizer.state_dict(), "step": step + 1}
                with written_aside(state_file) as aside:
                    torch.save(state, aside)
    weights = output / "anyup.safetensors"
    save_checkpoint(weights, average.module.state_dict(), arguments, steps=last)
    return weights


def _start_from(model, initial, name):
    try:
        model.load_state_dict(initial)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"init: {name} holds another architecture than `model` asks for: {reason}") from error


def learning_rate(config, step):
    """Linear warm-up, then a cosine down to a hundredth."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def _cut_metrics(path, steps):
    """Leave the header and the whole rows of the first `steps` steps; begin the file where there is none."""
    rows = []
    if path.exists():
        with open(path, newline="") as file:
            rows = [row for row in csv.reader(file) if len(row) == len(METRICS) and row != list(METRICS)]
    with written_aside(path) as aside, open(aside, "w", newline="") as file:
        csv.writer(file).writerows([METRICS, *(row for row in rows if int(row[0]) < steps)])
