"""Inputs: a user's values, files, manifests and buckets become JSON with references, and items of a run."""
