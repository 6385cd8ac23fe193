"""The Gradio front end: blocks and callbacks around the public functions of latentpipe; no tensor maths."""
