"""Decoders of media, each from bytes and within bounds. No network, no files."""
