"""Pickles: read in a process of its own, weights alone, and written as safetensors. No other code reads one."""
