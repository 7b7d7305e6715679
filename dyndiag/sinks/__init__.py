"""Where a run's values are shown live; the store keeps them."""

from dyndiag.sinks.sink import Sink
from dyndiag.sinks.tensorboard import TensorBoard

__all__ = ["Sink", "TensorBoard"]
