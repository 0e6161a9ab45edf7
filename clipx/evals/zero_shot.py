"""Zero-shot classification: assign each picture the class with the nearest prompts."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt
from torch import Tensor

from clipx.data.class_names import check_label, read_templates
from clipx.data.images import decode, eval_crop
from clipx.data.labelled import LabelledConfig, LabelledSet, open_sets
from clipx.evals.encoder import EvalEncoder, evaluating
from clipx.evals.features import EncodeImages, EncodeTexts, Scores
from clipx.evals.figures import picture_grid
from clipx.models.clip import CLIP
from clipx.tokenizer import Tokenizer

MAX_PROMPTS = 8192  # encoded at once
TILE = 4096  # pictures scored at once
SCALE = 100  # inverse temperature of the reported confidence: CLIP's after training
TOP = 5
MISTAKE_SIZE = 224  # pixels


class ZeroShot:
    """Accuracy on labelled sets of a classifier built from their class names.

    Args:
        sets: labelled data by name.
        templates: as in ``read_templates``, for sets without their own.
        per_class: whether to report each class's accuracy or average precision, too.
        mistakes: number of the most confident mistakes to show.
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
        """Return top1, top5 (for at least five classes), mean_per_class, per_class/..., and a figure of mistakes.

        Of a multi-label set, return mean_average_precision and per_class/....  ``skipped`` counts the pictures that
        cannot be read; the other metrics exclude them.
        """
        features = encode_images(data.test)
        texts = classifier(encode_texts, data.classes, data.templates or self.templates)
        counts = {"pictures": len(features.labels), "skipped": len(features.skipped)}
        if features.labels.ndim == 2:
            return {
                **average_precision(features.images @ texts.T, features.labels, data.classes, self.per_class),
                **counts,
            }
        best, confidence = top_classes(features.images, texts)
        correct = best == features.labels[:, None]
        scores: Scores = topk_accuracy(correct)
        scores |= per_class(correct[:, 0], features.labels, data.classes, self.per_class)
        scores |= counts
        wrong = (~correct[:, 0]).nonzero()[:, 0]
        shown = wrong[confidence[wrong].argsort(descending=True)][: self.mistakes].tolist()
        if shown:
            samples = [data.test.read(sample) for sample in features.samples[shown].tolist()]
            pictures = [eval_crop(decode(sample.picture), MISTAKE_SIZE) for sample in samples]
            titles = [
                f"{confidence[row]:.0%} {data.classes[best[row, 0]]}\nis {data.classes[features.labels[row]]}"
                for row in shown
            ]
            scores["mistakes"] = picture_grid(pictures, [title.replace("$", r"\$") for title in titles])
        return scores


def classifier(encode_texts: EncodeTexts, classes: list[str], templates: list[str]) -> Tensor:
    """(C, E) unit vectors: the normalised mean of each class's prompt features.

    Source: Radford et al. 2021, section 3.1.4 (ensembling over the embedding space).
    """
    rows, tile = [], max(1, MAX_PROMPTS // len(templates))
    for start in range(0, len(classes), tile):
        names = classes[start : start + tile]
        prompts = [template.replace("{}", name) for name in names for template in templates]
        rows.append(encode_texts(prompts).view(len(names), len(templates), -1).mean(dim=1))
    return F.normalize(torch.cat(rows), dim=-1)


def top_classes(images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest classes of each picture, (N, up to 5), and the probability of the first, (N,)."""
    best, confidence = [], []
    for tile in images.split(TILE):
        logits = SCALE * tile @ classes.T  # (T, C)
        top = logits.topk(min(TOP, len(classes)), dim=1)
        best.append(top.indices)
        confidence.append((top.values[:, 0] - logits.logsumexp(dim=1)).exp())
    return torch.cat(best), torch.cat(confidence)


def topk_accuracy(correct: Tensor) -> dict[str, float]:
    """top1 and top5 from (N, up to 5), which of the nearest classes are correct."""
    top1 = {"top1": correct[:, 0].double().mean().item()}
    return {**top1, "top5": correct.any(dim=1).double().mean().item()} if correct.shape[1] == TOP else top1


def per_class(correct: Tensor, labels: Tensor, classes: list[str], each: bool) -> dict[str, float]:
    """The mean accuracy over classes that have pictures; with ``each``, that of every class, too."""
    counts = labels.bincount(minlength=len(classes)).double()
    accuracy = torch.bincount(labels, correct.double(), len(classes)) / counts
    present = counts.nonzero()[:, 0].tolist()
    own = {f"per_class/{classes[number]}": accuracy[number].item() for number in present} if each else {}
    return {"mean_per_class": accuracy[present].mean().item(), **own}


def average_precision(scores: Tensor, labels: Tensor, classes: list[str], each: bool) -> dict[str, float]:
    """The mean over classes of the average precision of pictures (N, C), ranked by a class's score (N, C).

    As in CLIP_benchmark, a class without pictures counts as 0.  With ``each``, also that of every other class.
    """
    from sklearn.metrics import average_precision_score

    present = labels.any(dim=0).nonzero()[:, 0].tolist()
    found = {
        classes[number]: float(average_precision_score(labels[:, number].numpy(), scores[:, number].numpy()))
        for number in present
    }
    own = {f"per_class/{name}": value for name, value in found.items()} if each else {}
    return {"mean_average_precision": sum(found.values()) / len(classes), **own}


def zero_shot_eval(
    model: CLIP,
    tokenizer: Tokenizer,
    loader: Iterable[tuple[Tensor, Tensor]],
    class_names: list[str],
    device: str | torch.device = "cpu",
    templates: str | list[str] = "openai",
) -> float:
    """Top-1 accuracy on the pictures of a DataLoader.

    Args:
        model: on ``device``; its training mode is restored.
        tokenizer: of the model.
        loader: yields (B, 3, S, S) pictures, made by the model's transform, and (B,) labels.
        class_names: names of labels 0, 1, ...
        device: of the model.
        templates: as in ``read_templates``.

    Raises:
        DataError: a label has no name.
    """
    texts = classifier(EvalEncoder(model, tokenizer).encode_texts, list(class_names), read_templates(templates))
    correct = pictures = 0
    with evaluating(model):
        for images, labels in loader:
            check_label(int(labels.max()), class_names, "a picture of the loader")
            best, _ = top_classes(model.encode_image(images.to(device), True).cpu(), texts)
            correct += int((best[:, 0] == labels.cpu()).sum())
            pictures += len(labels)
    return correct / pictures
