"""BigQuery destinations: rows in tables of the tenant's own dataset, each exactly once."""
