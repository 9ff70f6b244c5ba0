"""What may cross a boundary, as frozen types, and how it is encoded: bounded, versioned, never pickled."""
