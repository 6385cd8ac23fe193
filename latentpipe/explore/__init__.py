"""What a smooth latent space is good for: sample, interpolate, traverse, edit, find anomalies, compress."""
