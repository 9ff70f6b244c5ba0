"""Keeps private weights encrypted until an attested enclave asks: sealed packages, and the broker that holds their keys."""
