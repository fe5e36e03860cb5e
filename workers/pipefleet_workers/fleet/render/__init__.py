"""Deploy files from the fleet file: what of Compose and Kubernetes differs from pool to pool is rendered, never written by hand."""
