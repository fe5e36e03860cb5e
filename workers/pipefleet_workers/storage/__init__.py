"""storage: objects through obstore, and the gate that every URI of a message must pass."""
