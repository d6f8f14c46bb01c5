"""The `headgate` command: one file a noun."""
