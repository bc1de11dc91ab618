"""What was found: the schema of records, statistics, and how numbers are written and drawn."""
