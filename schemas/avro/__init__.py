"""Events in Avro: the schema that producers may take (`event.avsc`), and the reader that makes JSON of a record."""
