"""How many workers each pool should have: `messages` and `signal` measure, `decide` decides, `service` asks them and answers."""
