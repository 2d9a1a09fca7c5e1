"""What flows: pictures with captions in a folder, read safely, placed in buckets and dealt into batches. Never imports
torch."""
