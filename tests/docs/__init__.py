"""Documentation that is generated from the code: `python -m tests.docs`, and `python -m tests.docs.autoscaling` (a minute)."""
