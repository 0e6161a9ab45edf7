"""Data sets in CLIP_benchmark's layout, evaluated by the command, have CLIP_benchmark's numbers."""

import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command, last_line, picture, run_python, write_tar
from sklearn.metrics import average_precision_score, balanced_accuracy_score, top_k_accuracy_score
from torch.utils.data import DataLoader

from clipx import load
from clipx.data.labelled import open_sets
from clipx.data.remote import stores
from clipx.data.remote.sets import RemoteSet
from clipx.evals.zero_shot import average_precision
from clipx.models.clip import CLIP
from clipx.models.text import TextEncoder
from clipx.models.vision import ImageEncoder
from clipx.weights import checkpoint

COLOURS = ["red", "green", "blue", "grey", "pink", "teal"]
CPU = ("run=weights.pt", "device=cpu", "workers=0")


def npy(values: object) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(values))
    return file.getvalue()


def benchmark_set(root: Path, kind: str, labels: list[tuple[str, bytes]], shards: int = 2) -> Path:
    """A data set as clip_benchmark_export_wds writes it; each label is a suffix and its bytes."""
    for shard in range(shards):
        rows = list(enumerate(labels))[shard::shards]
        members = [(f"s{number:04d}.png", picture(17 * number)) for number, _ in rows]
        members += [(f"s{number:04d}.{suffix}", data) for number, (suffix, data) in rows]
        write_tar(root / "test" / f"{shard}.tar", sorted(members))
    (root / "test/nshards.txt").write_text(str(shards))
    (root / "dataset_type.txt").write_text(kind)
    if kind != "retrieval":
        (root / "classnames.txt").write_text("\n".join(COLOURS))
        (root / "zeroshot_classification_templates.txt").write_text("a {c} thing\nsomething {c}.\n")
    return root


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """One set of each kind, and weights."""
    draw = np.random.default_rng(0)
    numbers, marks = draw.integers(0, 6, 24), draw.integers(0, 2, (20, 6))
    marks[:, 4] = 0  # a class without pictures
    benchmark_set(tmp_path / "sets/wds_one", "classification", [("cls", str(number).encode()) for number in numbers])
    benchmark_set(tmp_path / "sets/wds_many", "multilabel", [("npy", npy(row)) for row in marks])
    texts = [("txt", f"thing {number}\nthe {number}th\n".encode()) for number in range(18)]
    benchmark_set(tmp_path / "sets/wds_text", "retrieval", texts)
    torch.manual_seed(0)
    image = {"size": 32, "patch": 16, "width": 64, "depth": 1, "heads": 1, "embed": 32}
    text = {"width": 64, "depth": 1, "heads": 1, "embed": 32}
    node = {
        "_target_": "clipx.models.clip.CLIP",
        "image": {"_target_": "clipx.models.vision.ImageEncoder", **image},
        "text": {"_target_": "clipx.models.text.TextEncoder", **text},
    }
    model = CLIP(ImageEncoder(**image), TextEncoder(**text))
    checkpoint.save(tmp_path / "weights.pt", {"model_state_dict": model.state_dict(), "config": {"model": node}})
    return tmp_path / "sets"


@pytest.fixture
def evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    return partial(command("evaluate", tmp_path, monkeypatch), *CPU)


def print_peer_numbers(root: str) -> None:
    """Print the numbers of CLIP_benchmark, with its reader of data sets, by our names."""
    from clip_benchmark.datasets.builder import build_wds_dataset
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

    sets = Path(root)
    model, transform, tokenizer = load(sets.parent / "weights.pt", device="cpu")
    built = {name: build_wds_dataset(name, transform, data_dir=str(sets / name)) for name in ("wds_one", "wds_many")}
    text = build_wds_dataset("wds_text", transform, data_dir=str(sets / "wds_text"))
    loaders = {name: DataLoader(data.batched(7), batch_size=None) for name, data in built.items()}
    args = (tokenizer, built["wds_one"].classes, built["wds_one"].templates, "cpu")
    many = zeroshot_classification.evaluate(model, loaders["wds_many"], *args, amp=False)
    # accuracy from scikit-learn, because clip_benchmark's accuracy() raises TypeError with numpy 2.4 and later
    classes = zeroshot_classification.zero_shot_classifier(model, *args, amp=False)
    logits, target = zeroshot_classification.run_classification(model, classes, loaders["wds_one"], "cpu", amp=False)
    pairs = DataLoader(text.batched(7, collation_fn=lambda rows: tuple(zip(*rows, strict=True))), batch_size=None)
    batches = [(torch.stack(images), captions) for images, captions in pairs]
    recalls = zeroshot_retrieval.evaluate(model, batches, tokenizer, "cpu", amp=False, recall_k_list=[1, 5])
    numbers = {
        "wds_one/top1": top_k_accuracy_score(target, logits, k=1, labels=range(6)),
        "wds_one/top5": top_k_accuracy_score(target, logits, k=5, labels=range(6)),
        "wds_one/mean_per_class": balanced_accuracy_score(target, logits.argmax(dim=1)),
        "wds_many/mean_average_precision": many["mean_average_precision"],
        **{f"wds_text/i2t_r{k}": recalls[f"text_retrieval_recall@{k}"] for k in (1, 5)},
        **{f"wds_text/t2i_r{k}": recalls[f"image_retrieval_recall@{k}"] for k in (1, 5)},
    }
    print(json.dumps({name: float(number) for name, number in numbers.items()}))


def test_all_sets_at_once_have_the_numbers_of_clip_benchmark(sets: Path, evaluate: Callable[..., None]) -> None:
    evaluate("evals=[zero_shot,retrieval]", "sets=sets/*")
    every = [(name, one) for name, found in scores(sets.parent).items() for one in found.values()]
    ours = {f"{name}/{key}": value for name, one in every for key, value in one.items()}
    folders = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    code = f"import sys; sys.path[:0] = {folders}; import test_benchmark; test_benchmark.print_peer_numbers('sets')"
    peer = run_python(
        "-W", "ignore", "-c", code, cwd=sets.parent
    )  # it leaves files open, a warning that is an error here
    assert peer.returncode == 0, peer.stderr
    theirs = json.loads(peer.stdout)
    assert {key: ours[key] for key in theirs} == pytest.approx(theirs, abs=1e-4)
    assert ours["wds_many/pictures"] == 20 and ours["wds_one/pictures"] == 24
    assert "wds_many/per_class/red" in ours and "wds_many/per_class/pink" not in ours


def scores(root: Path) -> dict[str, dict[str, dict[str, float]]]:
    """The metrics of the only weights, by data set and evaluation."""
    (scored,) = json.loads((root / "metrics.json").read_text()).values()
    return scored


@pytest.fixture
def url(tmp_path: Path, sets: Path, serve: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Serves the sets, one of them also for training; the cache of indexes is empty."""
    benchmark_set(tmp_path / "more", "classification", [("cls", b"%d" % (n % 6)) for n in range(12)])
    (tmp_path / "more/test").rename(sets / "wds_one/train")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(stores, "WAITS", ())
    return serve(sets)


def test_remote_sets_have_the_numbers_of_local_ones(
    tmp_path: Path, sets: Path, url: str, evaluate: Callable[..., None]
) -> None:
    evaluate("evals=[zero_shot,retrieval]", "sets=sets/*")
    local = scores(tmp_path)
    remote = f"sets=[{url}/wds_one,{url}/wds_many/,{url}/wds_text]"
    for place in ("sets", "away"):  # the second time from the copies
        (tmp_path / "metrics.json").unlink()
        evaluate("evals=[zero_shot,retrieval]", remote, "sets_cache=copies")
        assert scores(tmp_path) == local
        assert len([*(tmp_path / "copies").rglob("*.tar")]) == 6  # no training shards
        if place == "sets":
            sets.rename(tmp_path / "away")


def test_a_probe_learns_from_the_training_shards_of_a_remote_set(
    tmp_path: Path, url: str, evaluate: Callable[..., None]
) -> None:
    evaluate("evals=[linear_probe]", "sets=sets/wds_one")
    local = scores(tmp_path)
    (tmp_path / "metrics.json").unlink()
    evaluate("evals=[linear_probe]", f"sets={url}/wds_one", "sets_cache=copies")
    assert scores(tmp_path) == local and len([*(tmp_path / "copies").rglob("*.tar")]) == 4


@pytest.mark.parametrize(
    ("place", "url", "query"),
    [
        ("https://h.org/sets/wds_x/", "https://h.org/sets/wds_x", ""),
        ("s3://bucket/wds_x?sig=1", "s3://bucket/wds_x", "?sig=1"),
        ("https://huggingface.co/datasets/a/wds_x", "https://huggingface.co/datasets/a/wds_x/resolve/main", ""),
        ("https://huggingface.co/datasets/a/wds_x/tree/v2", "https://huggingface.co/datasets/a/wds_x/resolve/v2", ""),
    ],
)
def test_where_the_files_of_a_remote_set_are(place: str, url: str, query: str) -> None:
    assert RemoteSet.at(place) == ("wds_x", url, query)
    assert RemoteSet.at(place).file("test/0.tar") == f"{url}/test/0.tar{query}"


def test_a_wrong_remote_set_is_one_line(tmp_path: Path, sets: Path, url: str, evaluate: Callable[..., None]) -> None:
    def line_for(name: str, *args: str) -> str:
        return last_line(evaluate, "evals=[zero_shot]", f"sets={url}/{name}", *args)

    assert line_for("no") == (
        f"sets={url}/no: there is no test/nshards.txt, the number of shards in CLIP_benchmark's layout"
    )
    assert line_for("*") == f"sets={url}/*: servers do not list data sets; name each: sets=[URL,URL]"
    (sets / "wds_many/test/nshards.txt").write_text("<html>\nSign in\n")
    assert line_for("wds_many") == f"sets={url}/wds_many: test/nshards.txt is not a number of shards but '<html>'"
    (tmp_path / "file").touch()
    assert line_for("wds_one", "sets_cache=file") == "sets_cache=file cannot be written: File exists"
    (sets / "wds_one/test/1.tar").unlink()
    assert line_for("wds_one").startswith(f"{url}/wds_one/test/1.tar cannot be copied (HTTP 404 ")


def test_average_precision_is_scikit_learns() -> None:
    torch.manual_seed(0)
    scores, labels = torch.randn(40, 5), torch.randint(2, (40, 5), dtype=torch.uint8)
    found = average_precision(scores, labels, COLOURS[:5], each=True)
    each = average_precision_score(labels.numpy(), scores.numpy(), average=None)
    assert [found[f"per_class/{name}"] for name in COLOURS[:5]] == pytest.approx(each.tolist())
    assert found["mean_average_precision"] == pytest.approx(
        average_precision_score(labels.numpy(), scores.numpy(), average="macro")
    )


def test_samples_of_a_multi_label_set_that_cannot_be_used_are_left_out(
    tmp_path: Path, sets: Path, evaluate: Callable[..., None]
) -> None:
    huge = npy(np.zeros(10)).replace(b"(10,), }          ", b"(999999999999,), }")
    assert b"999999999999" in huge
    bad = [npy([0, 1, 0]), npy([0, 2, 0, 0, 0, 0]), b"no array", npy(np.array([None] * 6)), huge]
    good = npy([0, 1, 0, 0, 1, 0])
    root = benchmark_set(tmp_path / "odd", "multilabel", [("npy", data) for data in [*bad, good]] + [("cls", b"1")], 1)
    evaluate("evals=[zero_shot]", "sets=odd")
    scored = scores(tmp_path)["odd"]["zero_shot"]
    assert (scored["pictures"], scored["skipped"]) == (1, 6)
    reasons = (tmp_path / "evaluate-skipped.jsonl").read_text()
    for reason in ("are not 6 zeros and ones, one for each class name", "cannot be read", "has no classes (.npy)"):
        assert reason in reasons
    assert open_sets({"x": {"shards": str(root)}})["x"].test.read(5).captions == ["1 4"]


def test_prompts_of_a_set_come_from_a_file_of_its_own(tmp_path: Path, sets: Path) -> None:
    (tmp_path / "mine.txt").write_text("my {}\n")
    (tmp_path / "wrong.txt").write_text("my thing\n")
    where = {"shards": str(sets / "wds_one")}
    assert open_sets({"x": {**where, "templates": str(tmp_path / "mine.txt")}})["x"].templates == ["my {}"]
    assert open_sets({"x": where})["x"].templates is None
    with pytest.raises(ValueError, match=r"^sets.x.templates=.*wrong.txt: \['my thing'\] has no {} for the class name"):
        open_sets({"x": {**where, "templates": str(tmp_path / "wrong.txt")}})
    with pytest.raises(ValueError, match=r"^sets.x.templates=no: there is no such file of templates; named ones are"):
        open_sets({"x": {**where, "templates": "no"}})


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["sets=none/*"], "sets=none/*: there is no such directory; a data set is one with test/*.tar"),
        (["sets=[sets/wds_one,.]"], "sets=.: . holds no shards (test/*.tar); name others: sets=[A,B]"),
        (
            ["sets=sets/*"],
            "sets: nothing in evals scores wds_many, wds_one by classes; set evals=[retrieval,zero_shot]",
        ),
        (
            ["sets=sets/*", "evals=[zero_shot]"],
            "sets: nothing in evals scores wds_text by captions; set evals=[zero_shot,retrieval]",
        ),
        (
            ["sets=sets/wds_one", "evals=[zero_shot,retrieval]"],
            "evals=[retrieval] needs captions, and no set has some; set evals=[zero_shot]",
        ),
        (
            ["sets=sets/wds_one", "evals=[zero_shot]", "labelled={wds_one:{folder:x}}"],
            "labelled.wds_one: sets has a data set of this name, too; give another name",
        ),
        (["sets=[sets/wds_one,other/wds_one]"], "sets=other/wds_one: two data sets are called wds_one, sets/wds_one"),
        (["sets=other/*", "evals=[zero_shot]"], "evals.zero_shot.sets.wds_one.classes has no value, and there is no"),
    ],
)
def test_a_wrong_set_is_one_line(args: list[str], line: str, sets: Path, evaluate: Callable[..., None]) -> None:
    write_tar(sets.parent / "other/wds_one/test/0.tar", [("0.png", picture(1)), ("0.cls", b"0")])
    assert last_line(evaluate, *args).startswith(line)
