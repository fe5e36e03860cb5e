"""Redis as a server: how it is reached and left, what its answers mean, what its user may do, and its clock."""
