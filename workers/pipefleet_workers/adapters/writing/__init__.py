"""Adapters of models that write a text with generate()."""
