"""Adapters of models that see: pictures, pages, films."""
