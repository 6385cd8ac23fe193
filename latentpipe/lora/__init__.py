"""LoRA on the UNet, the text encoders and the VAE: read, attach with a report, mix, fuse, take off without a trace."""
