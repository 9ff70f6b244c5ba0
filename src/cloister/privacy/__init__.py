"""Sanitises prompts under differential privacy: candidates, mechanisms, certificates, detection, ledger, restoration."""
