"""Files of other people's models."""
