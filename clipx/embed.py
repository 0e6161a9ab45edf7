"""``python -m clipx.embed``: a collection -> embeddings, captions and where each picture is."""

import importlib.util
from pathlib import Path

from omegaconf import DictConfig

from clipx.config.cli import command
from clipx.config.resolve import check_nodes, typed_values
from clipx.config.runs import check_exists
from clipx.config.schema import EmbedConfig
from clipx.errors import UserError


def main() -> None:
    command("embed", embed)


def embed(composed: DictConfig, directory: Path) -> None:
    """Write the embeddings of all samples to ``out``, part by part; finished parts are kept.

    Raises:
        UserError: a key, the weights, the data or ``out`` is wrong, or the command was interrupted.
    """
    values = typed_values(composed, EmbedConfig)
    check_exists("run", values["run"])
    config = check_nodes(values, EmbedConfig)
    if config.data is None:
        raise UserError("data has no value; add data=coco|folder|shards|... data.root=DIR")
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError("embed needs pyarrow to write metadata: pip install 'clipx[parquet]'")
    from clipx.tools.embeddings import write_embeddings  # imports torch

    try:
        write_embeddings(config)
    except KeyboardInterrupt:
        raise UserError("interrupted; the finished parts are kept, and the same command goes on from there") from None


if __name__ == "__main__":
    main()
