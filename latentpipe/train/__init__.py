"""Training: the VAE, then the denoiser on its latents."""
