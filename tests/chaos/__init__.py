"""The chaos suite: each delivery guarantee (docs/guarantees.md) proved with real processes that are killed, paused and cut off.

    python -m tests.chaos [--seed N] [--items 20000] [--faults 20] [--only NAME] [--transport lease|stock]

`world` has the servers and the workers, `nursery` starts workers quickly, `saboteur` is what makes one die at a point,
`proxy` stands before the object store, `checks` says what must hold after every scenario; the other modules are scenarios.
"""
