"""The gradient of a step: of the whole batch, however few of its samples fit into memory at once."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from clipx.data.images import Normalise
from clipx.models.packed import Packed
from clipx.training.batch import Part, joined

Features = tuple[Tensor, Tensor, Tensor]        # unit features (b, E), (b, E), scale ()
Forward = Callable[[Tensor, Packed], Features]


class Outcome(NamedTuple):
    """What a pass over a batch has found, without gradient."""

    loss: Tensor        # () nats
    image: Tensor       # (B, E) unit features
    text: Tensor        # (B, E) likewise
    scale: Tensor       # () inverse temperature


class Encoder:
    """A micro-batch, wherever it is, to its features on the device.

    Args:
        forward: normalised images (b, 3, S, S), packed captions -> unit features (b, E), (b, E), scale (); the bare
            model, or what is wrapped around it.
        device: the model's.
        amp: autocast's type, or None for float32.
    """

    def __init__(self, forward: Forward, device: torch.device, amp: torch.dtype | None):
        self.forward, self.device, self.amp = forward, device, amp
        self.normalise = Normalise(device)
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, part: Part) -> Features:
        part = self.on_device(part)
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            return self.forward(self.normalise(part.image), part.captions)

    def on_device(self, part: Part) -> Part:
        """The part on the device; a GPU copies it while it still computes what it was given before."""
        if self.copies is None:
            return tree_map_only(Tensor, lambda x: x.to(self.device), part)
        with torch.cuda.stream(self.copies):
            part = tree_map_only(Tensor, lambda x: x.to(self.device, non_blocking=True), part)
        now = torch.cuda.current_stream(self.device)
        now.wait_stream(self.copies)
        tree_map_only(Tensor, lambda x: x.record_stream(now), part)     # its memory is not given away before
        return part

    def unsynced(self) -> AbstractContextManager[None]:
        """In it ranks keep what they add to their gradients to themselves."""
        return self.forward.no_sync() if isinstance(self.forward, DistributedDataParallel) else nullcontext()

    def random_state(self) -> list[Tensor]:
        """What dropout and the like will draw from."""
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(self.device)] if self.copies else [])]

    def set_random_state(self, state: list[Tensor]) -> None:
        torch.set_rng_state(state[0])
        if self.copies:
            torch.cuda.set_rng_state(state[1], self.device)


def backward(
    encoder: Encoder, loss_of: Callable[..., Tensor], parts: Sequence[Part], scaler: torch.amp.GradScaler
) -> Outcome:
    """Add the gradient of a batch to that of the parameters.

    A batch in several parts goes forward twice: first all of it, keeping nothing but the features; then, when the
    gradient of the loss at these features is known, part by part again, and back from there.  Ranks sum once.

    Args:
        encoder: of the parts.
        loss_of: unit features (B, E), (B, E), scale (), ids (B, 2) or None -> loss ().
        parts: of the batch.
        scaler: scales the loss.

    Source: Gao et al. 2021, GradCache (arXiv 2101.06983).
    """
    ids = None if parts[0].ids is None else joined([part.ids for part in parts]).to(encoder.device)
    if len(parts) == 1:
        image, text, scale = encoder(parts[0])
        loss = loss_of(image, text, scale, ids)
        scaler.scale(loss).backward()
        return Outcome(loss.detach(), image.detach(), text.detach(), scale.detach())

    states, seen = [], []
    with torch.no_grad():
        for part in parts:
            states.append(encoder.random_state())
            seen.append(encoder(part))
    images, texts, scales = zip(*seen, strict=True)
    image, text, scale = (x.requires_grad_() for x in (torch.cat(images), torch.cat(texts), scales[0]))
    loss = loss_of(image, text, scale, ids)
    scaler.scale(loss).backward()

    sizes = [len(part) for part in parts]
    known = [*zip(image.grad.split(sizes), text.grad.split(sizes), strict=True)]
    known[-1] += (scale.grad,)
    for part, state, gradients in zip(parts, states, known, strict=True):
        encoder.set_random_state(state)         # what was drawn, for dropout, is drawn again
        with nullcontext() if part is parts[-1] else encoder.unsynced():
            back(encoder(part)[: len(gradients)], gradients)
    return Outcome(loss.detach(), image.detach(), text.detach(), scale.detach())


def back(features: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Back from features whose gradients are known; not from those of a frozen tower."""
    pairs = [(x, gradient) for x, gradient in zip(features, gradients, strict=True) if x.requires_grad]
    if pairs:
        torch.autograd.backward(*zip(*pairs, strict=True))
