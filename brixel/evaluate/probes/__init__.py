"""Probes: small readouts trained on frozen features."""
