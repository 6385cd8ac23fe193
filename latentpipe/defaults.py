"""How a picture is drawn unless told otherwise; chosen on training prompts of the embedded model (dev/LOG.md)."""

STEPS = 20
GUIDANCE = 3.0
STRENGTH = 0.6
