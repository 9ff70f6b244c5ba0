"""Run a Llama on hardware you do not trust."""
