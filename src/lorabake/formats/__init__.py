"""Weight files: safetensors read with suspicion and written to the same bytes every time, names, metadata, hashes."""
