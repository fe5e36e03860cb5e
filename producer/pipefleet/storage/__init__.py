"""Object storage through boto3: reads, writes, lists, and the errors of S3 in words of this package."""
