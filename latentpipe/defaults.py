"""How a picture is drawn unless told otherwise; measured in dev/LOG.md."""

STEPS = 20
GUIDANCE = 3.0
STRENGTH = 0.6
