"""Parity: what the engine returns equals what the transformers pipeline returns when it is called directly."""
