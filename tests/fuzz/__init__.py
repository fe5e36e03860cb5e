"""A fuzzer of messages: what anybody may push to a queue's lists, against one real worker process.

`python -m tests.fuzz --help` runs it for as long as one likes; tests/integration/test_fuzz.py is a short form with a fixed seed.
"""
