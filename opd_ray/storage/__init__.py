"""Files that survive a crash: committed folders and append-only JSON lines."""
