"""Recordings: bytes become mono float32 samples at the model's rate."""
