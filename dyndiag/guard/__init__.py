"""What makes measuring leave no trace on the training."""

from dyndiag.guard.no_trace import no_trace

__all__ = ["no_trace"]
