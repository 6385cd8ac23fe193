"""X/Y grids: axes, pictures, the sheet."""
