"""Training of a LoRA adapter: data, loss, parameters, the file."""
