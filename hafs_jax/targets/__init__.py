"""What a compiled training step would cost on a named GPU, read from its schedule. Nothing here runs on a device."""
