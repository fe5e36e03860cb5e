"""Adapters of text encoders: tokenised in bulk, padded to the longest of a batch, long texts cut."""
