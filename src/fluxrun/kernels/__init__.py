"""Kernels of our own: for the transformer's blocks and for the VAE's decoder."""
