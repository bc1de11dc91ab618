"""From records to pictures: the JSON schema of a result, its plots and the self-contained HTML report."""
