"""Code generated from proto/optimd/v1. Never edited: `make proto` rewrites it."""
