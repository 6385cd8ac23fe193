"""Metrics and the networks that they are measured on."""
