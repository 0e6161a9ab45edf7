"""``python -m clipx.export``: a run or weights -> a directory that open_clip or Hugging Face opens."""

import importlib.util
import logging
from pathlib import Path

from omegaconf import DictConfig

from clipx.config.cli import command
from clipx.config.resolve import resolve
from clipx.config.runs import check_exists, check_mix
from clipx.config.schema import ExportConfig
from clipx.errors import UserError

logger = logging.getLogger("clipx")

PACKAGES = {"open_clip": ("open_clip", "open_clip_torch"), "hf": ("transformers", '"clipx[hf]"')}  # module, to install
OPENED_BY = {
    "open_clip": 'open_clip.create_model_and_transforms("local-dir:{0}")',
    "hf": 'transformers.CLIPModel.from_pretrained("{0}"), CLIPProcessor.from_pretrained("{0}")',
}


def main() -> None:
    command("export", export)


def export(composed: DictConfig, directory: Path) -> None:
    """Write the directory ``out``, whole or not at all.

    Raises:
        UserError: the format cannot hold the model, or the other project computes something else from it.
    """
    config = resolve(composed, ExportConfig)
    module, package = PACKAGES[config.to]
    if importlib.util.find_spec(module) is None:
        raise UserError(f"to={config.to} needs {module}; install it with: pip install {package}")
    out = Path(config.out).expanduser()
    if out.exists():
        raise UserError(f"out={config.out} already exists; name a new directory")
    check_exists("run", config.run)
    check_mix(config.mix, "alpha", config.alpha)
    from clipx.weights.export import export_model  # imports torch
    from clipx.weights.load import load
    from clipx.weights.mix import mixtures

    if config.mix is None or config.alpha is None:
        model = load(config.run, trust=config.trust, act=config.act)[0]
    else:
        _, model = next(mixtures(config.run, config.mix, [config.alpha], trust=config.trust, act=config.act))
    try:
        export_model(model, config.to, out)
    except OSError as error:
        raise UserError(f"out={config.out} cannot be written: {error.strerror or error}") from error
    logger.info("export    %s; open it with %s", out, OPENED_BY[config.to].format(out))


if __name__ == "__main__":
    main()
