"""Augmentation: the same bits wherever a picture is read, and torchvision's pictures where it has the operation."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from conftest import ROOT, assert_same_state
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as peer

from clipx.config.instantiate import build
from clipx.data.augment import (
    Affine,
    Augmentation,
    BySource,
    Color,
    Flip,
    apply,
    drawing_from,
    for_sources,
    recolor,
    warp,
)
from clipx.data.dummy import Dummy, open_dummy
from clipx.data.images import TrainCrop
from clipx.data.loader import load_chunks, train_ranges
from clipx.data.mix import open_mix, source_names
from clipx.data.plan import Plan
from clipx.data.readers import TrainReader
from clipx.errors import UserError
from clipx.preprocessing import Preprocessing
from clipx.tokenizer import SimpleTokenizer

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")

NAMES = sorted(path.stem for path in (ROOT / "conf" / "augment").glob("*.yaml"))
OPTIONS = [name for name in NAMES if name != "by_source"]
TOKENIZER = SimpleTokenizer()


def augmentation(option: str) -> Augmentation | None:
    with hydra.initialize_config_module("clipx.conf", version_base="1.3"):
        node: Any = OmegaConf.to_container(hydra.compose("train", [f"augment={option}"]).augment)
    return build(node, "augment") or None


def reader_of(augment: Augmentation | None, seed: int = 0, views: int | None = None) -> TrainReader:
    source = Dummy(24, 40, 0)
    crop = TrainCrop(Preprocessing(32), (0.9, 1.0), "fast")
    return TrainReader(source, Plan(source.sizes, seed, 64), crop, TOKENIZER, views=views, augments=[augment])


def pictures(reader: TrainReader, workers: int = 0, start: int = 0, count: int = 6) -> Tensor:
    chunks = load_chunks(reader, train_ranges(start, 8), workers, pin=False)
    return torch.cat([chunk.images for chunk in itertools.islice(chunks, count)])


def photo(size: int = 48) -> Tensor:
    """A smooth picture of every colour, (3, S, S) uint8."""
    rows, columns = torch.meshgrid(*[torch.linspace(0, 1, size)] * 2, indexing="ij")
    waves = [rows, columns, 0.5 + 0.5 * torch.sin(9 * rows + 4 * columns)]
    return (torch.stack(waves) * 255).round().to(torch.uint8)


def colour_of(image: Tensor) -> Tensor:
    return image.float() - peer.rgb_to_grayscale(image, 3)


def distance(a: Tensor, b: Tensor) -> int:
    return int((a.int() - b.int()).abs().max())


@pytest.mark.parametrize("option", OPTIONS)
def test_the_pictures_are_the_same_with_0_1_and_4_workers_and_from_any_position(option: str) -> None:
    reader = reader_of(augmentation(option))
    expected = pictures(reader)
    assert all(torch.equal(expected, pictures(reader, workers)) for workers in (1, 4))
    assert torch.equal(expected[16:], pictures(reader, start=16, count=4))


@pytest.mark.parametrize("option", [option for option in OPTIONS if option != "none"])
def test_pictures_change_with_the_epoch_the_seed_and_the_sample_but_not_with_a_view_that_returns(option: str) -> None:
    augment = augmentation(option)
    plain, changed = pictures(reader_of(None)), pictures(reader_of(augment))
    share = sum(not torch.equal(a, b) for a, b in zip(plain, changed, strict=True)) / len(plain)
    assert share > 0.25 if option == "flip" else share > 0.8

    def of_sample(reader: TrainReader, number: int) -> list[bytes]:
        chunk = next(iter(load_chunks(reader, [range(96)], 0, pin=False)))  # four epochs
        return [chunk.images[row].numpy().tobytes() for row in (chunk.samples == number).nonzero()[:, 0]]

    assert len({*of_sample(reader_of(augment), 3)}) == 4
    viewed = of_sample(reader_of(augment, views=2), 3)
    assert viewed[:2] == viewed[2:] and viewed[0] != viewed[1]
    assert {*of_sample(reader_of(augment), 3)}.isdisjoint(of_sample(reader_of(augment, seed=1), 3))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("size", [17, 224])
def test_the_bits_do_not_depend_on_threads_and_the_stream_of_the_process_does_not_move(option: str, size: int) -> None:
    augment = augmentation(option) or (lambda image: image)
    threads, state, found = torch.get_num_threads(), torch.get_rng_state(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        pixels = [photo(size).permute(1, 2, 0).contiguous() for _ in range(4)]
        for seed, each in enumerate(pixels):
            apply(augment, each, seed)
        found.append(torch.stack(pixels))
        assert torch.get_num_threads() == count
    torch.set_num_threads(threads)
    assert torch.equal(*found) and torch.equal(torch.get_rng_state(), state)


def test_the_stream_of_the_process_is_restored_after_an_error() -> None:
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), drawing_from(3):
        torch.rand(3)
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("fill", [0, 128, 255])
@pytest.mark.parametrize(("degrees", "shear", "zoom"), [(0, 0, 0.8), (15, 0, 1.0), (0, 10, 1.0), (-37, 8, 1.2)])
def test_the_resampling_is_torchvisions(degrees: float, shear: float, zoom: float, fill: int) -> None:
    for size, (right, down) in itertools.product((17, 48), ((0, 0), (3, -2))):
        image, shift = photo(size), [2 * right / size, 2 * down / size]
        arguments = math.radians(degrees), math.tan(math.radians(shear)), (zoom, zoom), shift
        found = warp(image, *arguments, fill)
        expected = peer.affine(
            image, degrees, [right, down], zoom, [shear, 0], v2.InterpolationMode.BILINEAR, fill=float(fill)
        )
        whole = warp(torch.full_like(image, 255), *arguments, 0)  # torchvision darkens the pixels of the edge
        assert distance(found[whole == 255], expected[whole == 255]) <= 1
        assert (found[whole == 0] == fill).all() and (whole == 255).float().mean() > 0.4


def test_a_stretch_is_a_resize_of_one_side() -> None:
    image = photo(64)
    stretched = warp(image, 0, 0, (0.5, 1), [0, 0], 255)
    assert (stretched[:, :, :15] == 255).all() and (stretched[:, :, 49:] == 255).all()
    inside = peer.resize(image, [64, 32], v2.InterpolationMode.BILINEAR, antialias=False)
    assert distance(stretched[:, :, 17:47], inside[:, :, 1:31]) <= 2


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
def test_brightness_contrast_and_saturation_are_torchvisions(factor: float) -> None:
    image = photo()
    assert distance(recolor(image, factor, 1, 1, 0), peer.adjust_brightness(image, factor)) <= 1
    assert distance(recolor(image, 1, factor, 1, 0), peer.adjust_contrast(image, factor)) <= 1
    assert distance(recolor(image, 1, 1, factor, 0), peer.adjust_saturation(image, factor)) <= 1
    assert distance(recolor(image, 1, 1, 0, 0), peer.rgb_to_grayscale(image, 3)) <= 1


def test_a_turn_of_the_hue_keeps_grey_and_brightness_and_turns_as_torchvisions_does() -> None:
    pale = (photo().float() / 4 + 96).to(torch.uint8)  # far from black and white, where a turn is clipped
    for turn in (-0.1, 0.05, 0.1):
        turned = recolor(pale, 1, 1, 1, 2 * math.pi * turn)
        assert distance(peer.rgb_to_grayscale(turned), peer.rgb_to_grayscale(pale)) <= 1
        grey = peer.rgb_to_grayscale(pale, 3)
        assert distance(recolor(grey, 1, 1, 1, 2 * math.pi * turn), grey) <= 1
        change, expected = (colour_of(x) - colour_of(pale) for x in (turned, peer.adjust_hue(pale, turn)))
        assert (change * expected).sum() > 0.7 * change.norm() * expected.norm()  # about the same direction
    whole = recolor(recolor(recolor(pale, 1, 1, 1, 2.1), 1, 1, 1, 2.1), 1, 1, 1, 2 * math.pi - 4.2)
    assert distance(whole, pale) <= 3  # a full turn


@pytest.mark.parametrize(
    "still",
    [Flip(0), Affine(0, 0, (1, 1), 1, 0, 255), Color(0, 0, 0, 0, 0)],
    ids=["flip", "affine", "color"],
)
def test_an_augmentation_of_no_strength_changes_nothing(still: Augmentation) -> None:
    assert torch.equal(still(photo()), photo())


def test_strengths_are_bounds() -> None:
    white = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    assert torch.equal(Affine()(white), white)  # the fill is white
    black = torch.zeros(3, 100, 100, dtype=torch.uint8)
    for seed in range(50):
        with drawing_from(seed):
            shifted = Affine(0, 0, (1, 1), 1, 0.1)(black)
        assert (shifted > 128).float().mean() < 0.2
        assert (shifted[:, 11:-11, 11:-11] == 0).all()
    with drawing_from(0):
        assert torch.equal(Flip(1)(photo()), photo().flip(-1))
        assert torch.equal(*[Color(0, 0, 0, 0, 1)(photo())[channel] for channel in (0, 2)])


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (lambda image: image.float(), "(3, 8, 8) torch.float32"),
        (lambda image: image[:, :4], "(3, 4, 8) torch.uint8"),
        (lambda image: Image.new("RGB", (8, 8)), "Image"),
    ],
)
def test_an_augmentation_that_returns_something_else_ends_in_one_line(
    wrong: Callable[[Tensor], Any], found: str
) -> None:
    with pytest.raises(UserError, match="it should return \\(3, 8, 8\\) torch.uint8") as error:
        apply(wrong, torch.zeros(8, 8, 3, dtype=torch.uint8), 0)
    assert f"augment returns {found};" in str(error.value)


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["augment=weird"], "augment=weird: there is no such option; there are " + ", ".join(NAMES)),
        (["augment=flip", "augment.p=2"], "augment.p=2: should be less than or equal to 1"),
        (["augment=affine", "augment.scale=[1.2,0.8]"], "augment.scale=[1.2, 0.8]: expected the smallest and the"),
        (["augment=affine", "augment.aspect=0.5"], "augment.aspect=0.5: should be greater than or equal to 1"),
        (["augment=strong", "augment.color.hue=1"], "augment.color.hue=1: should be less than or equal to 0.5"),
        (["augment=strong", "+augment.flop=1"], "augment.flop=1: expected a config node with a _target_"),
        (["augment.p=0.5"], "augment.p"),
        (["+augment.p=0.5"], "augment={'p': 0.5}: expected a config node with a _target_"),
        (["augment=color", "augment._target_=torchvision.transforms.v2.ColorJitter"], "augment._target_=torchvision."),
    ],
)
def test_a_mistake_ends_in_one_line(args: list[str], line: str, fails: Callable[..., str], tmp_path: Path) -> None:
    assert fails("experiment=smoke", *args).startswith(line)
    assert not [*tmp_path.glob("outputs/*/metrics.jsonl")]


MIX = (
    "data=mix", "data@data.sources.coco=dummy", "data@data.sources.cc3m=dummy", "data.sources.coco.samples=20",
    "data.sources.cc3m.samples=24", "data.sources.coco.val_samples=0", "data.sources.cc3m.val_samples=0",
    "batch_size=8", "workers=0", "evals=[]",
)  # fmt: skip


def test_each_source_of_a_mix_has_its_own() -> None:
    def blacken(image: Tensor) -> Tensor:
        return torch.zeros_like(image)

    data = open_mix({"one": open_dummy(16, 0), "two": open_dummy(16, 0)}, {"one": 1, "two": 1})
    crop = TrainCrop(Preprocessing(32), (0.9, 1.0), "fast")
    both: list[tuple[dict[str, Any], list[bool]]] = [
        ({"two": blacken}, [False, True]),
        ({"one": blacken, "two": {}}, [True, False]),
    ]
    for named, expected in both:
        augments = for_sources(BySource(**named), source_names(data))
        reader = TrainReader(data.train, data.plan(0), crop, TOKENIZER, augments=augments)
        chunk = reader.chunk(range(16))
        for image, sample in zip(chunk.images, chunk.samples.tolist(), strict=True):
            assert bool((image == 0).all()) == expected[sample // 16]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ([*MIX, "+augment@augment.flickr=color"], "augment.flickr: the mix has no such source; there are coco, cc3m"),
        ([*MIX, "+augment@augment.flickr=none"], "augment.flickr: the mix has no such source; there are coco, cc3m"),
        ([*MIX, "+augment.coco=3"], "augment.coco=3: expected a config node with a _target_, such as that of"),
        (["experiment=smoke"], "augment=by_source is for the sources of data=mix; other data take one, such as"),
    ],
)
def test_a_source_that_is_not_there_is_refused(
    args: list[str], line: str, fails: Callable[..., str], tmp_path: Path
) -> None:
    assert fails("augment=by_source", *args).startswith(line)
    assert not [*tmp_path.glob("outputs/*/metrics.jsonl")]


def test_a_run_with_an_augmentation_for_each_source_resumes_to_the_bit(train: Callable[..., None]) -> None:
    small = ("model.image.depth=1", "model.text.depth=1", "max_steps=4", "device=cpu")
    sources = ("augment=by_source", "+augment@augment.coco=color", "+augment@augment.cc3m=affine")
    args = (*MIX, *small, *sources, "augment.cc3m.degrees=40")
    train(*args, "name=straight")
    train(*args, "name=parts", "stop_at=2")
    train(*args, "name=parts")
    assert_same_state(Path("outputs/straight"), Path("outputs/parts"))


def test_a_target_that_makes_no_function_is_refused() -> None:
    with pytest.raises(UserError, match="augment is 3; its _target_ should return a function of a picture"):
        for_sources(3, [])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("argument", "count"), [("~augment.color", 2), ("augment@augment.color=none", 2), ("augment@augment.color=flip", 3)]
)
def test_a_part_of_strong_can_be_replaced_or_left_out(argument: str, count: int) -> None:
    with hydra.initialize_config_module("clipx.conf", version_base="1.3"):
        node: Any = OmegaConf.to_container(hydra.compose("train", ["augment=strong", argument]).augment)
    assert len(build(node, "augment").steps) == count


def test_any_transform_of_uint8_pictures_can_be_named(train: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "mine/augment").mkdir(parents=True)
    (tmp_path / "mine/augment/erase.yaml").write_text("_target_: torchvision.transforms.v2.RandomErasing\np: 1.0\n")
    args = ["--config-dir", "mine", "augment=erase", "experiment=smoke", "max_steps=1", "workers=0", "evals=[]"]
    train(*args, "trust=[torchvision]", "name=x")
    assert (tmp_path / "outputs/x/summary.json").exists()
