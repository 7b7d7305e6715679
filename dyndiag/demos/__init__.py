"""Three trainings on real data that show what dyndiag is for; each is one file to read.

`train(folder, progress)` trains with a monitor and calls `progress(done, of)` now and then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from dyndiag.errors import DyndiagError

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[int, int], None]


def digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's handwritten digits: images (1797, 64) float32 in 0…1, labels (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as missing:
        raise DyndiagError(
            "this demo trains on scikit-learn's digits: pip install 'dyndiag[demo]'"
        ) from missing
    import torch

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
