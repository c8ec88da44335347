"""Where weights are, how they are loaded, and the store that keeps them for the runs of one process."""
