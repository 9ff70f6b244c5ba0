"""Obtains evidence of what runs in an enclave and decides whether a peer's evidence is good enough."""
