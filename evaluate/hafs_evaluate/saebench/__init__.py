"""SAE-Bench's sparse probing and first-letter absorption, run through its own code."""
