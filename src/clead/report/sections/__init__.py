"""The sections of a report: each file makes what the template shows of one, or nothing where no run has it."""
