"""latentpipe: latent diffusion around a VAE stage."""
