"""A plain, complete Llama in NumPy: the oracle for everything else, and the reader of model directories."""
