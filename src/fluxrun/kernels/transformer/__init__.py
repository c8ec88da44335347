"""The transformer blocks' fused forward, its Triton kernels, and float8 attention."""
