"""`pipefleet doctor`: checks everything that a fleet needs, and names the remedy for each fault.

`command` prints the report, `report` runs the checks, and each other module has the checks of one subject.
A check gets the settings. It returns a sentence if all is well, and raises an error with the remedy if not.
"""
