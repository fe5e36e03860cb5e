"""Redis as a server: connections, retries, errors, the rights of a user, and the server's clock."""
