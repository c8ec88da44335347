"""From a plan to a diffusers pipeline, rebuilt from the same weights whenever an option falls back."""
