"""The contract between producers and workers: messages, references, records, the layout and the files of a run. No network."""
