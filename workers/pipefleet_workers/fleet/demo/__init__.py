"""Real small models and sample media, without a network, for a first run and for the tests.

`weights` makes Hugging Face folders of the packages of the `demo` extra; `assets` has the paths of the project's own recordings,
pictures and texts. No other room of the worker imports this package.
"""
