"""Plays the curious or cheating accelerator and scores what it learns."""
