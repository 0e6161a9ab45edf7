"""Text towers of transformers, compared with transformers' and open_clip's own."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from conftest import FEW, command
from open_clip.hf_model import HFTextEncoder
from open_clip.tokenizer import HFTokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from clipx import load
from clipx.models.hf import PretrainedTokenizer, TextTower
from clipx.models.lora import add_adapters
from clipx.models.packed import EDGES, pack
from clipx.models.tower import TextTower as Tower
from clipx.optim import tower_scales

CAPTIONS = ["a cat", "two dogs in the snow " * 5, "the red  circle", "a long tail of a red fox on a mat at night"]
WORDS = "a an the two in on of at red green blue small large cat dog dogs snow circle square long tail fox mat night"
SPECIAL = {
    "bert": {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"},
    "roberta": {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "t5": {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
}
AROUND = {"bert": "[CLS] $A [SEP]", "roberta": "<s> $A </s>", "t5": "$A </s>"}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def save_tokenizer(kind: str, directory: Path) -> int:
    """Write a tokenizer of words; returns the size of its vocabulary."""
    special = SPECIAL[kind]
    ids = {word: number for number, word in enumerate([*special.values(), *WORDS.split()])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    around = [word for word in AROUND[kind].split() if word != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=AROUND[kind], special_tokens=[(word, ids[word]) for word in around]
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)
    return len(ids)


def save_encoder(kind: str, directory: Path) -> Path:
    """Write a small random encoder of transformers, and its tokenizer."""
    vocabulary = save_tokenizer(kind, directory)
    torch.manual_seed(1)
    if kind == "t5":
        config = transformers.T5Config(
            vocab_size=vocabulary, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, pad_token_id=0,
            decoder_start_token_id=0,
        )  # fmt: skip
        transformers.T5Model(config).save_pretrained(directory)
    elif kind == "bert":
        config = transformers.BertConfig(vocab_size=vocabulary, max_position_embeddings=48, pad_token_id=0, **SIZES)
        transformers.BertModel(config).save_pretrained(directory)
    else:
        config = transformers.RobertaConfig(vocab_size=vocabulary, max_position_embeddings=50, pad_token_id=0, **SIZES)
        transformers.RobertaModel(config).save_pretrained(directory)
    return directory


def tower_of(kind: str, directory: Path, **arguments: object) -> TextTower:
    tower = TextTower(str(save_encoder(kind, directory)), embed=16, context=40, pretrained=True, **arguments)
    tower.load_trunk(None)
    return tower.eval()


def pooled(tower: TextTower, tokens: Tensor) -> Tensor:
    """What transformers computes of padded captions, one by one."""
    rows = []
    for row in tokens:
        ids = row[row != tower.tokenizer.pad][None]  # without padding
        hidden = tower.transformer(input_ids=ids).last_hidden_state[0]
        rows.append({"cls": hidden[0], "mean": hidden.mean(dim=0), "eos": hidden[-1]}[tower.pool])
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("kind", "pool"), [("bert", "cls"), ("bert", "mean"), ("roberta", "mean"), ("roberta", "eos"), ("t5", "mean")]
)
def test_the_features_are_those_of_transformers_padded_or_not(tmp_path: Path, kind: str, pool: str) -> None:
    tower = tower_of(kind, tmp_path, pool=pool)
    padded, flat = tower.tokenizer(CAPTIONS), tower.tokenizer.flat(CAPTIONS)
    expected = pooled(tower, padded)
    for captions in (padded, pack(flat, EDGES), pack(flat, ())):
        torch.testing.assert_close(tower.features(captions), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "pool", "pooler", "proj"),
    [("roberta", "mean", "mean_pooler", "mlp"), ("bert", "cls", "cls_last_hidden_state_pooler", "linear")],
)
def test_the_tower_is_open_clips(tmp_path: Path, kind: str, pool: str, pooler: str, proj: str) -> None:
    tower = tower_of(kind, tmp_path, pool=pool, proj=proj)
    peer = HFTextEncoder(str(tmp_path), 16, pooler_type=pooler, proj_type=proj, pretrained=False).eval()
    peer.load_state_dict(tower.state_dict())
    tokens = HFTokenizer(str(tmp_path), context_length=40)(CAPTIONS)
    assert torch.equal(tokens, tower.tokenizer(CAPTIONS))
    torch.testing.assert_close(tower(tokens), peer(tokens), atol=1e-5, rtol=0)


def test_the_tokenizer_cuts_keeps_the_end_token_and_goes_to_workers(tmp_path: Path) -> None:
    save_tokenizer("roberta", tmp_path)
    tokenizer = PretrainedTokenizer(str(tmp_path), 8)
    start, *_, end = tokenizer("the cat")[0, :4].tolist()
    long = tokenizer(["the cat on the red mat in the snow"])[0].tolist()
    assert (long[0], long[-1], len(long)) == (start, end, 8)
    assert tokenizer.count("the cat on the red mat in the snow") == 11
    assert torch.equal(pickle.loads(pickle.dumps(tokenizer))(CAPTIONS), tokenizer(CAPTIONS))
    ids, lengths = tokenizer.flat(CAPTIONS)
    assert lengths.tolist() == [4, 8, 5, 8] and len(ids) == 25


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("t5", {"pool": "cls"}, "pool=cls: the tokenizer of .* has no token before a caption; use mean"),
        ("bert", {"context": 49}, "context=49: .* has 48 positions; set at most that many"),
        ("bert", {"proj": "none"}, "embed=16 is not 32, the features of .*; set it, or proj=linear"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path: Path, kind: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextTower(str(save_encoder(kind, tmp_path)), **{"embed": 16, "context": 40, **arguments})


def test_a_tokenizer_without_an_end_token_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_encoder("roberta", tmp_path)
    monkeypatch.setitem(AROUND, "roberta", "<s> $A")
    save_tokenizer("roberta", tmp_path)
    with pytest.raises(ValueError, match="pool=eos: the tokenizer of .* has no end token; use mean"):
        TextTower(str(tmp_path), embed=16, context=40, pool="eos")


def test_captions_need_no_special_tokens_if_their_mean_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_encoder("roberta", tmp_path)
    monkeypatch.setitem(AROUND, "roberta", "$A")
    save_tokenizer("roberta", tmp_path)
    tower = TextTower(str(tmp_path), embed=16, context=40)
    assert tower(tower.tokenizer(["a cat"])).shape == (1, 16)
    for pool in ("cls", "eos"):
        with pytest.raises(ValueError, match=f"pool={pool}: the tokenizer of .* has no "):
            TextTower(str(tmp_path), embed=16, context=40, pool=pool)


def test_a_model_that_cannot_be_found_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        TextTower(str(tmp_path / "none"))
    assert "none: transformers finds no config or tokenizer (" in str(error.value) and "\n" not in str(error.value)


def test_every_parameter_has_a_stage(tmp_path: Path) -> None:
    for kind in SPECIAL:
        tower = tower_of(kind, tmp_path / kind)
        stages = tower.stages()
        assert {id(p) for stage in stages for p in stage} == {id(p) for p in tower.parameters()}
        assert len(stages) == 4 and tower.proj.weight is stages[-1][-1]
    model = torch.nn.Module()
    model.text = tower
    assert tower_scales(model, "text", 1.0, 0.5)[stages[0][0]] == 0.125


def test_a_run_with_a_text_tower_of_transformers(
    train: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_encoder("roberta", tmp_path / "enc")
    args = [
        *(arg for arg in FEW if not arg.startswith("model.")),
        "model=hf_text", "model.image.size=32", "model.image.patch=8", "model.image.width=64", "model.image.heads=1",
        "model.image.depth=1", "model.image.embed=32", "model.text.name=enc", "model.text.context=32", "name=x",
        "max_steps=4",
    ]  # fmt: skip
    train(*args, "stop_at=2")
    assert "weights   of the text tower from enc" in (tmp_path / "outputs/x/train.log").read_text()
    train(*args)
    model, _, tokenizer = load(tmp_path / "outputs/x")
    assert isinstance(model.text, Tower) and "text.transformer.embeddings.word_embeddings.weight" in model.state_dict()
    command("export", tmp_path, monkeypatch)("run=outputs/x", "to=open_clip", "out=oc")
    same, _, _ = load(tmp_path / "oc")
    with torch.no_grad():
        assert torch.equal(same.encode_text(tokenizer(CAPTIONS)), model.encode_text(tokenizer(CAPTIONS)))


def test_recomputed_activations_give_the_same_gradient(tmp_path: Path) -> None:
    tower = tower_of("roberta", tmp_path).train()
    tokens, gradients = tower.tokenizer(CAPTIONS), []
    for on in (False, True, False):
        tower.set_grad_checkpoint(on)
        torch.manual_seed(0)
        gradients.append(torch.autograd.grad(tower(tokens).square().sum(), tower.transformer.embeddings.parameters()))
    for plain, recomputed, again in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)
        torch.testing.assert_close(again, plain)


def test_an_encoder_takes_adapters(tmp_path: Path) -> None:
    name = str(save_encoder("bert", tmp_path / "bert"))
    tower, plain = (TextTower(name, embed=24, context=48).eval() for _ in range(2))
    add_adapters({"text": tower}, 4)
    for parameter in tower.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    plain.load_state_dict(tower.state_dict())
    captions = pack(tower.tokenizer.flat(CAPTIONS))
    torch.testing.assert_close(tower(captions), plain(captions), atol=1e-6, rtol=0)
    tower(captions).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in tower.parameters())
    model = torch.nn.Module()
    model.text = tower
    assert tower_scales(model, "text", 1.0, 0.5).keys() == {*tower.parameters()}
