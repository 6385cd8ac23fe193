"""Pictures as small files: a VAE's rounded latents behind a range coder, with probabilities that are integers throughout."""
