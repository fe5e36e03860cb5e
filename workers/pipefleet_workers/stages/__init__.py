"""The stages of the engine, a module each, in the order in which work passes through them."""
