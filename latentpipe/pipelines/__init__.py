"""The families of diffusers pipelines, from a prompt to pictures and back from a picture's metadata."""
