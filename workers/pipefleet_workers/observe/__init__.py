"""observe: the reports of a worker about itself: metrics, totals for the scaler, traces, logs.

`build` makes the observers; the engine and `consume` count with them. `pulse` and `totals` reach the fleet through `facts`.
"""
