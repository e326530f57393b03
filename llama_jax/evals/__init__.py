"""Measures of a model: name -> function that yields (name, value)."""

from collections.abc import Callable

from llama_jax.evals import perplexity

EVALS: dict[str, Callable] = {"perplexity": perplexity.evaluate}
