"""inputs: from references to values: objects are fetched, checked before they are decoded, and decoded within bounds.

The engine calls `fetch.Fetcher`, then `decode.Decoder`. A bad input raises ItemError, and fails only its own item.
"""
