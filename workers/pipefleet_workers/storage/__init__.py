"""Object storage through obstore, and the gate that every URI of a message passes."""
