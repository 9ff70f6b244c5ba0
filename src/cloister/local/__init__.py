"""Starts every role on this machine and wires them together: the enclave process, its workers, and the client."""
