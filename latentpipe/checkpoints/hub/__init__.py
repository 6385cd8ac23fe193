"""Fetching from the hub: what a repository holds, which of its files suffice, and their bytes, verified."""
