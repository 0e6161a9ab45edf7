"""What embed does besides reading pictures and running the model, in CPU time on one thread; see README.md.

python experiments/embed/overhead.py [MODEL] [PICTURES] [PART_SIZE]
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet  # noqa: F401  start-up, not per picture
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from tqdm import tqdm

from clipx.config.instantiate import build
from clipx.data.dummy import Dummy
from clipx.evals.encoder import EvalEncoder
from clipx.tools.embeddings import encode_parts
from clipx.tools.index import Index

spent: dict[str, float] = {}


def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        started = time.process_time()
        try:
            return function(*args)
        finally:
            spent[name] = spent.get(name, 0) + time.process_time() - started

    return run


def main() -> None:
    name, pictures, part_size = (*sys.argv[1:], *("vit_b32", "256", "64")[len(sys.argv) - 1 :])
    torch.set_num_threads(1)
    with initialize_config_module("clipx.conf", version_base="1.3"):
        node = OmegaConf.to_container(compose("train", [f"model={name}"]).model, resolve=True)
    encoder = EvalEncoder(build(node), build(node).text.tokenizer)
    source = Dummy(int(pictures), 256, 0)
    encoder.tokenizer("")  # reads the vocabulary
    for method in ("encode_pictures", "encode_captions", "pixels"):
        setattr(encoder, method, timed("model", getattr(encoder, method)))
    read_chunks = encoder.read_chunks

    def timed_chunks(*args: Any, **options: Any) -> Any:
        chunks = iter(read_chunks(*args, **options))
        step = timed("reading", lambda: next(chunks, None))
        while (chunk := step()) is not None:
            yield chunk

    encoder.read_chunks = timed_chunks
    with tempfile.TemporaryDirectory() as directory, tqdm(total=int(pictures), disable=True) as bar:
        index = Index(Path(directory), {"samples": int(pictures), "part_size": int(part_size)})
        started = time.process_time()
        for number, part in encode_parts(encoder, source, dict(enumerate(index.parts)), bar):
            index.write(number, part)
        total = time.process_time() - started
    own = total - sum(spent.values())
    shares = ", ".join(f"{what} {seconds:.2f} s" for what, seconds in spent.items())
    print(f"{name}, {pictures} pictures in parts of {part_size}: {shares}, embed's own {own:.3f} s,", end=" ")
    print(f"{100 * own / spent['model']:.2f} % of the model's")


if __name__ == "__main__":
    main()
