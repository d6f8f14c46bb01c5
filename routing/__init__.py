"""Pure decisions: which route wants an event, what is redacted, when to try again. No I/O, no clock, no dice."""
