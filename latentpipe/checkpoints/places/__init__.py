"""Where checkpoints of other tools lie: the local hub cache, and the folders of ComfyUI, A1111 and InvokeAI. Imports no torch."""
