"""The latent space, the stage around an autoencoder, and how it runs: precision, memory, tiles."""
