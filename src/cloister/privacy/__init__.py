"""Sanitises prompts under differential privacy and keeps the ledger: candidates, mechanisms, certificates, detection, restoration."""
