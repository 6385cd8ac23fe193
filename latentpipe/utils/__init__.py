"""Files, pictures, threads, signals and errors; knows no model."""
