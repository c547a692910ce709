"""Loading a language model whole or not at all: which files it is, what they hold, and what came of them."""
