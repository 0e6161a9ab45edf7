"""Compare the losses of clipx and open_clip step by step, from the same weights and on the same batches.

    python experiments/speed/curves.py STEPS [arguments of a train command]

Prints the largest difference over the first ten steps and over all, and both curves.
"""

import itertools
import sys

import open_clip
import torch
from hydra import compose, initialize_config_module
from open_clip_side import open_clip_model, open_clip_optimizer, padded

from clipx.config.resolve import resolve
from clipx.config.schema import TrainConfig
from clipx.loss import clip_loss
from clipx.sched import warmup_cosine
from clipx.tools.measure import load_batches
from clipx.training.loop import State, StepOutput, fit
from clipx.training.parts import initial_state
from clipx.training.step import PixelModel


def losses(config: TrainConfig, steps: int) -> tuple[list[float], list[float]]:
    """Return both losses, float32 on the CPU; ten steps of warm-up, then cosine."""
    multiplier = warmup_cosine(steps, warmup=10, warmup_cap=1.0)
    state = initial_state(config, torch.device("cpu"))
    peer = open_clip_model(config.model)
    peer.load_state_dict(state.model.state_dict(), strict=True)
    optimizer, loss_fn = open_clip_optimizer(peer, config.optim), open_clip.ClipLoss()
    batches = [*itertools.islice(load_batches(config), steps)]
    ours: list[float] = []

    def record(_state: State, output: StepOutput) -> None:
        ours.append(output.loss.item())

    forward = PixelModel(state.model)
    fit(state, forward, clip_loss, iter(batches), None, lambda step: step >= steps, multiplier, None, None, record)
    theirs = []
    for step, chunks in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = config.optim["lr"] * multiplier(step)
        optimizer.zero_grad()
        found = peer(*padded(chunks, config.model["text"]["context"]))
        loss = loss_fn(found["image_features"], found["text_features"], found["logit_scale"])
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            peer.logit_scale.clamp_(0, 4.605170185988092)
        theirs.append(loss.item())
    return ours, theirs


def main(steps: str, *arguments: str) -> None:
    with initialize_config_module("clipx.conf", version_base="1.3"):
        config = resolve(compose("train", list(arguments)), TrainConfig)
    ours, theirs = losses(config, int(steps))
    apart = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    print(f"first ten: {max(apart[:10]):.2e}   all {len(apart)}: {max(apart):.2e}")
    for step, pair in enumerate(zip(ours, theirs, strict=True)):
        print(step, *(f"{loss:.6f}" for loss in pair))


if __name__ == "__main__":
    main(*sys.argv[1:])
