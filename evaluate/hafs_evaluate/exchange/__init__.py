"""Other libraries' formats and the model hub."""
