"""LoRA files of every layout, in and out."""
