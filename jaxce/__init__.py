"""Cross-entropy for JAX: exact, composable, and never larger than it has to be."""

from jaxce import _export as _export
from jaxce import metrics as metrics
from jaxce._information import (
    cross_entropy,
    cross_entropy_with_logits,
    differential_entropy,
    entropy,
    entropy_with_logits,
    jensen_shannon_divergence,
    jensen_shannon_divergence_with_logits,
    mutual_information,
    relative_entropy,
    relative_entropy_with_logits,
    surprisal,
)
from jaxce._likelihood import (
    bernoulli_nll,
    exponential_nll,
    gamma_nll,
    gaussian_nll,
    laplace_nll,
    mixture_nll,
    multivariate_normal_nll,
    negative_binomial_nll,
    poisson_nll,
    student_t_nll,
)
from jaxce._linear import linear_cross_entropy
from jaxce._logits import LinearLogits, ShardedLogits
from jaxce._probability import (
    binary_cross_entropy,
    categorical_cross_entropy,
    categorical_cross_entropy_with_integer_labels,
    generalized_kl_divergence,
    kl_divergence,
    kl_divergence_with_log_targets,
    nll,
)
from jaxce._reduction import bits_per, perplexity, weighted_mean
from jaxce._sigmoid import sigmoid_binary_cross_entropy, sigmoid_focal_loss
from jaxce._softmax import (
    poly_loss_cross_entropy,
    safe_softmax_cross_entropy,
    smooth_labels,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
    softmax_cross_entropy_with_sparse_labels,
    softmax_focal_loss,
)
from jaxce._statistics import SoftmaxStatistics, log_softmax, logsumexp, softmax_statistics

__version__ = "0.1.0"

__all__ = [
    # logits
    "LinearLogits",
    "ShardedLogits",
    "SoftmaxStatistics",
    "log_softmax",
    "logsumexp",
    "softmax_statistics",
    # losses on logits
    "linear_cross_entropy",
    "poly_loss_cross_entropy",
    "safe_softmax_cross_entropy",
    "sigmoid_binary_cross_entropy",
    "sigmoid_focal_loss",
    "smooth_labels",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
    "softmax_cross_entropy_with_sparse_labels",
    "softmax_focal_loss",
    # losses on probabilities
    "binary_cross_entropy",
    "categorical_cross_entropy",
    "categorical_cross_entropy_with_integer_labels",
    # losses on log-probabilities
    "generalized_kl_divergence",
    "kl_divergence",
    "kl_divergence_with_log_targets",
    "nll",
    # information
    "cross_entropy",
    "cross_entropy_with_logits",
    "differential_entropy",
    "entropy",
    "entropy_with_logits",
    "jensen_shannon_divergence",
    "jensen_shannon_divergence_with_logits",
    "mutual_information",
    "relative_entropy",
    "relative_entropy_with_logits",
    "surprisal",
    # likelihoods
    "bernoulli_nll",
    "exponential_nll",
    "gamma_nll",
    "gaussian_nll",
    "laplace_nll",
    "mixture_nll",
    "multivariate_normal_nll",
    "negative_binomial_nll",
    "poisson_nll",
    "student_t_nll",
    # reduction
    "bits_per",
    "perplexity",
    "weighted_mean",
]
