"""Measurements whose output names its set, its N and its interval."""
