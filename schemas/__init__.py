"""What things are: ids, events, deliveries, outcomes, records, topic names and wire formats. Pure."""
