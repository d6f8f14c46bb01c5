"""The Kafka kind: a lane of one topic of a tenant's own cluster."""
