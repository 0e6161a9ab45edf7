"""Labelled data sets, zero-shot classification and the linear probe."""

import logging
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import picture, write_tar
from labelled_data import CLASSES, NAMES, class_folders, class_shards
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from clipx import zero_shot_eval
from clipx.data.images import get_image_transform
from clipx.data.labelled import LabelledSet, open_sets
from clipx.errors import UserError
from clipx.evals import linear_probe, zero_shot
from clipx.evals.encoder import EvalEncoder
from clipx.evals.features import LabelledFeatures
from clipx.evals.linear_probe import LinearProbe
from clipx.evals.validation import Validation
from clipx.evals.zero_shot import ZeroShot, classifier, read_templates
from clipx.models.clip import CLIP
from clipx.models.text import TextEncoder
from clipx.models.vision import ImageEncoder
from clipx.tokenizer import SimpleTokenizer
from clipx.training.logs import SilentLog


@pytest.fixture
def model() -> CLIP:
    torch.manual_seed(0)
    return CLIP(
        ImageEncoder(size=32, patch=16, width=64, depth=1, heads=1, embed=32),
        TextEncoder(width=64, depth=1, heads=1, embed=32),
    ).eval()


def mnist(root: Path, labels: list[int], train: bool = False) -> Path:
    """MNIST's files as read by torchvision: 28 x 28 bytes per picture."""
    raw, part = root / "MNIST" / "raw", "train" if train else "t10k"
    raw.mkdir(parents=True, exist_ok=True)
    for split in ("train", "t10k"):  # torchvision checks that all four exist
        for kind in ("images-idx3", "labels-idx1"):
            if not (raw / f"{split}-{kind}-ubyte").exists():
                (raw / f"{split}-{kind}-ubyte").write_bytes(b"")
    pixels = np.stack([np.full((28, 28), 20 * label + 5 + offset, np.uint8) for offset, label in enumerate(labels)])
    (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, len(labels), 28, 28) + pixels.tobytes())
    (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, len(labels)) + bytes(labels))
    return root


def scores(model: CLIP, evaluation: ZeroShot | LinearProbe, workers: int = 0) -> dict[str, float]:
    validation = Validation({}, {"it": evaluation}, SimpleTokenizer(), workers, None)
    return {tag.removeprefix("val/it@"): value for tag, value in validation(model, 1, SilentLog()).items()}


# ---------------------------------------------------------------- comparison with other projects


def test_the_same_model_gives_the_classifier_and_the_accuracies_of_clip_benchmark(model: CLIP, tmp_path: Path) -> None:
    from clip_benchmark.metrics import zeroshot_classification as peer

    templates, root = read_templates("simple"), class_folders(tmp_path / "x", each=5)
    tokenizer = SimpleTokenizer()
    theirs = peer.zero_shot_classifier(
        model, tokenizer, CLASSES, [template.replace("{}", "{c}") for template in templates], "cpu", amp=False
    )
    texts = EvalEncoder(model, tokenizer).encode_texts
    assert torch.allclose(classifier(texts, CLASSES, templates), theirs.T, atol=1e-6)

    data = open_sets({"x": {"folder": str(root)}})["x"]
    encoded = EvalEncoder(model, tokenizer, 0, None).encode_labelled(data.test)
    transform = get_image_transform(32)
    batch = torch.stack([transform(Image.open(file)) for file in sorted(root.rglob("*.png"))]), encoded.labels
    their_texts = peer.zero_shot_classifier(model, tokenizer, NAMES, ["a {c}"], "cpu", amp=False)
    logits, target = peer.run_classification(model, their_texts, [batch], "cpu", amp=False)
    # accuracy from scikit-learn, because clip_benchmark's accuracy() raises TypeError with numpy 2.4 and later
    top1, top5 = (top_k_accuracy_score(target, logits, k=k, labels=range(6)) for k in (1, 5))
    ours = ZeroShot({"x": {"folder": str(root)}}, ["a {c}"])(replace(data, classes=NAMES), lambda _: encoded, texts)
    assert (ours["top1"], ours["top5"]) == (top1, top5)
    assert ours["mean_per_class"] == pytest.approx(balanced_accuracy_score(target, logits.argmax(dim=1)))
    assert zero_shot_eval(model, tokenizer, [batch], class_names=NAMES, templates=["a {}"]) == top1


def feature_source(images: torch.Tensor, labels: torch.Tensor) -> Callable[..., LabelledFeatures]:
    return lambda source: LabelledFeatures(images, images, labels, torch.arange(len(labels)), [])


def test_top_1_top_5_and_the_mean_of_classes_are_scikit_learns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(zero_shot, "TILE", 7)
    torch.manual_seed(0)
    texts, labels = F.normalize(torch.randn(12, 8), dim=-1), torch.randint(12, (50,))
    images = F.normalize(texts[labels] + 0.5 * torch.randn(50, 8), dim=-1)
    names = [f"class {number}" for number in range(12)]
    evaluation = ZeroShot({"x": {"folder": str(class_folders(tmp_path / "x"))}}, ["{}"], per_class=True, mistakes=0)
    metrics = evaluation(LabelledSet(None, None, names), feature_source(images, labels), lambda prompts: texts)
    logits = (images @ texts.T).numpy()
    for k in (1, 5):
        assert metrics[f"top{k}"] == top_k_accuracy_score(labels, logits, k=k, labels=range(12))
    assert metrics["mean_per_class"] == pytest.approx(balanced_accuracy_score(labels, logits.argmax(1)))
    in_class = labels == 3
    assert metrics["per_class/class 3"] == pytest.approx((logits.argmax(1)[in_class] == 3).mean())
    assert 0.3 < metrics["top1"] < metrics["top5"] <= 1


def test_the_class_texts_are_encoded_in_tiles_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []

    def texts(prompts: list[str]) -> torch.Tensor:
        encoded.extend(prompts)
        return F.normalize(torch.tensor([[len(prompt), prompt.count("a"), 1.0] for prompt in prompts]), dim=-1)

    expected = classifier(texts, NAMES, ["a {}", "the {}!"])
    assert len(encoded) == len(set(encoded)) == 12
    monkeypatch.setattr(zero_shot, "MAX_PROMPTS", 4)
    assert torch.equal(classifier(texts, NAMES, ["a {}", "the {}!"]), expected)
    both = F.normalize(texts(["a ant", "the ant!"]).mean(dim=0), dim=-1)
    assert torch.allclose(expected[0], both)


# ---------------------------------------------------------------- templates


def test_templates_come_by_name_from_a_list_or_from_a_file(tmp_path: Path) -> None:
    assert len(read_templates("openai")) == 80 and read_templates("openai")[0] == "a bad photo of a {}."
    assert len(read_templates("simple")) == 7
    (tmp_path / "words.txt").write_text("a {c}\n\nmy {}\n")
    assert read_templates(str(tmp_path / "words.txt")) == ["a {}", "my {}"]
    assert read_templates("a photo of a {}.") == ["a photo of a {}."]
    with pytest.raises(ValueError, match=r"^templates=\['a photo'\]: \['a photo'\] has no {} for the class name"):
        read_templates(["a photo"])
    with pytest.raises(ValueError, match="^templates=opnai: there is no such file"):
        read_templates("opnai")


# ---------------------------------------------------------------- labelled data


def read_all(data: LabelledSet) -> list[int]:
    return [int(data.test.read(number).captions[0]) for number in range(sum(data.test.sizes))]


def test_a_folder_of_class_folders_names_its_classes(tmp_path: Path) -> None:
    data = open_sets({"x": {"folder": str(class_folders(tmp_path / "x", each=2))}})["x"]
    assert data.classes == ["ant", "bee", "cow", "red panda"] and read_all(data) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert data.test.locate(7) == "red_panda/1.png"


def test_directories_that_a_system_made_are_no_classes_and_empty_ones_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = class_folders(tmp_path / "x", each=1)
    for name in (".ipynb_checkpoints", "@eaDir", "__MACOSX", "ant/.ipynb_checkpoints", "bee/@eaDir/0.png", "auk"):
        (root / name).mkdir(parents=True)
        (root / name / ("0.png" if name != "auk" else "notes.txt")).write_bytes(picture(1))
    (root / "cow" / "._0.png").write_bytes(b"AppleDouble")
    with caplog.at_level(logging.WARNING, "clipx"):
        data = open_sets({"x": {"folder": str(root)}})["x"]
    assert data.classes == ["ant", "auk", "bee", "cow", "red panda"] and read_all(data) == [0, 2, 3, 4]
    assert "1 of 5 classes have no pictures but can be predicted: auk" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_with_cls_are_read_by_workers_and_name_their_classes(model: CLIP, tmp_path: Path, workers: int) -> None:
    root = class_shards(tmp_path / "x", [b"0", b"3", b"1\n", b"2"])
    data = open_sets({"x": {"shards": str(root)}})["x"]
    assert data.classes == CLASSES and read_all(data) == [0, 3, 1, 2]
    encoder = EvalEncoder(model, SimpleTokenizer(), workers, None)
    assert encoder.encode_labelled(data.test).labels.tolist() == [0, 3, 1, 2]


def test_class_names_of_clip_benchmark_are_found_one_level_up_and_the_test_split_below(tmp_path: Path) -> None:
    root = class_shards(tmp_path / "x", [b"0", b"3"])
    for split in ("test", "train"):
        (root / split).mkdir()
    write_tar(root / "train" / "0.tar", [("0.png", picture(1)), ("0.cls", b"2")])
    (root / "part-0.tar").rename(root / "test" / "0.tar")
    for location in ("x", "x/test"):
        data = open_sets({"x": {"shards": str(tmp_path / location), "train": str(root)}}, train=True)["x"]
        assert data.classes == CLASSES and read_all(data) == [0, 3] and data.train.read(0).captions == ["2"]


def test_shards_of_another_kind_say_so(tmp_path: Path) -> None:
    root = class_shards(tmp_path / "x", [b"0"])
    (root / "dataset_type.txt").write_text("retrieval\n")
    with pytest.raises(ValueError, match="x: dataset_type.txt says retrieval; expected classification or multilabel"):
        open_sets({"x": {"shards": str(root)}})
    (root / "dataset_type.txt").write_text("multilabel\n")
    with pytest.raises(ValueError, match=r"sets.x: its pictures have several classes, .* use evals=\[zero_shot\]"):
        open_sets({"x": {"shards": str(root), "train": str(root)}}, train=True)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "cp1252"])
def test_class_names_in_another_encoding_are_one_line(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "names.txt").write_text("café\nbar\n", encoding=encoding)
    options = {"folder": str(class_folders(tmp_path / "x")), "classes": str(tmp_path / "names.txt")}
    with pytest.raises(
        UserError,
        match=r"^sets.x.classes=.*names.txt is not UTF-8 text, perhaps "
        rf"{'CP1252' if encoding == 'cp1252' else 'UTF-16'}; convert it: iconv",
    ):
        open_sets({"x": options})


def test_a_data_set_of_torchvisions_keeps_its_pixels_and_names(tmp_path: Path) -> None:
    root = mnist(mnist(tmp_path, [3, 1, 4]), [1, 5], train=True)
    data = open_sets({"x": {"dataset": "MNIST", "root": str(root)}}, train=True)["x"]
    assert data.classes[3] == "3 - three" and read_all(data) == [3, 1, 4] and sum(data.train.sizes) == 2
    from clipx.data.images import decode

    assert np.asarray(decode(data.test.read(1).picture))[0, 0].tolist() == [26, 26, 26]


def test_open_clips_class_names_are_1000() -> None:
    from clipx.data.class_names import read_names

    names = read_names("imagenet", "classes")
    assert len(names) == 1000 and names[1] == "goldfish"


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_a_broken_image_is_counted_and_reported(
    kind: str, model: CLIP, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if kind == "folder":
        root = class_folders(tmp_path / "x")
        (root / "bee" / "1.png").write_bytes(picture(1)[:50])
        message = "bee/1.png: does not decode"
    else:
        root = class_shards(tmp_path / "x", [b"0", b"one", b"2"])
        message = "part-0.tar/001: its class (.cls) is not a number"
    with caplog.at_level(logging.WARNING, "clipx"):
        metrics = scores(model, ZeroShot({"x": {kind: str(root)}}, "simple"))
    assert (metrics["x/skipped"], metrics["x/pictures"]) == ((1, 11) if kind == "folder" else (1, 2))
    assert f"x: skipped 1 pictures, for example {message}" in caplog.text


def test_labels_without_a_name_are_one_line(model: CLIP, tmp_path: Path) -> None:
    root = class_shards(tmp_path / "x", [b"0", b"4"])
    with pytest.raises(
        UserError,
        match=r"^part-0.tar/001 has the label 4, but there are 4 class names, for 0 to 3; "
        r"set the names of this data set: classes=FILE, one name per line$",
    ):
        scores(model, ZeroShot({"x": {"shards": str(root)}}, "simple"))
    with pytest.raises(UserError, match="^a picture of the loader has the label 9, but there are 4 class names"):
        zero_shot_eval(model, SimpleTokenizer(), [(torch.zeros(1, 3, 32, 32), torch.tensor([9]))], CLASSES)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, "sets.x={}: give one of dataset=CIFAR10 (with root=DIR), folder=DIR and shards=DIR"),
        ({"dataset": "CIFAR11", "root": "."}, "sets.x.dataset=CIFAR11: torchvision has no such data set; did you "),
        ({"dataset": "CIFAR10"}, "sets.x.root has no value; set it to the directory of CIFAR10"),
        (
            {"dataset": "CIFAR10", "root": "no"},
            "sets.x.root=no: CIFAR10 is missing or incomplete (Dataset not found "
            "or corrupted. You can use download=True to download it); download it with "
            "torchvision.datasets.CIFAR10('no', download=True)",
        ),
        ({"dataset": "CIFAR10", "root": "no", "split": "val"}, "sets.x.split=val: expected train or test for CIFAR10"),
        ({"dataset": "DTD", "root": "no", "split": "dev"}, "sets.x.split=dev: Unknown value 'dev' for argument split."),
        ({"dataset": "FakeData"}, "sets.x.classes has no value, and FakeData has no class names; set classes=FILE"),
        ({"folder": "no"}, "sets.x.folder=no has no class directories with pictures, such as no/cat/1.jpg"),
        ({"folder": "x", "classes": "few"}, "sets.x.classes=few has 2 names, but x has 4 classes"),
        ({"folder": "x", "classes": "no"}, "sets.x.classes=no: there is no such file; expected class names"),
        ({"folder": "x", "root": "no"}, "sets.x.root is only for torchvision's data sets (dataset=...)"),
        ({"shards": "no*.tar"}, "sets.x.shards=no*.tar: there is no file no*.tar"),
        ({"shards": "x"}, "sets.x.shards=x holds no shards (*.tar)"),
        ({"folder": "x", "cache": "no"}, "sets.x.cache is only for shards, not for folder=x"),
    ],
)
def test_a_wrong_set_is_one_line(
    options: dict[str, str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    class_folders(tmp_path / "x")
    (tmp_path / "few").write_text("a\nb\n")
    with pytest.raises(ValueError) as raised:
        open_sets({"x": options})
    assert str(raised.value).startswith(line) and "\n" not in str(raised.value)


def test_the_mistakes_that_are_most_confident_come_first(model: CLIP, tmp_path: Path) -> None:
    root = class_folders(tmp_path / "x")
    data = open_sets({"x": {"folder": str(root)}})["x"]
    texts, labels = torch.eye(4), torch.arange(12) // 3
    images = F.normalize(texts[labels] + torch.linspace(0.9, 1.1, 12)[:, None] * texts[(labels + 1) % 4], dim=-1)
    metrics = ZeroShot({"x": {"folder": str(root)}}, ["{}"], mistakes=3)(
        data, feature_source(images, labels), lambda _: texts
    )
    titles = [axes.get_title() for axes in metrics["mistakes"].axes]
    assert len(titles) == 3 and titles[0] == "100% ant\nis red panda"


# ---------------------------------------------------------------- the linear probe


def test_the_features_of_the_probe_are_those_before_the_projection(model: CLIP, tmp_path: Path) -> None:
    data = open_sets({"x": {"folder": str(class_folders(tmp_path / "x"))}})["x"]
    features = EvalEncoder(model, SimpleTokenizer(), 0, None).encode_labelled(data.test)
    assert features.hidden.shape == (12, 64)
    assert torch.allclose(F.normalize(features.hidden @ model.visual.proj.detach(), dim=-1), features.images, atol=1e-6)


def test_the_search_finds_the_peak_of_96_steps_in_few_tries() -> None:
    for peak in (0, 1, 37, 50, 96):
        tried = []

        def accuracy(strength: float, peak: int = peak, tried: list[float] = tried) -> float:
            tried.append(strength)
            return -abs(np.log10(strength) - np.log10(linear_probe.STRENGTHS[peak]))

        assert linear_probe.search(accuracy)[0] == linear_probe.STRENGTHS[peak] and len(tried) == len(set(tried)) <= 15
    assert linear_probe.search(lambda strength: 1.0)[0] == 1e6  # the strongest among equals
    assert np.allclose(np.diff(np.log10(linear_probe.STRENGTHS)), 1 / 8)


def test_the_probe_is_scikit_learns_at_the_strength_that_was_found(tmp_path: Path) -> None:
    torch.manual_seed(0)
    centres = torch.randn(4, 16)
    y, y_test = torch.randint(4, (200,)), torch.randint(4, (80,))
    x, x_test = centres[y] + 1.5 * torch.randn(200, 16), centres[y_test] + 1.5 * torch.randn(80, 16)
    options = {"folder": str(class_folders(tmp_path / "a")), "train": str(class_folders(tmp_path / "b", 4, 3))}
    probe = LinearProbe({"x": options})
    data = probe.sets["x"]
    metrics = probe(
        data, lambda source: feature_source(*((x, y) if source is data.train else (x_test, y_test)))(source), None
    )
    peer = LogisticRegression(C=1 / metrics["strength"], max_iter=1000).fit(x.numpy(), y.numpy())
    predicted = peer.predict(x_test.numpy())
    assert metrics["top1"] == pytest.approx(peer.score(x_test.numpy(), y_test.numpy())) and metrics["top1"] > 0.5
    assert metrics["mean_per_class"] == pytest.approx(balanced_accuracy_score(y_test, predicted))


def test_a_probe_asks_for_pictures_to_learn_from(tmp_path: Path) -> None:
    root = str(class_folders(tmp_path / "x"))
    with pytest.raises(ValueError, match=r"^sets.x.train has no value; a probe needs training pictures"):
        LinearProbe({"x": {"folder": root}})
    with pytest.raises(ValueError, match=r"expected other pictures of the same classes as the test set$"):
        LinearProbe({"x": {"folder": root, "train": root}})
