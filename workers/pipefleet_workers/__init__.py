"""Workers of pipefleet. Each line imports only from lines below it (`lint-imports` checks this).

cli                         the commands of the worker package
fleet/                      commands around workers: local stack, scaler, top, doctor, render, simulate, demo
worker, build, facts        the worker process, how its parts are put together, and what it announces
consume/                    a delivery becomes a job, and ends exactly once
engine/                     stages, queues, micro-batches, the lanes of the device
results/                    from outputs to stored results
models/                     from a name to a proved model
adapters/                   tasks: how inputs become batches and results
observe/                    metrics, totals, traces, logs
delivery/  inputs/          messages with leases; objects fetched and decoded within bounds
process/  storage/          the process and its watchdog; the object store and its gate
ending, items, settings     types that the rooms exchange, and the settings
"""
