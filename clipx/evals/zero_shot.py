"""Zero-shot classification: is the nearest class name, in prompts, the picture's own?"""

from collections.abc import Iterable
from functools import partial

import torch
from pydantic import NonNegativeInt
from torch import Tensor

from clipx.data.images import decode, eval_crop
from clipx.data.labelled import LabelledConfig, LabelledSet, check_label, open_sets
from clipx.evals.features import EncodeImages, EncodeTexts, Scores, encode_texts
from clipx.evals.figures import page
from clipx.evals.templates import classifier, read_templates
from clipx.models.clip import CLIP
from clipx.tokenizer import SimpleTokenizer

TILE = 4096         # pictures scored at once
SCALE = 100         # inverse temperature that confidence is told with: CLIP's at the end of its training
TOP = 5
SHOWN = 224         # pixels of a mistake


class ZeroShot:
    """Accuracy on labelled sets, for a classifier made of their class names.

    Args:
        sets: labelled data by name.
        templates: as in ``read_templates``.
        per_class: whether each class's own accuracy is told, too.
        mistakes: most confident ones that are shown; 0: none.
    """

    def __init__(
        self,
        sets: dict[str, LabelledConfig] | None = None,
        templates: str | list[str] = "openai",
        per_class: bool = False,
        mistakes: NonNegativeInt = 16,
    ):
        self.sets, self.templates = open_sets(sets), read_templates(templates)
        self.per_class, self.mistakes = per_class, mistakes

    def __call__(self, data: LabelledSet, encode_images: EncodeImages, encode_texts: EncodeTexts) -> Scores:
        """top1, top5 (of five classes or more), mean_per_class over those that have pictures, per_class/..., mistakes.

        ``skipped`` are the pictures that could not be read, which count nowhere else.
        """
        found = encode_images(data.test)
        best, confidence = nearest(found.images, classifier(encode_texts, data.classes, self.templates))
        right = best == found.labels[:, None]
        scores: Scores = {**accuracies(right), **per_class(right[:, 0], found.labels, data.classes, self.per_class)}
        scores["pictures"], scores["skipped"] = len(found.labels), len(found.skipped)
        wrong = (~right[:, 0]).nonzero()[:, 0]
        shown = wrong[confidence[wrong].argsort(descending=True)][: self.mistakes].tolist()
        if shown:
            pictures = [eval_crop(decode(data.test.read(int(found.samples[row])).picture), SHOWN) for row in shown]
            titles = [f"{confidence[row]:.0%} {data.classes[best[row, 0]]}\nis {data.classes[found.labels[row]]}"
                      for row in shown]
            scores["mistakes"] = page(pictures, [title.replace("$", r"\$") for title in titles])
        return scores


def nearest(images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Of each picture the nearest classes, (N, up to 5), and the probability of the first, (N,)."""
    best, confidence = [], []
    for tile in images.split(TILE):
        logits = SCALE * tile @ classes.T                               # (T, C)
        top = logits.topk(min(TOP, len(classes)), dim=1)
        best.append(top.indices)
        confidence.append((top.values[:, 0] - logits.logsumexp(dim=1)).exp())
    return torch.cat(best), torch.cat(confidence)


def accuracies(right: Tensor) -> dict[str, float]:
    """From which of the nearest classes are right, (N, up to 5)."""
    top1 = {"top1": right[:, 0].double().mean().item()}
    return {**top1, "top5": right.any(dim=1).double().mean().item()} if right.shape[1] == TOP else top1


def per_class(right: Tensor, labels: Tensor, classes: list[str], each: bool) -> dict[str, float]:
    """The mean over the classes of their accuracies, and with ``each`` all of these."""
    counts = labels.bincount(minlength=len(classes)).double()
    share = torch.bincount(labels, right.double(), len(classes)) / counts
    there = counts.nonzero()[:, 0].tolist()
    own = {f"per_class/{classes[number]}": share[number].item() for number in there} if each else {}
    return {"mean_per_class": share[there].mean().item(), **own}


@torch.no_grad()
def zero_shot_eval(
    model: CLIP,
    tokenizer: SimpleTokenizer,
    loader: Iterable[tuple[Tensor, Tensor]],
    class_names: list[str],
    device: str | torch.device = "cpu",
    templates: str | list[str] = "openai",
) -> float:
    """Top-1 accuracy on pictures of one's own loader.

    Args:
        model: on ``device``; is left in the mode it was in.
        tokenizer: the model's.
        loader: gives (B, 3, S, S) pictures, as the model's transform makes them, and (B,) labels.
        class_names: of the labels, in their order.
        device: the model's.
        templates: as in ``read_templates``.

    Raises:
        DataError: a label has no name.
    """
    device, training = torch.device(device), model.training
    texts = classifier(partial(encode_texts, model, tokenizer, device), list(class_names), read_templates(templates))
    model.eval()
    right = pictures = 0
    for images, labels in loader:
        check_label(int(labels.max()), class_names, "a picture of the loader")
        best, _ = nearest(model.encode_image(images.to(device), True).cpu(), texts)
        right += int((best[:, 0] == labels.cpu()).sum())
        pictures += len(labels)
    model.train(training)
    return right / pictures
