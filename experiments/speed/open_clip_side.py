"""open_clip's side of the comparison: its own data pipeline, model, loss, optimiser and loop.

Run as a program, as against_open_clip.py does, it measures open_clip's loader.
"""

import itertools
import json
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clipx.config.schema import TrainConfig
from clipx.data.images import Normalise
from clipx.data.readers import Chunk
from clipx.devices import select_amp, select_device
from clipx.preprocessing import Preprocessing
from clipx.tokenizer import SimpleTokenizer
from clipx.tools.measure import NUM_BATCHES, load_batches, measure_loader, synchronize
from clipx.training.batch import concat
from clipx.training.memory import peak_memory
from clipx.weights.convert import open_clip_config

ENOUGH = 10**9  # samples; the pipeline cycles through the shards
PRECISION = {"none": "fp32", "bf16": "amp_bf16", "fp16": "amp"}  # its names


def open_clip_batches(shards: str, batch_size: int, workers: int, size: int) -> Iterable[Any]:
    """The loader of open_clip's training command."""
    import open_clip
    from open_clip_train.data import get_wds_dataset

    args = Namespace(
        train_data=shards, train_num_samples=ENOUGH, train_data_upsampling_factors=None, dataset_resampled=False,
        batch_size=batch_size, workers=workers, world_size=1, seed=0,
    )  # fmt: skip
    transform = open_clip.image_transform((size, size), is_train=True)
    return get_wds_dataset(args, transform, True, tokenizer=open_clip.SimpleTokenizer()).dataloader


def open_clip_model(node: Mapping[str, Any]) -> nn.Module:
    """Build open_clip's model with the sizes of a clipx model, whose weights it loads strictly."""
    import open_clip

    return open_clip.CLIP(**open_clip_config(node), output_dict=True)


def open_clip_optimizer(model: nn.Module, optim: Mapping[str, Any]) -> torch.optim.AdamW:
    """AdamW as in its training command."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": optim["weight_decay"]},
    ]
    return torch.optim.AdamW(groups, lr=optim["lr"], betas=tuple(optim["betas"]), eps=optim["eps"])


def padded(chunks: list[Chunk], context: int) -> tuple[Tensor, Tensor]:
    """A batch as from its loader: normalised (B, 3, S, S) float32, and (B, context) tokens."""
    captions = [caption for chunk in chunks for caption in chunk.captions]
    return Normalise(Preprocessing(224))(concat([chunk.images for chunk in chunks])).contiguous(), SimpleTokenizer(
        context
    )(captions)


class Batches:
    """Data set for its loop: batches in memory, cycled."""

    num_samples = ENOUGH

    def __init__(self, held: list[tuple[Tensor, Tensor]]):
        self.held, self.num_batches, self.dataloader = itertools.cycle(held), 0, self

    def set_epoch(self, _epoch: int) -> None:
        pass

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.islice(self.held, self.num_batches)


class OpenClipSteps:
    """Its training loop on the batches of ``measure.StepBenchmark``, in its own process."""

    def __init__(self, config: TrainConfig):
        import open_clip

        self.device = select_device(config.device)
        torch.manual_seed(config.seed)
        self.model = open_clip_model(config.model).to(self.device)
        self.model.set_grad_checkpointing(config.grad_checkpoint is not False)
        self.optimizer = open_clip_optimizer(self.model, config.optim)
        self.loss = open_clip.ClipLoss()
        micro = config.micro_batch_size or config.batch_size
        context = config.model["text"]["context"]
        held = [padded(chunks, context) for chunks in itertools.islice(load_batches(config), NUM_BATCHES)]
        if self.device.type == "cuda":  # as its loader does
            held = [(images.pin_memory(), tokens.pin_memory()) for images, tokens in held]
        self.batches = Batches(
            [part for images, tokens in held for part in zip(images.split(micro), tokens.split(micro), strict=True)]
        )
        precision = PRECISION[select_amp(config.amp, self.device)]
        self.args = Namespace(
            device=str(self.device), precision=precision, accum_freq=-(-config.batch_size // micro),
            distill=False, skip_scheduler=True, horovod=False, grad_clip_norm=config.clip_norm, rank=0, local_rank=0,
            world_size=1, log_every_n_steps=ENOUGH, batch_size=micro, wandb=False,
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(self.device.type) if config.amp == "fp16" else None
        self.forward = torch.compile(self.model) if config.compile else self.model
        self.batch_size = config.batch_size

    def from_memory(self, count: int) -> float:
        """Samples/s on batches in memory."""
        from open_clip_train.train import train_one_epoch

        self.batches.num_batches = count * self.args.accum_freq
        start = time.perf_counter()
        train_one_epoch(
            self.forward, {"train": self.batches}, self.loss, 0, self.optimizer, self.scaler, None, None, self.args
        )
        synchronize(self.device)
        return count * self.batch_size / (time.perf_counter() - start)

    def memory(self) -> float:
        """Peak memory so far, in GB."""
        return peak_memory(self.device)


def main() -> None:
    """Measure open_clip's loader and write the figures to standard output, as JSON."""
    arguments = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    seconds = arguments.pop("seconds")
    found = measure_loader(open_clip_batches(**arguments), arguments["batch_size"], seconds)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
