"""Measures cost and fidelity: one JSON record per run."""
