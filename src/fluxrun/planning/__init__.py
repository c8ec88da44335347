"""Config + machine into what would run, what falls back and why. Pure: nothing here imports torch."""
