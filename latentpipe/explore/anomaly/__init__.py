"""Pictures that a VAE does not know, and where in them."""
