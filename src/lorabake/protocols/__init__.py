"""What a part must offer to be joined with the others. Nothing here knows any particular part, and nothing here loads torch."""
