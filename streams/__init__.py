"""The data plane: from a fetched record to its settling. Only this package knows Faust."""
