"""Multiplies matrices that it must not understand. Untrusted: nothing here can import a secret."""
