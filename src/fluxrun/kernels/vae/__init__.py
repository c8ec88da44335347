"""The VAE's decoder with less arithmetic and fewer passes over the picture."""
