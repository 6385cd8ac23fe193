"""Training of a VAE: the model, what trains, the terms of its loss, the export."""
