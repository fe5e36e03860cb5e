"""results: from outputs to stored results: artifacts, the lines of a part, records of single jobs, and progress.

`engine` calls `lines.ResultWriter`; `consume` calls `lines.PartWriter` and `reports.Reporter`.
"""
