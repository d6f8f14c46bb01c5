"""What is configured: settings, tenants, sealed secrets, topics, logs. Imports schemas only."""
