"""Object storage through boto3: reads, writes, listings, and the errors of S3 as errors of this package."""
