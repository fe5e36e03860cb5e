"""From what a user holds to what travels: values, files, manifests and buckets become JSON with references."""
