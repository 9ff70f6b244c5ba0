"""Decides what runs where and why it is safe: labels, the rule of soundness, policies, predicted cost."""
