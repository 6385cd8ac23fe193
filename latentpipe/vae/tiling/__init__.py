"""Encode and decode in tiles of rows with the result of the whole picture."""
