"""The trusted process: turns a request into tokens, lends only blinded products, checks every answer."""
