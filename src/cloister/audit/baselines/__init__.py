"""The partitions of the literature, runnable, so that the attacks of the audit can score them; and Slalom beside them."""
