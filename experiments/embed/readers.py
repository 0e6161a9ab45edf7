"""Open what ``clipx.embed`` wrote with clip-retrieval's reader and with autofaiss, in an environment of their own.

python -m venv peer && peer/bin/pip install 'autofaiss==2.18.0' 'pyarrow<20'
peer/bin/python experiments/embed/readers.py DIR
"""

import sys
from pathlib import Path

import faiss
import numpy as np
from autofaiss import build_index
from embedding_reader import EmbeddingReader

QUERIES = 200


def main(directory: Path) -> None:
    images, metadata = str(directory / "img_emb"), str(directory / "metadata")
    columns = ["image_path", "caption"]
    pairs = EmbeddingReader(images, metadata_folder=metadata, file_format="parquet_npy", meta_columns=columns)
    _, first = next(iter(pairs(batch_size=2, start=0, end=2)))
    print(f"embedding-reader: {pairs.count} rows of {pairs.dimension}; {first.to_dict('records')}")
    limits = {"max_index_memory_usage": "1GB", "current_memory_available": "2GB"}
    index, _ = build_index(embeddings=images, save_on_disk=False, metric_type="ip", verbose=40, **limits)
    rows = np.concatenate([part for part, _ in EmbeddingReader(images, file_format="npy")(batch_size=1000)])
    exact = faiss.IndexFlatIP(pairs.dimension)
    exact.add(rows.astype("float32"))
    queries = rows[:QUERIES].astype("float32")
    agree = (exact.search(queries, 2)[1] == index.search(queries, 2)[1]).mean()
    print(f"autofaiss: {type(index).__name__} of {index.ntotal} rows, {agree:.1%} of the two nearest are exact")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
