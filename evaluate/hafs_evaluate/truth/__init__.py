"""SAEs scored against a synthetic world's true features, and which of the other measures agree with the truth."""
