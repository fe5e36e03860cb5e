"""Deploy files from the fleet file: the parts of Compose and Kubernetes that differ between pools are rendered."""
