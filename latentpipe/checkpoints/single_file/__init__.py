"""A whole model in one safetensors file: what it is by its header, and its parts as a diffusers pipeline."""
