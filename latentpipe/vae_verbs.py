"""The verbs for VAE files: each is one call into the public API, and what it prints."""

from __future__ import annotations
