"""storage: objects through obstore, and the gate that every URI of a message must pass.

`store` is the object store of a worker, `uri_gate` decides which URIs its messages may name.
"""
