"""CMIF to the letter: the client holds the embedding layer, a server every other layer; each token crosses once."""
