"""How a picture is drawn unless told otherwise; measured in dev/LOG.md."""

STEPS = 20
GUIDANCE = 3.0
STRENGTH = 0.6
LORA_LIMIT = 10.0  # beyond this weight every adapter gives noise
MAX_SEED = 2**32 - 1
MAX_BATCH = 256  # pictures of one call
MAX_PROMPT = 20_000  # characters
