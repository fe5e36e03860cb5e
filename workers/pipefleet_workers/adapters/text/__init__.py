"""Adapters of text encoders: they tokenise in bulk, pad to the longest text of a batch, and cut long texts."""
