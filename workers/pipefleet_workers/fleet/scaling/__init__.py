"""How many workers each pool should have: what is measured (`signal`), what follows from it (`decide`), who asks (`service`)."""
