"""What producers and workers agree on, pure and without a network: messages, references, the layout and the files of a run."""
