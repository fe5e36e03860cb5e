"""`pipefleet render`: deploy files from the fleet file. It renders the parts of Compose and Kubernetes that differ between pools.

`pools` reads the fleet file, `files` fills the templates in `templates/`, `command` writes or checks the results.
"""
