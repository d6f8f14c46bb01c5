"""The admin and tenant HTTP API. Nothing lives here yet: `headgate api` says so and exits 1."""
