"""Any VAE file as one thing: a diffusers config and diffusers-named tensors; and back into the files of other hosts."""
