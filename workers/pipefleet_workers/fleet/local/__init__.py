"""The embedded stack behind `pipefleet up`: real servers and workers as children of one process.

`command` reads the options, and `stack` starts, watches and stops every part: `servers`, `flower`, `workers`, `autoscale`.
`supervise` runs the workers of one pool alone, without servers, for `pipefleet worker --devices`; `spread` says which device a
worker gets. `follow` and `edits` keep the workers as the fleet file describes them; `restarts` and `parked` deal with workers
that die. `part`, `children` and `relay` run one process; `lock`, `ports`, `credentials` and `files` keep the data directory.
"""
