"""The embedded stack behind `pipefleet up`: real servers and workers as children of one process.

`command` reads the options, and `stack` starts, watches and stops every part: `servers`, `flower`, `workers`, `autoscale`.
`follow` and `edits` keep the workers as the fleet file describes them; `restarts` and `parked` deal with workers that die.
`part` and `children` run one process; `lock`, `ports`, `credentials` and `files` keep the data directory.
"""
