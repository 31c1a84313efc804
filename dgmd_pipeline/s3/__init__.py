"""The bucket; the only users of boto3, botocore and awscrt."""
