"""Adapters of models that hear or speak."""
