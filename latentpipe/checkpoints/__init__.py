"""Any model file in and out: layouts, names, hashes, checks."""
