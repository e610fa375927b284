"""Cross-entropy for JAX: exact, composable, and never larger than it has to be."""

__version__ = "0.1.0"
