"""The model hub: whether it is there, a client that waits and retries within bounds, and files that are checked."""
