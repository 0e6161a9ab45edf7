"""The gradient of the whole batch, however few samples fit into memory at once."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map_only

from clipx.data.images import Normalise
from clipx.errors import UserError
from clipx.loss.distill import Teacher
from clipx.models.clip import CLIP
from clipx.models.packed import Packed, to_device
from clipx.training.batch import MicroBatch, concat
from clipx.training.memory import is_out_of_memory


class Features(NamedTuple):
    """What a loss takes of a batch."""

    image: Tensor  # (b, E) unit features
    text: Tensor  # (b K, E) unit features, K captions of each image
    scale: Tensor  # () inverse temperature
    bias: Tensor | None = None  # () of the logits, if the model has one
    projections: tuple[Tensor, ...] = ()  # (F, E) for pictures and for texts, to a teacher of another width


Forward = Callable[[Tensor, Packed | Tensor], Features]  # of images (b, 3, S, S) uint8 and captions, or their features


class BatchOutput(NamedTuple):
    """Loss and features of a batch, detached."""

    loss: Tensor  # () nats
    image: Tensor  # (B, E) unit features
    text: Tensor  # (B K, E) unit features
    scale: Tensor  # () inverse temperature


class PixelModel(nn.Module):
    """A model of uint8 images: a compiler joins normalising them with what reads them."""

    def __init__(self, model: CLIP, projections: nn.ParameterDict | None = None):
        super().__init__()
        self.model, self.normalise = model, Normalise(model.visual.preprocessing, model.logit_scale.device)
        self.projections = projections or nn.ParameterDict()

    def forward(self, images: Tensor, captions: Packed) -> Features:
        image, text, scale = self.model(self.normalise(images), captions)
        return Features(image, text, scale, self.model.logit_bias, tuple(self.projections.values()))


class MicroBatchEncoder:
    """Moves a micro-batch to the device and encodes it.

    Args:
        forward: images (b, 3, S, S) uint8, packed captions -> features: a ``PixelModel`` or ``FeatureModel``, or a
            wrapper around it.
        device: of the model.
        amp: autocast dtype, or None for float32.
    """

    def __init__(self, forward: Forward, device: torch.device, amp: torch.dtype | None):
        self.forward, self.device, self.amp = forward, device, amp
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, micro_batch: MicroBatch) -> Features:
        images, captions = self.to_device(micro_batch)
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            return Features(*self.forward(images, captions))

    def to_device(self, micro_batch: MicroBatch) -> tuple[Tensor, Packed | Tensor]:
        """Images (b, 3, S, S) uint8 and captions on the device.

        Chunks are copied one by one and joined on the device; on a GPU the copies overlap with the computation already
        queued.
        """
        if self.copies is None:
            return concat([x.to(self.device) for x in micro_batch.images]), move(micro_batch.captions, self.device)
        with torch.cuda.stream(self.copies):
            images = concat([to_device(x, self.device) for x in micro_batch.images])
            captions = move(micro_batch.captions, self.device)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.copies)
        tree_map_only(Tensor, lambda x: x.record_stream(current), (images, captions))  # keeps their memory until then
        return images, captions

    def no_sync(self) -> AbstractContextManager[None]:
        """Skip gradient synchronisation across ranks."""
        return self.forward.no_sync() if isinstance(self.forward, DistributedDataParallel) else nullcontext()

    def rng_state(self) -> list[Tensor]:
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(self.device)] if self.copies else [])]

    def set_rng_state(self, state: list[Tensor]) -> None:
        torch.set_rng_state(state[0])
        if self.copies:
            torch.cuda.set_rng_state(state[1], self.device)


def move(captions: Packed | Tensor, device: torch.device) -> Packed | Tensor:
    """Copy captions or their features as ``to_device`` does."""
    return to_device(captions, device) if isinstance(captions, Tensor) else captions.to(device)


def backward(
    encoder: MicroBatchEncoder,
    loss_fn: Callable[..., Tensor],
    micro_batches: Sequence[MicroBatch],
    scaler: torch.amp.GradScaler,
) -> BatchOutput:
    """Accumulate the gradient of a batch.

    Several micro-batches go forward twice: first without gradient, keeping only their features; then, once the
    gradient of the loss with respect to all features is known, one by one again, and backward from there.  Ranks
    reduce their gradients once.

    Args:
        encoder: of the micro-batches.
        loss_fn: unit features (B, E), (B K, E), scale (), ids (B, 1 + K) or None -> loss (); with ``bias=`` () if the
            model has one, and ``teacher=`` if the run has one.
        micro_batches: the batch.
        scaler: scales the loss.

    Source: Gao et al. 2021, GradCache (arXiv 2101.06983).
    """
    id_parts = [micro_batch.ids for micro_batch in micro_batches if micro_batch.ids is not None]
    ids = to_device(concat(id_parts), encoder.device) if id_parts else None
    loss_of = partial(call_loss, loss_fn, ids, join_targets(micro_batches, encoder.device))
    if len(micro_batches) > 1:
        return backward_in_parts(encoder, loss_of, micro_batches, scaler)
    features = encoder(micro_batches[0])
    loss = loss_of(features)
    scaler.scale(loss).backward()
    return BatchOutput(loss.detach(), *(x.detach() for x in features[:3]))


def backward_in_parts(
    encoder: MicroBatchEncoder,
    loss_of: Callable[[Features], Tensor],
    micro_batches: Sequence[MicroBatch],
    scaler: torch.amp.GradScaler,
) -> BatchOutput:
    """Accumulate the gradient of several micro-batches, as ``backward`` says."""
    rng_states, parts = [], []
    with torch.no_grad():
        for micro_batch in micro_batches:
            rng_states.append(encoder.rng_state())
            parts.append(encoder(micro_batch))
    image = torch.cat([part.image for part in parts]).requires_grad_()
    text = torch.cat([part.text for part in parts]).requires_grad_()
    shared = tree_map_only(Tensor, lambda x: x.detach().requires_grad_(), parts[0][2:])  # scale, bias, projections
    loss = loss_of(Features(image, text, *shared))
    inputs = tensors_in((image, text, shared))
    d_image, d_text, *d_shared = torch.autograd.grad(scaler.scale(loss), inputs, materialize_grads=True)

    of_images, of_texts = d_image.split([len(x.image) for x in parts]), d_text.split([len(x.text) for x in parts])
    grads = zip(of_images, of_texts, strict=True)
    for micro_batch, rng_state, own in zip(micro_batches, rng_states, grads, strict=True):
        encoder.set_rng_state(rng_state)  # dropout draws the same numbers again
        if micro_batch is not micro_batches[-1]:
            with encoder.no_sync():
                backward_from(encoder(micro_batch)[:2], own)
        else:
            backward_from(tensors_in(encoder(micro_batch)), [*own, *d_shared])
    return BatchOutput(loss.detach(), image.detach(), text.detach(), parts[0].scale)


def tensors_in(features: tuple[Any, ...]) -> list[Tensor]:
    """The tensors of nested tuples, in order."""
    return [x for x in tree_leaves(features) if x is not None]


def call_loss(
    loss_fn: Callable[..., Tensor], ids: Tensor | None, teacher: Teacher | None, features: Features
) -> Tensor:
    """Call a loss with what it takes.

    Raises:
        UserError: it cannot take several captions per picture.
    """
    image, text, scale, bias, projections = features
    further: dict[str, Any] = {} if bias is None else {"bias": bias}
    if teacher is not None:
        halves = teacher.image.to(image.dtype), teacher.text.to(text.dtype)
        further["teacher"] = Teacher(*halves, teacher.scale, projections)
    try:
        loss = loss_fn(image, text, scale, ids, **further)
    except (ValueError, IndexError, RuntimeError) as error:
        if len(text) == len(image) or is_out_of_memory(error):
            raise
        raise UserError(
            f"the loss does not take the features of {len(image)} pictures and {len(text)} captions: {error}; set "
            "data.captions_per_picture=1, or let it take several texts for each image, as docs/extend.md says"
        ) from error
    for weight in projections:
        loss = loss + 0 * weight.sum()  # DistributedDataParallel waits for the gradients of all parameters
    return loss


def join_targets(micro_batches: Sequence[MicroBatch], device: torch.device) -> Teacher | None:
    """The features of a teacher of the whole batch, on the device, if there are any."""
    targets = [target for micro_batch in micro_batches for target in micro_batch.targets]
    if not targets:
        return None
    halves = [torch.cat([target.image for target in targets]), torch.cat([target.text for target in targets])]
    image, text = (F.normalize(to_device(half, device).float(), dim=-1) for half in halves)
    return Teacher(image, text, targets[0].scale.to(device))


def backward_from(features: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Backpropagate given gradients of the features; skips the features of a frozen tower."""
    trained = [(x, grad) for x, grad in zip(features, grads, strict=True) if x.requires_grad]
    if trained:
        torch.autograd.backward([x for x, _ in trained], [grad for _, grad in trained])
