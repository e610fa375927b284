"""Cross-entropy for JAX: losses, entropies, divergences and likelihoods, accurate and small in memory.

Which function? B stands for any batch axes, also none, and K for the classes, which ``axis`` names:

======================  =================================================================  =========================
task                    function                                                           shapes
======================  =================================================================  =========================
one label per example   softmax_cross_entropy_with_integer_labels(logits, labels)          [B, K], [B] -> [B]
soft, one-hot labels    softmax_cross_entropy(logits, labels)                              [B, K], [B, K] -> [B]
several, weighted       softmax_cross_entropy_with_sparse_labels(logits, labels, weights)  [B, K], 2 x [B, k] -> [B]
large vocabularies      linear_cross_entropy(LinearLogits(hidden, kernel), labels)         [B, D], [D, K], [B] -> []
classes over devices    ShardedLogits(logits, axis_name)                                   in jax.shard_map
pairs of two sides      softmax_cross_entropy_of_pairs(logits): CLIP, InfoNCE              [N, K] -> [N], [K]
hard or rare classes    softmax_focal_loss(logits, labels), poly_loss_cross_entropy        [B, K], [B] -> [B]
binary, multi-label     sigmoid_binary_cross_entropy(logits, labels), sigmoid_focal_loss   [B], [B] -> [B]
few labels of many      sigmoid_binary_cross_entropy_with_sparse_labels(logits, labels)    [B, K], [B, k] -> [B]
their mean, large       linear_sigmoid_binary_cross_entropy(LinearLogits(h, W), labels)    [B, D], [D, K], [B, k] -> []
label smoothing         label_smoothing= of these; smooth_labels(labels, alpha)            [B, K] -> [B, K]
Optax's name            safe_softmax_cross_entropy is softmax_cross_entropy                [B, K], [B, K] -> [B]
from probabilities      categorical_cross_entropy(probs, labels)                           [B, K], [B, K] -> [B]
..                      categorical_cross_entropy_with_integer_labels(probs, labels)       [B, K], [B] -> [B]
..                      binary_cross_entropy(probs, labels)                                [B], [B] -> [B]
from log-probabilities  nll(log_probs, labels)                                             [B, K], [B] -> [B]
..                      kl_divergence(log_predictions, targets)                            [B, K], [B, K] -> [B]
..                      generalized_kl_divergence(log_predictions, targets)                [B, K], [B, K] -> [B]
..                      kl_divergence_with_log_targets(log_predictions, log_targets)       [B, K], [B, K] -> [B]
all in one pass         softmax_statistics(logits, labels), gives SoftmaxStatistics        [B, K], [B] -> 4 x [B]
normalise logits        logsumexp(logits), log_softmax(logits)                             [B, K] -> [B]; [B, K]
KL divergence           relative_entropy(p, q), relative_entropy_with_logits               [B, K], [B, K] -> [B]
other divergences       jensen_shannon_divergence(p, q)                                    [B, K], [B, K] -> [B]
..                      jensen_shannon_divergence_with_logits(p_logits, q_logits)          [B, K], [B, K] -> [B]
cross-entropy           cross_entropy(p, q), cross_entropy_with_logits                     [B, K], [B, K] -> [B]
entropy                 entropy(p), entropy_with_logits(logits)                            [B, K] -> [B]
self-information        surprisal(p)                                                       [B] -> [B]
mutual information      mutual_information(joint)                                          [B, X, Y] -> [B]
KL of two normals       gaussian_relative_entropy(p_location, p_log_scale)                 broadcast
entropy of samples      differential_entropy(samples)                                      [B, N] -> [B]
regression              gaussian_nll(location, log_scale, x), laplace_nll                  broadcast
..                      student_t_nll(location, log_scale, log_df, x)                      broadcast
..                      exponential_nll(log_rate, x)                                       broadcast
..                      gamma_nll(log_concentration, log_rate, x)                          broadcast
..                      multivariate_normal_nll(location, scale_tril, x)                   vectors [B, D] -> [B]
mixtures                mixture_nll(log_weights, component_nll)                            [B, K], [B, K] -> [B]
counts                  poisson_nll(log_rate, counts)                                      broadcast
..                      negative_binomial_nll(log_mean, log_concentration, counts)         broadcast
binary outcomes         bernoulli_nll(logits, x)                                           broadcast
mean                    weighted_mean(losses, weights)                                     [B], [B] -> []
report                  perplexity(nll), bits_per(nll, count)                              [B] -> [B]
evaluate                metrics.Evaluation, metrics.BinaryEvaluation                       see jaxce.metrics
======================  =================================================================  =========================

Losses take predictions first and labels second, entropies and divergences of p and q the true distribution p first. Results
are in nats; with ``base=2`` information measures are in bits. ``where`` selects the valid examples or classes: for labels
padded with -100 it is ``where=labels != -100``, and their mean is ``weighted_mean(losses, labels != -100)``. Functions of
logits with classes take an array or `LinearLogits`, which are never stored.
"""

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
    gaussian_relative_entropy,
    laplace_nll,
    mixture_nll,
    multivariate_normal_nll,
    negative_binomial_nll,
    poisson_nll,
    student_t_nll,
)
from jaxce._linear import linear_cross_entropy
from jaxce._logits import LinearLogits, ShardedLogits
from jaxce._multilabel import linear_sigmoid_binary_cross_entropy, sigmoid_binary_cross_entropy_with_sparse_labels
from jaxce._pairs import softmax_cross_entropy_of_pairs
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
    "linear_sigmoid_binary_cross_entropy",
    "poly_loss_cross_entropy",
    "safe_softmax_cross_entropy",
    "sigmoid_binary_cross_entropy",
    "sigmoid_binary_cross_entropy_with_sparse_labels",
    "sigmoid_focal_loss",
    "smooth_labels",
    "softmax_cross_entropy",
    "softmax_cross_entropy_of_pairs",
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
    "gaussian_relative_entropy",
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
