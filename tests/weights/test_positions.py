"""Weights for another context: stretched, extended or truncated positions of captions."""

import json
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
import transformers
from conftest import FEW, command
from peers import peer
from torch import Tensor

from clipx import load
from clipx.models.packed import pack
from clipx.tokenizer import SimpleTokenizer
from clipx.weights import checkpoint
from clipx.weights.positions import stretch

RUN = (*FEW, "model.text.width=128", "model.text.heads=2", "evals=[]", "max_steps=1", "name=x", "freeze=[image,text]")
LONG = " ".join(["a red circle left of a blue square"] * 18)  # 144 tokens
ENDS = [f"{LONG} and a dog", f"{LONG} and a cat"]


def old_positions() -> Tensor:
    return peer().state_dict()["positional_embedding"]


def trained_positions(tmp_path: Path) -> Tensor:
    return checkpoint.read(tmp_path / "outputs/x/checkpoints/clip_last.pt")["model_state_dict"]["positional_embedding"]


@pytest.fixture
def long_run(train: Callable[..., None], tmp_path: Path) -> Path:
    torch.save(peer().state_dict(), tmp_path / "w.pt")
    train(*RUN, "init_from=w.pt", "model.text.context=248")
    return tmp_path / "outputs/x"


def test_from_77_to_248_positions_are_those_of_long_clip(long_run: Path, tmp_path: Path) -> None:
    old, new = old_positions(), trained_positions(tmp_path)
    assert new.shape == (248, 128) and torch.equal(new[:20], old[:20])
    for position in range(20, 76):  # each old position is followed by three on the way to the next
        for part in range(4):
            expected = ((4 - part) * old[position] + part * old[position + 1]) / 4
            torch.testing.assert_close(new[20 + 4 * (position - 20) + part], expected)
    for part in range(4):  # after the last one they go on in the same direction
        torch.testing.assert_close(new[244 + part], old[76] + part * (old[76] - old[75]) / 4)
    assert (
        "from w.pt; position embeddings of captions stretched from 77 to 248 tokens"
        in (long_run / "train.log").read_text()
    )


@pytest.mark.parametrize("context", [78, 100, 154, 248, 512])
def test_the_first_twenty_stay_to_the_bit_and_a_line_stays_a_line(context: int) -> None:
    assert torch.equal(stretch(old_positions(), context)[:20], old_positions()[:20])
    line = stretch(torch.arange(77.0)[:, None], context)[20:, 0]
    torch.testing.assert_close(line, 20 + torch.arange(context - 20) * 57 / (context - 20))


def test_new_positions_follow_those_of_the_weights(
    train: Callable[..., None], fails: Callable[..., str], tmp_path: Path
) -> None:
    torch.save(peer().state_dict(), tmp_path / "w.pt")
    train(*RUN, "model.text.context=100", "init_from=null", "name=fresh")
    fresh = checkpoint.read(tmp_path / "outputs/fresh/checkpoints/clip_last.pt")["model_state_dict"]
    args = [*RUN, "model.text.context=100", "init_from=w.pt", "init_positions=new"]
    train(*args)
    positions = trained_positions(tmp_path)
    assert torch.equal(positions[:77], old_positions())
    assert torch.equal(positions[77:], fresh["positional_embedding"][77:])
    log = (tmp_path / "outputs/x/train.log").read_text()
    assert "position embeddings of captions extended by new ones from 77 to 100 tokens" in log
    assert "init_positions: 'new' -> 'stretch'" in fails(*args, "init_positions=stretch")


def test_too_few_positions_to_stretch_are_an_error(
    train: Callable[..., None], fails: Callable[..., str], tmp_path: Path
) -> None:
    state = peer().state_dict()
    torch.save({**state, "positional_embedding": state["positional_embedding"][:21]}, tmp_path / "w.pt")
    assert fails(*RUN, "init_from=w.pt", "model.text.context=40") == (
        "model.text.context=40: the 21 positions of the weights are too few to be stretched, which keeps the first 20; "
        "init_positions=new learns the further ones anew"
    )
    train(*RUN, "init_from=w.pt", "model.text.context=40", "init_positions=new")
    assert trained_positions(tmp_path).shape == (40, 128)


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ([], " without weights of a text tower; add init_from=WEIGHTS, or leave it out"),
        (["init_from.image=w.pt"], " without weights of a text tower; add init_from=WEIGHTS, or leave it out"),
        (["init_from=w.pt"], ", as the context is not longer than that of the weights"),
        (["init_from=w.pt", "model.text.context=40"], ", as the context is not longer than that of the weights"),
    ],
)
def test_new_positions_that_no_caption_needs_are_refused(
    fails: Callable[..., str], tmp_path: Path, args: list[str], why: str
) -> None:
    torch.save(peer().state_dict(), tmp_path / "w.pt")
    assert fails(*RUN, "init_positions=new", *args).startswith(f"init_positions=new has no effect{why}")
    assert not (tmp_path / "outputs").exists()


def test_a_long_caption_is_read_to_its_end_with_a_longer_context(long_run: Path) -> None:
    short, *_ = load(long_run.parents[1] / "w.pt", act="quick_gelu")
    model, _, tokenizer = load(long_run)
    assert tokenizer.context == 248 and tokenizer(ENDS).argmax(-1).tolist() == [148, 148]
    with torch.no_grad():
        cut = short.encode_text(SimpleTokenizer(77)(ENDS))
        whole = model.encode_text(tokenizer(ENDS))
    assert torch.equal(cut[0], cut[1]) and not torch.equal(whole[0], whole[1])


def test_padding_to_the_longer_context_changes_nothing(long_run: Path) -> None:
    model, _, tokenizer = load(long_run)
    captions = [ENDS[0], "a dog", LONG * 3]
    padded = tokenizer(captions)
    assert padded.shape == (3, 248)
    with torch.no_grad():
        alone = torch.cat([model.encode_text(padded[[row]][:, : padded[row].argmax() + 1]) for row in range(3)])
        torch.testing.assert_close(model.encode_text(padded), alone, atol=1e-6, rtol=1e-5)
        assert torch.equal(model.encode_text(padded), model.encode_text(pack(tokenizer.flat(captions))))


@pytest.mark.parametrize("to", ["open_clip", "hf"])
def test_a_longer_context_is_exported_with_its_tokenizer(
    long_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    command("export", tmp_path, monkeypatch)("run=outputs/x", f"to={to}", "out=made")
    ours, _, tokenizer = load(long_run)
    again, _, read = load(tmp_path / "made")
    assert read.context == again.text.context == 248
    captions = [*ENDS, LONG * 3]
    with torch.no_grad():
        expected = ours.encode_text(tokenizer(captions), normalize=True)
        if to == "open_clip":
            theirs = open_clip.get_tokenizer(f"local-dir:{tmp_path}/made")
            model = open_clip.create_model(f"local-dir:{tmp_path}/made").eval()
            assert torch.equal(theirs(captions), tokenizer(captions))
            features = model.encode_text(theirs(captions), normalize=True)
        else:
            config = json.loads((tmp_path / "made/tokenizer_config.json").read_text())
            assert config["model_max_length"] == 248
            processor = transformers.CLIPProcessor.from_pretrained(tmp_path / "made")
            inputs = processor(text=captions, return_tensors="pt", padding=True, truncation=True)
            assert inputs["input_ids"].shape == (3, 248)
            model = transformers.CLIPModel.from_pretrained(tmp_path / "made").eval()
            output = model.text_projection(model.text_model(**inputs).pooler_output)
            features = torch.nn.functional.normalize(output, dim=-1)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)
