"""The user's side: detects, sanitises, sends, and restores the answer."""
