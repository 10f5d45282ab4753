"""voidprune: smaller language models by leaving out decoder layers, one schedule for prefill and one for decode."""

__version__ = "0.1.0"
