"""From a name to a model that is proved: download, load, compile, warm up."""
