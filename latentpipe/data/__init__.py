"""Folders of captioned pictures, the emoji set, the latent cache."""
