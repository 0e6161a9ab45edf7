"""Time and memory of the exact search in made-up embeddings, against faiss; see README.md.

python experiments/embed/search.py [SAMPLES] [WIDTH]
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

from clipx.tools.index import Index, search_index

TOP = 12
ROUNDS = 5


def make(index: Index, width: int) -> None:
    """Write random unit vectors, fp16."""
    generator = torch.Generator().manual_seed(0)
    (index.directory / "img_emb").mkdir(parents=True)
    for number, part in enumerate(index.parts):
        rows = normalize(torch.randn(len(part), width, generator=generator), dim=1)
        np.save(index.path("img_emb", number), rows.half().numpy())


def measure(how: str, directory: str, samples: int, width: int, part_size: int) -> None:
    """In a process of its own: print seconds of each search, its memory in MB, and what it found."""
    index = Index(Path(directory), {"samples": samples, "part_size": part_size})
    query = normalize(torch.randn(width, generator=torch.Generator().manual_seed(1)), dim=0)
    before, flat = peak(), None
    started = time.perf_counter()
    if how == "faiss":
        import faiss

        flat = faiss.IndexFlatIP(width)
        for number in range(len(index.parts)):
            flat.add(np.load(index.path("img_emb", number)).astype(np.float32))
    loaded, seconds, found = time.perf_counter() - started, [], []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        if flat is not None:
            found = flat.search(query[None].numpy(), TOP)[1][0].tolist()
        else:
            found = [hit.part * part_size + hit.row for hit in search_index(index, query, TOP)]
        seconds.append(time.perf_counter() - started)
    print(json.dumps([loaded, seconds, before, peak(), found]))


def peak() -> float:
    """Most memory of this process so far, in MB, mapped files included; getrusage would include the parent's."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e3


def main() -> None:
    samples, width = (int(argument) for argument in (sys.argv[1:] or ["1000000", "512"]))
    for part_size in (10_000, samples):
        with tempfile.TemporaryDirectory() as directory:
            make(Index(Path(directory), {"samples": samples, "part_size": part_size}), width)
            results = {}
            for how in ("clipx", "faiss"):
                arguments = [how, directory, str(samples), str(width), str(part_size)]
                process = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, check=True)
                loaded, seconds, before, after, results[how] = json.loads(process.stdout)
                print(
                    f"{how} part_size={part_size}: load {loaded:.2f} s, search {np.median(seconds):.2f} s "
                    f"({min(seconds):.2f} to {max(seconds):.2f}), memory {before:.0f} -> {after:.0f} MB",
                    flush=True,
                )
            assert results["clipx"] == results["faiss"], results


if __name__ == "__main__":
    if len(sys.argv) == 6:
        measure(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
    else:
        main()
