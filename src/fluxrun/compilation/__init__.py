"""torch.compile and CUDA graphs, with their own bookkeeping: what was compiled or recorded, and what ran."""
