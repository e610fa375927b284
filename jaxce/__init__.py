"""Cross-entropy for JAX: exact, composable, and never larger than it has to be."""

from jaxce._softmax import (
    poly_loss_cross_entropy,
    safe_softmax_cross_entropy,
    smooth_labels,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
    softmax_focal_loss,
)
from jaxce._statistics import SoftmaxStatistics, log_softmax, logsumexp, softmax_statistics

__version__ = "0.1.0"

__all__ = [
    "SoftmaxStatistics",
    "log_softmax",
    "logsumexp",
    "poly_loss_cross_entropy",
    "safe_softmax_cross_entropy",
    "smooth_labels",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
    "softmax_focal_loss",
    "softmax_statistics",
]
