"""Fused Triton kernels for the memory-bound parts of FLUX.2's transformer blocks, and the blocks that call them."""
