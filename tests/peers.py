"""Models of other projects, and batches to compare them with ours."""

import open_clip
import torch
from torch import Tensor, nn

from clipx.data.emoji import open_emoji
from clipx.data.images import decode, get_image_transform
from clipx.tokenizer import SimpleTokenizer

SIZES = {  # conf/model/tiny.yaml with one block per tower, as an open_clip config
    "embed_dim": 192,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 192, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49_408, "width": 128, "heads": 2, "layers": 1},
}

PIXELS = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}


def peer(quick_gelu: bool = True, custom: bool = False, **vision: int) -> nn.Module:
    torch.manual_seed(0)
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    model = kind(**{**SIZES, "vision_cfg": {**SIZES["vision_cfg"], **vision}}, quick_gelu=quick_gelu)
    perturb(model)
    return model.eval()


def real_batch(size: int, count: int = 4) -> tuple[Tensor, Tensor]:
    """Real pictures (B, 3, S, S) and their captions (B, L), trimmed."""
    source = open_emoji().train
    samples = [source.read(number) for number in range(count)]
    transform = get_image_transform(size)
    images = torch.stack([transform(decode(sample.picture)) for sample in samples])
    tokens = SimpleTokenizer().flat([sample.captions[-1] for sample in samples])
    return images, torch.nn.utils.rnn.pad_sequence(tokens.ids.split(tokens.lengths.tolist()), batch_first=True)


def padded(tokens: Tensor) -> Tensor:
    return torch.nn.functional.pad(tokens, (0, 77 - tokens.shape[1]))


@torch.no_grad()
def perturb(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * 0.02)
