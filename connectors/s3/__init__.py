"""The S3 kind: batches of the stage as objects of a tenant's own bucket."""
