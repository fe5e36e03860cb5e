"""From references to values: fetched, looked at before they are decoded, decoded within bounds."""
