"""Real small models and sample media, for a first run and for the tests, without a network.

`weights` gives Hugging Face folders out of the packages of the `demo` extra, `assets` the paths of the
project's own recordings, pictures and texts. Nothing else in the worker imports this package.
"""
