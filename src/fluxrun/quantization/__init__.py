"""Quantized weights: what a checkpoint declares of its own, how the libraries are imported, and what is counted."""
