"""What made a picture, in its file; what other programs wrote into theirs."""
