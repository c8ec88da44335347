"""Qwen3's layers, which make FLUX.2 klein's prompt embeddings, with kernels of our own between the matmuls."""
