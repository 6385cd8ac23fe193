"""One VAE against another: measurements, the verdict, adapters between their latents."""
