"""Downloads the objects of a bucket. Only this package uses boto3, botocore and awscrt."""
