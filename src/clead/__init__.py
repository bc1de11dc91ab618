"""C-LEAD."""
