"""The Gradio front end comes here; it will import latentpipe only."""
