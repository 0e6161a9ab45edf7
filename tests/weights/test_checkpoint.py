import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from clipx import load
from clipx.data.emoji import open_emoji
from clipx.data.images import decode
from clipx.weights import checkpoint
from clipx.weights.checkpoint import AsyncSaver, CheckpointError, checksum, read, save

CONTENT = {"model_state_dict": {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1, dtype=torch.int64)}, "step": 3}


def test_what_is_saved_is_read_without_running_code(tmp_path: Path) -> None:
    save(tmp_path / "clip_last.pt", CONTENT)
    content = torch.load(tmp_path / "clip_last.pt", weights_only=True)
    assert content["step"] == 3 and content["format"] == 2
    assert torch.equal(content["model_state_dict"]["a"], torch.arange(6.0).view(2, 3))
    assert read(tmp_path / "clip_last.pt")["checksum"] == checksum(CONTENT)
    assert os.listdir(tmp_path) == ["clip_last.pt"]


def test_a_save_that_fails_leaves_the_old_checkpoint_and_says_how_much_room_it_needs(tmp_path: Path) -> None:
    save(tmp_path / "clip_last.pt", CONTENT)
    before, limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limit))  # limit the file size, to simulate a full disk
    try:
        with pytest.raises(CheckpointError, match=r"_last\.pt cannot be written: File too large\. It needs 0\.004 GB"):
            save(tmp_path / "clip_last.pt", {**CONTENT, "more": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, limit))
    assert read(tmp_path / "clip_last.pt")["step"] == 3 and os.listdir(tmp_path) == ["clip_last.pt"]


def test_a_directory_that_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def refuse(path: Path, mode: str = "r", **kwargs: Any) -> IO[Any]:
        if "w" in mode:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, mode, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match="cannot be written: Permission denied"):
        save(tmp_path / "clip_last.pt", CONTENT)


def test_a_background_save_is_of_the_state_when_it_was_requested(tmp_path: Path) -> None:
    weights = torch.zeros(2_000_000)
    with AsyncSaver(tmp_path, {"plan": "x"}, previous=False) as saver:
        for step in range(3):
            saver({"model_state_dict": {"a": weights}, "step": step}, ["last", f"step_{step}"])
            weights += 1  # training continues
    for name, step in (("last", 2), ("previous", 1), ("step_0", 0), ("step_1", 1), ("step_2", 2)):
        content = read(tmp_path / f"clip_{name}.pt")
        assert content["step"] == step and content["plan"] == "x" and (content["model_state_dict"]["a"] == step).all()


@pytest.mark.parametrize("links", [True, False])
def test_the_checkpoints_of_one_step_are_one_file_where_the_file_system_has_links(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, path: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    with AsyncSaver(tmp_path, {}, previous=False) as saver:
        for step in (1, 2):
            saver({**CONTENT, "optimizer": {}, "step": step}, ["best", "last", f"step_{step}"])
    for last, other_name in (("last", "step_2"), ("previous", "step_1")):
        one, other = (tmp_path / f"clip_{kind}.pt" for kind in (last, other_name))
        assert one.samefile(other) == links and one.read_bytes() == other.read_bytes()
    assert read(tmp_path / "clip_best.pt").keys().isdisjoint({"optimizer"}) and not [*tmp_path.glob("*.writing")]
    distinct = ("best", "last", "previous") if links else ("best", "last", "previous", "step_1", "step_2")
    sizes = [(tmp_path / f"clip_{kind}.pt").stat().st_size for kind in distinct]
    assert checkpoint.size_on_disk(tmp_path) == sum(sizes)


def test_a_failed_background_save_is_raised_at_the_next_step(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("a file where the directory should be")
    match = "cannot be written: File exists"
    with pytest.raises(CheckpointError, match=match), AsyncSaver(tmp_path / "x", {}, previous=False) as saver:
        saver(CONTENT, ["last"])
        while True:
            saver.check()


def test_a_flipped_bit_in_a_tensor_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "clip_last.pt"
    save(path, CONTENT)
    data = bytearray(path.read_bytes())
    offset = data.index(torch.arange(6.0).numpy().tobytes())
    data[offset + 5] ^= 4
    path.write_bytes(data)
    torch.load(path, weights_only=True)  # torch does not notice
    with pytest.raises(CheckpointError, match=r"clip_last\.pt is corrupt: its checksum"):
        read(path)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_what_is_no_checkpoint_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(content) if content is not None else torch.save({"weights": 1}, path)
    with pytest.raises(CheckpointError, match=r"x\.pt is not a checkpoint"):
        read(path)
    with pytest.raises(CheckpointError, match="there is no such checkpoint"):
        read(tmp_path / "y.pt")


def test_the_checksum_sees_names_shapes_and_bytes() -> None:
    tensor = torch.arange(6.0)
    variants = [{"a": tensor}, {"b": tensor}, {"a": tensor.view(2, 3)}, {"a": tensor + 1}, {"a": tensor.double()}]
    assert len({checksum(variant) for variant in variants}) == len(variants)
    assert checksum({"a": tensor, "b": tensor + 1}) == checksum({"b": tensor + 1, "a": tensor})


def test_a_run_loads_as_model_transform_and_tokenizer(train: Callable[..., None], tmp_path: Path) -> None:
    train("experiment=smoke", "max_steps=2", "workers=0", "name=x")
    model, transform, tokenizer = load(tmp_path / "outputs" / "x")
    image = transform(decode(open_emoji().train.read(0).picture))[None]
    with torch.no_grad():
        features, text_features, scale = model(image, tokenizer(["a guide dog"]))
    assert features.shape == text_features.shape == (1, 192) and not model.training and scale > 1
    reloaded, _, _ = load(tmp_path / "outputs" / "x" / "checkpoints" / "clip_best.pt")
    assert torch.equal(reloaded.encode_image(image, True), features)
    weights = torch.load(tmp_path / "outputs/x/checkpoints/clip_best.pt", weights_only=True)["model_state_dict"]
    reloaded.load_state_dict(weights)
    assert "text_projection" in weights and "visual.conv1.weight" in weights


def test_code_that_a_checkpoint_names_is_not_called(tmp_path: Path) -> None:
    evil = {**CONTENT, "config": {"model": {"_target_": "pathlib.Path.write_text", "self": "x", "data": "y"}}}
    checkpoint.save(tmp_path / "evil.pt", evil)
    with pytest.raises(Exception, match=r"model\._target_=pathlib\.Path\.write_text is not clipx's own code"):
        load(tmp_path / "evil.pt")
