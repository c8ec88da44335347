"""Weights that lie in the CPU's memory and are moved to the GPU: whole components, groups of layers, blocks."""
