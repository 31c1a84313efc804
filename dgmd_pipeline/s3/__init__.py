"""Objects in a bucket -> files; the only users of boto3, botocore and awscrt."""
