"""Memory for the pictures of a chunk."""

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from clipx.data.tar.headers import DataError

CHUNKS = 3  # in memory per worker: two prefetched by DataLoader, one in use


def shared_pixels(count: int, size: int) -> Tensor:
    """Allocate (count, S, S, 3) uint8; in a worker, in shared memory."""
    worker = get_worker_info()
    if worker is None:
        return torch.empty(count, size, size, 3, dtype=torch.uint8)
    amount = count * size * size * 3
    try:
        storage = torch.UntypedStorage._new_shared(amount)  # as torch's own collate does
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        need = amount * CHUNKS * worker.num_workers / 1e6
        raise DataError(
            f"shared memory (/dev/shm) is full: workers={worker.num_workers} needs about {need:,.0f} "
            "MB of it here; enlarge it (docker run --shm-size=..., or --ipc=host), or set fewer workers; workers=0 "
            "needs none"
        ) from error
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(count, size, size, 3)
