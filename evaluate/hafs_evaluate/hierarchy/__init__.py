"""Label trees: probes of parents and children, absorption, and the worst-child hole (`absorption` defines both)."""
