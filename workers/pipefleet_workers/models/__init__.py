"""models: from a name to a model that is proved: download, load, compile, warm up.

`build` calls `load`, `acceleration` and `warmup`, in this order. A model that cannot be served raises `cache.ModelError`.
"""
